"""The pump: redelivers failed messages when they are due. One more consumer of the worker, with the database as its broker.

It takes rows of the failure store whose `next_attempt_at` has come, postpones that time for a while (a lease on the row), and
hands them out for the one handler that failed. The run itself writes the result to the row, so `settle` acts only if nothing was
decided. After a crash anywhere here the lease runs out, and the claim decides between two runs. Called by the worker alone.
"""

from collections.abc import Callable, Sequence
from datetime import timedelta
from threading import Condition
from time import monotonic
from typing import Final

from sqlalchemy import Connection, Engine

from exactly_once.database.connections.own_transaction import own_transaction
from exactly_once.exceptions.words import words_of
from exactly_once.failures.due import DueFailures, Taken, message_of
from exactly_once.outcome import Redeliver, Settlement
from exactly_once.transports.contract import Delivery, Features
from exactly_once.transports.packed_messages import unpack
from exactly_once.wording.steady_log import steady
from exactly_once.wording.text import escaped

__all__ = ["Pump"]

_LEASE: Final = timedelta(seconds=60)
_POLL_S: Final = 0.5  # how long a due row may wait unseen; each poll is one indexed query
_FEATURES: Final = Features(redelivers=False, counts_attempts=False, ordered=True, tags=False, properties=True)


_log = steady("exactly_once.pump")


class _NotRead(Exception):
    """A row that was taken cannot be read as a message."""


class Pump:
    """The due failures of one consumer group in one database, as a `Consumer`.

    Args:
        engine: The engine of the database.
        failures: Its failure rows.
        group: The consumer group.
        handlers: The names of the handlers that this process can run.
        ordered: Those of them that keep order behind a failed message.
        waits: Those of `ordered` that also wait behind a dead message.
        name: The database's name, so that the delivery runs on this database again.
    """

    def __init__(
        self,
        engine: Engine,
        failures: DueFailures,
        group: str,
        *,
        handlers: Sequence[str],
        ordered: Sequence[str],
        waits: Sequence[str],
        name: str,
        away: Callable[[BaseException], bool],
        gone: Callable[[BaseException], Exception | None],
    ) -> None:
        self._engine, self._failures, self._group, self._name = engine, failures, group, name
        self._away, self._gone = away, gone
        self._handlers, self._ordered, self._waits = tuple(handlers), tuple(ordered), tuple(waits)
        self._changed = Condition()
        self._stopped = False

    @property
    def features(self) -> Features:
        """The features of the pump: what fails again is stored for the pump again."""
        return _FEATURES

    @property
    def invisible(self) -> timedelta | None:
        """How long other pumps leave a taken row alone."""
        return _LEASE

    def receive(self, limit: int, wait: timedelta) -> Sequence[Delivery]:
        """See `Consumer.receive`."""
        until = monotonic() + wait.total_seconds()
        while not self._stopped:
            if limit:
                try:
                    got = self._take(limit)
                except Exception as error:
                    if not self._away(error):
                        if (told := self._gone(error)) is not None:
                            raise told from error
                        raise
                    got = []  # the worker learns of the outage from its messages; here nothing is due
                if got:
                    return got
            left = until - monotonic()
            if left <= 0:
                break
            with self._changed:
                self._changed.wait_for(lambda: self._stopped, min(left, _POLL_S))
        return []

    def _take(self, limit: int) -> list[Delivery]:
        try:
            return self._taken(limit, every=True)
        except _NotRead:  # the connection is closed: an earlier user may have set it so that texts come as bytes
            return self._taken(limit, every=False)

    def _taken(self, limit: int, *, every: bool) -> list[Delivery]:
        """Take rows and read them, in one transaction. A row that cannot be read does not stop the others.

        Args:
            limit: The most rows to take.
            every: Raise if a row cannot be read; then nothing is taken.
        """
        got: list[Delivery] = []
        with own_transaction(self._engine) as connection:
            for row in self._failures.take(
                connection, self._group, self._handlers, self._ordered, self._waits, limit=limit, lease=_LEASE
            ):
                try:
                    message, unread = unpack(message_of(row))
                except Exception as error:
                    if every:
                        raise _NotRead from error
                    _log.error(
                        "failure_not_read id=%s handler=%s error=%s; it stays as it is, and is tried again in %d s. What it"
                        " holds was changed by hand, or is damaged. Look at it, or type: exactly-once failures discard %s",
                        row.id,
                        escaped(str(row.handler)),
                        escaped(words_of(error), 200),
                        _LEASE.total_seconds(),
                        row.id,
                    )
                    continue
                got.append(Delivery(message, (row.id, Taken.of(row)), row.handler, unread, self._name))
        return got

    def settle(self, verdicts: Sequence[tuple[Delivery, Settlement]]) -> None:
        """Postpone rows that were not decided. A decided row has its due time already.

        If a message is finished and its row is unchanged since it was taken, the row is closed. The message was processed or kept
        under another identity (its handler's key= or fingerprint= was changed meanwhile), or in the database that route= names
        now. Otherwise this row would bring the message again for ever.
        """
        back: dict[timedelta, list[int]] = {}
        done: list[Taken] = []
        for delivery, verdict in verdicts:
            if isinstance(verdict, Redeliver):
                back.setdefault(verdict.delay, []).append(delivery.receipt_handle[0])
            else:
                done.append(delivery.receipt_handle[1])
        if done:
            # after a crash before this the lease runs out, and the next run is a duplicate that ends here again
            self._change(len(done), lambda connection: self._failures.close(connection, done))
        for delay, ids in back.items():
            self._postpone(ids, delay)

    def extend(self, deliveries: Sequence[Delivery]) -> None:
        """Keep the rows of running messages away from other pumps."""
        self._postpone([delivery.receipt_handle[0] for delivery in deliveries], _LEASE)

    def _postpone(self, ids: Sequence[int], delay: timedelta) -> None:
        self._change(len(ids), lambda connection: self._failures.postpone(connection, ids, delay))

    def _change(self, rows: int, change: Callable[[Connection], None]) -> None:
        try:
            with own_transaction(self._engine) as connection:
                change(connection)
        except Exception as error:  # harmless: the lease runs out, and the row is due again
            _log.warning("pump_settle_failed rows=%d error=%s", rows, type(error).__name__)

    def stop(self) -> None:
        """Hand out nothing more."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    def close(self) -> None:
        """Nothing to do: nothing is held open between calls."""
