"""The programs of docs/how-to/pre-fork-servers.md, run as a reader runs them: gunicorn --preload, Celery, multiprocessing."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from time import monotonic, sleep
from urllib.error import URLError
from urllib.request import urlopen

import pytest
from sqlalchemy import Engine, NullPool, create_engine, text

from exactly_once.testing.child import free_ports
from exactly_once.testing.databases import DatabaseServer

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "how-to" / "pre-fork-servers.md"
ORDERS = [f"A-{n}" for n in range(40)]
WARM = "before the fork"
PATIENCE_S = 30


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The page's programs, each under the name in its first line."""
    for program in re.findall(r"```python\n# (\w+\.py)\n(.*?)```", PAGE.read_text(), re.DOTALL):
        (tmp_path / program[0]).write_text(program[1])
    return tmp_path


@pytest.fixture
def environment(eo_server: DatabaseServer, folder: Path) -> Iterator[dict[str, str]]:
    url = eo_server.create()
    ours = {name: value for name, value in os.environ.items() if not name.startswith("EXACTLY_ONCE_")}
    with _engine(url).begin() as connection:
        connection.execute(text("CREATE TABLE reservation (order_no VARCHAR(50) NOT NULL)"))
    yield ours | {
        "PYTHONPATH": f"{ROOT}{os.pathsep}{folder}",
        "EXACTLY_ONCE_DATABASE": url.render_as_string(hide_password=False),
    }
    eo_server.drop(url)


def _engine(url: object) -> Engine:
    return create_engine(str(url) if isinstance(url, str) else url, poolclass=NullPool)  # type: ignore[call-overload, no-any-return]


def assert_each_once(environment: dict[str, str]) -> None:
    with _engine(environment["EXACTLY_ONCE_DATABASE"]).connect() as connection:
        found = connection.execute(text("SELECT order_no FROM reservation")).scalars().all()
        failed = connection.execute(text("SELECT error_text FROM message_failure")).scalars().all()
    assert sorted(found) == sorted([WARM, *ORDERS])
    assert failed == []


def test_gunicorn_preloads_and_its_workers_take_effect_once(environment: dict[str, str], folder: Path) -> None:
    (port,) = free_ports(1)
    command = [sys.executable, "-m", "gunicorn", "--preload", "--workers", "3", "--bind", f"127.0.0.1:{port}"]
    server = subprocess.Popen([*command, "web:application"], cwd=folder, env=environment)
    url = f"http://127.0.0.1:{port}/"

    try:
        _until(lambda: _answers(url))
        with ThreadPoolExecutor(8) as threads:
            assert set(threads.map(lambda order: _posted(url, order), ORDERS * 2)) == {200}
        server.send_signal(signal.SIGTERM)
        assert server.wait(PATIENCE_S) == 0
    finally:
        server.kill()
        server.wait()
    assert_each_once(environment)


def test_celery_forks_and_its_workers_take_effect_once(environment: dict[str, str], folder: Path) -> None:
    for name in ("in", "control"):
        (folder / name).mkdir()
    there = {"data_folder_in": "in", "data_folder_out": "in", "control_folder": "control"}
    (folder / "tasks.py").write_text(
        (folder / "tasks.py").read_text() + f"\n\napp.conf.broker_transport_options = {there!r}\n"
    )
    environment = environment | {"CELERY_BROKER": "filesystem://"}
    sender = "import json, sys, tasks\nfor no in sys.argv[1:] * 2:\n    tasks.order.delay(json.dumps({'order_no': no}))"
    subprocess.run([sys.executable, "-c", sender, *ORDERS], cwd=folder, env=environment, check=True, timeout=PATIENCE_S)
    options = ["--pool", "prefork", "--concurrency", "3", "--loglevel", "warning"]
    quiet = ["--without-gossip", "--without-mingle", "--without-heartbeat"]
    command = [sys.executable, "-m", "celery", "--app", "tasks", "worker", *options, *quiet]
    worker = subprocess.Popen(command, cwd=folder, env=environment)
    try:
        _until(lambda: not any((folder / "in").iterdir()) and _count(environment) == len(ORDERS) + 1)
        worker.send_signal(signal.SIGTERM)
        assert worker.wait(PATIENCE_S) == 0
    finally:
        worker.kill()
        worker.wait()
    assert_each_once(environment)


def test_multiprocessing_forks_and_its_workers_take_effect_once(environment: dict[str, str], folder: Path) -> None:
    done = subprocess.run(
        [sys.executable, "several.py", *ORDERS * 2],
        cwd=folder, env=environment, capture_output=True, text=True, timeout=PATIENCE_S,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("'processed'") == len(ORDERS)
    assert done.stdout.count("'duplicate'") == len(ORDERS)
    assert_each_once(environment)


def _until(seen: object) -> None:
    assert callable(seen)
    deadline = monotonic() + PATIENCE_S
    while not seen():
        assert monotonic() < deadline
        sleep(0.05)


def _posted(url: str, order: str) -> int:
    with urlopen(url, json.dumps({"order_no": order}).encode(), timeout=PATIENCE_S) as answer:
        return int(answer.status)


def _answers(url: str) -> bool:
    try:
        return _posted(url, WARM) == 200
    except URLError:
        return False


def _count(environment: dict[str, str]) -> int:
    with _engine(environment["EXACTLY_ONCE_DATABASE"]).connect() as connection:
        return connection.execute(text("SELECT count(*) FROM reservation")).scalar_one()
