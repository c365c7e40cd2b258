"""Sends a statement of the lease store alone, as a transaction of its own, on a connection of its own.

On PostgreSQL in autocommit, which the driver sets without a round trip. Repeats what was the victim of a deadlock, or of what an
earlier user left in the connection. Called by `guards.lease.sql`.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final, TypeVar

from sqlalchemy import Connection, Engine

from exactly_once.database.connections.beginning import begin_ours
from exactly_once.database.connections.had_before import is_firsthand, kept_firsthand, moment
from exactly_once.database.connections.pooler import is_pooled
from exactly_once.database.dialects.claim_refusal import raise_for_the_store
from exactly_once.database.dialects.contract import Dialect, ErrorKind, State
from exactly_once.database.errors.drivers_own import is_taken
from exactly_once.database.errors.interrupted import interrupted
from exactly_once.database.mysql_committed import see_committed
from exactly_once.errors import StoreUnavailable

__all__ = ["OwnConnection"]

T = TypeVar("T")

_TRIES: Final = 3  # more tries for a statement that was the victim of a deadlock
_LEFT: Final = 5  # more tries behind a pooler for a refused statement: others may have changed the server's connections


class OwnConnection:
    """Connections of the lease store's own, each for one transaction.

    Args:
        name: The database's name.
        engine: Its engine.
        dialect: Its dialect.
    """

    def __init__(self, name: str, engine: Engine, dialect: Dialect) -> None:
        self._name, self._engine, self._dialect = name, engine, dialect
        # other drivers send a statement for it, also when the connection returns to the pool: a cancellation there would lose
        # the connection's place in the pool
        self._autocommit = dialect.name == "postgresql"

    def change(self, do: Callable[[Connection], T]) -> T:
        """Call `do` in a transaction of its own, and return its result. A crash before the end leaves nothing of it."""

        def changing(connection: Connection) -> T:
            done = do(connection)
            if not self._autocommit:
                connection.commit()
            return done

        return self.run(changing)

    def read(self, do: Callable[[Connection], T]) -> T:
        """Call `do` to read what is committed. Writes nothing."""

        def reading(connection: Connection) -> T:
            if self._dialect.asks_around_calls:
                # before SQLAlchemy begins: a listener of the user's may then send statements, after which this is refused
                see_committed(connection.connection.dbapi_connection)
            return do(connection)

        return self.run(reading)

    def run(self, do: Callable[[Connection], T]) -> T:
        """Call `do` with a connection; again on another one if an earlier user of that one is to blame for the error."""
        tries = left = 0
        since = moment()
        while True:
            believed, pooled = True, False
            try:
                with self.connected() as connection:
                    believed, pooled = is_firsthand(connection, since), is_pooled(connection)
                    kept_firsthand(connection)
                    if not self._autocommit:
                        return do(connection)
                    if left:
                        with self.transaction(connection):
                            return do(connection)
                    if not self._was_begun(connection):
                        connection.execution_options(isolation_level="AUTOCOMMIT")
                        return do(connection)
                    # the driver refuses autocommit inside a transaction, and we need what the listener set in this one
                    done = do(connection)
                    # the driver's commit, because SQLAlchemy does not know of a transaction begun on the driver alone
                    connection.connection.commit()
                    return done
            except Exception as error:
                if pooled and left < _LEFT and _may_be_left(error):
                    # a statement alone left the server's connection as it was; after an error in a transaction the pooler
                    # closes that connection
                    left += 1
                    continue
                if is_taken(error) or isinstance(error, StoreUnavailable):
                    raise
                trouble = self._dialect.error_kind(error)
                if trouble is ErrorKind.TRANSIENT and tries < _TRIES:
                    # the whole transaction was rolled back, so the victim of a deadlock can simply try again
                    tries += 1
                elif believed or trouble in (ErrorKind.TRANSIENT, ErrorKind.UNAVAILABLE) or interrupted(error):
                    raise
                # else an earlier user may have left a role or a time limit in the connection, which is closed now: try again

    def _was_begun(self, connection: Connection) -> bool:
        """Whether a transaction is open already: a listener of the user's may send a statement, even a ping, at a checkout."""
        if connection.in_transaction():
            return True
        return self._dialect.state(connection.connection.dbapi_connection) is not State.IDLE

    @contextmanager
    def transaction(self, connection: Connection) -> Iterator[None]:
        """A transaction of our own. After an error in it the connection is closed before anything is rolled back."""
        with connection.begin():
            kept_firsthand(connection)
            begin_ours(connection)
            try:
                yield
            except BaseException as error:
                self._throw_away(connection, error)
                raise

    def _throw_away(self, connection: Connection, error: BaseException) -> None:
        if not is_taken(error) and self._dialect.error_kind(error) is not ErrorKind.TRANSIENT:
            # SQLAlchemy does not see a driver's own error, and would reuse the connection. An earlier user may have left it
            # changed, and after a cancellation it is in the middle of a statement
            connection.invalidate(error)

    @contextmanager
    def connected(self) -> Iterator[Connection]:
        """Give a connection. What failed on it says whether the store is away."""
        try:
            with self._engine.connect() as connection:
                try:
                    yield connection
                except BaseException as error:
                    self._throw_away(connection, error)
                    raise
        except Exception as error:
            raise_for_the_store(self._dialect, error, self._engine, self._name)
            raise


def _may_be_left(error: BaseException) -> bool:
    from exactly_once.database.dialects.postgresql_pooler import may_be_left

    return may_be_left(error.__cause__ or error if isinstance(error, StoreUnavailable) else error)
