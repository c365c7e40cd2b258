"""Why a database cannot be used, as a sentence that ends with what to do: no rights, read-only, another service at its port.

Decided by SQLSTATE, errno and a server's answer, never by a driver's text, which comes in many languages. Called by
`store`, `service.starting`, `alembic`, `transports.sql`, `doctor` and the command line to tell a person.
"""

import re
import socket
import sqlite3
import struct
from contextlib import suppress
from importlib import import_module
from shlex import quote
from typing import Final

from sqlalchemy import URL

from exactly_once.database.errors.drivers_own import original
from exactly_once.errors import ConfigurationError
from exactly_once.wording.redaction import redacted, struck
from exactly_once.wording.text import escaped, stopped

__all__ = ["denied", "is_denied", "is_read_only", "nameless", "no_schemas", "read_only", "silent", "unusable", "words"]

_DENIED_STATE: Final = "42501"  # insufficient_privilege
_DENIED_CODES: Final = frozenset({1044, 1142, 1143})  # access to the database, to a table, to a column
_DENIED_DATABASE: Final = 1044  # the other errors name the client's host, for which there may be no account
_READ_ONLY_STATE: Final = "25006"  # read_only_sql_transaction
_READ_ONLY_CODES: Final = frozenset({1290, 1792, 1836, 1874})  # read_only; transaction; server; InnoDB
_PRIMARY: Final = 0xFF
_ACCOUNT: Final = re.compile(r"'([^']+)'@'([^']+)'")  # quoted like this in every language
_SILENT_S: Final = 5.0
"""Seconds for accepting, and for the server's first bytes."""
_ASKED_S: Final = 2.0
"""The same, if the driver has already waited."""
_SSL_REQUEST: Final = struct.pack("!ii", 8, 80877103)
_PORTS: Final = {"postgresql": 5432, "mysql": 3306, "mariadb": 3306}
_SPEAKS: Final = {"postgresql": "PostgreSQL", "mysql": "MySQL", "mariadb": "MariaDB"}


def _state(error: BaseException) -> str | None:
    state = getattr(original(error), "sqlstate", None)
    return state if isinstance(state, str) else None


def _errno(error: BaseException) -> int | None:
    args: tuple[object, ...] = getattr(original(error), "args", ())
    code = args[0] if len(args) > 1 else None
    return code if isinstance(code, int) else None


def is_denied(error: BaseException) -> bool:
    """Say whether we could log in, but the user lacks a right."""
    return _state(error) == _DENIED_STATE or _errno(error) in _DENIED_CODES


def is_read_only(error: BaseException) -> bool:
    """Say whether the server answers, but takes no writes."""
    own = original(error)
    if isinstance(own, sqlite3.Error):
        return (getattr(own, "sqlite_errorcode", 0) & _PRIMARY) == sqlite3.SQLITE_READONLY
    return _state(error) == _READ_ONLY_STATE or _errno(error) in _READ_ONLY_CODES


def words(error: BaseException) -> str:
    """Return the server's own sentence in one line. For errors of connecting, and of statements without values."""
    own = original(error)
    code = _errno(error)
    said = str(own.args[1]) if code is not None else str(own)
    lines = struck(said.strip()).splitlines()
    return escaped(lines[0].strip() if lines else type(own).__name__, 200) + (
        "" if code is None else f" (errno {code})"
    )


def denied(error: BaseException, url: URL, *, schema: str | None = None, changing: bool = False) -> str:
    """Say that a right is missing, and which statement grants it.

    Args:
        error: The server's error.
        url: Of the database.
        schema: The named schema of our tables.
        changing: The tables were to be made or changed, for which a worker needs no rights.
    """
    account = _ACCOUNT.search(words(error))
    role, host = (f"{account[1]}@{account[2]}" if account else url.username), ""
    given = role
    if account and _errno(error) != _DENIED_DATABASE:
        given, host = f"{account[1]}@HOST", " (HOST as SELECT CURRENT_USER() says of that login)"
    option = f" --schema {quote(schema)}" if schema else ""
    named = quote(given) if given else "ROLE"
    grants = f"exactly-once db sql --dialect {url.get_backend_name()} --grants {named} --only-grants{option}{host}"
    who = f"The role {role}" if role else "The role"
    why = stopped(words(error))
    if changing:
        return (
            f"{who} may not make or change the tables of exactly_once in {redacted(url)}: {why} Upgrade as their"
            f" owner: exactly-once db upgrade --database URL{option}. A worker's role needs only what this prints: {grants}"
        )
    return (
        f"{who} may not use the tables of exactly_once in {redacted(url)}: {why} Have their owner run what this"
        f" prints: {grants}"
    )


def read_only(url: URL) -> str:
    """Say that a database takes no writes, and what to do."""
    if url.get_backend_name() == "sqlite":
        return (
            f"{redacted(url)} answers and is read only: let this user write the file and its folder, and take mode=ro out of the"
            " URL if it is there"
        )
    return f"{redacted(url)} answers and is read only: a standby? Point EXACTLY_ONCE_DATABASE at the primary"


def nameless(url: URL) -> ConfigurationError:
    """Return the error for a URL without a database name, on a server without a default."""
    return ConfigurationError(f"The URL names no database. Write {redacted(url.set(database='NAME'))}")


def no_schemas(schema: str) -> ConfigurationError:
    """Return the error for a named schema in SQLite."""
    return ConfigurationError(
        f"SQLite has no schemas. Leave {escaped(schema)!r} out: --schema, EXACTLY_ONCE_SCHEMA, or schema= in the program."
    )


def unusable(error: BaseException, url: URL) -> str:
    """Say why connecting failed: the driver's own words, or that another service uses this port."""
    if _state(error) is None and url.get_backend_name() == "postgresql" and (told := silent(url, _ASKED_S)):
        return told
    return words(error)


def silent(url: URL, patience_s: float = _SILENT_S) -> str | None:
    """Ask the service at a URL's port whether it speaks this database's protocol. None if it does.

    None, too, if nobody accepts, which the driver reports, and if the URL names no single host. MySQL's drivers limit only the
    time to connect: at the port of a server that waits for the client's first bytes, they wait for ever. MySQL itself
    counts each connection that is broken off, and at last refuses the host (`max_connect_errors`), so we first log in.

    Args:
        url: The database's URL.
        patience_s: How long to wait for it to accept, and for its first bytes.
    """
    backend = url.get_backend_name()
    if backend not in _PORTS or not url.host or url.host.startswith("/") or "," in url.host:
        return None
    if not {"host", "hostaddr", "unix_socket", "service"}.isdisjoint(url.query):
        return None
    port = url.port or _PORTS[backend]
    if backend != "postgresql" and _is_mysql(url, port, patience_s):
        return None
    try:
        with socket.create_connection((url.host, port), timeout=patience_s) as connection:
            if backend == "postgresql":
                connection.sendall(_SSL_REQUEST)
            answer = _first(connection, 1 if backend == "postgresql" else 5)
    except OSError:
        return None
    well = answer[:1] in (b"S", b"N", b"E") if backend == "postgresql" else answer[4:5] in (b"\x0a", b"\xff")
    if well:
        return None
    return (
        f"{url.host}:{port} accepted the connection and did not speak {_SPEAKS[backend]}: is it another service's port, or a"
        " proxy whose server is away?"
    )


def _is_mysql(url: URL, port: int, patience_s: float) -> bool:
    """Log in as the driver will: a MySQL server accepts, or refuses with an error of its own."""
    try:
        pymysql = import_module("pymysql")
    except ImportError:
        return True  # without PyMySQL we cannot tell
    try:
        pymysql.connect(
            host=url.host,
            port=port,
            user=url.username,
            password=url.password or "",
            connect_timeout=patience_s,
            read_timeout=patience_s,
        ).close()
    except Exception as error:
        code = _errno(error)
        return code is not None and not 2000 <= code < 3000  # 2000 to 2999 are the client's own errors
    return True


def _first(connection: socket.socket, wanted: int) -> bytes:
    """Return so many bytes of the server's first answer, or fewer if it sends no more."""
    said = b""
    with suppress(OSError):  # a timeout, or a reset
        while len(said) < wanted and (more := connection.recv(wanted - len(said))):
            said += more
    return said
