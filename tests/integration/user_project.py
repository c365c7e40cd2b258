"""A program of a user, with models and an Alembic history of its own, in the database where our tables are too.

Written to a folder and driven through the `alembic` command, as its owner would.
"""

import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import create_engine, inspect, make_url
from sqlalchemy.pool import NullPool

ROOT = Path(__file__).parents[2]
OURS = {
    "message_idempotent",
    "message_step",
    "message_failure",
    "message_outbox",
    "message_queue",
    "message_queue_group",
    "message_cutover",
    "exactly_once_version",
}
ASYNC_DRIVER = {"postgresql": "postgresql+psycopg", "mysql": "mysql+asyncmy", "sqlite": "sqlite+aiosqlite"}

ENV = """
import os
from alembic import context
from sqlalchemy import create_engine
from models import Base
from exactly_once.alembic import include_name

url = os.environ["SHOP_DATABASE"]
options = dict(target_metadata=Base.metadata, {options})

if context.is_offline_mode():
    context.configure(url=url, literal_binds=True, **options)
    with context.begin_transaction():
        context.run_migrations()
else:
    with create_engine(url).connect() as connection:
        context.configure(connection=connection, **options)
        with context.begin_transaction():
            context.run_migrations()
"""
MODELS = """
from sqlalchemy import MetaData
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from sqlalchemy import String

class Base(DeclarativeBase):
    metadata = MetaData(naming_convention={{"pk": "pk_%(table_name)s", "ix": "ix_%(table_name)s_%(column_0_name)s"}})

class Stock(Base):
    __tablename__ = "shop_stock"
    __table_args__ = {{"schema": {schema!r}}}
    id: Mapped[int] = mapped_column(primary_key=True)
    article: Mapped[str] = mapped_column(String(40), index=True)
"""
MAKO = '''"""${message}"""
import sqlalchemy as sa
from alembic import op
revision = ${repr(up_revision)}
down_revision = ${repr(down_revision)}
def upgrade():
    ${upgrades if upgrades else "pass"}
def downgrade():
    ${downgrades if downgrades else "pass"}
'''


@dataclass(frozen=True, kw_only=True)
class UserProject:
    folder: Path
    url: str

    def alembic(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return alembic(*arguments, folder=self.folder, env={"SHOP_DATABASE": self.url})

    def versions(self) -> list[Path]:
        return sorted((self.folder / "history" / "versions").glob("*.py"))


def make_project(
    folder: Path, url: str, *, schema: str | None = None, options: str = "include_name=include_name"
) -> UserProject:
    (folder / "history" / "versions").mkdir(parents=True)
    (folder / "alembic.ini").write_text(
        "[alembic]\nscript_location = %(here)s/history\nprepend_sys_path = %(here)s\npath_separator = os\n"
    )
    (folder / "models.py").write_text(MODELS.format(schema=schema))
    (folder / "history" / "env.py").write_text(ENV.format(options=options))
    (folder / "history" / "script.py.mako").write_text(MAKO)
    return UserProject(folder=folder, url=url)


def alembic(
    *arguments: str, folder: Path = ROOT, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run the `alembic` command as a person does: in a folder, with an environment."""
    outside = {name: value for name, value in os.environ.items() if not name.startswith("EXACTLY_ONCE_")}
    path = os.pathsep.join(part for part in (str(ROOT), os.environ.get("PYTHONPATH")) if part)
    return subprocess.run(
        [sys.executable, "-m", "alembic", *arguments],
        cwd=folder,
        env=outside | {"PYTHONPATH": path} | dict(env or {}),
        capture_output=True,
        text=True,
        timeout=120,
    )


def done(result: subprocess.CompletedProcess[str]) -> str:
    assert result.returncode == 0, result.stderr
    return result.stdout


def table_names(url: str, schema: str | None = None) -> set[str]:
    engine = create_engine(url, poolclass=NullPool)
    try:
        return set(inspect(engine).get_table_names(schema=schema))
    finally:
        engine.dispose()


def async_url(url: str) -> str:
    parsed = make_url(url)
    name = parsed.get_backend_name()
    return parsed.set(drivername=ASYNC_DRIVER[name]).render_as_string(hide_password=False)
