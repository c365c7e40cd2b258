"""The wheel works where there is no checkout: built, installed into an environment of its own, run from elsewhere."""

import json
import os
import shutil
import sqlite3
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from email.parser import Parser
from pathlib import Path

import pytest

from exactly_once.wording.installation import DISTRIBUTION
from tests.integration.user_project import ROOT, make_project


@dataclass(frozen=True, kw_only=True)
class Installed:
    wheel: Path
    sdist: Path
    python: Path
    site: Path

    def run(self, *arguments: str, folder: Path, env: Mapping[str, str] | None = None) -> str:
        ended = self.ended(*arguments, folder=folder, env=env)
        assert ended.returncode == 0, ended.stdout + ended.stderr
        return ended.stdout

    def ended(
        self, *arguments: str, folder: Path, env: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        # no PYTHONPATH, and -I would not see the packages below: what is left is what an owner of the wheel has
        bare = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "EXACTLY_ONCE_"))}
        return subprocess.run(
            [*arguments], cwd=folder, env=bare | dict(env or {}), capture_output=True, text=True, timeout=120
        )

    @property
    def metadata(self) -> Path:
        (found,) = self.site.glob("sqlalchemy_exactly_once-*.dist-info")
        return found


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


# -- a transport of somebody else's ---------------------------------------------------------------------------------------

_WORKER = """
import sys
from pathlib import Path
import exactly_once.alembic
from exactly_once import ExactlyOnce, Message
from sqlalchemy.orm import Session

exactly_once.alembic.upgrade("sqlite:///x.db")
eo = ExactlyOnce("sqlite:///x.db", group="inventory")
ran = []

@eo.handler("orders", key="order_no")
def reserve(session: Session, order: dict[str, str]) -> None:
    ran.append(order["order_no"])

url = f"folder://{Path('spool').absolute()}"
with eo.worker(url) as worker, eo.producer(url) as producer:
    producer.send_all([Message("orders", b'{"order_no": "A-1"}')] * 3)
    outcomes = worker.drain()
print(outcomes["processed"], outcomes["duplicate"], ran)
"""


@pytest.fixture(scope="module")
def strangers(installed: Installed, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Install the example from a folder outside the checkout, as its README says; returns that folder."""
    folder = tmp_path_factory.mktemp("stranger") / "own_transport"
    shutil.copytree(ROOT / "examples/own_transport", folder)
    pip = (sys.executable, "-m", "pip", "-q", "--python", str(installed.python), "install")
    installed.run(*pip, "--no-deps", "--no-index", "--no-build-isolation", str(folder), folder=folder)
    return folder


def test_the_wheel_carries_the_suites_and_a_strangers_transport_passes_with_them(
    installed: Installed, strangers: Path
) -> None:
    code = "import exactly_once.testing.conformance as suites; print(suites.__file__, *suites.__all__)"
    where, *names = installed.run(str(installed.python), "-c", code, folder=strangers).split()
    assert Path(where).is_relative_to(installed.site)
    assert {"Conformance", "ServerConformance", "TopicConformance", "Harness", "LeaseConformance"} <= set(names)
    command = (str(installed.python), "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_transport.py")
    said = installed.run(*command, folder=strangers)
    assert "30 passed, 6 skipped" in said


def test_a_strangers_transport_is_known_by_its_scheme_once_it_is_installed(
    installed: Installed, strangers: Path, tmp_path: Path
) -> None:
    (tmp_path / "spool").mkdir()
    told = installed.run(str(installed.python), "-c", _WORKER, folder=tmp_path)
    assert told == "1 2 ['A-1']\n"
    (tmp_path / "app.py").write_text(
        "from exactly_once import ExactlyOnce\nfrom sqlalchemy.orm import Session\n"
        "eo = ExactlyOnce('sqlite:///x.db', group='inventory')\n"
        "@eo.handler('orders', key='order_no')\ndef reserve(session: Session, order: dict) -> None: ...\n"
    )
    doctor = (str(installed.python), "-m", "exactly_once", "doctor", "--app", "app:eo")
    assert (
        "There is no folder /gone. Type: mkdir -p /gone"
        in installed.ended(*doctor, "--transport", "folder:///gone", folder=tmp_path).stdout
    )


# -- how it was installed ------------------------------------------------------------------------------------------------

ORIGINS = {
    "from an index": (None, f"pip install '{DISTRIBUTION}[redis]'"),
    "in the checkout": ({"url": "file://{here}", "dir_info": {}}, "pip install '.[redis]'"),
    "in the checkout, to edit": (
        {"url": "file://{here}", "dir_info": {"editable": True}},
        "pip install -e '.[redis]'",
    ),
    "elsewhere in a checkout": ({"url": "file:///home/me/a%20b", "dir_info": {}}, "pip install '/home/me/a b[redis]'"),
    "in a folder with a quote": (
        {"url": "file:///home/o'neil/it", "dir_info": {"editable": True}},
        """pip install -e '/home/o'"'"'neil/it[redis]'""",
    ),
    "from a wheel": ({"url": "file:///tmp/a%20b/x.whl", "archive_info": {}}, "pip install '/tmp/a b/x.whl[redis]'"),
    "from an archive elsewhere": (
        {"url": "https://me:secret@example.org/it.tar.gz", "archive_info": {}, "subdirectory": "sub"},
        f"pip install '{DISTRIBUTION}[redis] @ https://example.org/it.tar.gz#subdirectory=sub'",
    ),
    "from a folder of an archive": (
        {"url": "file:///tmp/it.tar.gz", "archive_info": {}, "subdirectory": "sub"},
        f"pip install '{DISTRIBUTION}[redis] @ file:///tmp/it.tar.gz#subdirectory=sub'",
    ),
    "from a tag in git": (
        {
            "url": "https://example.org/it.git",
            "vcs_info": {"vcs": "git", "requested_revision": "v1.2", "commit_id": "a" * 40},
            "subdirectory": "packages/it",
        },
        f"pip install '{DISTRIBUTION}[redis] @ git+https://example.org/it.git@v1.2#subdirectory=packages/it'",
    ),
    "from git over SSH": (
        {"url": "ssh://git:secret@example.org/it.git", "vcs_info": {"vcs": "git", "commit_id": "a" * 40}},
        f"pip install '{DISTRIBUTION}[redis] @ git+ssh://git@example.org/it.git'",
    ),
    "from git": (
        {"url": "https://me:secret@example.org/it.git", "vcs_info": {"vcs": "git"}},
        f"pip install '{DISTRIBUTION}[redis] @ git+https://example.org/it.git'",
    ),
}


@pytest.mark.parametrize("made", ORIGINS)
def test_an_error_names_the_command_by_which_this_installation_was_made(
    installed: Installed, tmp_path: Path, made: str
) -> None:
    origin, command = ORIGINS[made]
    written = installed.metadata / "direct_url.json"
    before = written.read_bytes()
    try:
        if origin is None:
            written.unlink()
        else:
            written.write_text(json.dumps(origin).replace("{here}", str(tmp_path)))
        code = "from exactly_once import MissingExtra; print(MissingExtra('Redis', 'redis'))"
        told = installed.run(str(installed.python), "-c", code, folder=tmp_path)
    finally:
        written.write_bytes(before)
    assert told == f"Redis needs a package that is not installed. Type: {command}\n"


@pytest.fixture
def beside_the_other(installed: Installed) -> Iterator[Path]:
    """Another project's distribution is installed, whose package has our name; what it overwrites is put back."""
    package, metadata = installed.site / "exactly_once", installed.site / "exactly_once-0.2.1.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.4\nName: exactly-once\nVersion: 0.2.1\n")
    kept = {name: (package / name).read_bytes() for name in ("__init__.py", "errors.py", "keys.py")}
    yield package
    for name, content in kept.items():
        (package / name).write_bytes(content)
    shutil.rmtree(metadata)


def test_doctor_names_another_projects_package_of_our_name(
    installed: Installed, beside_the_other: Path, tmp_path: Path
) -> None:
    (tmp_path / "app.py").write_text(
        "from exactly_once import ExactlyOnce\neo = ExactlyOnce('sqlite:///x.db', group='g')\n"
    )
    command = (str(installed.python), "-m", "exactly_once", "doctor", "--app", "app:eo")
    ended = installed.ended(*command, folder=tmp_path)
    assert ended.returncode == 1
    assert "FAIL  Two distributions are installed that both bring a package exactly_once" in ended.stdout
    assert "pip uninstall exactly-once && pip install --force-reinstall --no-deps" in ended.stdout


@pytest.mark.parametrize("overwritten", [["errors.py"], ["__init__.py", "errors.py", "keys.py"]], ids=" ".join)
def test_where_its_files_lie_over_ours_the_command_names_it(
    installed: Installed, beside_the_other: Path, tmp_path: Path, overwritten: list[str]
) -> None:
    for name in overwritten:
        (beside_the_other / name).write_text("class DuplicateInFlight(Exception): ...\n")
    command = (str(installed.python), "-m", "exactly_once", "doctor", "--app", "app:eo")
    (tmp_path / "app.py").write_text("eo = None\n")
    ended = installed.ended(*command, folder=tmp_path)
    assert ended.returncode == 2
    assert "Two distributions are installed that both bring a package exactly_once" in ended.stderr
    assert "Traceback" not in ended.stderr
    if "__init__.py" not in overwritten:
        code = "from exactly_once import ConfigurationError"
        ended = installed.ended(str(installed.python), "-c", code, folder=tmp_path)
        assert "ImportError: " in ended.stderr
        assert "pip uninstall exactly-once" in ended.stderr
