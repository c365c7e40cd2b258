"""What a handler may return: nothing. It says "done" by returning and "not done" by raising, and nothing else is read.

Elsewhere a listener says "no" with False, with a number, a text or a member of an Enum. Taken for "done" here, the message
would be lost, so such a value is refused: when the handler is decorated, if it is annotated so; else when it is returned.
Called by the handler's parameters and by whoever calls handlers.
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
"""An exception, too: returned, it was meant to be raised."""
_INSTEAD: Final = "raise an exception to have the message tried again, Reject(reason) to keep it for a person"
_MOST_LAYERS: Final = 100  # an alias may mean itself

_log = steady("exactly_once.handler")
_told: set[str] = set()


def check_result(result: object, *, in_lists: bool = False, handler: str = "") -> None:
    """Refuse what a handler returned, if it shows that nothing ran, or that it means to say how it went.

    Args:
        result: What a plain handler returned, or what an async one gave when awaited.
        in_lists: A batch handler returned it.
        handler: Its name. Of each, one warning is logged for a result that nobody reads.

    Raises:
        Misuse: It is an awaitable, a generator or another iterator, the future of a thread, or a statement of SQLAlchemy's: the
            work in it has not been done, and acknowledging would lose it. Or a batch handler returned any other object:
            elsewhere that names the messages to bring again, here nobody reads it.
        RefusedResult: It is a bool, a number, text, bytes, a member of an Enum, an exception or a scalar of numpy's (as
            `(amounts >= 0).all()` is): an answer that nobody reads.
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
    """One of these, or a scalar of numpy's, of which not all are registered as numbers: its bools and dates are not."""
    return issubclass(kind, _ANSWERS) or any(
        each.__name__ == "generic" and each.__module__ == "numpy" for each in kind.__mro__
    )


def _is_lazy(kind: type[Any]) -> bool:
    """An iterator: map, filter, zip. Not what a statement gave that was executed, a file, nor a mock of a test's."""
    if not issubclass(kind, (Iterator, AsyncIterator)) or issubclass(kind, IOBase):
        return False
    return not any(str(each.__module__).startswith(("sqlalchemy.", "unittest.mock")) for each in kind.__mro__)


def _is_made_of_a_generator(result: object) -> bool:
    """What a function under @contextmanager returns: it runs when it is entered."""
    if not isinstance(result, (AbstractContextManager, AbstractAsyncContextManager)):
        return False
    made = getattr(result, "gen", None)
    return inspect.isgenerator(made) or inspect.isasyncgen(made)


def check_returns(function: Callable[..., object], hints: Hints, *, is_async: bool) -> None:
    """Refuse a handler that is annotated to return what `check_result` refuses.

    An annotation that cannot be resolved is left alone: what is then really returned is looked at.

    Raises:
        ConfigurationError: The sentence says what to write instead.
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
            waiting.extend(arguments[-1:])  # what it gives when awaited
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
    return f"{article} {type(result).__name__}"  # not the value: it may be a customer's
