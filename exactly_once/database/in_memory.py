"""SQLite in memory: the connection is the database. Thrown away, it takes claims and effects with it, so it is never thrown away.

As in an application's own tests: `create_engine("sqlite://", poolclass=StaticPool)`. What a handler leaves in such a connection
(a PRAGMA, a temporary table) stays there. Asked by the guards and the store, where they would throw a connection away.
"""

from sqlalchemy import Engine

__all__ = ["in_memory"]


def in_memory(engine: Engine) -> bool:
    """Say whether an engine's database ends with its connection.

    Example:
        `in_memory(create_engine("sqlite://"))` is True.
    """
    if engine.dialect.name != "sqlite":
        return False
    return ":memory:" in (engine.url.database or ":memory:") or "mode=memory" in str(engine.url)
