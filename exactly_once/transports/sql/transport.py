"""A broker in a table of the application's database, `sql://`: for applications without a broker.

For development, tests and small shops. It keeps the whole contract: several groups each get every message, a delivery
comes back unless settled in time, attempts are counted, an ordering key's messages come one at a time across all
processes. The clock is the server's. A group's rows stay until a member of the group acknowledges them, also while none runs.

What is sent before any group has joined a topic is kept for the first group that joins. A lock puts a send and a join at the
same moment in order, so that no message is kept for nobody. Idle consumers poll, at most five times a second,
and are woken at once by sends of their own process. It never uses NOTIFY, which would serialise commits.

Called by the registry; the statements and their locking are in `statements`. Its transactions are short and its own: it
never joins a handler's.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import timedelta
from functools import partial
from time import monotonic
from typing import Any, Final
from uuid import uuid4

from sqlalchemy import Connection, Engine
from sqlalchemy.exc import ArgumentError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.pool import SingletonThreadPool, StaticPool

from exactly_once.database.connections.replaced_file import replaced
from exactly_once.database.errors.drivers_own import is_of_a_database
from exactly_once.database.errors.not_made import upgrade_command
from exactly_once.database.errors.unreached import unreached
from exactly_once.database.errors.unusable import denied, is_denied, is_read_only, read_only
from exactly_once.errors import ConfigurationError
from exactly_once.message import Message
from exactly_once.outcome import Ack, Settlement
from exactly_once.transports.contract import (
    Away,
    BrokerProducer,
    Consumer,
    Delivery,
    Features,
    Subscription,
    Surroundings,
)
from exactly_once.transports.sql.database import Database, missing_tables
from exactly_once.transports.sql.producer import SqlProducer, gone, reason, refused, refused_group
from exactly_once.transports.sql.statements import WINDOW, Look
from exactly_once.transports.urls import parse
from exactly_once.wording.redaction import redacted
from exactly_once.wording.steady_log import steady
from exactly_once.wording.text import escaped, probably, stopped, taken

__all__ = ["SqlTransport"]

_log = steady("exactly_once.transports.sql")

_FEATURES: Final = Features(
    redelivers=True,
    counts_attempts=True,
    ordered=True,
    tags=True,
    properties=True,
    delayed=True,
    empty_body=True,
)
# The table would redeliver a message for ever. With this limit a message that kills its process each time is parked.
_MAX_ATTEMPTS: Final = 16
_INVISIBLE: Final = timedelta(seconds=60)
# An idle consumer looks again after the first pause, which doubles up to the last one: five looks a second cost next to
# nothing, and a message of another process waits at most a fifth of a second.
_FIRST_PAUSE_S: Final = 0.01
_LAST_PAUSE_S: Final = 0.2
_SETTLE_TRIES: Final = 3  # a deadlock with another receiver is over at once
_SPARE: Final = 64  # how many rows other receivers may take between finding and taking
_UNWANTED_AGE: Final = timedelta(days=1)  # longer than a rolling deployment in which two versions want different tags
_TIDY_EVERY: Final = timedelta(seconds=600.0)
_TIDY_ROWS: Final = 1000
_LOOKED_AT: Final = 1000
"""How many of the oldest rows are examined for messages that nobody takes."""


class SqlTransport:
    """The broker in `message_queue`.

    Args:
        engine: Returns the engine of the application's database; asked on first use.
        schema: Returns the database schema of our tables; asked on first use.
        invisible: A delivery that is neither settled nor extended comes back after this time.
        max_attempts: After so many deliveries without an end a message is parked, not run.

    Example:
        >>> from sqlalchemy import create_engine
        >>> SqlTransport(lambda: create_engine("postgresql+psycopg://localhost/shop")).features.ordered
        True
    """

    def __init__(
        self,
        engine: Callable[[], Engine],
        *,
        schema: Callable[[], str | None] | None = None,
        invisible: timedelta = _INVISIBLE,
        max_attempts: int = _MAX_ATTEMPTS,
    ) -> None:
        self._database = Database(engine, schema)
        self._invisible = invisible
        self._features = replace(_FEATURES, max_attempts=max_attempts)

    @classmethod
    def from_url(cls, url: str, surroundings: Surroundings) -> SqlTransport:
        """Make a transport from `sql://?invisible_s=60`, in the application's first database."""
        parsed = parse(url, options=["invisible_s", "max_attempts"])
        if parsed.hosts:
            raise ConfigurationError(
                "sql:// names no database of its own: it uses the application's. Write sql:// and set the database as"
                " ExactlyOnce(database=...) or EXACTLY_ONCE_DATABASE."
            )
        invisible = parsed.seconds("invisible_s", _INVISIBLE)
        return cls(
            surroundings.engine,
            schema=surroundings.schema,
            invisible=invisible,
            max_attempts=parsed.whole("max_attempts", _MAX_ATTEMPTS),
        )

    @property
    def features(self) -> Features:
        return self._features

    def check(self, group: str, subscriptions: Sequence[Subscription]) -> Sequence[str]:
        """Ask the server for the tables. Topics and groups are created when they are named."""
        problems = [str(error) for s in subscriptions if (error := refused(topic=s.topic))]
        if error := refused_group(group):
            problems.append(str(error))
        try:
            engine = self._database.engine
            url = redacted(engine.url)
            if isinstance(engine.pool, (StaticPool, SingletonThreadPool)):
                problems.append(f"The database {url} lives in memory, where threads cannot share it. Give it a file.")
            missing = self._database.read(partial(missing_tables, self._database.sql))
            problems += [
                f"The table {name} is missing in {url}. Type: {upgrade_command(engine, self._database.schema)}"
                for name in missing
            ]
            # SQLite has no roles, and a writer there waits for other writers.
            if not missing and engine.dialect.name != "sqlite":
                self._database.read(partial(_tried, self._database.sql.needed()))
        except ConfigurationError as error:
            problems.append(str(error))
        except (LookupError, ArgumentError) as error:
            problems.append(
                f"sql:// needs the application's database: {stopped(str(error))} Set EXACTLY_ONCE_DATABASE."
            )
        except Exception as error:
            if not _is_away(error):
                raise
            if is_denied(error):
                schema = None
                with suppress(Exception):  # MySQL, which refuses the connection
                    schema = self._database.schema
                problem = denied(error, engine.url, schema=schema)
            elif is_read_only(error):
                problem = read_only(engine.url)
            elif unreached(error, (engine,)) or getattr(error, "connection_invalidated", False):
                problem = (
                    f"The database {url} of sql:// does not answer ({reason(error)})."
                    " Start it, or correct EXACTLY_ONCE_DATABASE."
                )
            else:
                problem = (
                    f"The database {url} answers, and refuses a statement that sql:// needs ({reason(error)}). Mend that,"
                    " or correct EXACTLY_ONCE_DATABASE."
                )
            problems.append(Away(problem))
        return problems

    def concerns(self, group: str, subscriptions: Sequence[Subscription]) -> Sequence[str]:
        """Count waiting messages that look like a sender's mistake: without a tag, or with a tag or topic that
        resembles one of ours.

        Only the oldest rows are examined, so that a long backlog costs nothing.
        """
        try:
            return [*self._not_taken(group, subscriptions), *self._misspelled(subscriptions)]
        except Exception as error:
            if isinstance(error, ConfigurationError) or _is_away(error):
                return ()  # `check` reports it
            raise

    def _not_taken(self, group: str, subscriptions: Sequence[Subscription]) -> Iterator[str]:
        for each in subscriptions:
            if not each.tags:
                continue
            of = f"message(s) of topic {escaped(each.topic)}"
            take = escaped(taken(each.topic, each.tags), 200)
            found = dict(self._database.read(partial(_counted, self._database.sql.tags(group, each.topic, _LOOKED_AT))))
            if number := found.pop(None, 0):
                yield (
                    f"sql://: {number} {of} have no tag, and handlers of group {escaped(group)} take {take}. Nobody runs them,"
                    f" and they are deleted after a day. Send them with --tag {escaped(each.tags[0])}"
                )
            for tag in sorted(tag for tag in found if tag and tag not in each.tags):
                if meant := probably(tag, each.tags):  # any other tag is another program's
                    yield (
                        f"sql://: {found[tag]} {of} have the tag {escaped(tag)!r}, which no handler of group {escaped(group)}"
                        f" takes (they take {take}); deleted after a day.{meant}"
                    )

    def _misspelled(self, subscriptions: Sequence[Subscription]) -> Iterator[str]:
        ours = [each.topic for each in subscriptions]
        for topic, number in self._database.read(partial(_counted, self._database.sql.groupless(_LOOKED_AT))):
            if topic not in ours and (meant := probably(topic, ours)):
                yield (
                    f"sql://: {number} message(s) of topic {escaped(topic)!r} wait for a group, and none has joined it.{meant}"
                )

    def subscribe(self, group: str, subscriptions: Sequence[Subscription]) -> Sequence[Consumer]:
        """Join the group; one consumer for each topic. If the database is away, the first `receive` that reaches it joins."""
        for error in (refused_group(group), *(refused(topic=s.topic) for s in subscriptions)):
            if error:
                raise ConfigurationError(str(error)) from error
        consumers = [_SqlConsumer(self._database, group, s, self._invisible, self._features) for s in subscriptions]
        for consumer in consumers:
            consumer.join()
        return consumers

    def producer(self) -> BrokerProducer:
        return SqlProducer(self._database)


class _SqlConsumer:
    """The consumer of one group for one topic."""

    def __init__(
        self, database: Database, group: str, wanted: Subscription, invisible: timedelta, features: Features
    ) -> None:
        self._features = features
        self._database, self._group, self._wanted, self._invisible = database, group, wanted, invisible
        self._bell = database.bell(wanted.topic)
        self._joined = self._stopped = self._away = False
        self._pause_s = _FIRST_PAUSE_S
        self._file = 0
        self._far: str | None = None  # the ordering key at which the last look beyond the window ended

    @property
    def features(self) -> Features:
        return self._features

    @property
    def invisible(self) -> timedelta | None:
        return self._invisible

    def join(self) -> None:
        with self._survive("join its group"):
            self._database.join(self._wanted.topic, self._group)
            self._joined = True

    def receive(self, limit: int, wait: timedelta) -> Sequence[Delivery]:
        deadline = monotonic() + wait.total_seconds()
        while limit > 0 and not self._stopped:
            since = self._bell.count  # read before looking: a ring in between is not missed
            found = self._take(limit)
            if found:
                self._pause_s = _FIRST_PAUSE_S
                return found
            left = deadline - monotonic()
            if left <= 0:
                break
            rang = self._bell.wait(since, min(left, self._pause_s))
            self._pause_s = _FIRST_PAUSE_S if rang else min(2 * self._pause_s, _LAST_PAUSE_S)
        return []

    def _take(self, limit: int) -> Sequence[Delivery]:
        if (file := replaced(self._database.engine)) != self._file:
            self._joined, self._file = False, file
        if not self._joined:
            self.join()
        if not self._joined:
            return []
        # One token for each taking: a delivery whose time was over must not settle the next delivery of the same row, even
        # if both are ours.
        token = uuid4().hex
        rows: Sequence[Any] = ()
        with self._survive("receive"):
            # a crash after this transaction: the rows are free again when their invisible time is over
            rows = sorted(self._taken(limit, token), key=lambda row: int(row.id))
        if self._stopped and rows:
            self._give_back([(row.id, token) for row in rows])
            return []
        return [Delivery(_message(row), (row.id, token)) for row in rows]

    def _taken(self, limit: int, token: str) -> Sequence[Any]:
        database, sql, group, wanted = self._database, self._database.sql, self._group, self._wanted
        if database.dialect == "sqlite":
            due = sql.any_due(group, wanted)
            if database.read(lambda connection: connection.execute(due).first()) is None:
                return ()

        def taken(connection: Connection) -> Sequence[Any]:
            if not wanted.ordered:
                return self._looked(connection, Look(group, wanted, limit), token)
            edge = connection.execute(sql.edge(group, wanted)).first()
            until = None if edge is None else (edge.deliver_at, edge.id)
            rows = self._looked(connection, Look(group, wanted, limit, until=until), token)
            if rows or edge is None:
                return rows
            # All rows in the window are held back by their keys: look farther on, each time from where the last look ended.
            heads = connection.execute(sql.heads(group, wanted, self._far)).all()
            self._far = heads[-1].ordering_key if len(heads) == WINDOW else None
            found = [row.id for row in heads if row.id is not None][: limit + _SPARE]
            found += connection.execute(sql.keyless(group, wanted, limit + _SPARE)).scalars()
            return self._looked(connection, Look(group, wanted, limit, among=tuple(found)), token) if found else ()

        return database.write(taken)

    def _looked(self, connection: Connection, look: Look, token: str) -> Sequence[Any]:
        sql = self._database.sql
        if self._database.dialect == "postgresql":
            return connection.execute(sql.take(look, token, self._invisible)).all()
        rows = connection.execute(sql.due(look)).all()
        if rows:
            connection.execute(sql.hold([row.id for row in rows], token, self._invisible))
        return rows

    def settle(self, settlements: Sequence[tuple[Delivery, Settlement]]) -> None:
        sql = self._database.sql
        finished = [delivery.receipt_handle for delivery, settlement in settlements if isinstance(settlement, Ack)]
        again: dict[timedelta, list[tuple[int, str]]] = {}
        for delivery, settlement in settlements:
            if not isinstance(settlement, Ack):
                again.setdefault(settlement.delay, []).append(delivery.receipt_handle)
        changes: list[Any] = [sql.finish(finished)] if finished else []
        changes += [sql.bring_again(held, delay) for delay, held in again.items()]
        # A crash before this transaction commits: all these messages come again when their invisible time is over.
        self._change(changes, f"settle {len(settlements)} messages; they come again by themselves")
        if self._wanted.ordered or any(not delay for delay in again):
            self._bell.ring()  # the next message of the key is free now, or the same message

    def extend(self, deliveries: Sequence[Delivery]) -> None:
        if deliveries:
            held = [delivery.receipt_handle for delivery in deliveries]
            self._change([self._database.sql.extend(held, self._invisible)], f"extend {len(held)} messages")

    def stop(self) -> None:
        self._stopped = True
        self._bell.ring()

    def close(self) -> None:
        self.stop()

    def _give_back(self, held: Sequence[tuple[int, str]]) -> None:
        self._change(
            [self._database.sql.untake(held)], f"give back {len(held)} messages; they come again by themselves"
        )
        self._bell.ring()

    def _change(self, changes: Sequence[Any], what: str) -> None:
        def change(connection: Connection) -> None:
            for each in changes:
                connection.execute(each)

        for left in reversed(range(_SETTLE_TRIES)):
            try:
                self._database.write(change)
            except Exception as error:
                if not _is_away(error):
                    raise
                if left and not getattr(error, "connection_invalidated", False):
                    continue
                _log.warning("topic %s: could not %s (%s)", self._wanted.topic, what, reason(error))
            return

    @property
    def topic(self) -> str:
        return self._wanted.topic

    @property
    def tidy_every(self) -> timedelta | None:
        return _TIDY_EVERY if self._wanted.tags else None

    def tidy(self) -> None:
        """Delete what the group's tags have left lying for a day; else the table would grow for ever."""
        try:
            self._deleted()
        except Exception as error:
            if not unreached(error, (self._database.engine,)):
                raise  # an outage is told where messages are received

    def _deleted(self) -> None:
        sql = self._database.sql
        old = sql.unwanted(self._group, self._wanted, _UNWANTED_AGE, _TIDY_ROWS)

        def tidied(connection: Connection) -> int:
            if ids := connection.execute(old).scalars().all():
                connection.execute(sql.drop(), {"ids": ids})
            return len(ids)

        if number := self._database.write(tidied):
            _log.info(
                "topic %s: deleted %d message(s) that waited for a day with a tag, or without one, that no handler of group %s"
                " takes (they take %s)",
                escaped(self._wanted.topic),
                number,
                escaped(self._group),
                escaped(taken(self._wanted.topic, self._wanted.tags), 200),
            )

    @contextmanager
    def _survive(self, what: str) -> Iterator[None]:
        """Log an unavailable database, or another passing error, once. A later look finds the database again."""
        try:
            yield
        except Exception as error:
            if not _is_away(error):
                raise
            if not self._away:
                if lacking := gone(self._database):
                    self._joined = False  # the table of group members was lost, too
                why = lacking or f"({reason(error)})"
                _log.warning("topic %s: cannot %s; trying until it can. %s", self._wanted.topic, what, why)
            self._away = True
        else:
            if self._away:
                _log.warning("topic %s: the database answers again", self._wanted.topic)
            self._away = False


def _tried(statements: Sequence[Any], connection: Connection) -> None:
    for each in statements:
        connection.execute(each)


def _counted(statement: Any, connection: Connection) -> Sequence[tuple[Any, int]]:
    return [(row[0], row[1]) for row in connection.execute(statement)]


def _is_away(error: Exception) -> bool:
    return isinstance(error, PoolTimeout) or is_of_a_database(error)


def _message(row: Any) -> Message:
    return Message(
        row.topic,
        row.body,
        tag=row.tag,
        key=row.message_key,
        ordering_key=row.ordering_key,
        properties=json.loads(row.properties),
        message_id=row.message_id,
        born_at=row.born_at,
        attempt=row.attempts,
    )
