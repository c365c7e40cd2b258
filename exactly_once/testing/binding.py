"""Binds an application to another database during a test.

It never opens or closes that database, except one given as a URL. Called by tests.
"""

from typing import Any, Final, Generic, TypeVar
from warnings import warn

__all__ = ["bound"]

App = TypeVar("App", bound=Any)


class bound(Generic[App]):  # noqa: N801  (a block, written as contextlib's are)
    """Bind `eo` to `engine` in the block, then restore its previous binding.

    Args:
        eo: The `ExactlyOnce` object of the program under test.
        engine: What `eo.bind` takes: an Engine, a sessionmaker, a URL.

    Example:
        def test_an_order_is_reserved_once(eo_database):
            with bound(shop.consumers.eo, eo_database) as eo:
                eo.process(Message("orders", b'{"order_no": 1}'))
    """

    # Not a generator under @contextmanager: that sets the traceback of a test's exception, which a frozen dataclass refuses.

    _entered = False

    def __init__(self, eo: App, engine: Any) -> None:
        self._eo, self._engine = eo, engine

    def __del__(self) -> None:
        if not self._entered:
            warn(_NOT_ENTERED, stacklevel=2)

    def __enter__(self) -> App:
        self._entered = True
        self._before = self._eo._store_binding  # noqa: SLF001
        # Not bind(): it refuses after messages were handled, and a test runs after other tests.
        self._lent = type(self._before)(self._engine)
        self._eo._store_binding = self._lent  # noqa: SLF001
        return self._eo

    def __exit__(self, *_: object) -> None:
        self._eo._store_binding = self._before  # noqa: SLF001
        self._lent.close()


_NOT_ENTERED: Final = (
    "bound(eo, engine) was made and not entered, so nothing is bound: the test ran on the program's own database. Write"
    " `with bound(eo, engine):` around what is to use the engine."
)
