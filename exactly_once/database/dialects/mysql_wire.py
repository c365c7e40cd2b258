"""How MySQL and MariaDB are spoken to: several statements in one round trip, savepoints, our own role, the rest of an answer.

What is known of the session is an argument (`SessionSettings`). Called by `mysql` and what stands around it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from inspect import isawaitable
from typing import Any, Final

from sqlalchemy.util import await_only

from exactly_once.claim import ClaimRow
from exactly_once.database.dialects.keywords import Read
from exactly_once.database.dialects.mysql_errors import DENIED, NO_SAVEPOINT, errno
from exactly_once.database.owner import savepoint_of
from exactly_once.errors import ConfigurationError

__all__ = [
    "BOUND",
    "ROLE",
    "SessionSettings",
    "bound",
    "bounded_by",
    "counters_of",
    "digits",
    "driver_of",
    "identity",
    "read_rest",
    "refuse_autocommit",
    "release",
    "role_as_set",
    "savepoint_of_call",
    "together",
    "took_another_role",
    "undo",
]

BOUND: Final = "SET STATEMENT innodb_lock_wait_timeout = {seconds} FOR "
ROLE: Final = ("SELECT CURRENT_ROLE() LIMIT 1", "SET ROLE {role}")
_AUTOCOMMIT: Final = 2  # SERVER_STATUS_AUTOCOMMIT


@dataclass(slots=True)
class SessionSettings:
    """What a connection reported when we first saw it."""

    bound: str
    """Prefix that limits the lock wait of one statement beside the claim; empty if only the session can be limited."""
    patience_s: int
    """The longest that a statement may wait, in whole seconds, before the driver ends the connection (`read_timeout`)."""
    rollback_on_timeout: bool
    compound: bool
    """Several statements can be sent as one."""
    right: tuple[str, ...]
    """Statements that repair the session, if that costs no round trip, and read its log, if there is one."""
    commits: str
    """The statement that reads what changes with each commit of this session."""
    limit: list[Any]
    """The longest that a statement may take; empty on MySQL, whose limit applies to SELECT alone."""
    role: str
    """The role for what we write in our name, as SET ROLE takes it; empty if the server has no roles."""
    readers: tuple[Callable[[str], Read], Callable[[str], Read]]
    """Readers of a handler's statements: for sessions where a backslash in a string is a character, and where it escapes."""


def bound(seen: SessionSettings, wait_ms: int) -> str:
    """Return the prefix that limits one statement's lock wait, in whole seconds; empty if only the session can be limited."""
    return bounded_by(min(-(-wait_ms // 1000), seen.patience_s)) if seen.bound else ""


@lru_cache(maxsize=64)
def bounded_by(seconds: int) -> str:
    """Return the prefix for so many whole seconds."""
    return BOUND.replace("{seconds}", f"{seconds:d}")


def together(cursor: Any, seen: SessionSettings, *statements: str, values: Sequence[Any] = ()) -> None:
    """Execute several statements, in one round trip if the server can. `values` are for the one that has placeholders.

    Afterwards the cursor has the rows of the last statement.
    """
    if seen.compound:
        cursor.execute(f"BEGIN NOT ATOMIC {'; '.join(statements)}; /* exactly_once */ END", values or None)
        return
    for statement in statements:
        cursor.execute(statement, values if "%s" in statement else None)


def identity(row: ClaimRow) -> tuple[str, str, str]:
    return row.group.encode().hex(), row.handler.encode().hex(), row.key.encode().hex()


def digits(value: str | bytes | None) -> str | None:
    """Return a value for UNHEX: no character set and no mode of the session changes digits."""
    return None if value is None else (value.encode() if isinstance(value, str) else value).hex()


def took_another_role(cursor: Any, seen: SessionSettings, error: BaseException) -> str:
    """After a denial, set our own role if the handler has changed it. Return the statement that restores the handler's role.

    Empty if there is no other role to set. Called after a denial alone, because it costs round trips; a denied statement
    has done nothing.
    """
    if errno(error) not in DENIED or not seen.role:
        return ""
    cursor.execute(ROLE[0])
    theirs = role_as_set(cursor.fetchone()[0], is_mariadb=bool(seen.bound))
    if theirs == seen.role:
        return ""
    cursor.execute(ROLE[1].replace("{role}", seen.role))
    return ROLE[1].replace("{role}", theirs)


def role_as_set(told: Any, *, is_mariadb: bool) -> str:
    """Return the value of CURRENT_ROLE() in the form that SET ROLE takes. MySQL returns that form, also for several roles."""
    role = told.decode() if isinstance(told, bytes) else told
    if not is_mariadb or not role:
        return role or "NONE"
    return "`" + role.replace("`", "``") + "`"


def savepoint_of_call(owner: str) -> str:
    """Name the savepoint around a CALL."""
    return f"{savepoint_of(owner)}_call"


def counters_of(cursor: Any) -> tuple[Any, ...] | None:
    """Return the counters to compare; None if there are none, which says nothing about commits."""
    rows = tuple(cursor.fetchall())
    return rows if rows and all(None not in row for row in rows) else None


def read_rest(driver: Any, *, streams: bool) -> bool:
    """Read the rest of the last answer, as the drivers do before they send.

    True: its rows are being streamed, and are left alone.
    """
    while (result := driver._result) is not None:  # noqa: SLF001
        if result.unbuffered_active:
            if not streams:
                return True
            read = result._finish_unbuffered_query()  # noqa: SLF001
        elif result.has_next:
            read = driver.next_result()
        else:
            break
        if isawaitable(read):
            await_only(read)
    return False


def release(dbapi: Any, name: str) -> bool:
    cursor = dbapi.cursor()
    try:
        cursor.execute(f"RELEASE SAVEPOINT {name}")
    except Exception as error:
        if errno(error) != NO_SAVEPOINT:
            raise
        return False
    else:
        return True
    finally:
        cursor.close()


def undo(cursor: Any, name: str) -> bool:
    """Undo the work after a savepoint; False if the server has dropped the savepoint with the whole transaction."""
    try:
        cursor.execute(f"ROLLBACK TO SAVEPOINT {name}")
    except Exception as error:
        if errno(error) != NO_SAVEPOINT:
            raise
        return False
    return True


def driver_of(dbapi: Any) -> Any:
    """The driver's own connection: `dbapi` itself if sync, inside the adapter if async."""
    return getattr(dbapi, "driver_connection", None) or dbapi


def refuse_autocommit(dbapi: Any) -> None:
    """Refuse a connection that commits each statement by itself.

    Raises:
        ConfigurationError: It is in autocommit.
    """
    # The server reports it with each answer. Checked at each claim: code may have changed it in the session.
    if driver_of(dbapi).server_status & _AUTOCOMMIT:
        raise ConfigurationError(
            "The connection is in AUTOCOMMIT: a claim would be kept although its handler failed, and the message lost."
            " Take isolation_level='AUTOCOMMIT' off the engine (or session) given to exactly_once."
        )
