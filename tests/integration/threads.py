"""Two sides of a race, brought to the same moment without sleeping."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Event, Thread

PATIENCE_S = 30


class Turn:
    """One side comes to a place; the other waits until it is there."""

    def __init__(self) -> None:
        self._event = Event()

    def come(self) -> None:
        self._event.set()

    @property
    def came(self) -> bool:
        return self._event.is_set()

    def wait(self) -> None:
        assert self._event.wait(PATIENCE_S), "the other side never came"


@contextmanager
def in_thread(do: Callable[[], object]) -> Iterator[None]:
    """Run `do` beside the block; its end is waited for, and what it raised is raised here."""
    raised: list[BaseException] = []

    def run() -> None:
        try:
            do()
        except BaseException as error:
            raised.append(error)

    thread = Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        thread.join(PATIENCE_S)
    assert not thread.is_alive(), "the other side never ended"
    if raised:
        raise raised[0]
