"""What a session's settings are to us: the lock limit, the role and the durability that travel with our statements.

A handler, a listener or a stranger behind a pooler may have set others. Ours are sent with each transaction, or around each
statement of ours, and theirs are restored. Called by the dialect, its lease and batch statements, and the pooler.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from psycopg.pq import Escaping

from exactly_once.database.dialects.postgresql_wire import (
    driver_begun,
    refuse_autocommit,
    template,
    text_of_begin,
    user_of,
)

__all__ = [
    "AS_OUR_USER",
    "BOUND",
    "BOUND_IN_OPEN",
    "DURABLE",
    "IN_OUR_NAME",
    "OWN_ROLE",
    "SessionSettings",
    "limits",
    "text_in_theirs",
    "text_of_our_begin",
]

# In a transaction of our own we know the session's setting; in one that is already open, the setting may be another.
BOUND: Final = ("SET LOCAL lock_timeout = {wait_ms};", ";SET LOCAL lock_timeout = {own_wait}")
BOUND_IN_OPEN: Final = (
    (
        "SELECT set_config('exactly_once.lock_timeout', current_setting('lock_timeout'), true),"
        " set_config('lock_timeout', '{wait_ms}', true);"
    ),
    ";SELECT set_config('lock_timeout', current_setting('exactly_once.lock_timeout'), true)",
)
# A role that the handler has set (by SET LOCAL ROLE, or by a function) is not ours.
IN_OUR_NAME: Final = (
    (
        "SELECT pg_catalog.set_config('exactly_once.role', pg_catalog.current_setting('role'), true),"
        " pg_catalog.set_config('role', {role}, true);"
    ),
    ";SELECT pg_catalog.set_config('role', pg_catalog.current_setting('exactly_once.role'), true)",
)
# The same if the handler has also set another user for its session. Setting the user resets the role, so the user comes first.
AS_OUR_USER: Final = (
    (
        "SELECT pg_catalog.set_config('exactly_once.role', pg_catalog.current_setting('role'), true),"
        " pg_catalog.set_config('session_authorization', {user}, true), pg_catalog.set_config('role', {role}, true);"
    ),
    (
        ";SELECT pg_catalog.set_config('session_authorization', {theirs}, true),"
        " pg_catalog.set_config('role', pg_catalog.current_setting('exactly_once.role'), true)"
    ),
)
# If the application sets a role for each transaction, our role is the one with which this transaction began. It
# is read with BEGIN and kept in this process: a value kept in a setting would be lost by the handler's RESET ALL.
OWN_ROLE: Final = "SELECT pg_catalog.current_setting('role');"
# Stronger values stay, and so do `local` and `remote_write`: they keep acknowledged commits when this server stops.
DURABLE: Final = (
    "SELECT pg_catalog.set_config('synchronous_commit', 'on', true)"
    " WHERE pg_catalog.current_setting('synchronous_commit') = 'off';"
)
_BOUND: Final = BOUND[0].replace("{wait_ms}", "%d").encode()
_UNBOUND: Final = template(BOUND[1], ("own_wait",))
_BOUND_IN_OPEN: Final = BOUND_IN_OPEN[0].replace("{wait_ms}", "%d").encode()
_UNBOUND_IN_OPEN: Final = BOUND_IN_OPEN[1].encode()
_IN_OUR_NAME: Final = template(IN_OUR_NAME[0], ("role",)), IN_OUR_NAME[1].encode()
_AS_OUR_USER: Final = template(AS_OUR_USER[0], ("user", "role")), template(AS_OUR_USER[1], ("theirs",))
_OWN_ROLE: Final = OWN_ROLE.encode()
_ROLE_NOW: Final = b"pg_catalog.current_setting('role')"


@dataclass(slots=True)
class SessionSettings:
    """What a connection reported when we first saw it."""

    own_wait: bytes
    role: bytes
    """The role for what we write in our name, as the server reads it."""
    user: bytes | None
    """The session's user as the server reports it; None if it does not."""
    prepared: bool
    encoding: bytes | None
    """The client encoding at that time."""
    limit: bytes | None
    """The longest that a statement may take."""
    settings: bytes
    """Sent with BEGIN: see `Link.settings`, and `vary`."""
    varies: bool = False
    """Role and lock limit differ between transactions: each transaction keeps those it began with, and finds them again."""

    def vary(self) -> None:
        """Do not use the learnt role and lock limit any more: the application sets them for each transaction."""
        if not self.varies:
            self.varies, self.role, self.settings = True, _ROLE_NOW, self.settings + _OWN_ROLE

    def begins(self, driver: Any, first: bytes, results: Sequence[Any]) -> None:
        """Learn from the answers the role with which the transaction began, which is our role in it.

        Args:
            driver: The driver's connection.
            first: What was sent first, as returned by `text_of_our_begin` or `text_in_theirs`.
            results: The answers.
        """
        if self.varies:
            # No string sent with BEGIN contains ";". The role is asked for by the last of these statements.
            answer = results[first.count(b";") - 1]
            self.role = Escaping(driver.pgconn).escape_literal(answer.get_value(0, 0) or b"none")
            self.user = user_of(driver)

    def as_ours(self, driver: Any) -> tuple[bytes, bytes]:
        """Return what goes before and after a statement that we write in our name in the handler's transaction."""
        if self.varies and driver_begun(driver):  # it did not begin with a claim: its present role is ours
            return _IN_OUR_NAME[0] % _ROLE_NOW, _IN_OUR_NAME[1]
        theirs = user_of(driver)
        if theirs == self.user or theirs is None or self.user is None:
            return _IN_OUR_NAME[0] % self.role, _IN_OUR_NAME[1]
        quote = Escaping(driver.pgconn).escape_literal
        return _AS_OUR_USER[0] % (quote(self.user), self.role), _AS_OUR_USER[1] % quote(theirs)


def text_of_our_begin(driver: Any, seen: SessionSettings) -> bytes:
    """Return the text that begins a transaction of ours on this connection."""
    refuse_autocommit(driver)
    return text_of_begin(driver) + seen.settings


def text_in_theirs(seen: SessionSettings) -> bytes:
    """The same if a listener or a hook of the application has begun it: what they set for it counts as its beginning."""
    seen.vary()
    return _OWN_ROLE


def limits(seen: SessionSettings, wait_ms: int, *, begins: bool = True) -> tuple[bytes, bytes]:
    """Return what limits the lock waits of a statement, and what restores the session's own limit for the handler.

    Args:
        seen: What is known of the connection.
        wait_ms: The limit.
        begins: It is the first in a transaction of ours; else a limit may have been set in it before.
    """
    if seen.varies or not begins:
        return _BOUND_IN_OPEN % wait_ms, _UNBOUND_IN_OPEN
    return _BOUND % wait_ms, _UNBOUND % seen.own_wait
