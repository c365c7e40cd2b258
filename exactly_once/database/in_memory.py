"""Tells whether an engine is SQLite in memory. There the connection is the database, so we never throw the connection away.

Applications' tests use it: `create_engine("sqlite://", poolclass=StaticPool)`. What a handler leaves in such a connection
(a PRAGMA, a temporary table) stays there. The guards and the store ask before they throw a connection away.
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
