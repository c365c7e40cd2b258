"""Waiting for a condition with a deadline: what tests do in place of sleeping."""

from collections.abc import Callable
from time import monotonic, sleep

__all__ = ["PATIENCE_S", "until"]

PATIENCE_S = 60.0


def until(
    condition: Callable[[], object], what: str | Callable[[], object] = "in vain", patience_s: float = PATIENCE_S
) -> None:
    """Wait until it is so.

    Args:
        condition: Asked a hundred times a second.
        what: Is to become so; or says, when it did not, what was the case instead.
        patience_s: Then it will not become so.
    """
    deadline = monotonic() + patience_s
    while not condition():
        assert monotonic() < deadline, what() if callable(what) else what
        sleep(0.01)
