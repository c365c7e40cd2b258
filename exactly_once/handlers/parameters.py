"""Decides, at the decorator, what each parameter of a handler is filled with, from its annotation.

`Session`, `AsyncSession`, `Message`, `Steps` and `AsyncSteps` are known by class. One other parameter without a default is the
body. A parameter with a default is never filled. Never calls a handler. Called by the handler's plan.
"""

import inspect
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from operator import itemgetter
from typing import Annotated, Any, Final, get_args, get_origin

from sqlalchemy.orm import Session

from exactly_once.errors import ConfigurationError
from exactly_once.handlers.body import shown, without_none
from exactly_once.handlers.hints import Hints, signature
from exactly_once.handlers.results import check_returns
from exactly_once.handlers.steps import AsyncSteps, Steps
from exactly_once.message import Message

__all__ = ["NO_BODY", "Parameters", "Values", "parameters"]

Values = tuple[Any, Any, Message, Any]
"""Session, body, message and steps of one attempt, in this order."""
_SESSION, _BODY, _MESSAGE, _STEPS = range(4)
_VARIABLE: Final = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
NO_BODY: Final = inspect.Parameter.empty
"""The body annotation of a handler without a body parameter."""


@dataclass(frozen=True, slots=True)
class Parameters:
    """What was decided about the parameters of one handler."""

    is_async: bool
    session_type: type[Any] | None
    """The annotation of the session parameter. None: no such parameter."""
    body_name: str
    body_annotation: Any
    """`NO_BODY`: no such parameter."""
    positional: Callable[[Values], Sequence[Any]]
    named: tuple[tuple[str, int], ...]
    """Keyword-only parameters, each with its place in `Values`."""
    takes_steps: bool = False


def parameters(function: Callable[..., object], hints: Hints, *, in_lists: bool = False) -> Parameters:
    """Decide what each parameter of a handler is filled with.

    Args:
        function: The handler.
        hints: Its annotations.
        in_lists: The handler takes lists of bodies and messages. The result then describes their elements.

    Raises:
        ConfigurationError: A parameter cannot be filled, or the function can never run as a handler.
    """
    is_async = _is_async(function)
    if not hasattr(next(_layers(function)), "__wrapped__"):  # else a decorator wraps it, and has a result of its own
        check_returns(function, hints, is_async=is_async)
    places: list[int] = []
    named: list[tuple[str, int]] = []
    filled: dict[int, tuple[str, Any]] = {}
    for parameter in _wanted(function, hints):
        place, annotation = _purpose(parameter, hints, in_lists)
        if place in filled:
            raise ConfigurationError(_twice(place, filled[place][0], parameter.name))
        filled[place] = parameter.name, annotation
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY:
            named.append((parameter.name, place))
        else:
            places.append(place)
    if _BODY not in filled and _MESSAGE not in filled:
        _check_empty_handed(function, in_lists)
    session_type = filled[_SESSION][1] if _SESSION in filled else None
    _check_colour(is_async, session_type)
    takes_steps = _STEPS in filled
    if takes_steps:
        _check_steps(is_async, filled[_STEPS][1])
    body = filled.get(_BODY, ("", NO_BODY))
    return Parameters(is_async, session_type, *body, _picker(places), tuple(named), takes_steps)


def _wanted(function: Callable[..., object], hints: Hints) -> list[inspect.Parameter]:
    """Return the parameters that we fill: those without a default. The user may inject others by defaults or partials."""
    every = list(signature(function).parameters.values())
    wanted = [each for each in every if each.default is inspect.Parameter.empty and each.kind not in _VARIABLE]
    _check_defaults(function, every, hints)
    if not wanted and any(each.kind in _VARIABLE for each in every):
        raise ConfigurationError(
            "it takes *args and **kwargs only, so nobody can know what it wants. If a decorator below @eo.handler made "
            "it so, put @functools.wraps on that decorator's inner function"
        )
    if not wanted:
        raise ConfigurationError(
            "it has no parameter to fill. Give it at least `session: Session` or `message: Message`"
        )
    return wanted


def _check_defaults(function: Callable[..., object], every: Iterable[inspect.Parameter], hints: Hints) -> None:
    """Refuse a default for a parameter that only we can fill, such as the marker object of another framework.

    None, an object of the annotated class, and everything that a partial binds are the user's own choice.
    """
    bound: set[str] = set()
    at = function
    while isinstance(at, partial):
        bound.update(at.keywords)
        at = at.func
    for parameter in every:
        default = parameter.default
        if default is inspect.Parameter.empty or default is None or parameter.name in bound:
            continue
        if parameter.annotation is inspect.Parameter.empty:
            continue
        plain, _ = without_none(hints.known(parameter.annotation))  # never filled, so nothing is imported for it
        try:
            place, kind = _place(parameter.name, plain)
        except ConfigurationError:
            continue
        if place != _BODY and not isinstance(default, kind):
            raise ConfigurationError(
                f"`{parameter.name}` has a default ({type(default).__name__}(...)), so it is never filled. Take the default"
                " away: a handler is called by its messages, and is no route"
            )


def _check_empty_handed(function: Callable[..., object], in_lists: bool) -> None:
    """Refuse a handler that gets neither body nor message, but seems to want one: it would acknowledge messages unread."""
    for name, parameter in signature(function).parameters.items():
        if parameter.kind in _VARIABLE:
            stars = "*" if parameter.kind is inspect.Parameter.VAR_POSITIONAL else "**"
            raise ConfigurationError(
                f"`{stars}{name}` is never filled, so it would run without its message. Write one parameter for the body,"
                f" such as `{name}: {'list[dict]' if in_lists else 'dict'}`, or for the message; or take it away"
            )
        if parameter.default is None or (isinstance(parameter.default, (dict, list, tuple)) and not parameter.default):
            raise ConfigurationError(
                f"`{name}` has a default, so it is never filled, and the handler would run without its message. Take the"
                f" default away; if a message may have no body, write `{name}: Order | None`"
            )
    if in_lists:
        raise ConfigurationError(
            "it asks for no list, so it would run without its messages (a parameter with a default is never filled)."
            " Write `orders: list[Order]` for the bodies, or `messages: list[Message]`"
        )


def _purpose(parameter: inspect.Parameter, hints: Hints, in_lists: bool) -> tuple[int, Any]:
    if parameter.annotation is inspect.Parameter.empty:
        if parameter.name in ("self", "cls"):
            raise ConfigurationError(
                f"it is a method and {parameter.name!r} is not bound. Register the bound method once the object exists: "
                "eo.handler(...)(service.method)"
            )
        raise ConfigurationError(
            f"the parameter {parameter.name!r} has no annotation. Write `{parameter.name}: Session`, `: Message`, "
            "`: dict` or the body's model; or give it a default, and it is left alone"
        )
    annotation = hints.resolve(parameter.annotation)
    return _listed(parameter.name, annotation) if in_lists else _place(parameter.name, annotation)


def _listed(name: str, annotation: Any) -> tuple[int, Any]:
    """The same for a batch handler: for bodies and messages the elements of the lists decide."""
    listed = get_origin(annotation) in (list, Sequence) and bool(get_args(annotation))
    place, kind = _place(name, get_args(annotation)[0] if listed else annotation)
    if place == _STEPS:
        raise ConfigurationError(
            f"`{name}: {kind.__name__}`: steps are of one message under a lease, and a list's are in one transaction. Take"
            " it away; or take one message a call, with @eo.handler(..., guard=Lease(timedelta(minutes=10)))"
        )
    if listed is (place == _SESSION):
        wanted = (
            kind.__name__ if place == _SESSION else f"list[{'Message' if place == _MESSAGE else _element(annotation)}]"
        )
        raise ConfigurationError(
            f"a batch handler gets one session, and bodies and messages in lists. Write `{name}: {wanted}`"
        )
    return place, kind


def _element(annotation: Any) -> str:
    """Return what the list's elements should be, from an annotation of a single one or of another collection."""
    plain, _ = without_none(annotation)
    while get_origin(plain) is Annotated or hasattr(plain, "__value__"):  # or a `type X = ...` alias
        plain = plain.__value__ if hasattr(plain, "__value__") else get_args(plain)[0]
    holder, inside = get_origin(plain) or plain, get_args(plain)
    if holder not in (list, set, frozenset, Sequence, Iterable, Iterator, Collection) and inside[1:] != (...,):
        return shown(plain)
    return shown(inside[0]) if inside else "dict"


def _place(name: str, annotation: Any) -> tuple[int, Any]:
    """Return what a parameter with this annotation is filled with, and the class or annotation that decides how."""
    plain, optional = without_none(annotation)
    base = get_origin(plain) or plain
    if not isinstance(base, type):
        return _BODY, annotation
    if issubclass(base, Message):
        return _MESSAGE, base
    if issubclass(base, (Steps, AsyncSteps)):
        return _STEPS, base
    if issubclass(base, Session) or _is_async_session(base):
        if optional:
            raise ConfigurationError(f"the session is always there: write `{name}: {base.__name__}`, without None")
        return _SESSION, base
    if base.__module__.startswith("sqlalchemy."):
        raise ConfigurationError(
            f"`{name}: {base.__name__}` cannot be filled: a handler gets the one session its transaction is "
            f"in. Write `{name}: Session` (or AsyncSession in an async handler)"
        )
    return _BODY, annotation


def _is_async_session(base: type) -> bool:
    # by name first, so that programs without async handlers do not import sqlalchemy.ext.asyncio
    if not any(cls.__name__ == "AsyncSession" for cls in base.__mro__):
        return False
    from sqlalchemy.ext.asyncio import AsyncSession

    return issubclass(base, AsyncSession)


def _twice(kind: int, first: str, second: str) -> str:
    if kind == _BODY:
        return (
            f"the parameters {first!r} and {second!r} both look like the message's body. Keep one; give the other a "
            "default, or bind it with functools.partial"
        )
    what = {_SESSION: "session", _MESSAGE: "message", _STEPS: "steps"}[kind]
    return f"the parameters {first!r} and {second!r} ask for the same {what}. Keep one"


def _is_async(function: Callable[..., object]) -> bool:
    layers = list(_layers(function))
    if inspect.isgeneratorfunction(layers[0]) or inspect.isasyncgenfunction(layers[0]):
        raise ConfigurationError(
            "it is a generator (it has `yield`): calling it would run nothing. Use a plain function"
        )
    # also a sync decorator around an async function, which returns the coroutine
    return any(inspect.iscoroutinefunction(layer) for layer in layers)


def _layers(function: Callable[..., object]) -> Iterator[Any]:
    """Yield the callable without partials and binding, then the function inside each decorator."""
    at: Any = function
    for _ in range(100):
        while isinstance(at, partial):
            at = at.func
        if not inspect.isroutine(at):
            at = getattr(type(at), "__call__", at)  # noqa: B004
        yield at
        if not hasattr(at, "__wrapped__"):
            return
        at = at.__wrapped__


def _check_colour(is_async: bool, session_type: type[Any] | None) -> None:
    if session_type is None:
        return
    sync_session = issubclass(session_type, Session)
    if is_async and sync_session:
        raise ConfigurationError(
            "it is `async def` and asks for a Session, which would block the event loop. Write `session: AsyncSession`, "
            "or make it a plain `def`"
        )
    if not is_async and not sync_session:
        raise ConfigurationError(
            "it is a plain `def` and asks for an AsyncSession, which nothing in it can await. Write `session: Session`, "
            "or make it `async def`"
        )


def _check_steps(is_async: bool, steps_type: type[Any]) -> None:
    wanted = AsyncSteps if is_async else Steps
    if not issubclass(steps_type, wanted):
        raise ConfigurationError(
            f"it is {'`async def`' if is_async else 'a plain `def`'} and asks for {steps_type.__name__}. Write"
            f" `steps: {wanted.__name__}`"
        )


def _picker(places: list[int]) -> Callable[[Values], Sequence[Any]]:
    if not places:
        return lambda values: ()
    if len(places) == 1:
        (place,) = places
        return lambda values: (values[place],)
    pick: Callable[[Values], Sequence[Any]] = itemgetter(*places)
    return pick
