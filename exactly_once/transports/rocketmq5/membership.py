"""Keeps a consumer in its group over restarts of the proxy. Never raises: an unavailable broker is not an error.

Called by the consumer: `rejoin` by its receiving thread, `lose` by the thread whose call failed, `stop` and `close` by any.

When its proxy restarts, a SimpleConsumer never recovers: its telemetry stream, by which the proxy knows the group,
stays dead and every receive fails with 50001. So the first failure discards the session, and a new session is opened as
soon as a proxy accepts a new connection.
"""

from collections.abc import Sequence
from threading import Event, Lock
from time import monotonic
from typing import Final

from exactly_once import fork
from exactly_once.transports.contract import Subscription
from exactly_once.transports.rocketmq5.endpoints import Endpoints, reachable
from exactly_once.transports.rocketmq5.group_client import GroupClient, describe
from exactly_once.wording.steady_log import steady

__all__ = ["Membership"]

log = steady("exactly_once.transports.rocketmq5")

FIRST_PAUSE_S: Final = 0.25
LONGEST_PAUSE_S: Final = 1.0  # between two tries to reach an unavailable proxy


class Membership:
    """The present session, if there is one, and the tries to open another.

    Args:
        proxies: The addresses of the proxies.
        group: The consumer group.
        subscriptions: All subscriptions of the group.
        topic: The topic that must have a route.
    """

    def __init__(self, proxies: Endpoints, group: str, subscriptions: Sequence[Subscription], topic: str) -> None:
        self._proxies, self._group, self._subscriptions, self._topic = proxies, group, subscriptions, topic
        self._lock = Lock()
        self._session: GroupClient | None = None
        self._stopping = Event()
        self._closed = False
        self._pause_s, self._not_before, self._complained = 0.0, 0.0, ""
        fork.tell(self)
        self._try()  # join now if the proxy is available; if not, `rejoin` goes on trying

    def forked(self) -> None:
        """Runs in a forked child: the member is the parent, and only the parent leaves the group."""
        fork.pin(self._session)
        self._lock, self._session, self._stopping, self._closed = Lock(), None, Event(), True
        self._stopping.set()

    @property
    def session(self) -> GroupClient | None:
        """The session; None while the proxy is away."""
        return self._session

    @property
    def resting(self) -> bool:
        """The proxy has just failed or refused: ask nothing for a moment."""
        return monotonic() < self._not_before

    def rejoin(self, deadline: float) -> GroupClient | None:
        """Try to join until it works, the deadline passes or we are stopped."""
        while not self._stopping.is_set():
            now = monotonic()
            # The pause is kept over calls: a caller with short waits must not flood a starting proxy.
            if now < self._not_before:
                self._stopping.wait(max(0.0, min(self._not_before, deadline) - now))
                if self.resting:
                    return None
            session = self._try()
            if session is not None or monotonic() >= deadline:
                return session
        return None

    def lose(self, session: GroupClient, reason: str) -> bool:
        """Discard this session. False: it was already discarded, because another call failed at the same time."""
        with self._lock:
            if self._session is not session:
                return False
            self._session = None
        self.rest(reason)
        session.close(farewell=False)
        return True

    def rest(self, reason: str) -> None:
        """Ask nothing for a moment, a longer moment each time, and log the reason once."""
        self._pause_s = min(LONGEST_PAUSE_S, max(FIRST_PAUSE_S, self._pause_s * 2))
        self._not_before = monotonic() + self._pause_s
        if reason != self._complained:  # a proxy may be away for hours
            self._complained = reason
            log.warning(
                "RocketMQ at %s gives nothing of %s to group %s: %s. Trying on.",
                *(self._proxies, self._topic, self._group, reason),
            )

    def well(self) -> None:
        """The broker has answered: the next failure is a new one."""
        if self._complained:
            log.info("RocketMQ at %s gives %s to group %s again.", self._proxies, self._topic, self._group)
        self._pause_s, self._not_before, self._complained = 0.0, 0.0, ""

    def stop(self) -> None:
        """Try no more. The session stays, for messages that are still to be settled."""
        self._stopping.set()

    def close(self) -> None:
        """Leave the group. Idempotent."""
        self.stop()
        with self._lock:
            self._closed = True
            session, self._session = self._session, None
        if session is not None:
            session.close()

    def _try(self) -> GroupClient | None:
        reason = reachable(self._proxies)
        if reason is not None:
            self.rest(reason)
            return None
        session = GroupClient(self._proxies, self._group, self._subscriptions)  # raises in a child that cannot have one
        try:
            session.open()
            session.queues(self._topic)
        except Exception as error:  # after any error we have not joined; the next try will see
            session.close(farewell=False)
            self.rest(str(error) or describe(error))
            return None
        with self._lock:
            if not self._closed:
                self._session = session
                return session
        session.close()
        return None
