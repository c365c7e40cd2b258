"""A worker starts and PostgreSQL refuses the connection: too many are open, which ends, or the setting is wrong, which does not.

libpq tells no SQLSTATE of that. In a rolling deploy the old workers have what the role may have, and the new one waits for it.
"""

import sys
from collections.abc import Iterator
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from threading import Timer
from time import monotonic
from typing import Any

import psycopg
import pytest
from sqlalchemy import URL, make_url
from sqlalchemy.orm import Session

import exactly_once.alembic
from exactly_once import ExactlyOnce
from exactly_once.alembic import ready
from exactly_once.database.dialects import postgresql_refusal
from exactly_once.database.store import Store
from exactly_once.errors import ConfigurationError
from exactly_once.service import starting
from exactly_once.testing.postgres import EmbeddedPostgres
from exactly_once.transports.contract import Transport
from tests.services.need import need
from tests.services.pgbouncer import PgBouncer, missing

# a role that is named like what another refusal says: the text does not decide
STRANGE = "too many connections"


@pytest.fixture(scope="module")
def server() -> Iterator[EmbeddedPostgres]:
    settings = {"max_connections": "14", "superuser_reserved_connections": "2", "max_wal_senders": "0"}
    with EmbeddedPostgres(settings=settings) as server:
        url = server.create_database("shop")
        exactly_once.alembic.upgrade(url)
        with psycopg.connect(plain(make_url(url)), autocommit=True) as connection:
            for statement in (
                "CREATE ROLE few LOGIN PASSWORD 'few' CONNECTION LIMIT 2",
                f"CREATE ROLE \"{STRANGE}\" LOGIN PASSWORD 'few'",
                "CREATE ROLE other LOGIN PASSWORD 'few'",
                "GRANT ALL ON ALL TABLES IN SCHEMA public TO PUBLIC",
                "CREATE DATABASE small CONNECTION LIMIT 1",
                "CREATE DATABASE closed",
                "REVOKE CONNECT ON DATABASE closed FROM PUBLIC",
            ):
                connection.execute(statement)
        yield server


def plain(url: URL) -> str:
    return url.set(drivername="postgresql").render_as_string(hide_password=False)


def to(server: EmbeddedPostgres, user: str = "other", password: str = "few", database: str = "shop") -> URL:
    return make_url(server.url).set(username=user, password=password, database=database)


def take(stack: ExitStack, url: URL, most: int) -> None:
    """Have so many connections, or as many as there are."""
    for _ in range(most):
        try:
            connection = psycopg.connect(plain(url), connect_timeout=5)
        except psycopg.OperationalError:
            return
        stack.callback(connection.close)


def looked(url: URL) -> str | None:
    """What a worker waits for; raises what it does not wait for."""
    store = Store("default", url)
    try:
        return ready.problem(store)
    finally:
        store.close()


LIMITS: dict[str, Any] = {
    "of a role": lambda server: (to(server, "few"), to(server, "few")),
    "of a database": lambda server: (to(server, database="small"), to(server, STRANGE, database="small")),
    "but the reserved": lambda server: (to(server), to(server, "few")),
}


@pytest.mark.parametrize("which", LIMITS)
def test_too_many_connections_are_waited_for(server: EmbeddedPostgres, which: str) -> None:
    taken, url = LIMITS[which](server)
    with ExitStack() as stack:
        take(stack, taken, 20)
        assert "does not answer" in (looked(url) or "")


def test_a_server_that_is_full_to_the_last_slot_is_waited_for(server: EmbeddedPostgres) -> None:
    with ExitStack() as stack:
        take(stack, to(server), 20)
        take(stack, make_url(server.url), 20)
        assert "does not answer" in (looked(to(server)) or "")


WRONG: dict[str, Any] = {
    "password": lambda server: to(server, password="wrong"),
    "password of a role that is named like another refusal": lambda server: to(server, STRANGE, "wrong"),
    "no password": lambda server: to(server, password=""),
    "role": lambda server: to(server, "nobody"),
    "database": lambda server: to(server, database="nowhere"),
    "right to connect": lambda server: to(server, database="closed"),
    "option": lambda server: to(server).update_query_dict({"options": "-c no_such_setting=1"}),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_setting_is_told(server: EmbeddedPostgres, what: str) -> None:
    with pytest.raises(ConfigurationError, match="cannot be used"):
        looked(WRONG[what](server))


def test_what_libpq_does_not_show_is_read_from_the_text(
    server: EmbeddedPostgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where psycopg has no trace: on other systems than Linux."""
    monkeypatch.delattr(postgresql_refusal.os, "memfd_create")
    with ExitStack() as stack:
        take(stack, to(server, "few"), 20)
        assert "does not answer" in (looked(to(server, "few")) or "")
    with pytest.raises(ConfigurationError):
        looked(to(server, password="wrong"))


def test_a_refusal_that_is_over_by_then_is_waited_for(server: EmbeddedPostgres) -> None:
    with ExitStack() as stack:
        take(stack, to(server, "few"), 20)
        with pytest.raises(psycopg.OperationalError) as refused:
            psycopg.connect(plain(to(server, "few")))
    assert postgresql_refusal.why(refused.value) == ""


@pytest.mark.parametrize("database", ["shop", "nowhere"])
def test_a_pooler_that_is_full_is_waited_for_and_one_that_knows_no_such_database_is_not(
    server: EmbeddedPostgres, database: str
) -> None:
    if reason := missing():
        need(reason)
    with PgBouncer(to(server).render_as_string(hide_password=False), server_connections=1, clients=2) as pooler:
        url = make_url(pooler.url).set(database=database, password="few")
        if database == "nowhere":
            with pytest.raises(ConfigurationError):
                looked(url)
            return
        with ExitStack() as stack:
            take(stack, url, 5)
            assert "does not answer" in (looked(url) or "")


def test_a_worker_starts_once_the_workers_before_it_have_ended(server: EmbeddedPostgres) -> None:
    eo = ExactlyOnce(to(server, "few").render_as_string(hide_password=False), group="shop")

    @eo.handler("orders", key="no")
    def handler(body: dict[str, int]) -> None: ...

    with ExitStack() as stack:
        take(stack, to(server, "few"), 20)
        timer = Timer(12, stack.pop_all().close)  # longer than a setting that looks wrong is looked at
        timer.start()
        try:
            with eo.worker("memory://deploy", concurrency=1, drain_timeout=timedelta(seconds=1)):
                pass
        finally:
            timer.join()


# -- told at once --------------------------------------------------------------------------------------------------------


def started_in_vain(database: str, transport: str) -> tuple[float, str]:
    """How long a start took that is refused, and what it said."""
    eo = ExactlyOnce(database, group="refused")

    @eo.handler("orders", key="no")
    def reserve(session: Session, order: dict[str, Any]) -> None: ...

    began = monotonic()
    with pytest.raises(ConfigurationError) as refused:
        eo.worker(transport).start()
    return monotonic() - began, str(refused.value)


def test_another_client_of_the_same_name_is_told_at_once_and_not_waited_for(
    sqlite_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "rocketmq" / "v5").mkdir(parents=True)
    (tmp_path / "rocketmq" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "rocketmq", raising=False)
    took, said = started_in_vain(sqlite_url, "rocketmq4://127.0.0.1:1")
    assert "rocketmq-python-client, the client of rocketmq://" in said
    assert took < 4
    assert "Waiting for" not in caplog.text


def test_a_wrong_database_is_told_at_once(server: EmbeddedPostgres, caplog: pytest.LogCaptureFixture) -> None:
    took, said = started_in_vain(str(to(server, database="nowhere")).replace("***", "few"), "sql://")
    assert "nowhere cannot be used" in said
    assert took < 4
    assert "Waiting for" not in caplog.text


def test_all_that_is_wrong_is_told_in_one_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "rocketmq" / "v5").mkdir(parents=True)
    (tmp_path / "rocketmq" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "rocketmq", raising=False)
    took, said = started_in_vain(f"sqlite:///{tmp_path / 'new.db'}", "rocketmq4://127.0.0.1:1")
    tables, broker = said.split("\n")
    assert "exactly-once db upgrade" in tables
    assert "rocketmq-python-client, the client of rocketmq://" in broker
    assert took < 4
    _, said = started_in_vain(f"sqlite:///{tmp_path / 'new.db'}", "sql://")
    assert said == tables, "said once, though both look for tables"


class Lacking:
    """A broker that answers and has not what a group needs; at the second look it has, or it has not."""

    def __init__(self, real: Transport, *, made: bool) -> None:
        self._real, self._made, self.looks = real, made, 0

    def check(self, group: str, subscriptions: Any) -> list[str]:
        self.looks += 1
        return [] if self._made and self.looks > 1 else ["Topic orders does not exist. Type: make topic orders"]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)


@pytest.mark.parametrize("made", [True, False])
def test_what_a_broker_lacks_is_told_at_once_and_looked_for_for_a_moment(
    made: bool, sqlite_url: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(starting, "_REFUSED_S", 8.0 if made else 0.5)
    eo = ExactlyOnce(sqlite_url, group="refused")

    @eo.handler("orders", key="no")
    def reserve(session: Session, order: dict[str, Any]) -> None: ...

    lacking: Any = Lacking(eo.transport("sql://"), made=made)
    monkeypatch.setattr(eo, "transport", lambda url: lacking)
    worker = eo.worker("sql://")
    if made:
        with worker:
            assert lacking.looks == 2
    else:
        with pytest.raises(ConfigurationError, match="make topic orders"):
            worker.start()
    [record] = [record for record in caplog.records if record.levelname == "ERROR"]
    assert "make topic orders" in record.getMessage()
    assert "Waiting for" not in caplog.text
