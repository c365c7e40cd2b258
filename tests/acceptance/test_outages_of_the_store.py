"""The store answers and cannot work: read only, its disk full, out of connections. Held until it can; nothing is counted."""

import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from tempfile import mkdtemp
from threading import Event
from typing import Any

import pytest
from sqlalchemy import NullPool, create_engine, make_url, text
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

import exactly_once.alembic
from exactly_once import ExactlyOnce, Lease, Message, Retry
from exactly_once.testing.postgres import EmbeddedPostgres
from tests.services.mariadb import MariaDB
from tests.services.need import need
from tests.waiting import until

PATIENCE_S = 60.0
ROWS = 10  # of one message
ONE = Retry(immediate=0, max_attempts=1)
COLOURS = ("sync", "async")
GUARDS: dict[str, dict[str, Any]] = {
    "alone": {},
    "group": {"batch": 10},
    "lease": {"guard": Lease(timedelta(seconds=30))},
}


def application(url: str, colour: str, goes_on: Event | None = None, **more: Any) -> ExactlyOnce:
    """One handler that writes much, of no pattern, and fails for good at its first failure; `plain` waits for `goes_on`."""
    eo = ExactlyOnce(url, group="store")

    def effect(no: str) -> list[dict[str, Any]]:
        # in rows that fit into a page: MariaDB 10.11 ends itself where a larger value finds no room
        return [{"no": f"{no}-{n}", "bulk": os.urandom(7_000)} for n in range(ROWS)]

    put = text("INSERT INTO effect (no, bulk) VALUES (:no, :bulk)")
    if colour == "async":

        @eo.handler("orders", name="handler", key="no", retry=ONE, **more)
        async def awaited(session: AsyncSession, body: dict[str, str]) -> None:
            await session.execute(put, effect(body["no"]))
    else:

        @eo.handler("orders", name="handler", key="no", retry=ONE, **more)
        def plain(session: Session, body: dict[str, str]) -> None:
            assert goes_on is None or goes_on.wait(PATIENCE_S)
            session.execute(put, effect(body["no"]))

    return eo


def prepare(url: str) -> None:
    exactly_once.alembic.upgrade(url)
    blob = {"postgresql": "bytea", "sqlite": "blob"}.get(make_url(url).get_backend_name(), "longblob")
    run(url, f"CREATE TABLE effect (no varchar(64) PRIMARY KEY, bulk {blob})")


def run(url: str, *statements: str) -> None:
    engine = create_engine(url, poolclass=NullPool)
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        for statement in statements:
            connection.execute(text(statement))


def count(url: str, table: str) -> int:
    with create_engine(url, poolclass=NullPool).connect() as connection:
        return int(connection.execute(text(f"SELECT count(*) FROM {table}")).scalar_one())


def messages(first: int, last: int) -> list[Message]:
    return [Message("orders", json.dumps({"no": f"o-{n}"}).encode()) for n in range(first, last)]


def story(
    url: str, name: str, colour: str, guard: str, begin: Callable[[], None], end: Callable[[], None], *, transport: str
) -> None:
    """Ten messages before, fifty while the store cannot work; all are done after it, and none was counted."""
    goes_on = Event()
    goes_on.set()
    eo = application(url, colour, goes_on, **GUARDS[guard])
    where = f"memory://{name}-{colour}-{guard}" if transport == "memory" else "sql://?invisible_s=5"
    with eo.worker(where, concurrency=3) as worker, eo.producer(where) as producer:
        producer.send_all(messages(0, 10))
        worker.drain()
        if transport == "sql":
            goes_on.clear()  # sent while there is room, and handled when there is none
            producer.send_all(messages(10, 60))
            begin()
            goes_on.set()
        else:
            begin()
            producer.send_all(messages(10, 60))
        until(lambda: worker.unready() is not None, lambda: worker.counts)
        time.sleep(1.5)  # so long that it is looked at more than once
        assert worker.unready() is not None, "it still cannot work"
        end()
        until(lambda: worker.unready() is None, lambda: worker.counts)
        worker.drain(timedelta(seconds=PATIENCE_S))
        outcomes = worker.counts.outcomes
    assert (outcomes["dead"], outcomes["failed"]) == (0, 0)
    assert count(url, "effect") == 60 * ROWS
    assert count(url, "message_failure") == 0


# -- read only ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("colour", COLOURS)
@pytest.mark.parametrize("guard", GUARDS)
def test_postgresql_that_was_read_only_for_new_sessions_is_written_to_again(
    own_postgres: EmbeddedPostgres, colour: str, guard: str
) -> None:
    url = own_postgres.create_database("shop")
    prepare(url)
    admin = own_postgres.url

    def begin() -> None:
        run(
            admin,
            "ALTER DATABASE shop SET default_transaction_read_only = on",
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = 'shop'",
        )

    def end() -> None:
        run(admin, "ALTER DATABASE shop RESET default_transaction_read_only")

    story(url, "pg-readonly", colour, guard, begin, end, transport="memory")


CANNOT_WRITE = {
    "tx-read-only": ("SET GLOBAL tx_read_only = 1", "SET GLOBAL tx_read_only = 0"),
    "read-only": ("SET GLOBAL read_only = 1", "SET GLOBAL read_only = 0"),
    # lets connections in, and refuses each statement
    "expired-password": (
        "ALTER USER worker@'127.0.0.1' PASSWORD EXPIRE",
        "ALTER USER worker@'127.0.0.1' IDENTIFIED BY 'w' PASSWORD EXPIRE NEVER",
    ),
}


@pytest.mark.parametrize("colour", COLOURS)
@pytest.mark.parametrize("why", CANNOT_WRITE)
def test_mariadb_that_could_not_be_written_to_is_written_to_again(own_mariadb: MariaDB, colour: str, why: str) -> None:
    url = own_mariadb.create_database("shop")
    prepare(url)
    run(url, "CREATE USER worker@'127.0.0.1' IDENTIFIED BY 'w'", "GRANT ALL ON shop.* TO worker@'127.0.0.1'")
    user = make_url(url).set(username="worker", password="w").render_as_string(hide_password=False)

    def begin() -> None:
        run(url, CANNOT_WRITE[why][0])
        engine = create_engine(url, poolclass=NullPool)
        with engine.connect() as connection:
            mine = connection.execute(text("SELECT id FROM information_schema.processlist WHERE user = 'worker'"))
            for id_ in mine.scalars().all():
                connection.execute(text(f"KILL {id_}"))

    def end() -> None:
        run(url, CANNOT_WRITE[why][1])

    story(user, f"maria-{why}", colour, "alone", begin, end, transport="memory")


def test_an_outage_ends_where_the_pool_holds_the_last_connections_that_the_server_gives(
    own_postgres: EmbeddedPostgres,
) -> None:
    url = own_postgres.create_database("shop")
    prepare(url)
    run(
        own_postgres.url,
        "CREATE ROLE shop LOGIN PASSWORD 'shop'",
        "ALTER ROLE shop CONNECTION LIMIT 2",
    )
    run(url, "GRANT ALL ON ALL TABLES IN SCHEMA public TO shop")
    run(url, "GRANT ALL ON ALL SEQUENCES IN SCHEMA public TO shop")
    user = make_url(url).set(username="shop", password="shop").render_as_string(hide_password=False)
    eo = application(user, "sync")
    with eo.worker("memory://few", concurrency=6) as worker, eo.producer("memory://few") as producer:
        producer.send_all(messages(0, 60))
        worker.drain(timedelta(seconds=PATIENCE_S))
        assert worker.counts.outcomes["dead"] == 0
    assert count(url, "effect") == 60 * ROWS
    assert count(url, "message_failure") == 0


# -- a full disk --------------------------------------------------------------------------------------------------------


@contextmanager
def small_disk(megabytes: int) -> Iterator[Path]:
    """A file system of this size, which a test fills."""
    folder = Path(mkdtemp(prefix="exactly-once-disk-"))
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m,mode=0777", "tmpfs", str(folder)],
        capture_output=True,
        text=True,
    )
    if made.returncode != 0:
        folder.rmdir()
        need(f"no file system can be mounted here ({made.stderr.strip()}); run the tests as root")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=False)
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def disk() -> Iterator[Path]:
    if shutil.which("mount") is None:
        need("there is no `mount` here")
    with small_disk(120) as folder:
        yield folder


def fill(folder: Path) -> None:
    """Leave not a byte of it."""
    for size in (2**20, 4096, 1):
        with (folder / f"filler-{size}").open("wb", buffering=0) as file:
            try:
                while True:
                    file.write(b"\0" * size)
            except OSError:
                continue


def clear(folder: Path) -> None:
    for file in folder.glob("filler-*"):
        file.unlink()


def on_the_disk(server: MariaDB, disk: Path) -> str:
    """A database whose tables are on the small disk; with its own logs there, too, the server ends itself when it is full."""
    url = server.create_database("shop")
    here = server.directory / "data" / "shop"
    shutil.move(here, disk / "shop")
    here.symlink_to(disk / "shop")
    account = os.stat(server.directory / "data")
    for path in (disk / "shop", *(disk / "shop").iterdir()):
        os.chown(path, account.st_uid, account.st_gid)
    prepare(url)
    return url


@pytest.mark.parametrize("colour", COLOURS)
@pytest.mark.parametrize("guard", GUARDS)
def test_mariadb_whose_disk_was_full_has_done_everything_once_there_is_room(
    own_mariadb: MariaDB, disk: Path, colour: str, guard: str
) -> None:
    url = on_the_disk(own_mariadb, disk)
    story(url, "maria-full", colour, guard, lambda: fill(disk), lambda: clear(disk), transport="memory")


def test_the_queue_in_a_table_goes_on_once_there_is_room(own_mariadb: MariaDB, disk: Path) -> None:
    url = on_the_disk(own_mariadb, disk)
    story(url, "maria-full-sql", "sync", "alone", lambda: fill(disk), lambda: clear(disk), transport="sql")


@pytest.mark.parametrize("colour", COLOURS)
def test_postgresql_whose_tables_disk_was_full_has_done_everything_once_there_is_room(
    own_postgres: EmbeddedPostgres, disk: Path, colour: str
) -> None:
    place = disk / "tables"
    place.mkdir()
    account = os.stat(own_postgres.directory / "data")
    os.chown(place, account.st_uid, account.st_gid)
    run(own_postgres.url, f"CREATE TABLESPACE small LOCATION '{place}'", "CREATE DATABASE shop TABLESPACE small")
    url = make_url(own_postgres.url).set(database="shop").render_as_string(hide_password=False)
    prepare(url)
    story(url, "pg-full", colour, "alone", lambda: fill(disk), lambda: clear(disk), transport="memory")


@pytest.mark.parametrize("colour", COLOURS)
def test_sqlite_whose_disk_was_full_has_done_everything_once_there_is_room(disk: Path, colour: str) -> None:
    url = f"sqlite:///{disk / 'shop.db'}"
    prepare(url)
    story(url, "sqlite-full", colour, "alone", lambda: fill(disk), lambda: clear(disk), transport="memory")


# -- what says the same of one message ----------------------------------------------------------------------------------


@pytest.mark.parametrize("colour", COLOURS)
def test_a_full_table_of_the_handlers_own_in_memory_is_a_failure_and_others_go_on(
    own_mariadb: MariaDB, colour: str
) -> None:
    url = own_mariadb.create_database("shop")
    exactly_once.alembic.upgrade(url)
    run(
        url,
        "SET GLOBAL max_heap_table_size = 16384",
        "CREATE TABLE effect (no varchar(64) PRIMARY KEY, bulk longblob)",
    )
    engine = create_engine(url, poolclass=NullPool)
    with engine.connect() as connection:
        connection.execute(text("SET max_heap_table_size = 16384"))
        connection.execute(text("CREATE TABLE small (a char(255)) ENGINE=MEMORY"))
    eo = application(url, colour)

    @eo.handler("hot", name="hot", key="no", retry=ONE)
    def hot(session: Session, body: dict[str, str]) -> None:
        for _ in range(500):
            session.execute(text("INSERT INTO small VALUES ('x')"))

    where = f"memory://heap-{colour}"
    with eo.worker(where, concurrency=2) as worker, eo.producer(where) as producer:
        producer.send(Message("hot", b'{"no": "h"}'))
        producer.send_all(messages(0, 10))
        worker.drain()
        assert (worker.counts.outcomes["processed"], worker.counts.outcomes["dead"]) == (10, 1)
