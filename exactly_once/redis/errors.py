"""What an error of Redis means: away and worth waiting for, or wrong until a person repairs it. Opens nothing.

Errors are known by their class and by the code word at the beginning of a reply (`OOM`, `READONLY`), never by the text after
it. That text is not repeated if it may contain the password. Called by `RedisConnection`.
"""

from collections.abc import Mapping
from functools import cache
from typing import Final
from urllib.parse import parse_qs, unquote, urlsplit

from exactly_once.errors import ConfigurationError, ExactlyOnceError, StoreUnavailable
from exactly_once.wording.redaction import HIDDEN
from exactly_once.wording.text import escaped

__all__ = ["awaited", "code", "dropped", "meaning", "secrets", "unfit"]

_AWAY: Final = {
    "BUSY": "it is busy with a script of somebody else's: SCRIPT KILL",
    "CLUSTERDOWN": "its cluster is down",
    "LOADING": "it has just started and reads its files",
    "MASTERDOWN": "it is a replica, and its primary is away",
    "MISCONF": "it cannot write to its disk and takes no writes: look at its log",
    "NOREPLICAS": "it has fewer replicas than min-replicas-to-write wants and takes no writes",
    "OOM": "its memory is full and it takes no writes: give it more, CONFIG SET maxmemory 1gb",
    "READONLY": "it is a read only replica, also on a new connection: point the URL, or what is behind it, at the primary",
    "TRYAGAIN": "its cluster moves keys",
}
_WRONG: Final = {
    "ASK": "it is a node of a Redis Cluster, which is not supported: give a Redis that stands alone",
    "CROSSSLOT": "it is a node of a Redis Cluster, which is not supported: give a Redis that stands alone",
    "DENIED": "it is in protected mode: bind it to an address and give it a password",
    "MOVED": "it is a node of a Redis Cluster, which is not supported: give a Redis that stands alone",
    "NOAUTH": "it wants a password: redis://:PASSWORD@HOST:6379/0",
    "NOPERM": "this user may not do what is needed: ACL SETUSER NAME ~exactly_once:* +@all -@dangerous +info +config|get",
    "WRONGPASS": "the user or the password is wrong",
}
_LEAST: Final = 5
"""The first version in which a script may read TIME and then write. Older ones replicate the script's text, and refuse that."""


@cache
def _classes() -> tuple[tuple[type[Exception], str], ...]:
    """The client's classes for errors from which it removes the code word; a subclass comes before its parent."""
    from redis import exceptions as e

    return (
        (e.BusyLoadingError, "LOADING"),
        (e.AuthenticationError, "WRONGPASS"),
        (e.AuthenticationWrongNumberOfArgsError, "WRONGPASS"),
        (e.MasterDownError, "MASTERDOWN"),
        (e.ClusterDownError, "CLUSTERDOWN"),
        (e.ReadOnlyError, "READONLY"),
        (e.OutOfMemoryError, "OOM"),
        (e.TryAgainError, "TRYAGAIN"),
        (e.NoScriptError, "NOSCRIPT"),
        (e.NoPermissionError, "NOPERM"),
        (e.MovedError, "MOVED"),
        (e.AskError, "ASK"),
        (e.ClusterCrossSlotError, "CROSSSLOT"),
    )


def code(error: BaseException) -> str:
    """Return the code word of an error reply: `ERR` if it has no special meaning, "" if the error is no reply."""
    from redis.exceptions import ResponseError

    for kind, word in _classes():
        if isinstance(error, kind):
            return word
    if not isinstance(error, ResponseError):
        return ""
    word = str(error).partition(" ")[0]
    return word if word in _AWAY or word in _WRONG else "ERR"


def dropped(error: BaseException) -> bool:
    """Say whether the connection broke or fell silent: then the command may have run, or not."""
    from redis import exceptions as e

    return isinstance(error, (e.ConnectionError, e.TimeoutError, OSError)) and not code(error)


def awaited(error: BaseException) -> bool:
    """Say whether the server answered that it cannot do this now. It has done nothing."""
    return code(error) in _AWAY


def meaning(error: Exception, name: str, hidden: frozenset[str], *, connecting: bool = False) -> ExactlyOnceError:
    """Return the error to raise for an error of the client.

    Args:
        error: What it raised.
        name: The Redis, without its password.
        hidden: Texts that must not be repeated.
        connecting: It was raised while connecting: then a refusal concerns the user, password or database.

    Returns:
        `StoreUnavailable` if waiting may help, `ConfigurationError` if it does not, else `ExactlyOnceError`.
    """
    word = code(error)
    if word in _AWAY:
        return StoreUnavailable(f"Redis {name} does not answer as it should: {_AWAY[word]} ({word}).", store=name)
    if word in _WRONG:
        return ConfigurationError(f"Redis {name} cannot be used: {_WRONG[word]} ({word}).")
    told = _without(hidden, str(error))
    if dropped(error):
        return StoreUnavailable(f"Redis {name} does not answer ({told}).", store=name)
    if connecting:
        return ConfigurationError(f"Redis {name} cannot be used: it refused the connection ({told}). Check its URL.")
    return ExactlyOnceError(f"Redis {name} refused a command ({told}).")


def unfit(info: Mapping[str, str], name: str) -> str | None:
    """Say why a server that answers cannot be used, or return None.

    Args:
        info: The fields of INFO.
        name: The Redis, for the sentence.

    Example:
        >>> unfit({"redis_version": "4.0.14"}, "redis://h")
        'Redis redis://h has version 4.0.14, and at least 5 is needed: before, a script may not write after it read the time.'
    """
    version = info.get("redis_version", "")
    major = version.partition(".")[0]
    if major.isdigit() and int(major) < _LEAST:
        return (
            f"Redis {name} has version {escaped(version)}, and at least {_LEAST} is needed: before, a script may not write"
            " after it read the time."
        )
    if info.get("cluster_enabled") == "1":
        return f"Redis {name} cannot be used: {_WRONG['MOVED']}."
    return None


def secrets(url: str) -> frozenset[str]:
    """Return the parts of a URL that must never be repeated, as written and decoded.

    Example:
        >>> sorted(secrets("redis://me:p%40ss@h:6379/0"))
        ['p%40ss', 'p@ss']
    """
    parts = urlsplit(url)
    written = [parts.password or "", *parse_qs(parts.query).get("password", ())]
    return frozenset(filter(None, (*written, *map(unquote, written))))


def _without(hidden: frozenset[str], text: str) -> str:
    for secret in sorted(hidden, key=len, reverse=True):
        text = text.replace(secret, HIDDEN)
    return escaped(text.strip().rstrip("."), 200)
