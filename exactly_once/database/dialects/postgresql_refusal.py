"""Why PostgreSQL refused a connection, as its SQLSTATE: too many connections, which passes, or a wrong password, which does not.

The server sends an SQLSTATE with every refusal. libpq reports only the text, in the server's language. But its trace of the
protocol's messages shows the SQLSTATE, so we connect once more with the trace on. psycopg has the trace on Linux. libpq 15 shows
only refusals after the login (the limits of a role or a database, the reserved slots); libpq 18 shows all.

Called by `postgresql`, in a thread, when a worker or `doctor` could not connect.
"""

import os
import re
from contextlib import suppress
from selectors import EVENT_READ, EVENT_WRITE, DefaultSelector
from time import monotonic
from typing import Any, Final

import psycopg
from psycopg import errors
from psycopg.conninfo import make_conninfo
from psycopg.pq import PGconn, Ping, PollingStatus

__all__ = ["why"]

_ANSWER_S: Final = 5.0
_MOST_BYTES: Final = 1_000_000
_STATE: Final = re.compile(rb'\tErrorResponse\t.*? C "(\w{5})" M ')
_LET_IN: Final = b"\tReadyForQuery\t"
_TOO_MANY: Final = "53300"
_WRONG: Final = "28000"
_OF_POOLERS: Final = "08P01"
# PgBouncer, up to 1.18 at least, has one SQLSTATE for all refusals, and its texts are always English.
_WRONG_BY_POOLERS: Final = ("authentication failed", "no such ", "unsupported startup parameter", "config error")
_TOO_MANY_IN_ENGLISH: Final = ("too many ", "connection slots", "no more connections")


def why(error: Any) -> str:
    """Return the SQLSTATE of a refusal, learnt by connecting again; "" if the server is away, busy, or accepts us by now.

    Args:
        error: psycopg's error of the failed connect.
    """
    refused = getattr(error, "pgconn", None)
    if refused is None or isinstance(error, errors.ConnectionTimeout):
        return ""
    text = str(error)
    seen, state = _asked_again(refused)
    if state is None:
        # The trace shows every refusal after the password, and a full server refuses before it: so the password is wrong.
        return _guessed(refused, "" if seen and refused.used_password else text)
    if state == _OF_POOLERS and any(words in text for words in _WRONG_BY_POOLERS):
        return _WRONG
    return state


def _asked_again(refused: Any) -> tuple[bool, str | None]:
    """Connect once more. Return whether a trace is available, and the server's SQLSTATE if libpq shows it."""
    given = {option.keyword.decode(): option.val.decode() for option in refused.info if option.val}
    try:
        seen = _traced(make_conninfo(**given).encode())
    except (psycopg.Error, AttributeError, OSError):  # no trace here, or the arguments cannot be used again
        return False, None
    if seen is None or _LET_IN in seen:
        return True, ""
    found = _STATE.findall(seen)
    return True, found[-1].decode() if found else None  # the last: the first try may have been with encryption


def _traced(given: bytes) -> bytes | None:
    """Return the protocol messages of a connection as it is made; None if that takes too long."""
    file = os.memfd_create("libpq-trace")  # never on a disk: a password may be in it
    pgconn = PGconn.connect_start(given)
    try:
        pgconn.trace(file)  # libpq never frees what it allocates for this, which is small: it cannot close a trace
        until = monotonic() + _ANSWER_S
        with DefaultSelector() as selector:
            while (asks := pgconn.connect_poll()) in (PollingStatus.READING, PollingStatus.WRITING):
                key = selector.register(pgconn.socket, EVENT_READ if asks == PollingStatus.READING else EVENT_WRITE)
                if not selector.select(max(0.0, until - monotonic())):
                    return None
                selector.unregister(key.fileobj)
        pgconn.untrace()
        os.lseek(file, 0, os.SEEK_SET)
        return os.read(file, _MOST_BYTES)
    finally:
        with suppress(psycopg.Error):
            pgconn.untrace()
        pgconn.finish()
        os.close(file)


def _guessed(refused: Any, text: str) -> str:
    """Decide by the text alone: too many connections, in English; else a server that accepts other clients refused *us*.

    In another language, too many connections look like a wrong setting. Then the process ends, and its supervisor restarts it
    until there is room. The other mistake is worse: if we waited after a wrong password, it would look like an outage.
    """
    if any(words in text for words in _TOO_MANY_IN_ENGLISH):
        return _TOO_MANY
    where = b"host=%s port=%s connect_timeout=2" % (refused.hostaddr or refused.host, refused.port)
    return _WRONG if PGconn.ping(where) == Ping.OK else ""
