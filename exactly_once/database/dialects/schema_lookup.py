"""Finds the database schema of our tables if nobody has named it; once for each database.

Later statements name the schema. Without a name the server would look for the table along the connection's search path
(PostgreSQL) or in its current database (MySQL and MariaDB). An earlier handler may have changed either: claims would be written
into another schema's table. For the same reason we ask on a connection that no handler and no caller has used, and that no
`checkout` listener has set up: a listener that sets the tenant would give us the schema of the first tenant, another one in
each process. Called by `store`, and by `guards.claiming` for engines of the caller.

Behind a pooler a new connection is not a new session: strangers have used it. There we take the search path with which sessions
of this login begin. What is set in the session itself counts only if the program may have set it while connecting.
"""

from collections.abc import Callable, Sequence
from typing import Any, Final

from sqlalchemy import Connection, Engine, text
from sqlalchemy.pool import NullPool

from exactly_once.database.connections.pooler import LINK, Link
from exactly_once.database.errors.not_made import not_made, other_schemas
from exactly_once.database.errors.unusable import nameless
from exactly_once.errors import ConfigurationError, SchemaError

__all__ = ["FoundIn", "as_sessions_begin", "refuse_elsewhere", "schema_in"]

FoundIn = Callable[[], str | None] | None
"""Returns the schema that was looked up. None: somebody has named it, and no search path counts."""

_PATH: Final = text(
    "SELECT place.name FROM unnest(current_schemas(false)) WITH ORDINALITY AS place (name, number)"
    " JOIN pg_catalog.pg_namespace AS known ON known.nspname = place.name"
    " JOIN pg_catalog.pg_class AS found ON found.relnamespace = known.oid AND found.relname = 'message_idempotent'"
    " ORDER BY place.number"
)
# With the values of ALTER ROLE, ALTER DATABASE, the server's configuration or the connection's options; "$user" is the role.
_AS_SESSIONS_BEGIN: Final = ("SET LOCAL role = DEFAULT", "SET LOCAL search_path = DEFAULT")
_DATABASE: Final = text("SELECT DATABASE()")
_NOT_THE_PROGRAMS: Final = ("exactly_once", "sqlalchemy")
_BY_A_LISTENER: Final = (
    ". Or, if a `checkout` listener of this engine's pool names their schema: what it sets may differ each time, so say it"
    " yourself: ExactlyOnce(schema=...), or EXACTLY_ONCE_SCHEMA=..."
)


def schema_in(engine: Engine) -> str | None:
    """Return the schema (on MySQL and MariaDB the database) in which a new connection of this engine finds our tables.

    Args:
        engine: Its pool is not used. A connection is made as the pool would make it (`connect` listeners are called,
            `checkout` listeners are not), and closed.

    Raises:
        SchemaError: Our tables do not exist.
        ConfigurationError: The URL names no database (MySQL and MariaDB). Or several schemas of the search path have them, and
            no setting says which is meant.
    """
    if engine.dialect.name == "sqlite":
        return "main"  # without a name, a temporary table, or one of an attached file, would be used
    listeners = engine.pool.dispatch
    pool = NullPool(engine.pool._creator, events=list(_as_made(engine).items()))  # noqa: SLF001
    apart = Engine(pool, engine.dialect, engine.url)
    others: Sequence[str] = ()
    try:
        with apart.connect() as connection:
            if engine.dialect.name == "postgresql":
                found = _along_the_path(connection, engine)
                others = () if found else other_schemas(connection)
            else:
                database = connection.execute(_DATABASE).scalar()
                if not database:
                    raise nameless(engine.url)
                found = [str(database)]
            connection.rollback()
    finally:
        apart.dispose()
    if not found:
        reason = not_made(engine, looked_for="message_idempotent", others=others, ran="nothing ran")
        raise SchemaError(reason + (_BY_A_LISTENER if listeners.checkout else ""))
    if len(found) > 1:
        raise ConfigurationError(
            f"Several schemas of the search path have our tables: {', '.join(found)}. Claims in one of them would not be"
            f" seen in another. Say which holds yours: ExactlyOnce(schema={found[0]!r}), or"
            f" EXACTLY_ONCE_SCHEMA={found[0]}. Until now it was the first of them."
        )
    return found[0]


def refuse_elsewhere(found_in: FoundIn, now: str | None) -> None:
    """Refuse a new connection that finds our tables in another schema than the one that was looked up.

    Statements of ours name the schema, and a handler's do not: claims and effects would part, and the next start, which looks
    along the new path, would take copies for new messages.

    Args:
        found_in: The schema that was looked up.
        now: Where the new connection finds them. None: nowhere, or it was not asked.

    Raises:
        ConfigurationError: They differ.
    """
    then = None if found_in is None or now is None else found_in()
    if then is not None and then != now:
        raise ConfigurationError(
            f"The claims of this program are in {then}.message_idempotent, and a new connection finds that table in {now}: the"
            " search path of its login, or the database that it connects to, was changed while the program runs. Claims would"
            f" stay in {then}, and what handlers write would go to {now}, so nothing ran. To move to {now}: copy the claims"
            f" there, and restart the program. To stay: put the path back, or say it: ExactlyOnce(schema={then!r}), or"
            f" EXACTLY_ONCE_SCHEMA={then}."
        )


def as_sessions_begin(connection: Connection) -> None:
    """In a transaction of ours behind a pooler, take back the role and the search path that strangers left in the session.

    If the program may have set them while connecting, they stay: a pooler in session mode keeps them for it.
    """
    if _link(connection).pooled and not _sets_itself(connection.engine):
        _take_back(connection)


def _along_the_path(connection: Connection, engine: Engine) -> list[str]:
    """Return the schemas of the search path that have our tables, in its order.

    Args:
        connection: A new connection.
        engine: The engine whose pool would have made it.
    """
    pooled = _link(connection).pooled
    found: list[str] = []
    if not pooled or _sets_itself(engine):
        found += connection.execute(_PATH).scalars()
    if pooled:
        _take_back(connection)
        found += connection.execute(_PATH).scalars()
    return list(dict.fromkeys(found))


def _link(connection: Connection) -> Link:
    from exactly_once.database.dialects.postgresql_pooler import look

    known: Link | None = connection.info.get(LINK)
    return known or look(connection.connection.dbapi_connection, connection.info)


def _take_back(connection: Connection) -> None:
    # On the driver: SQLAlchemy may be just about to begin.
    cursor: Any = connection.connection.cursor()
    try:
        for statement in _AS_SESSIONS_BEGIN:
            cursor.execute(statement)
    finally:
        cursor.close()


def _sets_itself(engine: Engine) -> bool:
    """Say whether the program takes part in making a connection, by a listener of its own or a function that connects."""
    pool: Any = engine.pool
    makes = [pool._creator, *_as_made(engine), *engine.dialect.dispatch.do_connect]  # noqa: SLF001
    return any(str(getattr(each, "__module__", "")).partition(".")[0] not in _NOT_THE_PROGRAMS for each in makes)


def _as_made(engine: Engine) -> dict[Any, str]:
    """The listeners that run while a connection is made."""
    pool = engine.pool.dispatch
    return {each: name for name in ("first_connect", "connect") for each in getattr(pool, name)}
