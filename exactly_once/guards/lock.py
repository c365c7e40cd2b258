"""The lock guard: a plain lock in Redis around each run. Remembers nothing and does not fence; see `redis.lock`.

For handlers that are idempotent by themselves, and only must not overlap. A redelivered message runs again. Called by `attempt`.
"""

from sqlalchemy.orm import Session

from exactly_once import errors
from exactly_once.claim import ClaimRow
from exactly_once.database.dialects.contract import Dialect
from exactly_once.database.watched.deferred_watch import DeferredWatch
from exactly_once.guards.contract import Busy, Claim, OpenOurs, Won
from exactly_once.handlers.plan import Lock
from exactly_once.redis.connection import RedisConnection
from exactly_once.redis.lock import RedisLock

__all__ = ["LockGuard"]


class LockGuard:
    """Locks of one handler.

    Args:
        connection: The Redis.
        dialect: The dialect of the handler's database.
        option: The handler's guard option.
        awaiting: Called in a greenlet, which must not block the event loop.
    """

    def __init__(self, connection: RedisConnection, dialect: Dialect, option: Lock, *, awaiting: bool) -> None:
        self._connection, self._dialect, self._option, self._awaiting = connection, dialect, option, awaiting

    def claim(self, session: Session, row: ClaimRow) -> Claim:
        """See `Guard.claim`."""
        lock = RedisLock(
            self._connection,
            f"{row.group} {row.handler}",
            row.key,
            expires=self._option.expires,
            wait=self._option.wait,
        )
        try:
            lock.acquire(awaiting=self._awaiting)
        except errors.InProgress:
            return Busy(remaining=self._option.expires)
        return Won(deferred_watch=DeferredWatch(session, self._dialect, None), lock=lock)

    def complete(self, session: Session, won: Won) -> None:
        """Nothing to write."""

    def consume(self, won: Won) -> None:
        """See `Guard.consume`. Only releases the lock."""
        self.release(won)

    def end(self, won: Won) -> None:
        """Nothing to do: a lock is not renewed."""

    def release(self, won: Won, *, broken: bool = False) -> bool:
        """See `Guard.release`. If Redis does not answer, the lock expires."""
        assert won.lock is not None
        won.lock.leave()
        return True

    def look(self, open_ours: OpenOurs, row: ClaimRow) -> None:
        """Returns None: a lock remembers nothing."""
