"""Checks the function that a step is to call, and what it returned. Returns what is wrong as a sentence. Pure.

    steps.run("charge", charge())                 called before the step begins, and again at each try
    steps.run("charge", lambda: charge())         it is called with the key
    steps.run("charge", lambda key: acharge())    in a plain handler, which cannot await it

Checked before anything of the step is recorded, where that is possible. Called by `steps` and the ledger; the ledger refuses.
"""

import inspect
from asyncio import Future
from collections.abc import Coroutine
from typing import Any, Final

__all__ = ["KEY", "SESSION", "never_awaited", "not_awaited", "not_to_be_called", "nothing_to_await"]

KEY: Final = "key"
"""The argument that `run` passes."""
SESSION: Final = "session"
"""The argument that `transaction` passes."""
_MEANT: Final = {KEY: "the idempotency key", SESSION: "a session"}


def not_to_be_called(name: object, call: object, argument: str, *, awaited: bool) -> str | None:
    """Return why a step cannot call this, or None.

    Args:
        name: The name of the step.
        call: What the step was given to call.
        argument: KEY or SESSION.
        awaited: Whether the step awaits what the call returns.
    """
    write = f"Write `lambda {argument}: ...` around the call"
    if not callable(call):
        if callable(name):
            return "was given its name behind its function: the name comes first. Nothing ran. Turn them round"
        if inspect.iscoroutine(call):
            call.close()  # or Python warns of a coroutine never awaited, on top of this error
            return f"takes a function, and was given what an `async def` function returned: nothing of it ran. {write}"
        what = _kind(call)
        runs = "it runs already" if isinstance(call, Future) else "it ran already"
        return (
            f"takes a function, and was given what a call returned ({what}): {runs}, outside the step, and would again at"
            f" each try. The step did not begin. Look whether that call had its effect. {write}"
        )
    if not awaited and inspect.iscoroutinefunction(call):
        return f"was given an `async def` function, and {_PLAIN}"
    try:
        inspect.signature(call).bind(None)
    except TypeError:
        return (
            f"calls its function with one argument, {_MEANT[argument]}, and this one cannot be called so: nothing ran."
            f" {write}"
        )
    except ValueError:  # the function is not written in Python
        return None
    return None


def not_awaited(result: object) -> str | None:
    """Return what is wrong with the result of a sync handler's step, or None. If something is, nothing of the step ran."""
    if not inspect.isawaitable(result):
        return None
    if inspect.iscoroutine(result):
        result.close()
    return f"was given a function that returns something to await, and {_PLAIN}"


def nothing_to_await(result: object) -> str | None:
    """Return why an async handler's step cannot await this result, or None."""
    if inspect.isawaitable(result):
        return None
    return f"was given a function that returned no awaitable ({_kind(result)}), and AsyncSteps awaits it"


def never_awaited(made: list[tuple[str, Coroutine[Any, Any, Any]]]) -> str | None:
    """Return the first step that was not awaited, or None. Closes all such steps, so that none can begin any more."""
    found: str | None = None
    for name, coroutine in made:
        if inspect.getcoroutinestate(coroutine) == inspect.CORO_CREATED:
            coroutine.close()
            found = name if found is None else found
    return found


def _kind(value: object) -> str:
    return "None" if value is None else type(value).__qualname__


_PLAIN: Final = (
    "the handler is a plain `def`, which cannot await it: nothing of it ran. Write `async def`, and ask for AsyncSteps"
)
