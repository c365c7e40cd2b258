"""The tutorial, done: its files are written, its commands typed, in a folder of their own."""

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import create_engine, text

from exactly_once.testing.databases import DatabaseServer

ROOT = Path(__file__).parents[2]
PATIENCE_S = 180
_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def _blocks() -> Iterator[tuple[str, str]]:
    for language, content in _BLOCK.findall((ROOT / "docs" / "tutorial.md").read_text()):
        if "pip install" not in content:  # where the tests run, all that is there
            yield language, content


@pytest.fixture
def environment(eo_server: DatabaseServer, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    programs = tmp_path_factory.mktemp("bin")
    for command, program in (("python", ""), ("exactly-once", "-m exactly_once")):
        (programs / command).write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {program} "$@"\n')
        (programs / command).chmod(0o755)
    ours = {name: value for name, value in os.environ.items() if not name.startswith("EXACTLY_ONCE_")}
    return ours | {
        "PATH": f"{programs}:{ours['PATH']}",
        "PYTHONPATH": str(ROOT),
        # the server that is there anyway, so that none is started for this test alone
        "EXACTLY_ONCE_TEST_DATABASE": eo_server.url.render_as_string(hide_password=False),
    }


def _worker(command: str, folder: Path, environment: dict[str, str]) -> str:
    engine = create_engine(f"sqlite:///{folder / 'shop.db'}")
    with (folder / "said").open("w") as said:
        process = subprocess.Popen(shlex.split(command), cwd=folder, env=environment, stdout=said)
    try:
        deadline = time.monotonic() + PATIENCE_S
        while True:
            with engine.connect() as connection:
                if not connection.execute(text("SELECT count(*) FROM message_queue")).scalar():
                    break
            assert process.poll() is None, "the worker ended by itself"
            assert time.monotonic() < deadline, "the worker did not empty the queue"
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait()
        engine.dispose()
    return (folder / "said").read_text()


def test_the_tutorial_does_what_it_says(environment: dict[str, str], tmp_path: Path) -> None:
    said: dict[str, str] = {}
    for language, content in _blocks():
        if language in ("python", "toml"):
            name = content.partition("\n")[0].removeprefix("# ")
            (tmp_path / name).write_text(content)
            continue
        for command in content.splitlines():
            if command.startswith("exactly-once run"):
                said[command] = _worker(command, tmp_path, environment)
                continue
            done = subprocess.run(
                shlex.split(command),
                cwd=tmp_path,
                env=environment,
                capture_output=True,
                text=True,
                timeout=PATIENCE_S,
                check=False,
            )
            assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
            said[command] = done.stdout
    assert said["exactly-once run consumers:eo"] == "2 of chair for A-1\n"
    listed = said["exactly-once failures list --app consumers:eo"]
    assert "A-2" in listed
    assert "there is no article 'chiar'" in listed
    assert "chiar" in said["exactly-once failures show 1 --app consumers:eo"]
    assert "1 passed" in said["python -m pytest -q"]
