"""The application's database as the `sql://` broker uses it: short transactions, joins and sends, and wake-ups.

READ COMMITTED on servers; one writer from the start on SQLite; never part of a handler's transaction. Everything goes through
`Database.seen` and `Database.done`, which do not trust a connection that others used.

The topic's *gate row* puts a send and a join in order: sends share its lock, and a join locks it alone. So either the send
commits before the join, which finds its message, or the send sees the new group. Without that, a send that saw no group
could commit after the join, and nobody would get its message.

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
from exactly_once.database.connections.beginning import begin_ours
from exactly_once.database.connections.had_before import is_firsthand, kept_firsthand, moment
from exactly_once.database.connections.pooler import is_pooled
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
    """Wakes the waiting consumers of one topic in this process. `count` shows whether it rang since it was last read."""

    def __init__(self) -> None:
        self._changed = Condition()
        self.count = 0
        fork.tell(self)

    def forked(self) -> None:
        """Runs in a forked child: a thread of the parent may have held the lock."""
        self._changed = Condition()

    def ring(self) -> None:
        """Wake all waiters."""
        with self._changed:
            self.count += 1
            self._changed.notify_all()

    def wait(self, since: int, seconds: float) -> bool:
        """Wait until it rings, unless it rang after `since` was read. False: the time was up first."""
        with self._changed:
            return self._changed.wait_for(lambda: self.count != since, seconds)


_bells: dict[tuple[str, str | None, str], Bell] = {}


class Database:
    """The application's database, for one transport.

    Args:
        engine: Returns the engine; asked on first use.
        schema: Returns the database schema of our tables; asked on first use. None: the connection's default.
    """

    def __init__(self, engine: Callable[[], Engine], schema: Callable[[], str | None] | None) -> None:
        self._engine_of, self._schema_of = engine, schema
        self._engine: Engine | None = None
        self._characters: str | None = None

    @property
    def engine(self) -> Engine:
        """The application's engine."""
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

    def read(self, do: Callable[[Connection], T]) -> T:
        """Read something; see `write`."""
        return self._asked(do, writes=False)

    def write(self, do: Callable[[Connection], T]) -> T:
        """Do something in a transaction of its own, and commit it.

        An earlier user of the connection may have left a role, a time limit, READ ONLY or locked tables in it. So work that fails
        there is repeated on another connection, until it fails on one that nobody else used. A connection on which
        it failed is closed.

        Args:
            do: Called with the connection; repeated from the start.

        Raises:
            Exception: What `do` raised on a trusted connection. At once: that a row exists, that another
                transaction was in the way, that the connection was lost, what a signal handler raised, and any error of
                the COMMIT, after which the work may be done already.
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
        """Say whether the database's character set lacks a character of this text. Asked once, for texts that are not ASCII."""
        if text.isascii():
            return False
        if self._characters is None:
            self._characters = self.read(characters_of)
        return storable(text, characters=self._characters) != text

    def bell(self, topic: str) -> Bell:
        """Return the bell of a topic in this database, the same for the whole process."""
        where = (redacted(self.engine.url), self.schema, topic)
        return _bells.get(where) or _bells.setdefault(where, Bell())  # atomic for all threads, without a lock

    @contextmanager
    def begun(self, connection: Connection) -> Iterator[None]:
        """Begin a transaction on a connection that has sent nothing yet, and commit it at the end."""
        if self.dialect == "postgresql":
            _read_committed(connection)
        elif self.dialect in ("mysql", "mariadb"):
            _next_read_committed(connection)
        with _one_transaction(connection), connection.begin():
            if self.dialect == "sqlite" and not _in_transaction(connection):
                # As a writer from the start: a reader that becomes a writer fails where it should wait.
                connection.exec_driver_sql("BEGIN IMMEDIATE")
            elif self.dialect == "postgresql":
                begin_ours(connection)
            try:
                yield
            except DBAPIError:
                if not connection.invalidated and is_pooled(connection):
                    # Before the rollback: else the pooler keeps the server connection as a stranger left it.
                    connection.invalidate()
                raise

    def join(self, topic: str, group: str) -> None:
        """Record that the group wants the topic from now on. The first group also gets what was sent before."""

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
        """Do it in a transaction that holds the topics' gate rows. Missing gate rows are made first."""

        def held(connection: Connection) -> set[str]:
            missing = set(topics) - set(connection.execute(self.sql.gate(topics, alone=alone)).scalars())
            if not missing:
                do(connection)
            return missing

        while missing := self.write(held):
            # Each in its own transaction: on MySQL two transactions that insert the same row deadlock.
            for topic in sorted(missing):
                made = self.sql.add_group(topic, NO_GROUP)
                try:
                    self.write(lambda connection, made=made: connection.execute(made))  # type: ignore[misc]
                except Exception as error:
                    if not is_taken(error):  # another process may have made it meanwhile
                        raise

    def _groups(self, connection: Connection, topics: Sequence[str]) -> dict[str, list[str]]:
        groups: dict[str, list[str]] = {topic: [] for topic in topics}
        for topic, group in connection.execute(self.sql.groups(topics)):
            groups[topic].append(group)
        return groups


def missing_tables(sql: Statements, connection: Connection) -> Sequence[str]:
    """Return the names of our tables that do not exist."""
    look = inspect(connection)
    return [table.fullname for table in (sql.queue, sql.group) if not look.has_table(table.name, schema=table.schema)]


def _read_committed(connection: Connection) -> None:
    """Set the isolation level in the driver, without a round trip. A connection that turns out dead is thrown away."""
    driver = connection.dialect.loaded_dbapi
    try:
        try:
            connection.execution_options(isolation_level="READ COMMITTED")
        except driver.ProgrammingError:
            # A listener of the application has sent a query at checkout, and so begun a transaction.
            connection.connection.commit()
            connection.execution_options(isolation_level="READ COMMITTED")
    except driver.Error as error:
        connection.invalidate(error)
        raise OperationalError(COMMITTED_ALONE, None, error) from error


@contextmanager
def _one_transaction(connection: Connection) -> Iterator[None]:
    """Switch autocommit off if an earlier user left it on: with it, the locks of a receiver and a sender would hold nothing."""
    dbapi: Any = connection.connection.dbapi_connection
    # As MySQL's server reported to the driver: no round trip. On other servers it is the isolation level, or BEGIN is sent.
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
    """Set READ COMMITTED for the next transaction only; the engine's own option would cost two more statements.

    Sent before SQLAlchemy begins that transaction, because a listener of the application may send statements then.
    """
    dbapi: Any = connection.connection.dbapi_connection
    try:
        see_committed(dbapi)
    except connection.dialect.loaded_dbapi.Error as error:
        connection.invalidate(error)
        raise OperationalError(COMMITTED_ALONE, None, error) from error


def _in_transaction(connection: Connection) -> bool:
    return bool(getattr(connection.connection.dbapi_connection, "in_transaction", False))
