"""Programs that upgrade one empty database at the same moment all end well, and so does the one after a killed one."""

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from sqlalchemy import create_engine, text

import exactly_once.alembic
from exactly_once.errors import SchemaError
from tests.integration.alembic.compared import differences
from tests.integration.user_project import OURS, ROOT, async_url, done, make_project, table_names

# imports first, then waits to be told: the upgrades begin within a millisecond of each other
RUNNER = """
import sys
import exactly_once.alembic, exactly_once.database.schema, alembic.migration, alembic.operations, alembic.script, sqlalchemy
if "+asyncmy" in sys.argv[1]: import asyncmy
elif "+aiosqlite" in sys.argv[1]: import aiosqlite
else: sqlalchemy.create_engine(sys.argv[1])
print("waiting", flush=True)
sys.stdin.readline()
exactly_once.alembic.upgrade(sys.argv[1])
print("done", flush=True)
"""
KILLED = """
import os, signal, sys
from sqlalchemy import create_engine, event
import exactly_once.alembic
engine = create_engine(sys.argv[1])
work, left = sys.argv[2], int(sys.argv[3])
@event.listens_for(engine, "after_cursor_execute")
def count(connection, cursor, statement, parameters, context, executemany):
    global left
    if statement.lstrip().startswith(("CREATE", "DROP", "DELETE", "INSERT")):
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
if work == "upgrade":
    exactly_once.alembic.upgrade(engine)
else:
    exactly_once.alembic.downgrade(engine, version=0)
"""


def start(url: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", RUNNER, url],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def complete(url: str) -> None:
    assert table_names(url) == OURS
    with create_engine(url).connect() as connection:
        assert exactly_once.alembic.check(connection) is None
        assert connection.execute(text("SELECT COUNT(*) FROM exactly_once_version")).scalar() == 1
        assert differences(connection) == []


@pytest.mark.parametrize("driver", ["sync", "async"])
def test_processes_that_upgrade_at_once_all_end_well(empty_url: str, driver: str) -> None:
    url = empty_url if driver == "sync" else async_url(empty_url)
    processes = [start(url) for _ in range(4)]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "waiting\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    for process in processes:
        said, complaint = process.communicate(timeout=60)
        assert (process.returncode, said) == (0, "done\n"), complaint
    complete(empty_url)


def test_threads_of_one_process_that_upgrade_at_once_all_end_well(empty_url: str) -> None:
    engine = create_engine(empty_url)
    with ThreadPoolExecutor(6) as threads:
        for _ in range(3):
            list(threads.map(lambda _: exactly_once.alembic.upgrade(engine), range(6)))
            complete(empty_url)
            exactly_once.alembic.downgrade(engine, version=0)
    engine.dispose()


def test_a_users_own_history_and_db_upgrade_at_once_both_end_well(tmp_path: Path, empty_url: str) -> None:
    project = make_project(tmp_path / "shop", empty_url)
    exactly_once.alembic.revision(project.folder / "history")
    process = start(empty_url)
    assert process.stdout is not None
    process.stdout.readline()
    with ThreadPoolExecutor(1) as thread:
        theirs = thread.submit(project.alembic, "upgrade", "head")
        said, complaint = process.communicate("go\n", timeout=60)
        assert said == "done\n", complaint
        done(theirs.result())
    assert table_names(empty_url) == OURS | {"alembic_version"}
    with create_engine(empty_url).connect() as connection:
        assert exactly_once.alembic.check(connection) is None


def test_an_upgrade_that_finds_another_at_work_waits_for_its_commit(empty_postgres_url: str) -> None:
    engine = create_engine(empty_postgres_url)
    process = start(empty_postgres_url)
    assert process.stdout is not None
    assert process.stdin is not None
    process.stdout.readline()
    with engine.connect() as connection, engine.connect() as observer:
        transaction = connection.begin()
        exactly_once.alembic.upgrade(connection)
        process.stdin.write("go\n")
        process.stdin.flush()
        deadline = time.monotonic() + 30
        while not observer.execute(text("SELECT COUNT(*) FROM pg_locks WHERE NOT granted")).scalar():
            assert time.monotonic() < deadline, "the second did not wait"
            time.sleep(0.01)
        transaction.commit()
    said, complaint = process.communicate(timeout=60)
    assert said == "done\n", complaint
    complete(empty_postgres_url)
    engine.dispose()


@pytest.mark.parametrize("at", [1, 2, 5, 15])
def test_an_upgrade_killed_on_the_way_is_finished_by_the_next(empty_url: str, at: int) -> None:
    kill(empty_url, "upgrade", at)
    if not empty_url.startswith("mysql"):
        assert table_names(empty_url) == set()
    exactly_once.alembic.upgrade(empty_url)
    complete(empty_url)


@pytest.mark.parametrize("at", [1, 5, 8])
@pytest.mark.parametrize("then", ["upgrade", "downgrade"])
def test_a_downgrade_killed_on_the_way_can_be_taken_either_way(empty_url: str, at: int, then: str) -> None:
    exactly_once.alembic.upgrade(empty_url)
    kill(empty_url, "downgrade", at)
    if then == "upgrade":
        exactly_once.alembic.upgrade(empty_url)
        complete(empty_url)
    else:
        exactly_once.alembic.downgrade(empty_url, version=0)
        assert table_names(empty_url) == set()


def test_a_killed_run_does_not_make_a_strangers_table_ours(empty_mariadb_url: str) -> None:
    engine = create_engine(empty_mariadb_url)
    with engine.begin() as connection:
        connection.execute(text("CREATE TABLE message_queue (mine INTEGER)"))
    with pytest.raises(SchemaError):
        exactly_once.alembic.upgrade(engine)
    with pytest.raises(SchemaError):
        exactly_once.alembic.upgrade(engine)
    engine.dispose()


def kill(url: str, work: str, at: int) -> None:
    result = subprocess.run(
        [sys.executable, "-c", KILLED, url, work, str(at)], cwd=ROOT, env=os.environ, capture_output=True, text=True
    )
    assert result.returncode == -signal.SIGKILL, result.stderr
