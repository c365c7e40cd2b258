"""The check and the default of each setting. Pure; called by `config`, which knows where values come from."""

import json
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any, Final

from exactly_once.database.schema import GROUP_BYTES
from exactly_once.keys import check_name
from exactly_once.redis.connection import checked

__all__ = ["SECRET", "SETTINGS"]


def _text(value: object) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError("give a text that is not empty")
    return value.strip()


def _group(value: object) -> str:
    return check_name(_text(value), GROUP_BYTES, "group")


def _url(value: object) -> object:
    """Check a URL, or URLs by name, which the environment gives as a JSON object. Engines from code pass unchecked."""
    if isinstance(value, str):
        text = _text(value)
        if not text.startswith("{"):
            return text
        try:
            value = json.loads(text)
        except ValueError:
            raise ValueError("it starts with { and is not a JSON object of URLs by name") from None
    if isinstance(value, Mapping):
        if not value:
            raise ValueError("name at least one database")
        return {_text(name): _text(url) if isinstance(url, str) else url for name, url in value.items()}
    if value is None or isinstance(value, (bool, int, float, list)):
        raise ValueError("give a URL, or URLs by name")
    return value


def _redis(value: object) -> str:
    return checked(value)


def _names(value: object) -> tuple[str, ...]:
    names = value.split(",") if isinstance(value, str) else value
    if not isinstance(names, (list, tuple)):
        raise ValueError("give module names: a list, or separated by commas")  # noqa: TRY004
    return tuple(_text(name) for name in names)


def _count(value: object) -> int:
    if isinstance(value, str) and value.strip().isascii() and value.strip().isdigit():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 10_000:
        raise ValueError("give a whole number from 1 to 10000")
    return value


def _yes(value: object) -> bool:
    told = (
        value
        if isinstance(value, bool)
        else {"true": True, "1": True, "false": False, "0": False}.get(str(value).lower())
    )
    if told is None:
        raise ValueError("give true or false")
    return told


def _seconds(value: object) -> timedelta:
    if isinstance(value, timedelta):
        return value
    try:
        seconds = float(value) if isinstance(value, (str, int, float)) and not isinstance(value, bool) else -1.0
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds <= 86_400:
        raise ValueError("give seconds, from 0 to 86400")
    return timedelta(seconds=seconds)


SETTINGS: Final[Mapping[str, tuple[Callable[[Any], Any], Any]]] = {
    "database": (_url, None),
    "async_database": (_url, None),
    "transport": (_text, None),
    "redis": (_redis, None),
    "group": (_group, None),
    "schema": (_text, None),
    "pooler": (_yes, False),
    "imports": (_names, ()),
    "concurrency": (_count, 16),
    "processes": (_count, 1),
    "drain_timeout_s": (_seconds, timedelta(seconds=25)),
    "health": (_text, None),
}
SECRET: Final = ("database", "async_database", "transport", "redis")  # may also be given as ..._file
