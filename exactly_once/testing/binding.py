"""Lends an application another database for the length of a test.

It never opens or closes that database, except one given as a URL, which it opens and closes. Called by tests.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

__all__ = ["bound"]

App = TypeVar("App", bound=Any)


@contextmanager
def bound(eo: App, engine: Any) -> Iterator[App]:
    """Bind `eo` to `engine` for the block, then give it back the binding it had.

    Args:
        eo: The `ExactlyOnce` object of the program under test.
        engine: What `eo.bind` takes: an Engine, a sessionmaker, a URL.

    Example:
        def test_an_order_is_reserved_once(eo_database):
            with bound(shop.consumers.eo, eo_database) as eo:
                eo.process(Message("orders", b'{"order_no": 1}'))
    """
    before = eo._store_binding  # noqa: SLF001
    # not bind(): that refuses once messages were handled, and a test comes after other tests
    lent = type(before)(engine)
    eo._store_binding = lent  # noqa: SLF001
    try:
        yield eo
    finally:
        eo._store_binding = before  # noqa: SLF001
        lent.close()
