"""What programs that use exactly_once need for their tests: a real database for each test, and an application bound to it.

    from exactly_once.testing import bound, eo_database  # noqa: F401

    def test_an_order_is_reserved_once(eo_database):
        with bound(shop.consumers.eo, eo_database) as eo:
            assert eo.process(Message("orders", b'{"order_no": 1}')).acknowledge

Nothing is imported, started or looked for until a name is used; only the fixtures import pytest.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from exactly_once.testing.binding import bound
    from exactly_once.testing.databases import DatabaseServer, choose
    from exactly_once.testing.fixtures import eo_database, eo_server
    from exactly_once.testing.postgres import EmbeddedPostgres

__all__ = ["DatabaseServer", "EmbeddedPostgres", "bound", "choose", "eo_database", "eo_server"]

_ROOMS = {
    "DatabaseServer": "databases",
    "EmbeddedPostgres": "postgres",
    "bound": "binding",
    "choose": "databases",
    "eo_database": "fixtures",
    "eo_server": "fixtures",
}


def __getattr__(name: str) -> Any:
    if name not in _ROOMS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_ROOMS[name]}"), name)
