"""The server of the tests that must not read error messages really speaks another language."""

import psycopg
import pytest

from tests.services import postgres_debian
from tests.services.need import require


def test_debians_postgresql_is_ours_alone() -> None:
    require(postgres_debian)
    with (
        postgres_debian.DebianPostgres() as server,
        psycopg.connect(server.url.replace("+psycopg", "")) as connection,
    ):
        assert connection.execute("SHOW data_directory").fetchone() == (str(server.directory / "data"),)


def test_a_german_server_says_its_errors_in_german(german_postgres_url: str) -> None:
    with psycopg.connect(german_postgres_url.replace("+psycopg", "")) as connection:
        connection.execute("CREATE TABLE shelf (item integer PRIMARY KEY)")
        connection.execute("INSERT INTO shelf VALUES (1)")
        with pytest.raises(psycopg.errors.UniqueViolation, match="doppelter Schlüsselwert"):
            connection.execute("INSERT INTO shelf VALUES (1)")
