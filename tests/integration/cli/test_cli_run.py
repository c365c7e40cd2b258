"""`exactly-once run` as a real process: what signals do to it, its exit codes, and one health port for several processes."""

import os
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.error import HTTPError, URLError

import pytest

from exactly_once.testing.child import free_ports
from tests.waiting import until

ROOT = Path(__file__).parents[3]


SHOP = """
import time
from pathlib import Path
from sqlalchemy.orm import Session
from exactly_once import ExactlyOnce

eo = ExactlyOnce(group="signals")

@eo.handler("orders", key="no")
def forever(session: Session, order: dict) -> None:
    Path("running").touch()
    while not Path("finish").exists():
        time.sleep(0.02)
"""


@pytest.fixture
def busy(postgres_url: str, tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts a worker, as a process, and returns once its handler runs and does not end; not on SQLite, which it would lock."""
    (tmp_path / "shop.py").write_text(SHOP)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("EXACTLY_ONCE_")}
    environment |= {"EXACTLY_ONCE_DATABASE": postgres_url, "PYTHONPATH": str(ROOT), "EXACTLY_ONCE_TRANSPORT": "sql://"}
    command = [sys.executable, "-m", "exactly_once"]
    started: list[subprocess.Popen[str]] = []

    def start(*options: str) -> subprocess.Popen[str]:
        sent = subprocess.run(
            [*command, "send", "--topic", "orders", "--body", '{"no": 1}'], cwd=tmp_path, env=environment, timeout=60
        )
        assert sent.returncode == 0
        worker = subprocess.Popen(
            [*command, "run", "shop:eo", *options], cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True
        )
        started.append(worker)
        until((tmp_path / "running").exists)
        return worker

    yield start
    for worker in started:
        worker.kill()
        worker.communicate()


def test_work_that_does_not_end_in_time_is_given_back_and_the_exit_code_is_1(
    busy: Callable[..., subprocess.Popen[str]],
) -> None:
    worker = busy("--drain-timeout", "0.5")
    worker.send_signal(signal.SIGTERM)
    _, said = worker.communicate(timeout=60)
    assert worker.returncode == 1, said
    assert "1 message(s) given back" in said


def test_a_second_signal_ends_at_once_with_143(busy: Callable[..., subprocess.Popen[str]]) -> None:
    worker = busy("--drain-timeout", "600")
    worker.send_signal(signal.SIGTERM)
    assert worker.stderr is not None
    until(lambda: "A second signal ends at once" in (worker.stderr.readline() if worker.stderr else ""))
    worker.send_signal(signal.SIGTERM)
    assert worker.wait(60) == 143


def test_one_health_port_from_the_settings_answers_for_all_processes(
    busy: Callable[..., subprocess.Popen[str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (port,) = free_ports()
    (tmp_path / "pyproject.toml").write_text(f'[tool.exactly_once]\nhealth = "127.0.0.1:{port}"\nprocesses = 2\n')
    supervisor = busy()

    def ready() -> bool:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/ready", timeout=5) as answer:
                return answer.status == 200
        except (HTTPError, URLError, OSError):
            return False

    until(ready)  # both children receive: neither tried to listen on the port that the supervisor has
    (tmp_path / "finish").touch()
    supervisor.send_signal(signal.SIGTERM)
    _, said = supervisor.communicate(timeout=60)
    assert supervisor.returncode == 0, said


# -- logging ---------------------------------------------------------------------------------------------------------------

APPLICATION = """
from exactly_once import ExactlyOnce
eo = ExactlyOnce(group="logging", imports=["loghandlers"])
"""
HANDLERS = """
from sqlalchemy.orm import Session
from logapp import eo

@eo.handler("orders", key="no")
def reserve(session: Session, order: dict) -> None: ...
"""
OWN = """
import logging
logging.basicConfig(level=logging.INFO, format="MINE %(name)s %(message)s")
"""


@pytest.mark.parametrize("configures", ["logapp", "loghandlers", "nobody"])
def test_an_application_that_configures_logging_is_listened_to(
    configures: str, sqlite_url: str, tmp_path: Path
) -> None:
    for name, text in (("logapp", APPLICATION), ("loghandlers", HANDLERS)):
        (tmp_path / f"{name}.py").write_text(text + (OWN if name == configures else ""))
    environment = {name: value for name, value in os.environ.items() if not name.startswith("EXACTLY_ONCE_")}
    environment |= {"EXACTLY_ONCE_DATABASE": sqlite_url, "PYTHONPATH": str(ROOT), "EXACTLY_ONCE_TRANSPORT": "sql://"}
    worker = subprocess.Popen(
        [sys.executable, "-m", "exactly_once", "run", "logapp:eo"],
        cwd=tmp_path,
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert worker.stderr is not None
        first = worker.stderr.readline()
        worker.send_signal(signal.SIGTERM)
        _, rest = worker.communicate(timeout=60)
    finally:
        worker.kill()
        worker.communicate()
    assert worker.returncode == 0, first + rest
    begins = (
        " INFO exactly_once.worker worker_started "
        if configures == "nobody"
        else "MINE exactly_once.worker worker_started "
    )
    assert begins in first
    assert ("MINE" in rest) == (configures != "nobody")


@pytest.mark.parametrize("processes", [1, 2])
def test_what_is_left_out_of_the_settings_is_said_once_for_all_processes_where_the_log_goes(
    processes: int, sqlite_url: str, tmp_path: Path
) -> None:
    (tmp_path / "logapp.py").write_text(APPLICATION)
    (tmp_path / "loghandlers.py").write_text(HANDLERS + OWN)
    links = {"EXACTLY_ONCE_PORT": "tcp://10.0.0.11:80", "EXACTLY_ONCE_SERVICE_HOST": "10.0.0.11"}
    environment = {name: value for name, value in os.environ.items() if not name.startswith("EXACTLY_ONCE_")} | links
    environment |= {"EXACTLY_ONCE_DATABASE": sqlite_url, "PYTHONPATH": str(ROOT), "EXACTLY_ONCE_TRANSPORT": "sql://"}
    log = tmp_path / "log"
    with log.open("w") as into:
        worker = subprocess.Popen(
            [sys.executable, "-m", "exactly_once", "run", "logapp:eo", "--processes", str(processes)],
            cwd=tmp_path,
            env=environment,
            stderr=into,
        )
    try:
        until(lambda: log.read_text().count("worker_started") == processes)
        worker.send_signal(signal.SIGTERM)
        assert worker.wait(60) == 0
    finally:
        worker.kill()
        worker.wait()
    [said] = [line for line in log.read_text().splitlines() if "left out: Kubernetes" in line]
    assert said.startswith("MINE exactly_once.config settings: EXACTLY_ONCE_PORT, EXACTLY_ONCE_SERVICE_HOST are")
