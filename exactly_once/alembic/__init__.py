"""Creates and upgrades our tables: numbered migrations, run one program at a time, recorded in a version table of our own.

It never touches a table that is not ours, and never drops data unless `downgrade` is called. Called by the command line
(`exactly-once db`), a program's start-up check, a program's own Alembic history and tests.

There are three ways to create the tables and one record: in all of them `exactly_once_version` holds the version, written in
the transaction that made the tables. So a program may change from one way to another, and `check` need not know which it was.

1. `alembic upgrade head` in a checkout of this project.
2. `exactly-once db upgrade`, or `exactly_once.alembic.upgrade(url)`.
3. `exactly-once db revision` writes one file into the program's own versions folder: one history, one head.

Importing this module costs nothing: Alembic and SQLAlchemy are imported when a function needs them.
"""

from exactly_once.alembic.migrate import check, current, downgrade, head, include_name, revision, sql, upgrade
from exactly_once.alembic.version_table import VERSION_TABLE

__all__ = [
    "VERSION_TABLE",
    "check",
    "current",
    "downgrade",
    "head",
    "include_name",
    "revision",
    "sql",
    "upgrade",
]
