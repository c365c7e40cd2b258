"""The wheel works where there is no checkout: built, installed into an environment of its own, run from elsewhere."""

import os
import sqlite3
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from email.parser import Parser
from pathlib import Path

import pytest

from tests.integration.user_project import ROOT, make_project


@dataclass(frozen=True, kw_only=True)
class Installed:
    wheel: Path
    sdist: Path
    python: Path
    site: Path

    def run(self, *arguments: str, folder: Path, env: Mapping[str, str] | None = None) -> str:
        # no PYTHONPATH, and -I would not see the packages below: what is left is what an owner of the wheel has
        bare = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "EXACTLY_ONCE_"))}
        result = subprocess.run(
            [*arguments], cwd=folder, env=bare | dict(env or {}), capture_output=True, text=True, timeout=120
        )
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    """Build the sdist, the wheel from it, and install that without its dependencies, which this environment lends."""
    folder = tmp_path_factory.mktemp("wheel")

    def step(*command: str) -> None:
        result = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
        assert result.returncode == 0, result.stdout + result.stderr

    step(sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder / "dist"), str(ROOT))
    (wheel,), (sdist,) = (folder / "dist").glob("*.whl"), (folder / "dist").glob("*.tar.gz")
    step(sys.executable, "-m", "venv", "--without-pip", str(folder / "env"))
    python = folder / "env" / "bin" / "python"
    step(sys.executable, "-m", "pip", "-q", "--python", str(python), "install", "--no-deps", "--no-index", str(wheel))
    site = next((folder / "env" / "lib").glob("python*")) / "site-packages"
    # behind its own packages; a .pth in a lent folder is not read, so an editable install of us stays out
    (site / "lent.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return Installed(wheel=wheel, sdist=sdist, python=python, site=site)


def tables_in(file: Path) -> set[str]:
    with sqlite3.connect(file) as connection:
        return {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}


def test_the_wheel_carries_the_migrations_the_types_and_the_licence(installed: Installed) -> None:
    names = set(zipfile.ZipFile(installed.wheel).namelist())
    ours = {str(path.relative_to(ROOT)) for path in (ROOT / "migrations").rglob("*") if path.suffix in (".py", ".mako")}
    assert len(ours) >= 3
    assert {f"exactly_once/{name}" for name in ours} <= names
    assert "exactly_once/py.typed" in names
    assert any(name.endswith("dist-info/licenses/LICENSE") for name in names)
    stray = {name.split("/")[0] for name in names} - {"exactly_once"}
    assert all(name.endswith(".dist-info") for name in stray), stray
    assert not [name for name in names if name.endswith(".pyc")]


def test_the_sdist_carries_what_a_build_and_a_reader_need(installed: Installed) -> None:
    with tarfile.open(installed.sdist) as archive:
        names = {name.split("/", 1)[-1] for name in archive.getnames()}
    assert {"alembic.ini", "migrations/env.py", "LICENSE", "CHANGELOG.md", "README.md", "pyproject.toml"} <= names


def test_the_wheels_metadata_names_licence_and_extras(installed: Installed) -> None:
    with zipfile.ZipFile(installed.wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith("dist-info/METADATA"))
        metadata = Parser().parsestr(archive.read(name).decode())
    assert metadata["License-Expression"] == "Apache-2.0"
    assert {"rocketmq", "rocketmq4", "mysql", "sqlite", "embedded"} <= set(metadata.get_all("Provides-Extra") or [])


def test_the_installed_package_upgrades_a_database_outside_a_checkout(installed: Installed, tmp_path: Path) -> None:
    code = "import exactly_once.alembic; exactly_once.alembic.upgrade('sqlite:///x.db'); print(exactly_once.alembic.__file__)"
    where = installed.run(str(installed.python), "-c", code, folder=tmp_path)
    assert Path(where.strip()).is_relative_to(installed.site)
    assert {"message_idempotent", "message_failure", "message_cutover", "exactly_once_version"} <= tables_in(
        tmp_path / "x.db"
    )


def test_the_installed_package_writes_into_a_users_history_and_alembic_runs_it(
    installed: Installed, tmp_path: Path
) -> None:
    project = make_project(tmp_path / "shop", "sqlite:///x.db")
    code = "import exactly_once.alembic; exactly_once.alembic.revision('history')"
    installed.run(str(installed.python), "-c", code, folder=project.folder)
    command = (str(installed.python), "-m", "alembic", "upgrade", "head")
    installed.run(*command, folder=project.folder, env={"SHOP_DATABASE": project.url})
    assert {"message_idempotent", "exactly_once_version", "alembic_version"} <= tables_in(project.folder / "x.db")
