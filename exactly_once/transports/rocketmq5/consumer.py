"""Receives one topic for one group over RocketMQ 5's pop protocol, settles, and survives a restart of its proxy.

It knows no handler and decides nothing. The worker calls it: `receive` from one thread, the other methods from others.

A poll lasts longer than the `receive` that began it. Proxies with default settings keep a poll for at least 5 s, and a worker
needs control sooner. So a `receive` without messages returns, and the next one waits for the same poll. What a poll brings while
nobody receives waits here and is kept invisible. If that fails, it is dropped: the broker brings it again.

Order. In a FIFO group the broker gives no more messages of a *queue* until all that it gave are settled. After a failure it
starts again at the first unsettled message, with all later ones, also the acknowledged ones. So for an ordered topic
each poll asks for one message, and several polls run at a time, which the broker serves from different queues. Thus a
message cannot be here while its predecessor is unsettled or due later, and is not counted as delivered when
its predecessor failed. The price: a failed message holds back its queue, not only its own key.
"""

from collections import deque
from collections.abc import Sequence
from concurrent.futures import CancelledError
from contextlib import suppress
from datetime import timedelta
from functools import partial
from math import ceil
from queue import Empty, SimpleQueue
from threading import Lock
from time import monotonic
from typing import Any, Final

from rocketmq.grpc_protocol import Code

from exactly_once.outcome import Ack, Settlement
from exactly_once.transports.contract import Delivery, Features, Subscription
from exactly_once.transports.rocketmq5 import reading
from exactly_once.transports.rocketmq5.answers import (
    FINE,
    begun,
    refused_acknowledgements,
    refused_renewals,
    tell,
)
from exactly_once.transports.rocketmq5.endpoints import Endpoints
from exactly_once.transports.rocketmq5.group_client import MOST_PER_POLL, Grip, GroupClient, Poll, describe
from exactly_once.transports.rocketmq5.membership import Membership
from exactly_once.wording.steady_log import steady

__all__ = ["RocketMQ5Consumer"]

log = steady("exactly_once.transports.rocketmq5")

MOST_POLLS: Final = 4  # for each broker, without order: as many as the client's one event loop can decode
MOST_ORDERED_POLLS: Final = 16
MOST_ENTRIES: Final = 128  # acknowledgements in one request
LONGEST_HIDING_S: Final = 12 * 3600  # the proxy refuses more
_WAKE: Final = Poll(0, None, None)

Fetched = tuple[Any, Grip]
"""A received message in the protocol's form, and its grip."""


class RocketMQ5Consumer:
    """The consumer of one topic.

    Args:
        proxies: The addresses of the proxies.
        group: The consumer group.
        subscriptions: All subscriptions of the group.
        mine: The one received here.
        features: What the transport can do.
        invisible: How long a delivery stays invisible unless extended; whole seconds.
    """

    def __init__(
        self,
        proxies: Endpoints,
        group: str,
        subscriptions: Sequence[Subscription],
        mine: Subscription,
        *,
        features: Features,
        invisible: timedelta,
    ) -> None:
        self._proxies, self._group, self._mine = proxies, group, mine
        self._features, self._invisible = features, invisible
        self._member = Membership(proxies, group, tuple(subscriptions), mine.topic)
        self._lock = Lock()  # guards the next three, and is never held during a call
        self._polls: set[Poll] = set()
        self._ready: deque[Fetched] = deque()  # received, not handed out
        self._stopped = False
        self._ended: SimpleQueue[Poll] = SimpleQueue()  # polls that have ended

    @property
    def features(self) -> Features:
        """What the transport can do."""
        return self._features

    @property
    def invisible(self) -> timedelta | None:
        """How long a delivery stays invisible unless extended."""
        return self._invisible

    def receive(self, limit: int, wait: timedelta) -> Sequence[Delivery]:
        """Hand out up to `limit` deliveries, waiting at most `wait` for the first; see `contract.Consumer`."""
        deadline = monotonic() + wait.total_seconds()
        if limit < 1:
            self._keep()
            return ()
        while not self._stopped:
            session = self._member.session or self._member.rejoin(deadline)
            if session is None:
                return ()
            self._begin(session, limit)
            self._gather(deadline)
            found = self._take(limit)
            if found or monotonic() >= deadline:
                return found
        return ()

    def settle(self, settlements: Sequence[tuple[Delivery, Settlement]]) -> None:
        """Carry out each settlement; acknowledgements share requests. See `contract.Consumer`."""
        session, topic = self._member.session, self._mine.topic
        if session is None:
            if settlements:
                away = {"RocketMQ is away": [delivery.receipt_handle.message_id for delivery, _ in settlements]}
                tell(topic, away, "settled")
            return
        acks: dict[Any, list[Grip]] = {}
        later: list[tuple[Grip, int]] = []
        for delivery, settlement in settlements:
            grip: Grip = delivery.receipt_handle
            if isinstance(settlement, Ack):
                acks.setdefault(grip.endpoints, []).append(grip)
            else:
                later.append((grip, _whole_seconds(settlement.delay)))
        parts = [all_[i : i + MOST_ENTRIES] for all_ in acks.values() for i in range(0, len(all_), MOST_ENTRIES)]
        # All are begun before any is awaited: one round trip to the broker, not one for each.
        acknowledged = [(part, begun(session.acknowledge, topic, part)) for part in parts]
        given_back = [(grip, begun(session.hide, topic, grip, seconds)) for grip, seconds in later]
        tell(topic, refused_acknowledgements(acknowledged), "acknowledged")
        tell(topic, refused_renewals(given_back), "given back")

    def extend(self, deliveries: Sequence[Delivery]) -> None:
        """Keep these invisible for another `invisible`; see `contract.Consumer`."""
        self._hide(
            [delivery.receipt_handle for delivery in deliveries], _whole_seconds(self._invisible), "kept invisible"
        )

    def stop(self) -> None:
        """Hand out nothing more, and give back what was fetched; see `contract.Consumer`."""
        with self._lock:
            if self._stopped:
                return
            self._stopped = True
            polls = list(self._polls)
        self._member.stop()
        self._ended.put(_WAKE)
        for poll in polls:
            poll.owner.abandon(poll)
        for poll in polls:
            with suppress(Exception):  # failed or late; what came is in its list
                poll.future.result(1)
            self._keep_from(poll)
        self._give_back()

    def close(self) -> None:
        """Leave the group; see `contract.Consumer`."""
        self.stop()
        self._member.close()

    def _begin(self, session: GroupClient, limit: int) -> None:
        """Keep enough polls running for `limit` messages, and never more than that."""
        if self._member.resting:
            return
        try:
            queues = session.queues(self._mine.topic)
        except Exception as error:
            self._lose(session, str(error) or describe(error))
            return
        ordered = self._mine.ordered or session.fifo
        if ordered:
            targets, most = queues[:MOST_ORDERED_POLLS], 1
        else:
            # A broker answers from all of its queues. One poll for each broker: else an idle broker would keep
            # a busy one waiting.
            targets = [*{queue.message_queue0().broker.name: queue for queue in queues}.values()] * MOST_POLLS
            most = MOST_PER_POLL
        with self._lock:
            if self._stopped or self._member.session is not session:
                return
            room = limit - len(self._ready) - sum(poll.asked for poll in self._polls)
            for queue in targets[len(self._polls) :]:
                if room < 1:
                    return
                poll = session.poll(self._mine.topic, queue, min(room, most), self._invisible)
                room -= poll.asked
                self._polls.add(poll)
                poll.future.add_done_callback(partial(self._tell_ended, poll))

    def _tell_ended(self, poll: Poll, _: object) -> None:
        self._ended.put(poll)  # called in the client's loop thread

    def _gather(self, deadline: float) -> None:
        """Wait for a first poll to end, unless a message is already here; then process all polls that have ended."""
        while not self._stopped:
            left = 0.0 if self._ready else deadline - monotonic()
            try:
                poll = self._ended.get(timeout=left) if left > 0 else self._ended.get_nowait()
            except Empty:
                return
            if poll is not _WAKE:
                self._take_in(poll)
                if self._member.session is None or not self._polls:
                    return

    def _take_in(self, poll: Poll) -> None:
        self._keep_from(poll)
        if self._stopped:
            self._give_back()
            return
        error = CancelledError() if poll.future.cancelled() else poll.future.exception()
        if error is not None or poll.status is None:
            if not poll.abandoned:
                self._lose(poll.owner, "the answer had no status" if error is None else describe(error))
        elif poll.status.code in FINE:
            self._member.well()
        elif poll.status.code == Code.TOO_MANY_REQUESTS:
            self._member.rest(describe(poll.status))  # the session itself is fine
        else:
            self._lose(poll.owner, describe(poll.status))

    def _lose(self, session: GroupClient, reason: str) -> None:
        if self._member.lose(session, reason):
            with self._lock:
                polls, self._polls = self._polls, set()
            for poll in polls:
                session.abandon(poll)  # ends it; what it has already received can still be handed out

    def _keep_from(self, poll: Poll) -> None:
        """Move the poll's messages to those that wait to be handed out."""
        now = monotonic()
        with self._lock:
            raws, poll.messages = poll.messages, []
            self._polls.discard(poll)
            for raw in raws:
                place = raw.system_properties
                self._ready.append((raw, Grip(place.message_id, place.receipt_handle, poll.endpoints, now)))

    def _take(self, limit: int) -> list[Delivery]:
        """Make deliveries of the messages here."""
        with self._lock:
            if self._stopped:
                return []
            found = [self._ready.popleft() for _ in range(min(limit, len(self._ready)))]
        if any(self._aged(one) for one in found):
            found = self._still_ours(found)
        return [reading.delivery(raw, self._mine.topic, grip) for raw, grip in found]

    def _keep(self) -> None:
        """Process polls that ended, and keep their messages invisible, because the worker is full."""
        with suppress(Empty):
            while not self._stopped:
                poll = self._ended.get_nowait()
                if poll is not _WAKE:
                    self._take_in(poll)
        with self._lock:
            aged = [one for one in self._ready if self._aged(one)]
        if aged:
            lost = {id(one) for one in aged} - {id(one) for one in self._still_ours(aged)}
            with self._lock:
                self._ready = deque(one for one in self._ready if id(one) not in lost)

    def _aged(self, one: Fetched) -> bool:
        return one[1].received_at + self._invisible.total_seconds() / 3 < monotonic()

    def _still_ours(self, held: Sequence[Fetched]) -> list[Fetched]:
        """Extend these. Drop those that cannot be extended: another consumer may already have them, or will get them."""
        self._hide([grip for _, grip in held], _whole_seconds(self._invisible), "kept invisible")
        return [one for one in held if not self._aged(one)]

    def _give_back(self) -> None:
        """Make visible again, in a second, what was received and not handed out."""
        with self._lock:
            grips = [grip for _, grip in self._ready]
            self._ready.clear()
        self._hide(grips, 1, "given back")

    def _hide(self, grips: Sequence[Grip], seconds: int, what: str) -> None:
        session, topic = self._member.session, self._mine.topic
        if session is not None:
            asked = [(grip, begun(session.hide, topic, grip, seconds)) for grip in grips]
            tell(topic, refused_renewals(asked), what)


def _whole_seconds(delay: timedelta) -> int:
    # The proxy takes whole seconds; never less than asked.
    return min(max(1, ceil(delay.total_seconds())), LONGEST_HIDING_S)
