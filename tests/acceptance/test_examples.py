"""The examples as a reader runs them: the commands of their READMEs, real processes, a fresh database, their own output."""

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from sqlalchemy import Engine, NullPool, create_engine, text

from exactly_once.testing.child import free_ports
from exactly_once.testing.databases import DatabaseServer

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
PATIENCE_S = 180


@pytest.fixture
def environment(eo_server: DatabaseServer, tmp_path: Path) -> Iterator[dict[str, str]]:
    """An empty database, and `python` and `exactly-once` as they would be in an activated environment."""
    if eo_server.dialect != "postgresql":
        pytest.skip(f"the test database is {eo_server.dialect}")
    url = eo_server.create(upgraded=False)
    for command, program in (("python", ""), ("exactly-once", "-m exactly_once"), ("uvicorn", "-m uvicorn")):
        path = tmp_path / command
        path.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {program} "$@"\n')
        path.chmod(0o755)
    ours = {name: value for name, value in os.environ.items() if not name.startswith("EXACTLY_ONCE_")}
    yield ours | {
        "PATH": f"{tmp_path}:{ours['PATH']}",
        "PYTHONPATH": str(ROOT),
        "PYTHONUNBUFFERED": "1",
        "EXACTLY_ONCE_DATABASE": url.render_as_string(hide_password=False),
        "EXACTLY_ONCE_TRANSPORT": "sql://",
    }
    eo_server.drop(url)


def _commands(example: str) -> list[str]:
    """Return the commands of an example's README."""
    readme = (EXAMPLES / example / "README.md").read_text()
    return readme.split("```sh\n")[1].split("```")[0].splitlines()


def _type(command: str, example: str, environment: dict[str, str]) -> str:
    done = subprocess.run(
        shlex.split(command, comments=True),
        cwd=EXAMPLES / example,
        env=environment,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    assert "Traceback" not in done.stderr
    return done.stdout


def _expected(example: str) -> str:
    return (EXAMPLES / example / "expected.txt").read_text()


def test_a_claim_in_your_transaction(environment: dict[str, str]) -> None:
    upgrade, first, again = _commands("claim_in_your_transaction")
    _type(upgrade, "claim_in_your_transaction", environment)
    assert _type(first, "claim_in_your_transaction", environment) == _expected("claim_in_your_transaction")
    second = _type(again, "claim_in_your_transaction", environment)
    assert second == _expected("claim_in_your_transaction").replace("reserved", "done before")


def test_your_consumer_loop(environment: dict[str, str]) -> None:
    upgrade, first = _commands("your_consumer_loop")
    _type(upgrade, "your_consumer_loop", environment)
    assert _type(first, "your_consumer_loop", environment) == _expected("your_consumer_loop")


def test_the_worker(environment: dict[str, str]) -> None:
    upgrade, first, failures = _commands("worker")
    _type(upgrade, "worker", environment)
    assert _type(first, "worker", environment) == _expected("worker")
    listed = _type(failures, "worker", environment)
    assert "A-3" in listed
    assert "0 pieces cannot be reserved" in listed
    assert "A-2" not in listed, "it was asked for later, and then processed"


def test_fastapi_with_a_producer_and_a_worker_beside_it(environment: dict[str, str]) -> None:
    upgrade, serve, work, *_ = _commands("fastapi_producer")
    _type(upgrade, "fastapi_producer", environment)
    (port,) = free_ports()
    processes = []
    try:
        for command in (serve.replace("8000", str(port)), work):
            arguments = shlex.split(command, comments=True)
            # its own output on ours: pytest shows it when the test fails
            processes.append(subprocess.Popen(arguments, cwd=EXAMPLES / "fastapi_producer", env=environment))
        said = _customers(f"http://127.0.0.1:{port}", processes, environment["EXACTLY_ONCE_DATABASE"])
        assert "\n".join(said) + "\n" == _expected("fastapi_producer")
        for process in processes:
            process.send_signal(signal.SIGTERM)
        assert [process.wait(30) for process in processes][1] == 0
    finally:
        for process in processes:
            process.kill()
            process.wait()


def test_a_transport_of_your_own_keeps_the_contract() -> None:
    [command] = _commands("own_transport")
    assert command == "python -m pytest"
    ended = subprocess.run(
        [sys.executable, *command.split()[1:], "-q", "-p", "no:cacheprovider"],
        cwd=EXAMPLES / "own_transport",
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "30 passed, 6 skipped" in ended.stdout, "its README says so"
    skipped = re.findall(r"SKIPPED .*: (.*)", ended.stdout)
    assert skipped
    assert all(each.startswith("this transport declares Features.") for each in skipped), skipped


def _customers(url: str, processes: list[subprocess.Popen[bytes]], database: str) -> list[str]:
    deadline = time.monotonic() + PATIENCE_S
    engine = create_engine(database, poolclass=NullPool)
    with httpx.Client(base_url=url, timeout=10, trust_env=False) as client:
        while not _answers(client):
            assert all(process.poll() is None for process in processes), "a process ended before it served"
            assert time.monotonic() < deadline, "the application does not answer"
            time.sleep(0.1)
        orders = [("A-1", 2), ("A-1", 2), ("A-2", 1), ("A-2", 5)]
        answers = [client.post("/orders", json={"order_no": no, "quantity": n}) for no, n in orders]
        while _waiting(engine):  # the copy too must have been handled before the parcels are counted
            assert time.monotonic() < deadline, f"not packed: {client.get('/parcels').text}"
            time.sleep(0.1)
        parcels = client.get("/parcels")
    return [f"{answer.status_code} {answer.text}" for answer in [*answers, parcels]]


def _waiting(engine: Engine) -> int:
    with engine.connect() as connection:
        return int(connection.execute(text("SELECT count(*) FROM message_queue")).scalar_one())


def _answers(client: httpx.Client) -> bool:
    try:
        return client.get("/parcels").status_code == 200
    except httpx.TransportError:
        return False
