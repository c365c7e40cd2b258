"""The test database in a container, for real: on the machine's engine, or one of our own where there is none."""

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor

import pytest
from sqlalchemy import text

from exactly_once.testing import choose
from tests.services import docker_engine
from tests.services.need import require


@pytest.fixture(scope="module")
def container_tests() -> Iterator[Mapping[str, str]]:
    """What to set where test databases are to be in containers."""
    require(docker_engine)
    with docker_engine.container_tests() as environment:
        yield environment


@pytest.fixture
def engine(container_tests: Mapping[str, str], monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """An engine that answers."""
    for name, value in container_tests.items():
        monkeypatch.setenv(name, value)
    return monkeypatch


def test_where_an_engine_answers_the_test_database_is_in_a_container(engine: pytest.MonkeyPatch) -> None:
    engine.delenv("EXACTLY_ONCE_TEST_DATABASE", raising=False)
    engine.delenv("EXACTLY_ONCE_TEST_SOURCE", raising=False)
    server = choose()
    try:
        assert server.source == "container"
        with server.fresh() as database, database.connect() as connection:
            assert connection.scalar(text("SELECT count(*) FROM message_idempotent")) == 0
    finally:
        server.close()


def test_containers_that_start_at_once_all_answer_from_outside(engine: pytest.MonkeyPatch) -> None:
    engine.setenv("EXACTLY_ONCE_TEST_SOURCE", "container")
    with ThreadPoolExecutor(3) as threads:
        starting = [threads.submit(choose) for _ in range(3)]
    servers = [each.result() for each in starting]
    try:
        for server in servers:
            server.drop(server.create(upgraded=False))
    finally:
        for server in servers:
            server.close()


def test_an_engine_without_the_image_is_told_and_done_without(engine: pytest.MonkeyPatch) -> None:
    engine.delenv("EXACTLY_ONCE_TEST_DATABASE", raising=False)
    engine.delenv("EXACTLY_ONCE_TEST_SOURCE", raising=False)
    engine.setenv("EXACTLY_ONCE_TEST_IMAGE", "127.0.0.1:1/no/such/image:ever")
    with pytest.warns(UserWarning, match="no/such/image"):
        server = choose()
    try:
        assert server.source == "embedded"
    finally:
        server.close()
