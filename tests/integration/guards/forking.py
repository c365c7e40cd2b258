"""A child that is forked, does something, and says what came of it; with a deadline, for what is tested may hang."""

import os
import pickle
import select
import signal
import traceback
from collections.abc import Callable
from typing import Any, Self

__all__ = ["Forked", "forked"]


class Forked:
    """A process forked off this one, which calls `do` and ends without any exit code of Python's."""

    def __init__(self, do: Callable[[], Any]) -> None:
        self._out, into = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            try:
                said: Any = ("returned", do())
            except BaseException as error:
                said = ("raised", type(error).__name__, str(error), traceback.format_exc())
            try:
                with os.fdopen(into, "wb") as pipe:
                    pickle.dump(said, pipe)
            finally:
                os._exit(0)
        os.close(into)

    def result(self, seconds: float = 30.0) -> Any:
        """What it returned; raises what it raised, or that it did not end in time."""
        kind, *said = self.said(seconds)
        assert kind == "returned", said
        return said[0]

    def said(self, seconds: float = 30.0) -> Any:
        """`("returned", value)`, or `("raised", class, text, trace)`."""
        try:
            with os.fdopen(self._out, "rb") as pipe:
                if not select.select([pipe], [], [], seconds)[0]:
                    raise AssertionError(f"The child {self.pid} hangs.")
                return pickle.load(pipe)
        finally:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None: ...


def forked(do: Callable[[], Any]) -> Any:
    """Do it in a child and return what it returned."""
    return Forked(do).result()
