"""The pytest fixtures: `eo_server`, the server of the session's test databases, and `eo_database`, a new database.

It holds no logic; `databases` has it. Users take it in one of two ways, in a `conftest.py`:

    pytest_plugins = ["exactly_once.testing.fixtures"]
    from exactly_once.testing import eo_database  # noqa: F401
"""

from collections.abc import Iterator

import pytest
from sqlalchemy import Engine

from exactly_once.testing.databases import DatabaseServer, choose

__all__ = ["eo_database", "eo_server"]

_server = pytest.StashKey[DatabaseServer]()


def _server_of(config: pytest.Config) -> DatabaseServer:
    # Kept in pytest's configuration, not in a session fixture that `eo_database` asks for: a user who imports
    # `eo_database` alone would not have that fixture.
    if _server not in config.stash:
        server = choose()
        config.stash[_server] = server
        config.add_cleanup(server.close)
    return config.stash[_server]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Say on which server the tests ran: with three sources, nobody should have to guess."""
    if _server in config.stash:
        terminalreporter.write_line(f"test databases: {config.stash[_server]}")


@pytest.fixture(scope="session")
def eo_server(pytestconfig: pytest.Config) -> DatabaseServer:
    """The server of this session's test databases; started when the first test asks."""
    return _server_of(pytestconfig)


@pytest.fixture
def eo_database(pytestconfig: pytest.Config) -> Iterator[Engine]:
    """An Engine on a new database with our tables in it; disposed and dropped after the test."""
    with _server_of(pytestconfig).fresh() as engine:
        yield engine
