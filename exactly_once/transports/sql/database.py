"""The application's database as the broker in a table uses it: short transactions, joins and sends, and wake-ups.

READ COMMITTED on servers, one writer from the start on SQLite; never part of a handler's transaction. All of it passes by
`Database.seen` and `Database.done`, which do not believe a connection that others had.

A send and a join are put in order by the topic's *gate row*, shared by sends and locked alone by a join: either the send
commits before the join and its message is found by it, or it sees the new group. Without that a send that saw no group
could commit after the join, and its message would lie there for nobody.

Called by `exactly_once.transports.sql` alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from datetime import timedelta
from functools import cached_property
from threading import Condition
from typing import Any, TypeVar

from sqlalchemy import Connection, Engine, inspect
from sqlalchemy.exc import DBAPIError, OperationalError

from exactly_once import fork
from exactly_once.database.characters import characters_of
from exactly_once.database.connections.had_before import is_firsthand, kept_firsthand, moment
from exactly_once.database.connections.pooler import begin_bounded, is_pooled
from exactly_once.database.errors.contended import is_contended
from exactly_once.database.errors.drivers_own import is_taken
from exactly_once.database.errors.interrupted import interrupted
from exactly_once.database.mysql_committed import COMMITTED_ALONE, see_committed
from exactly_once.transports.sql.statements import NO_GROUP, Statements, statements
from exactly_once.wording.redaction import redacted
from exactly_once.wording.text import storable

__all__ = ["Bell", "Database", "missing_tables"]

T = TypeVar("T")


class Bell:
    """Wakes the waiting consumers of one topic in this process; `count` shows whether it rang since one looked."""

    def __init__(self) -> None:
        self._changed = Condition()
        self.count = 0
        fork.tell(self)

    def forked(self) -> None:
        """In a process just forked: a thread of the parent's may have held the lock."""
        self._changed = Condition()

    def ring(self) -> None:
        """Wake all who wait."""
        with self._changed:
            self.count += 1
            self._changed.notify_all()

    def wait(self, since: int, seconds: float) -> bool:
        """Wait until it rings, unless it rang after `since` was read; False when the time was up first."""
        with self._changed:
            return self._changed.wait_for(lambda: self.count != since, seconds)


_bells: dict[tuple[str, str | None, str], Bell] = {}


class Database:
    """The application's database, for one transport.

    Args:
        engine: Gives the engine; asked on first use.
        schema: Names the database schema of our tables; asked on first use. None: where the connection looks first.
    """

    def __init__(self, engine: Callable[[], Engine], schema: Callable[[], str | None] | None) -> None:
        self._engine_of, self._schema_of = engine, schema
        self._engine: Engine | None = None
        self._characters: str | None = None

    @property
    def engine(self) -> Engine:
        """The application's."""
        if self._engine is None:
            self._engine = self._engine_of()
        return self._engine

    @cached_property
    def schema(self) -> str | None:
        return self._schema_of() if self._schema_of is not None else None

    @property
    def dialect(self) -> str:
        """Such as `postgresql`."""
        return self.engine.dialect.name

    @property
    def sql(self) -> Statements:
        """The statements for this kind of server."""
        return statements(self.schema, self.dialect)

    def seen(self, do: Callable[[Connection], T]) -> T:
        """Look at something; see `done`."""
        return self._asked(do, writes=False)

    def done(self, do: Callable[[Connection], T]) -> T:
        """Do something in a transaction of its own, which is committed then.

        Whoever had the connection before may have left a role, a time limit, READ ONLY or locked tables in it. So what fails
        there is done again on another connection, until one that nobody had refuses it, too. One that refused is closed.

        Args:
            do: Given the connection; done again from the start.

        Raises:
            Exception: What `do` raised on a connection that is believed. At once: that a row is there, that another
                transaction was in the way, that the connection was lost, what a signal's handler raised, and any error of
                the COMMIT, behind which the work may be done already.
        """
        return self._asked(do, writes=True)

    def _asked(self, do: Callable[[Connection], T], *, writes: bool) -> T:
        since = moment()
        while True:
            with self.engine.connect() as connection:
                believed = is_firsthand(connection, since)
                kept_firsthand(connection)
                committing, lost = False, None
                try:
                    with self.begun(connection) if writes else nullcontext():
                        try:
                            found = do(connection)
                        except Exception:
                            lost = connection.invalidated  # behind a pooler it is closed next in any case
                            raise
                        committing = writes
                except Exception as error:
                    if is_taken(error):
                        raise
                    contended = is_contended(error)
                    lost = connection.invalidated if lost is None else lost
                    if not lost and not (believed and contended):
                        connection.invalidate(error)
                    if believed or lost or contended or committing or interrupted(error):
                        raise
                else:
                    return found

    def lacks(self, text: str) -> bool:
        """Say whether the database's character set lacks a character of this text; asked once, of texts not in ASCII."""
        if text.isascii():
            return False
        if self._characters is None:
            self._characters = self.seen(characters_of)
        return storable(text, characters=self._characters) != text

    def bell(self, topic: str) -> Bell:
        """Return the bell of a topic in this database, the same for all of this process."""
        where = (redacted(self.engine.url), self.schema, topic)
        return _bells.get(where) or _bells.setdefault(where, Bell())  # one step for all threads, without a lock

    @contextmanager
    def begun(self, connection: Connection) -> Iterator[None]:
        """A transaction on a connection that has sent nothing yet, committed in the end."""
        if self.dialect == "postgresql":
            _read_committed(connection)
        elif self.dialect in ("mysql", "mariadb"):
            _next_read_committed(connection)
        with _one_transaction(connection), connection.begin():
            if self.dialect == "sqlite" and not _in_transaction(connection):
                # as a writer from the start: a reader that becomes one fails where it should wait
                connection.exec_driver_sql("BEGIN IMMEDIATE")
            elif self.dialect == "postgresql":
                begin_bounded(connection)
            try:
                yield
            except DBAPIError:
                if not connection.invalidated and is_pooled(connection):
                    # before it is rolled back: else the pooler keeps the server's as a stranger has left it
                    connection.invalidate()
                raise

    def join(self, topic: str, group: str) -> None:
        """Write that the group wants the topic from now on; the first also gets what was sent before."""

        def joined(connection: Connection) -> None:
            groups = self._groups(connection, [topic])[topic]
            if group in groups:
                return
            connection.execute(self.sql.add_group(topic, group))
            if not groups:
                connection.execute(self.sql.adopt(topic, group))

        self._behind_gates([topic], joined, alone=True)

    def put(self, rows: Sequence[Mapping[str, Any]], delay: timedelta) -> None:
        """Store each row once for each group of its topic, in one transaction."""
        topics = sorted({row["topic"] for row in rows})

        def stored(connection: Connection) -> None:
            groups = self._groups(connection, topics)
            copies = [{**row, "consumer_group": group} for row in rows for group in groups[row["topic"]] or [NO_GROUP]]
            connection.execute(self.sql.put(delay), copies)

        self._behind_gates(topics, stored, alone=False)

    def _behind_gates(self, topics: Sequence[str], do: Callable[[Connection], None], *, alone: bool) -> None:
        """Do it in a transaction that holds the topics' gate rows; they are made first where they are missing."""

        def held(connection: Connection) -> set[str]:
            missing = set(topics) - set(connection.execute(self.sql.gate(topics, alone=alone)).scalars())
            if not missing:
                do(connection)
            return missing

        while missing := self.done(held):
            # in transactions of their own: on MySQL two who insert the same row inside theirs end in a deadlock
            for topic in sorted(missing):
                made = self.sql.add_group(topic, NO_GROUP)
                try:
                    self.done(lambda connection, made=made: connection.execute(made))  # type: ignore[misc]
                except Exception as error:
                    if not is_taken(error):  # another may have made it meanwhile
                        raise

    def _groups(self, connection: Connection, topics: Sequence[str]) -> dict[str, list[str]]:
        groups: dict[str, list[str]] = {topic: [] for topic in topics}
        for topic, group in connection.execute(self.sql.groups(topics)):
            groups[topic].append(group)
        return groups


def missing_tables(sql: Statements, connection: Connection) -> Sequence[str]:
    """Return the names of our tables that are not there."""
    look = inspect(connection)
    return [table.fullname for table in (sql.queue, sql.group) if not look.has_table(table.name, schema=table.schema)]


def _read_committed(connection: Connection) -> None:
    """Set the level in the driver, without a round trip; a connection found dead by this is thrown away."""
    driver = connection.dialect.loaded_dbapi
    try:
        try:
            connection.execution_options(isolation_level="READ COMMITTED")
        except driver.ProgrammingError:
            # a listener of the application's has asked the server as the connection was taken, and so begun a transaction
            connection.connection.commit()
            connection.execution_options(isolation_level="READ COMMITTED")
    except driver.Error as error:
        connection.invalidate(error)
        raise OperationalError(COMMITTED_ALONE, None, error) from error


@contextmanager
def _one_transaction(connection: Connection) -> Iterator[None]:
    """Let no statement commit by itself, whoever left the session so: the locks of a receiver and a sender would hold nothing."""
    dbapi: Any = connection.connection.dbapi_connection
    # as MySQL's server has told the driver, at no round trip; elsewhere it is the level, or BEGIN is sent
    if connection.dialect.name not in ("mysql", "mariadb") or not dbapi.get_autocommit():
        yield
        return
    dbapi.autocommit(False)
    try:
        yield
    finally:
        with suppress(Exception):  # the connection is lost, or closed
            dbapi.autocommit(True)


def _next_read_committed(connection: Connection) -> None:
    """Of the next transaction only; the engine's own option would cost two statements more.

    Sent before SQLAlchemy begins that one, for a listener of the application's may send statements then.
    """
    dbapi: Any = connection.connection.dbapi_connection
    try:
        see_committed(dbapi)
    except connection.dialect.loaded_dbapi.Error as error:
        connection.invalidate(error)
        raise OperationalError(COMMITTED_ALONE, None, error) from error


def _in_transaction(connection: Connection) -> bool:
    return bool(getattr(connection.connection.dbapi_connection, "in_transaction", False))
