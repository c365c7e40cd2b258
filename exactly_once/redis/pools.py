"""Pools of connections to one Redis: one for threads, and one for each event loop that asks. Sends nothing.

asyncio sockets belong to the loop they were opened in, so a loop gets a pool of its own, which is closed before the
loop ends. Nothing is opened until a connection is taken from a pool. Called by `RedisConnection`.
"""

import asyncio
import socket
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from importlib import import_module
from threading import Lock
from typing import Any, Final
from urllib.parse import urlsplit

from sqlalchemy.util import await_only

from exactly_once import fork
from exactly_once.errors import MissingExtra
from exactly_once.wording.redaction import redacted

__all__ = ["Pools", "Side"]

TIMEOUT_S: Final = 5.0  # a server that does not accept or answer within this time counts as away
CONNECTIONS: Final = 64
"""The most connections, for threads and again for each loop. A script takes a fraction of a millisecond, and Redis runs one at
a time: more connections would only queue there. A caller that finds none free waits for one, up to the timeout."""
HEALTH_CHECK_S: Final = 30  # an idle connection is checked after this time before it is used

# A dead peer is noticed in about a minute, also on a connection that is not in use.
_KEEPALIVE: Final = {
    option: value
    for name, value in (("TCP_KEEPIDLE", 30), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 3))
    if (option := getattr(socket, name, None)) is not None  # not every system has all of them
}


@dataclass(eq=False, slots=True)
class Side:
    """One pool, and how to wait for its calls: directly in a thread, by `await_only` in a greenlet.

    The client's sync and async pools have methods of the same names, so the code that talks to Redis is written once.
    """

    pool: Any
    wait: Callable[[Any], Any]
    uninterrupted: Callable[[], AbstractContextManager[None]] = nullcontext
    """Wraps a whole exchange: a cancellation that was swallowed inside is raised at its end."""
    guard: AsyncGenerator[None, None] | None = None


class Pools:
    """The pools of one Redis.

    Args:
        url: As returned by `checked`.
    """

    def __init__(self, url: str) -> None:
        self._url = url
        self._lock = Lock()
        self._threads: Side | None = None
        self._loops: dict[asyncio.AbstractEventLoop, Side] = {}
        fork.tell(self)

    def forked(self) -> None:
        """Begin with new pools in a forked child.

        Closing a stream of the parent would remove it from the selector that both processes share.
        """
        fork.pin((self._threads, self._loops))
        self._lock, self._threads, self._loops = Lock(), None, {}

    def of_threads(self) -> Side:
        """The pool that all threads share.

        Raises:
            MissingExtra: The client is not installed.
        """
        side = self._threads
        if side is None:
            with self._lock:
                side = self._threads
                if side is None:
                    side = self._threads = Side(self._made("redis"), _at_once)
        return side

    def of_this_loop(self) -> Side:
        """The pool of the running loop; called in SQLAlchemy's greenlet.

        Raises:
            MissingExtra: The client is not installed.
        """
        loop = asyncio.get_running_loop()
        side = self._loops.get(loop)
        if side is None:
            side = Side(self._made("redis.asyncio"), await_only, _cancellation_kept)
            side.guard = _until_the_loop_ends(side.pool)
            with self._lock:
                # A loop that was closed without a shutdown has closed its sockets with it.
                self._loops = {each: kept for each, kept in self._loops.items() if not each.is_closed()}
                self._loops[loop] = side
            await_only(_begun(side.guard))
        return side

    def close(self) -> None:
        """Close every connection; running loops close theirs when they get to it."""
        with self._lock:
            threads, self._threads = self._threads, None
            loops, self._loops = self._loops, {}
        if threads is not None:
            threads.pool.disconnect()
        for loop, side in loops.items():
            with suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(_end, loop, side)

    def _made(self, module: str) -> Any:
        try:
            client = import_module(module)
        except ModuleNotFoundError as error:
            raise MissingExtra(f"Redis {redacted(self._url, whole=True)}", "redis") from error
        keepalive = {"socket_keepalive": True, "socket_keepalive_options": _KEEPALIVE}
        # Without retry=: the client's own would retry connecting, the handshake and sending, one inside the other.
        return client.BlockingConnectionPool.from_url(
            self._url,
            protocol=2,  # Redis 5 has no other, and a handshake for 3 costs round trips
            max_connections=CONNECTIONS,
            timeout=TIMEOUT_S,
            socket_timeout=TIMEOUT_S,
            socket_connect_timeout=TIMEOUT_S,
            health_check_interval=HEALTH_CHECK_S,
            **({} if urlsplit(self._url).scheme == "unix" else keepalive),
        )


def _at_once(value: Any) -> Any:
    return value


@contextmanager
def _cancellation_kept() -> Iterator[None]:
    """Raise a cancellation that was swallowed: the client sends inside `asyncio.wait_for`, which before Python 3.12 loses
    one that comes as it finishes (https://github.com/python/cpython/issues/86296). The task would run on, and stopping it
    would wait for ever. The task's count of cancellations still shows it."""
    task = asyncio.current_task()
    assert task is not None
    before = task.cancelling()
    try:
        yield
    except Exception as error:
        if task.cancelling() > before:
            raise _cancellation() from error
        raise
    if task.cancelling() > before:
        raise _cancellation()


def _cancellation() -> asyncio.CancelledError:
    """Return a replacement for the swallowed cancellation. A scope of anyio cancels again, and knows its own by their text."""
    try:
        await_only(asyncio.sleep(0))
    except asyncio.CancelledError as error:
        return error
    return asyncio.CancelledError()


async def _until_the_loop_ends(pool: Any) -> AsyncGenerator[None, None]:
    """Close a pool before its loop ends: a loop that shuts down closes the asynchronous generators that were started in it."""
    try:
        yield
    finally:
        await pool.disconnect()


async def _begun(guard: AsyncGenerator[None, None]) -> None:
    await anext(guard)


async def _ended(guard: AsyncGenerator[None, None]) -> None:
    await guard.aclose()


def _end(loop: asyncio.AbstractEventLoop, side: Side) -> None:
    assert side.guard is not None
    task = loop.create_task(_ended(side.guard))
    _ENDING.add(task)
    task.add_done_callback(_ENDING.discard)


_ENDING: Final[set["asyncio.Task[None]"]] = set()
"""References to the tasks: a loop keeps only weak references."""
