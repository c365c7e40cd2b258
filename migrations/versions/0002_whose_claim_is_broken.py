"""A broken failure keeps the owner of the claim that stands for it.

`requeue` removes that claim. Until now it was found by its time, and a server's clock may go back.
"""

from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade(*, schema: str | None = None, operations: Any = op) -> None:
    if not _is_there(operations, schema):
        operations.add_column("message_failure", sa.Column("claim_owner", sa.String(64)), schema=schema)


def downgrade(*, schema: str | None = None, operations: Any = op) -> None:
    if _is_there(operations, schema) is not False:
        operations.drop_column("message_failure", "claim_owner", schema=schema)


def _is_there(operations: Any, schema: str | None) -> bool | None:
    """Whether a run that was killed has added the column. None: there is no database to ask, or DDL is transactional."""
    context = operations.get_context()
    if context.as_sql or context.dialect.name not in ("mysql", "mariadb"):
        return None
    columns = sa.inspect(operations.get_bind()).get_columns("message_failure", schema=schema)
    return any(column["name"] == "claim_owner" for column in columns)
