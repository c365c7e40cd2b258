"""The options of `@eo.handler`, each checked when the handler is decorated. Pure; called by the handler's plan."""

from datetime import timedelta
from itertools import chain
from typing import Final, Literal

from exactly_once.database.schema import HANDLER_BYTES
from exactly_once.errors import ConfigurationError
from exactly_once.handlers.hints import innermost
from exactly_once.keys import check_name

__all__ = [
    "check_after_dead",
    "check_batch",
    "check_concurrency",
    "check_flag",
    "check_handler_name",
    "check_linger",
    "check_tags",
    "check_topic",
]

_MOST_IN_A_GROUP: Final = 10_000
_LONGEST_LINGER: Final = timedelta(seconds=10)


def check_handler_name(function: object, name: str | None) -> str:
    """Return the name that identifies a handler in the tables: `name=`, or the function's own bare name."""
    if isinstance(function, type) or not callable(function):
        kind = "a class" if isinstance(function, type) else f"a {type(function).__name__}"
        raise ConfigurationError(f"@eo.handler was put on {kind}: {function!r}. Put it on a function")
    if name is not None:
        return check_name(name, HANDLER_BYTES, "handler")
    own = getattr(function, "__name__", None)
    if not isinstance(own, str) or own == "<lambda>":
        plain = innermost(function)
        close = repr(plain.__name__) if plain is not None and plain.__name__.isidentifier() else "'...'"
        what = "a lambda" if own == "<lambda>" else f"a {type(function).__name__}"
        raise ConfigurationError(f"a handler that is {what} has no name of its own. Give it one: name={close}")
    return check_name(own, HANDLER_BYTES, "handler")


def check_topic(topic: object) -> str:
    """Return the topic."""
    if not isinstance(topic, str) or not topic.strip() or "\0" in topic:
        raise ConfigurationError(f"the topic must be a text, not {topic!r}: @eo.handler('orders', ...)")
    return topic


def check_tags(tag: object) -> tuple[str, ...]:
    """Return the tags, sorted, each once. Empty: every tag, and messages without a tag."""
    given = (tag,) if tag is None or isinstance(tag, str) else tag
    if not isinstance(given, (tuple, list, set, frozenset)) or not given:
        raise ConfigurationError(f"tag={tag!r}: give None for every tag, one tag, or a tuple of tags")
    if any(one is not None and not isinstance(one, str) for one in given):
        raise ConfigurationError(f"tag={tag!r}: a tag is a text")
    if tag is None or tag == "*":
        return ()
    split = [one.strip() for one in chain.from_iterable(str(each or "").split("||") for each in given)]
    if not all(split) or any("|" in one or "\0" in one or one == "*" for one in split):
        raise ConfigurationError(f"tag={tag!r}: a tag is a text without '|', and '*' stands alone")
    return tuple(sorted(set(split)))


def check_flag(name: str, value: object) -> bool:
    """Return a boolean option."""
    if not isinstance(value, bool):
        raise ConfigurationError(f"{name}={value!r}: give True or False")
    return value


def check_after_dead(value: object) -> Literal["wait", "go on"]:
    """Return what messages behind a dead message do."""
    if value == "wait":
        return "wait"
    if value == "go on":
        return "go on"
    raise ConfigurationError(f"after_dead={value!r}: give 'wait' (hold what comes behind a dead message) or 'go on'")


def check_concurrency(value: object) -> int | None:
    """Return the most runs at a time in a process. None: no limit of the handler's own."""
    if value is None or (isinstance(value, int) and not isinstance(value, bool) and value >= 1):
        return value
    raise ConfigurationError(f"concurrency={value!r}: give a whole number of at least 1, or None")


def check_batch(value: object) -> int | None:
    """Return the most messages in one transaction. None: each message has its own."""
    if value is None or (isinstance(value, int) and not isinstance(value, bool) and 2 <= value <= _MOST_IN_A_GROUP):
        return value
    raise ConfigurationError(f"batch={value!r}: give a whole number from 2 to {_MOST_IN_A_GROUP:,}, or None")


def check_linger(value: object) -> timedelta | None:
    """Return how long a message waits for others that share its transaction. None: the default."""
    if value is None or (isinstance(value, timedelta) and timedelta(0) <= value <= _LONGEST_LINGER):
        return value
    raise ConfigurationError(
        f"linger={value!r}: give a timedelta of zero to ten seconds, such as timedelta(milliseconds=5)"
    )
