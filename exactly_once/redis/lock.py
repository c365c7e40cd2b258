"""The plain distributed lock: one holder of a name in Redis at a time, for a limited time. One key, two scripts.

It records nothing of what was done (no consumed marker: the next holder runs the work again), and it does not fence: a
process that stands still for longer than the lock's time overlaps with the next holder, and neither notices before its end.
It is for work that is idempotent by itself and only must not overlap. For work that must happen once, use a claim. Called
by the facade, for `eo.lock`.
"""

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta
from functools import partial
from json import dumps
from random import uniform
from time import monotonic, sleep
from types import TracebackType
from typing import Final, Self
from uuid import uuid4

from sqlalchemy.util import await_only, greenlet_spawn
from sqlalchemy.util.concurrency import in_greenlet

from exactly_once import fork
from exactly_once.errors import ConfigurationError, ExactlyOnceError, InProgress, StoreUnavailable
from exactly_once.exceptions.finishing import finished
from exactly_once.keys import canonical
from exactly_once.redis.connection import RedisConnection
from exactly_once.wording.steady_log import steady
from exactly_once.wording.text import escaped

__all__ = ["RedisLock"]

PREFIX: Final = "exactly_once:lock:"
POLL_S: Final = (0.005, 0.1)
"""Seconds between two tries: the first pause, and then twice as long each time, up to the second. Each is multiplied by a random
factor of 0.5 to 1.5, so that many waiters do not ask at the same moment."""

# If it is sent twice because an answer was lost, it finds its own token and holds the lock.
_ACQUIRE: Final = """
if redis.call('SET', KEYS[1], ARGV[1], 'NX', 'PX', ARGV[2]) then return {1, 0} end
if redis.call('GET', KEYS[1]) == ARGV[1] then redis.call('PEXPIRE', KEYS[1], ARGV[2]) return {1, 0} end
return {0, redis.call('PTTL', KEYS[1])}
"""
# One script: between a client's GET and DEL the lock could expire and become another holder's.
_RELEASE: Final = """
if redis.call('GET', KEYS[1]) == ARGV[1] then return redis.call('DEL', KEYS[1]) end
return 0
"""

_log = steady("exactly_once.lock")


class RedisLock:
    """A lock on a name, used with `with` in a thread or `async with` in a coroutine; each object once at a time.

    It is free at the end of the block, or `expires` after it was taken, whichever comes first: it is not prolonged. Choose
    `expires` longer than the work may take, and write the work so that it may overlap all the same: a process can stand still
    for any time (a stopped machine, a full swap), and a Redis that loses its memory forgets the holder.

    Args:
        connection: Where the lock is kept.
        group: The consumer group; locks of the same name in other groups are different locks.
        key: What is locked: a text, whole number or UUID, or a tuple of these.
        expires: The longest it is held. After that it is free, whatever its holder does.
        wait: How long to wait for a lock that another holds; zero asks once.

    Raises:
        ConfigurationError: `expires` is not above zero, or `wait` is below.
        BadKey: The key is empty, over 255 bytes, or neither text, a whole number nor a UUID.
    """

    def __init__(
        self,
        connection: RedisConnection,
        group: str,
        key: object,
        *,
        expires: timedelta = timedelta(seconds=30),
        wait: timedelta = timedelta(seconds=10),
    ) -> None:
        if expires < timedelta(milliseconds=1):
            raise ConfigurationError(f"A lock's expires= must be at least a millisecond, and {expires} was given.")
        if wait < timedelta(0):
            raise ConfigurationError(f"A lock's wait= must not be below zero, and {wait} was given.")
        self.name = canonical(key if isinstance(key, tuple) else (key,))
        self.group, self.expires, self.wait = group, expires, wait
        self._connection = connection
        self._keys: Sequence[str] = [PREFIX + dumps([group, self.name])]
        self._token: str | None = None
        self._since = 0.0
        self._awaiting = False
        self._process = fork.here

    def acquire(self, *, awaiting: bool = False) -> None:
        """Take the lock; wait for it up to `wait`.

        Args:
            awaiting: We are in SQLAlchemy's greenlet, and the loop must go on. False is for threads.

        Raises:
            InProgress: Another holder had it all that time.
            StoreUnavailable: Redis does not answer. If only the answer was lost, the lock is free after `expires`.
            ConfigurationError: This object holds it already.
        """
        if self._token is not None:
            raise ConfigurationError(
                f"This object holds the lock {escaped(self.name)!r} already. Take a new one for each use:"
                " with eo.lock(...): ..."
            )
        take = (self._connection.ascript if awaiting else self._connection.script)(_ACQUIRE)
        token, milliseconds = uuid4().hex, round(self.expires.total_seconds() * 1000)
        deadline, pause_s = monotonic() + self.wait.total_seconds(), POLL_S[0]
        while True:
            asked = monotonic()
            try:
                won, left_ms = take(self._keys, [token, milliseconds])
            except BaseException as error:
                if not isinstance(error, Exception):  # cancelled: it may be ours, and nobody else would release it
                    with suppress(Exception):
                        finished(partial(self._free, token, awaiting))
                raise
            if won:
                self._token, self._since, self._awaiting, self._process = token, asked, awaiting, fork.here
                return
            rest_s = deadline - monotonic()
            if rest_s <= 0:
                raise self._not_free(left_ms)
            # We know when it expires, and a longer pause would only be late.
            pause = min(rest_s, uniform(0.5, 1.5) * pause_s, left_ms / 1000 + 0.001 if left_ms >= 0 else rest_s)  # noqa: S311
            pause_s = min(2 * pause_s, POLL_S[1])
            if awaiting:
                await_only(asyncio.sleep(pause))
            else:
                sleep(pause)

    def release(self) -> bool:
        """Release the lock, sync or async as it was taken.

        Returns:
            False if it was not ours any more, which is logged as a warning: another holder may have run at the same time.

        Raises:
            StoreUnavailable: Redis does not answer; the lock is free after `expires`.
        """
        token, self._token = self._token, None
        if token is None or self._process is not fork.here:  # a child's copy: only the parent may release it
            return False
        if self._free(token, self._awaiting):
            return True
        held_s = monotonic() - self._since
        if held_s >= self.expires.total_seconds():
            why = "it had expired: give it a longer expires=, or do less under it"
        else:
            why = "Redis did not know of it any more (restarted, evicted, or deleted by hand?)"
        _log.warning(
            "The lock %r of the group %r was held for %.1f s of %g s, and was not ours any more when we let go of it: %s."
            " Another may have run at the same time.",
            escaped(self.name),
            escaped(self.group),
            held_s,
            self.expires.total_seconds(),
            why,
        )
        return False

    def __enter__(self) -> Self:
        self._enter(awaiting=_in_greenlet())
        return self

    def _enter(self, *, awaiting: bool) -> None:
        try:
            self.acquire(awaiting=awaiting)
        except StoreUnavailable as error:
            error.asked_by_handler = True
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.leave()

    async def __aenter__(self) -> Self:
        await greenlet_spawn(self._enter, awaiting=True)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await greenlet_spawn(self.leave)

    def leave(self) -> None:
        """Release at the end of a block: the work is done, so an unavailable Redis is not its error."""
        try:
            self.release()
        except ExactlyOnceError as error:
            _log.warning(
                "The lock %r of the group %r could not be released, and is free after %g s: %s",
                escaped(self.name),
                escaped(self.group),
                self.expires.total_seconds(),
                error,
            )

    def _free(self, token: str, awaiting: bool) -> bool:
        free = (self._connection.ascript if awaiting else self._connection.script)(_RELEASE)
        try:
            return bool(free(self._keys, [token]))
        except Exception:
            raise
        except BaseException:  # cancelled while sending: it may not have arrived
            with suppress(Exception):
                finished(partial(free, self._keys, [token]))
            raise

    def _not_free(self, left_ms: int) -> InProgress:
        known = f", and holds it for at most {left_ms / 1000:.1f} s more" if left_ms >= 0 else ""
        return InProgress(
            f"The lock {escaped(self.name)!r} of the group {escaped(self.group)!r} was not free within"
            f" {self.wait.total_seconds():g} s: another run has it{known}. Nothing ran. Ask again later, or wait longer:"
            " eo.lock(..., wait=...)."
        )


def _in_greenlet() -> bool:
    """Say how a plain `with` must wait: by `await_only` if sync code runs under asyncio, as in `run_sync`.

    Raises:
        ConfigurationError: In a coroutine, where it would stop the loop, and with it the holder of the lock.
    """
    if in_greenlet():
        return True
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    raise ConfigurationError(
        "`with eo.lock(...)` in a coroutine would stop its event loop while it waits. Write: async with eo.lock(...)"
    )
