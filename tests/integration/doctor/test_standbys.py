"""The doctor names servers that follow the database and may take over without what was acknowledged; real ones follow it here."""

import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import create_engine, make_url, text

from exactly_once.doctor.finding import Mark
from exactly_once.doctor.standbys import findings_for_standbys
from exactly_once.testing.child import Child
from tests.services import mariadb as mariadb_service
from tests.services import postgres_debian
from tests.services.mariadb import MYSQLD, MariaDB
from tests.services.need import need, require
from tests.services.postgres_debian import DebianPostgres
from tests.waiting import until


def said(url: str) -> list[tuple[Mark, str]]:
    engine = create_engine(url)
    with engine.connect() as connection:
        found = [(each.mark, each.text) for each in findings_for_standbys("database 'default'", connection)]
    engine.dispose()
    return found


def told(url: str, *statements: str) -> None:
    engine = create_engine(url, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        for statement in statements:
            connection.execute(text(statement))
    engine.dispose()


@pytest.fixture
def primary() -> Iterator[DebianPostgres]:
    require(postgres_debian)
    server = DebianPostgres(settings={"wal_level": "replica", "max_wal_senders": "4"})
    server.start()
    try:
        yield server
    finally:
        server.close()


def test_postgresqls_asynchronous_standbys_are_warned_of(primary: DebianPostgres) -> None:
    url = primary.create_database("followed")
    assert said(url) == []
    follower = Path(tempfile.mkdtemp(prefix="exactly-once-follower-"))
    program = next(Path("/usr/lib/postgresql").glob("*/bin/pg_receivewal"))
    at = make_url(url)
    by = f"host=127.0.0.1 port={at.port} user={at.username} password={at.password}"
    child = Child(
        "pg_receivewal",
        [str(program), "--no-password", "-D", str(follower), "-d", by, "--synchronous"],
        output=follower / "log",
    )
    try:
        child.start()
        until(lambda: said(url), "the standby follows")
        ((mark, words),) = said(url)
        assert mark is Mark.WARN
        assert "1 server(s) follow it, and no commit waits for them" in words
        assert "synchronous_standby_names" in words
        told(url, "ALTER SYSTEM SET synchronous_standby_names = 'ANY 1 (*)'", "SELECT pg_reload_conf()")
        until(lambda: said(url)[0][0] is Mark.OK, "the setting is read")
    finally:
        child.end(signal.SIGKILL)
        shutil.rmtree(follower, ignore_errors=True)


@pytest.mark.skipif(bool(MYSQLD), reason="its replication speaks other words; the status read is the same")
def test_mariadbs_asynchronous_replicas_are_warned_of() -> None:
    need(mariadb_service.missing())
    log = {"log-bin": "binlog", "server-id": "1"}
    with MariaDB(settings=log) as primary, MariaDB(settings={"server-id": "2"}) as replica:
        url = primary.create_database("followed")
        assert said(url) == []
        told(
            f"{replica.url}/mysql",
            f"CHANGE MASTER TO MASTER_HOST='127.0.0.1', MASTER_PORT={primary.port}, MASTER_USER='root', MASTER_SSL=0",
            "START SLAVE",
        )
        until(lambda: said(url), "the replica follows")
        ((mark, words),) = said(url)
        assert mark is Mark.WARN
        assert "1 replica(s) follow it, and no commit waits for them" in words
        told(f"{replica.url}/mysql", "STOP SLAVE", "SET GLOBAL rpl_semi_sync_slave_enabled = ON", "START SLAVE")
        told(url, "SET GLOBAL rpl_semi_sync_master_enabled = ON")
        until(lambda: said(url)[0][0] is Mark.OK, "commits wait for it")
