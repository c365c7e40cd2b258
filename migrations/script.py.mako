"""${message}

Immutable once released: a later change is a later file.
"""

from typing import Any

import sqlalchemy as sa
from alembic import op
${imports if imports else ""}
revision = ${repr(up_revision)}
down_revision = ${repr(down_revision)}
branch_labels = ${repr(branch_labels)}
depends_on = ${repr(depends_on)}


def upgrade(*, schema: str | None = None, operations: Any = op) -> None:
    ${upgrades if upgrades else "pass"}


def downgrade(*, schema: str | None = None, operations: Any = op) -> None:
    ${downgrades if downgrades else "pass"}
