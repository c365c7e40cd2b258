"""Checks what a handler returns: it must be nothing. Returning means "done", raising means "not done"; nothing else is read.

In other frameworks a listener returns False, a number, a text or an Enum member to say "no". Here that would count as "done", and
the message would be lost. So such a value is refused: at the decorator if the annotation says so, else when it is returned.
Called by `parameters` and by `processing`.
"""

import inspect
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures import Future
from contextlib import AbstractAsyncContextManager, AbstractContextManager
from enum import Enum
from io import IOBase
from numbers import Number
from types import UnionType
from typing import Annotated, Any, Final, Literal, Union, get_args, get_origin

from sqlalchemy.sql import Executable

from exactly_once.errors import ConfigurationError, Misuse, RefusedResult
from exactly_once.handlers.body import shown
from exactly_once.handlers.hints import Hints, signature
from exactly_once.wording.steady_log import steady
from exactly_once.wording.text import escaped

__all__ = ["check_result", "check_returns"]

_ANSWERS: Final = (bool, Number, str, bytes, bytearray, memoryview, Enum, BaseException)
"""Types that are answers. Also exceptions: a returned exception was meant to be raised."""
_INSTEAD: Final = "raise an exception to have the message tried again, Reject(reason) to keep it for a person"
_MOST_LAYERS: Final = 100  # an alias may mean itself

_log = steady("exactly_once.handler")
_told: set[str] = set()


def check_result(result: object, *, in_lists: bool = False, handler: str = "") -> None:
    """Refuse a handler's result if it shows that nothing ran, or if it looks like an answer.

    Args:
        result: The result of a sync handler, or the awaited result of an async handler.
        in_lists: A batch handler returned it.
        handler: The handler's name. One warning for each handler is logged for any other result, which nobody reads.

    Raises:
        Misuse: It is an awaitable, a generator or another iterator, the future of a thread, or a statement of SQLAlchemy: its
            work has not been done, and acknowledging would lose it. Or a batch handler returned any other object: in other
            frameworks that names the messages to redeliver, here nobody reads it.
        RefusedResult: It is a bool, a number, text, bytes, an Enum member, an exception or a numpy scalar (such as
            `(amounts >= 0).all()`): an answer that nobody reads.
    """
    if result is None:
        return
    if _is_answer(type(result)):
        who = f"the handler {handler!r}" if handler else "the handler"
        raise RefusedResult(
            f'{who} returned {_value(result)}, and nobody reads what a handler returns: returning is "done", whatever it'
            f" is. Nothing was committed. Return nothing; {_INSTEAD}."
        )
    if inspect.isgenerator(result) or inspect.isasyncgen(result) or _is_made_of_a_generator(result):
        raise Misuse("the handler returned a generator, so nothing in it ran. Make it a plain function without `yield`")
    if inspect.isawaitable(result):
        if inspect.iscoroutine(result):
            result.close()  # or Python warns of a coroutine never awaited, on top of this error
        raise Misuse(
            "the handler returned something to await, so nothing in it ran. Make it `async def` and await inside"
        )
    if isinstance(result, Future):
        raise Misuse(
            "the handler returned the future of work in another thread, which may not be done, nor go well. Wait for its"
            " result() in the handler, and let no other thread use the session"
        )
    if _is_lazy(type(result)):
        raise Misuse(
            f"the handler returned a {type(result).__name__}, which works only when it is walked through, so nothing in it ran."
            " Walk through it in the handler, with a `for`"
        )
    if isinstance(result, Executable):
        raise Misuse(
            f"the handler returned a statement ({type(result).__name__}) that was not executed, so nothing in it ran. Write"
            " session.execute(...) around it"
        )
    if in_lists:
        raise Misuse(
            f"the batch handler returned a {type(result).__name__}, which nobody reads; nothing was committed. If it names"
            " messages that failed: raise instead, and those that are sound are handled without them. Else return nothing"
        )
    if handler not in _told:
        _told.add(handler)
        _log.warning(
            "handler_result_ignored handler=%s type=%s: nobody reads what a handler returns. If it says how it went, %s;"
            " else return nothing. Said once",
            escaped(handler),
            type(result).__name__,
            _INSTEAD,
        )


def _is_answer(kind: type[Any]) -> bool:
    """Whether the type is one of `_ANSWERS`, or a numpy scalar (numpy's bools and dates are not registered as numbers)."""
    return issubclass(kind, _ANSWERS) or any(
        each.__name__ == "generic" and each.__module__ == "numpy" for each in kind.__mro__
    )


def _is_lazy(kind: type[Any]) -> bool:
    """Whether the type is a lazy iterator (map, filter, zip). Not: the result of an executed statement, a file, a mock."""
    if not issubclass(kind, (Iterator, AsyncIterator)) or issubclass(kind, IOBase):
        return False
    return not any(str(each.__module__).startswith(("sqlalchemy.", "unittest.mock")) for each in kind.__mro__)


def _is_made_of_a_generator(result: object) -> bool:
    """Whether it is the result of a function under @contextmanager, which runs only when it is entered."""
    if not isinstance(result, (AbstractContextManager, AbstractAsyncContextManager)):
        return False
    made = getattr(result, "gen", None)
    return inspect.isgenerator(made) or inspect.isasyncgen(made)


def check_returns(function: Callable[..., object], hints: Hints, *, is_async: bool) -> None:
    """Refuse a handler whose return annotation allows what `check_result` refuses.

    An annotation that cannot be resolved is ignored: the real result is checked later.

    Raises:
        ConfigurationError: The text says what to write instead.
    """
    annotation = signature(function).return_annotation
    if annotation is inspect.Signature.empty:
        return
    for meant in _members(hints.known(annotation), is_async):
        written = (
            f"it is annotated `-> {escaped(annotation if isinstance(annotation, str) else shown(annotation), 80)}`"
        )
        if _is_lazy(meant) or issubclass(meant, (Awaitable, Future, Executable)):
            raise ConfigurationError(
                f"{written}: calling it would run nothing. Make it a plain function without `yield`, or `async def`, and"
                " await inside"
            )
        if _is_answer(meant):
            raise ConfigurationError(
                f'{written}, and nobody reads what a handler returns: returning is "done", whatever it is. Write'
                f" `-> None`; {_INSTEAD}"
            )


def _members(annotation: Any, is_async: bool) -> Iterator[type[Any]]:
    """The classes an annotation allows, as far as they are known."""
    waiting = [annotation]
    for _ in range(_MOST_LAYERS):
        if not waiting:
            return
        at = waiting.pop()
        origin, arguments = get_origin(at), get_args(at)
        if origin is Annotated:
            waiting.append(arguments[0])
        elif origin in (Union, UnionType):
            waiting.extend(arguments)
        elif origin is Literal:
            waiting.extend(type(value) for value in arguments)
        elif is_async and isinstance(origin or at, type) and issubclass(origin or at, Awaitable):
            waiting.extend(arguments[-1:])  # the type of the awaited result
        elif hasattr(at, "__supertype__"):  # a NewType
            waiting.append(at.__supertype__)
        elif hasattr(at, "__value__") and type(at).__name__ == "TypeAliasType":
            waiting.append(at.__value__)
        elif isinstance(origin or at, type):
            yield origin or at


def _value(result: object) -> str:
    if isinstance(result, (bool, Enum)):
        return str(result)
    article = "an" if type(result).__name__[0] in "aeiouAEIOU" else "a"
    return f"{article} {type(result).__name__}"  # not the value, which may be a customer's data
