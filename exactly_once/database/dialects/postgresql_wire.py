"""What psycopg 3 is told and tells below its cursors: simple-query strings, its connection's state, its own BEGIN.

Sync and async alike. Knows no claim and no setting of ours.
"""

import asyncio
import os
import socket
from collections.abc import Generator, Iterable
from contextlib import suppress
from selectors import EVENT_READ, DefaultSelector
from typing import Any, Final

import psycopg
from psycopg import AsyncConnection, errors, generators
from psycopg import Connection as PsycopgConnection
from psycopg.pq import ExecStatus, TransactionStatus
from sqlalchemy.util import await_only

from exactly_once.errors import ConfigurationError

__all__ = [
    "cut",
    "driver_begun",
    "driver_of",
    "encoding_of",
    "ignore_driver_begin",
    "note_driver_begin",
    "refuse_autocommit",
    "send",
    "speaks_utf8",
    "template",
    "text_of_begin",
    "user_of",
]

_NOTICED_S: Final = 1.0  # seconds; who waits for a connection that is cut sees it at once
_LOOKS: Final = 50
_UTF8: Final = frozenset({b"UTF8", b"UNICODE"})


def driver_of(dbapi: Any) -> Any:
    """The psycopg connection below SQLAlchemy: `dbapi` itself if sync, inside the adapter if async."""
    if isinstance(
        dbapi, PsycopgConnection
    ):  # an attribute that is not there costs three times as much, at each of twelve calls
        return dbapi
    return getattr(dbapi, "driver_connection", None) or getattr(dbapi, "_connection", dbapi)


def refuse_autocommit(driver: Any) -> None:
    if driver.autocommit:
        raise ConfigurationError(
            "The engine is in AUTOCOMMIT: a claim would be kept although its handler failed, and the message lost."
            " Take isolation_level='AUTOCOMMIT' off the engine (or session) given to exactly_once."
        )


def send(driver: Any, text: bytes, meanwhile: Iterable[object] = ()) -> list[Any]:
    """Send one simple-query string and return a result for each of its statements. One round trip.

    Args:
        driver: psycopg's connection.
        text: The statements.
        meanwhile: Work to do while the server works: a step for each element, until the answer begins to arrive.
    """

    results: list[Any]
    if isinstance(driver, AsyncConnection):
        results = await_only(_talk(driver, text, meanwhile))
    else:
        with driver.lock:
            results = driver.wait(_sent(driver.pgconn, text, meanwhile))
    for result in results:
        if result.status == ExecStatus.FATAL_ERROR:
            raise errors.error_from_result(result, encoding="utf-8")
    return results


def _sent(pgconn: Any, text: bytes, meanwhile: Iterable[object]) -> Generator[Any, Any, list[Any]]:
    """Send a text. The result waits for its answers."""
    pgconn.send_query(text)
    if meanwhile and not pgconn.flush():  # the whole text is sent
        # If no descriptor is free for the selector, the answer is waited for all the same.
        with suppress(OSError), DefaultSelector() as look:
            look.register(pgconn.socket, EVENT_READ)
            for _ in meanwhile:
                if look.select(0):
                    break
    answers: Generator[Any, Any, list[Any]] = generators.execute(pgconn)
    return answers


async def _talk(driver: Any, text: bytes, meanwhile: Iterable[object]) -> list[Any]:
    async with driver.lock:
        results: list[Any] = await driver.wait(_sent(driver.pgconn, text, meanwhile))
    return results


def note_driver_begin(driver: Any) -> None:
    """From here on, show whether the driver begins a transaction: our transactions are begun by us.

    After a COMMIT or ROLLBACK on the driver itself, the driver sends BEGIN before its next statement. The transaction
    looks open, and is not ours. But the driver keeps the text of its BEGIN once it has made one. Looking there
    costs nothing; to ask the server would cost each message one more statement.
    """
    driver._begin_statement = b""  # noqa: SLF001


def ignore_driver_begin(driver: Any) -> None:
    """Mark that a transaction begun now is not one that a handler is given, so that it is not taken for a handler's."""
    driver._begin_statement = text_of_begin(driver).rstrip(b";")  # noqa: SLF001  # what the driver itself would send


def driver_begun(driver: Any) -> bool:
    return bool(driver._begin_statement)  # noqa: SLF001


def text_of_begin(driver: Any) -> bytes:
    """BEGIN as psycopg itself would send it on this connection."""
    level, read_only, deferrable = driver.isolation_level, driver.read_only, driver.deferrable
    if level is None and read_only is None and deferrable is None:
        return b"BEGIN;"
    words = [b"BEGIN"]
    if level is not None:
        words.append(b"ISOLATION LEVEL " + level.name.replace("_", " ").encode())
    if read_only is not None:
        words.append(b"READ ONLY" if read_only else b"READ WRITE")
    if deferrable is not None:
        words.append(b"DEFERRABLE" if deferrable else b"NOT DEFERRABLE")
    return b" ".join(words) + b";"


def encoding_of(driver: Any) -> bytes | None:
    """Return this connection's client encoding. The server reports each change of it, so this asks nothing."""
    told: bytes | None = driver.pgconn.parameter_status(b"client_encoding")
    return told


def user_of(driver: Any) -> bytes | None:
    """Return the session's user. The server reports it like the encoding; a pooler need not forward it."""
    told: bytes | None = driver.pgconn.parameter_status(b"session_authorization")
    return told


def speaks_utf8(encoding: bytes | None) -> bool:
    return (
        encoding in _UTF8 or (encoding or b"").upper().replace(b"-", b"") in _UTF8
    )  # a pooler repeats what the client wrote


def template(text: str, order: tuple[str, ...]) -> bytes:
    """Turn named places into %s, after a check that they are in this `order`. Bytes formatting costs least for each message."""
    places = sorted(order, key=lambda name: text.index("{" + name + "}"))
    assert places == list(order)
    text = text.replace("%", "%%")
    for name in order:
        text = text.replace("{" + name + "}", "%s")
    return text.encode()


def cut(driver: Any) -> None:
    """End a connection on which somebody waits for an answer: who waits gets an error at once."""
    # Not closed: closing a descriptor wakes none of its waiters.
    with suppress(OSError, psycopg.Error), socket.socket(fileno=os.dup(driver.pgconn.socket)) as ours:
        ours.shutdown(socket.SHUT_RDWR)
    if isinstance(driver, AsyncConnection):
        await_only(_until_noticed(driver))
    elif driver.lock.acquire(timeout=_NOTICED_S):
        driver.lock.release()


async def _until_noticed(driver: Any) -> None:
    """Let the task that waits for this connection notice that it is cut."""
    for _ in range(_LOOKS):
        if driver.pgconn.transaction_status != TransactionStatus.ACTIVE:
            return
        await asyncio.sleep(_NOTICED_S / _LOOKS)
