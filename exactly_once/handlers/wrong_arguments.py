"""Explains a call of our interface with wrong arguments: says what to write, in place of Python's own message. Pure.

Called by the facade and by the decorators.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from inspect import Signature, signature
from typing import Any, Final, TypeAlias, TypeVar, cast

from exactly_once.errors import ConfigurationError
from exactly_once.wording.text import probably

__all__ = ["explained", "of_a_decorator", "of_making_one"]

F = TypeVar("F", bound=Callable[..., Any])
Wrong: TypeAlias = Callable[[str, Signature, Sequence[object], Mapping[str, object]], str | None]


def explained(wrong: Wrong) -> Callable[[F], F]:
    """Make a decorator that explains calls with wrong arguments: says what to write, in place of Python's own message.

    Args:
        wrong: Returns what to write, from the function's name, its signature and the arguments. None: it cannot say.
    """

    def decorate(function: F) -> F:
        takes = signature(function)

        @wraps(function)
        def call(*arguments: Any, **named: Any) -> Any:
            try:
                takes.bind(*arguments, **named)
            except TypeError as error:
                told = wrong(function.__name__, takes, arguments[1:], named) or str(error)
                raise ConfigurationError(told) from None  # Python's own message would only repeat it
            return function(*arguments, **named)

        return cast("F", call)

    return decorate


def of_a_decorator(name: str, takes: Signature, arguments: Sequence[object], named: Mapping[str, object]) -> str | None:
    """See `explained`. For `@eo.handler` and `@eo.batch_handler`."""
    known = [each for each in takes.parameters if each != "self"]
    example = f'@eo.{name}("orders", key="order_no")'
    if unknown := [each for each in named if each not in known]:
        return f"@eo.{name} has no argument {unknown[0]}=.{probably(unknown[0], known)} It takes: {', '.join(known)}."
    if len(arguments) > 1:
        return f"@eo.{name} takes one argument without a name, the topic. Write {example}"
    given = arguments[0] if arguments else named.get("topic")
    if callable(given):
        function = getattr(given, "__name__", "the function")
        return f"@eo.{name} stands above {function!r} alone: it must be told the topic and the key. Write {example}"
    if given is None:
        return f"@eo.{name} must be told the topic. Write {example}"
    if "key" not in named:
        return (
            f"@eo.{name}({given!r}) must be told the key: what names the event, and makes two copies of it one. Write"
            f' @eo.{name}({given!r}, key="order_no") for a member of the body, or key=keys.message_key().'
        )
    return None


def of_making_one(_: str, takes: Signature, arguments: Sequence[object], named: Mapping[str, object]) -> str | None:
    """See `explained`. For `ExactlyOnce(...)`."""
    known = [name for name in takes.parameters if name != "self"]
    unknown = next((name for name in named if name not in known), None)
    if unknown is None:
        return "ExactlyOnce takes one argument without a name, the database." if len(arguments) > 1 else None
    if (goes := _ELSEWHERE.get(unknown)) is not None:
        return f"ExactlyOnce takes no {unknown}=. {goes}"
    meant = " Did you mean 'database'?" if unknown in _DATABASES else probably(unknown, known)
    return f"ExactlyOnce has no argument {unknown}=.{meant} It takes: {', '.join(known)}."


_DATABASES: Final = ("db", "url", "engine", "bind", "dsn", "session", "sessionmaker")
_ELSEWHERE: Final = {
    "transport": (
        "The broker's URL goes to eo.worker(URL), eo.run(URL) and eo.producer(URL), to --transport on the command line, or type:"
        " export EXACTLY_ONCE_TRANSPORT=sql://"
    ),
    "concurrency": "It goes to eo.worker(..., concurrency=), or type: export EXACTLY_ONCE_CONCURRENCY=16",
    "drain_timeout": "It goes to eo.worker(..., drain_timeout=), or type: export EXACTLY_ONCE_DRAIN_TIMEOUT_S=25",
    "processes": "Type: exactly-once run MODULE:NAME --processes 2, or: export EXACTLY_ONCE_PROCESSES=2",
    "health": "Type: exactly-once run MODULE:NAME --health HOST:PORT, or: export EXACTLY_ONCE_HEALTH=HOST:PORT",
    "retry": "It is a handler's: @eo.handler(..., retry=Retry(...))",
}
