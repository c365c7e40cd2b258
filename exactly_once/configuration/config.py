"""Settings: where the program runs. Environment over file over code; each value remembers its source.

    EXACTLY_ONCE_DATABASE, ..._DATABASE_FILE     the environment; _FILE names a file that holds the value (secrets)
    [tool.exactly_once] in pyproject.toml        or the TOML file that EXACTLY_ONCE_CONFIG or --config names
    ExactlyOnce(group=...)                       the code
    a default

Code says what a program is, settings say where it runs. A handler's topic, tag, retry and concurrency may be set under
`[tool.exactly_once.handlers.NAME]`. An unknown name is an error: a misspelled setting that is silently ignored is found
only in production. Values are checked here; nothing is opened. Called by the facade and the command line, never at import.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from functools import lru_cache
from pathlib import Path
from typing import Any, Final, Generic, TypeVar

from sqlalchemy import URL

from exactly_once.configuration.service_links import service_links
from exactly_once.configuration.settings import SECRET, SETTINGS
from exactly_once.configuration.settings_file import CONFIG_VARIABLE, settings_table, told
from exactly_once.configuration.supervised import SUPERVISED
from exactly_once.errors import ConfigurationError
from exactly_once.handlers.plan import Plan
from exactly_once.handlers.retry import Retry
from exactly_once.wording.redaction import redacted
from exactly_once.wording.steady_log import steady
from exactly_once.wording.text import escaped, listed, probably

__all__ = ["Config", "HandlerSettings", "Setting", "load", "redacted", "said_afterwards"]

_log = steady("exactly_once.config")

PREFIX: Final = "EXACTLY_ONCE_"
TEST_PREFIX: Final = "EXACTLY_ONCE_TEST_"  # read by exactly_once.testing, not here
NO_SETTINGS: Final = frozenset(
    {
        CONFIG_VARIABLE,
        "EXACTLY_ONCE_TRACEBACK",  # read by the command line
        SUPERVISED,  # set by a supervisor for its children; refused here, no child would start
        "EXACTLY_ONCE_REPORT_FD",
        "EXACTLY_ONCE_LIBROCKETMQ",  # the path of librocketmq; read by that transport
        "EXACTLY_ONCE_ROCKETMQ4_PYTHON",  # the second environment, read by the benchmarks
    }
)
DEFAULT: Final = "default"

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


@dataclass(frozen=True, slots=True)
class Setting(Generic[T_co]):
    """A value and its source."""

    value: T_co
    source: str

    @property
    def shown(self) -> str:
        """The value for a person, without passwords."""
        if isinstance(self.value, Mapping):
            return ", ".join(f"{name}={_shown(url)}" for name, url in self.value.items())
        if isinstance(self.value, tuple) and not isinstance(self.value, URL):
            return ", ".join(map(str, self.value)) or "none"
        return "not set" if self.value is None else _shown(self.value)


def _shown(value: object) -> str:
    """Return the value of a setting, or what code gives for it, for a person, without passwords."""
    if isinstance(value, (str, URL)):
        return redacted(value)
    url = getattr(getattr(value, "kw", {}).get("bind", value), "url", None)  # of an engine, or of a sessionmaker's
    return f"{type(value).__name__}({redacted(url)})" if isinstance(url, URL) else str(value)


@dataclass(frozen=True, slots=True, kw_only=True)
class HandlerSettings:
    """The file's settings for one handler; None for each that is not set."""

    topic: str | None = None
    tag: str | tuple[str, ...] | None = None
    retry: Mapping[str, Any] | None = None
    concurrency: int | None = None
    source: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """All settings that apply. Made by `load`."""

    database: Setting[Any]
    """A URL, or URLs by name; from code also an Engine or a sessionmaker; None if not set."""
    async_database: Setting[Any]
    transport: Setting[str | None]
    redis: Setting[str | None]
    group: Setting[str | None]
    schema: Setting[str | None]
    pooler: Setting[bool]
    """There is a pooler before PostgreSQL, even if we detect none."""
    imports: Setting[tuple[str, ...]]
    concurrency: Setting[int]
    """Messages at once in one process."""
    processes: Setting[int]
    drain_timeout: Setting[timedelta]
    """How long running messages may take to finish after SIGTERM; set as `drain_timeout_s`."""
    health: Setting[str | None]
    """HOST:PORT of the health endpoint."""
    handlers: Mapping[str, HandlerSettings] = field(default_factory=dict)
    looked: str = ""
    """Which file was searched, and what it has; for the error about a missing setting."""

    def applied(self, plans: Sequence[Plan]) -> tuple[Plan, ...]:
        """Return the handlers' plans with the file's changes.

        Raises:
            ConfigurationError: The file names a handler that does not exist, or a value is wrong.
        """
        known = [plan.name for plan in plans]
        for name, settings in self.handlers.items():
            if name not in known:
                raise ConfigurationError(
                    f"{settings.source} has settings for a handler '{escaped(name)}', which is not registered."
                    f"{probably(name, known)} Registered: {listed(known)}"
                )
        return tuple(_applied(plan, self.handlers.get(plan.name)) for plan in plans)


def _applied(plan: Plan, settings: HandlerSettings | None) -> Plan:
    if settings is None:
        return plan
    try:
        retry = None if settings.retry is None else Retry(**settings.retry)
        return plan.moved(topic=settings.topic, tag=settings.tag, retry=retry, concurrency=settings.concurrency)
    except ConfigurationError as error:
        raise ConfigurationError(f"handler {plan.name!r}, set in {settings.source}: {error}") from error


_HANDLER_NAMES: Final = ("topic", "tag", "retry", "concurrency")
_RETRY_NAMES: Final = ("immediate", "delays", "max_attempts")


def load(
    code: Mapping[str, object] | None = None,
    *,
    config: str | Path | None = None,
    environ: Mapping[str, str] | None = None,
    directory: str | Path | None = None,
) -> Config:
    """Read the settings that apply.

    Args:
        code: The program's values, by the same names; None counts as not given. The environment and the file win.
        config: A TOML file, as `--config` names it; wins over EXACTLY_ONCE_CONFIG.
        environ: The environment; `os.environ` by default.
        directory: Where to look for pyproject.toml, also in the folders above; the current folder by default.

    Raises:
        ConfigurationError: A name is unknown, a value is wrong, a named file cannot be read, or a file that was
            found belongs to another user.

    Example:
        >>> load(environ={"EXACTLY_ONCE_GROUP": "inventory"}, directory="/").group
        Setting(value='inventory', source='environment EXACTLY_ONCE_GROUP')
    """
    variables = os.environ if environ is None else environ
    found: dict[str, Setting[Any]] = {}
    given = {name: value for name, value in (code or {}).items() if value is not None}
    _known(given, SETTINGS, "the program's settings")
    for name, value in given.items():
        found[name] = Setting(_checked(name, value, f"{name}= in the program"), "code")
    table, path = settings_table(config or variables.get(CONFIG_VARIABLE) or None, Path(directory or Path.cwd()))
    looked = _looked(table, path)
    handlers = _handlers(table.pop("handlers", {}), path)
    _known(table, (*_file_names(), "handlers"), f"file {path}")
    found |= _layer(table, _file_names(), f"file {path}", "{source}, {name}", relative_to=path.parent)
    ours = {name: value for name, value in variables.items() if name.startswith(PREFIX) and name not in NO_SETTINGS}
    ours = {name: value for name, value in ours.items() if not name.startswith(TEST_PREFIX) and value != ""}
    if links := service_links(ours, PREFIX):
        if SUPERVISED not in variables:  # the supervisor has the same variables, and reports it for all
            _say_ignored(links)
        ours = {name: value for name, value in ours.items() if name not in links}
    by_variable = {PREFIX + name.upper(): target for name, target in _file_names().items()}
    found |= _layer(ours, by_variable, "environment", "{source} {name}", relative_to=Path())
    every = {name: found.get(name, Setting(default, DEFAULT)) for name, (_, default) in SETTINGS.items()}
    every["drain_timeout"] = every.pop("drain_timeout_s")
    return Config(**every, handlers=handlers, looked=looked)


def _looked(table: Mapping[str, object], path: Path) -> str:
    if table:
        return f"settings were looked for in {path}"
    if not path.is_file():
        return f"settings were looked for in {path} and the folders above: there is no pyproject.toml"
    return f"settings were looked for in {path}: no [tool.exactly_once] there"


@contextmanager
def said_afterwards() -> Iterator[None]:
    """Delay log lines about the settings until the end of the block: before that no logging is configured."""
    global _kept_back  # noqa: PLW0603  (of a command line, which has one thread by then)
    kept: list[tuple[str, ...]] = []
    _kept_back = kept.append
    try:
        yield
    finally:
        _kept_back = None
        for links in kept:
            _log_ignored(links)


_kept_back: Callable[[tuple[str, ...]], None] | None = None


@lru_cache
def _say_ignored(links: tuple[str, ...]) -> None:
    """Log it once in a process, however many applications it has."""
    (_kept_back or _log_ignored)(links)


def _log_ignored(links: tuple[str, ...]) -> None:
    _log.warning(
        "settings: %s %s left out: Kubernetes sets such variables in each pod for a Service of that name. They are no settings;"
        " enableServiceLinks: false in the pod's spec keeps them away.",
        listed(links, most=3),
        "is" if len(links) == 1 else "are",
    )


def _file_names() -> dict[str, str]:
    """Each name that may be used in the file or the environment, with its setting."""
    return {name: name for name in SETTINGS} | {f"{name}_file": name for name in SECRET}


def _known(given: Iterable[str], known: Iterable[str], where: str) -> None:
    names = list(known)
    for name in given:
        if name not in names:
            raise ConfigurationError(
                f"{where}: there is no setting '{escaped(name)}'.{probably(name, names)} There are: "
                f"{listed(names, most=30)}"
            )


def _layer(
    given: Mapping[str, object], names: Mapping[str, str], source: str, form: str, *, relative_to: Path
) -> dict[str, Setting[Any]]:
    _known(given, names, source)
    found: dict[str, Setting[Any]] = {}
    for name, value in given.items():
        target, where = names[name], form.format(source=source, name=name)
        if target in found:
            raise ConfigurationError(f"{found[target].source} and {where} both set the {target}; keep one")
        if name.lower() != target and name.lower().endswith("_file"):
            found[target] = Setting(_checked(target, _secret(relative_to / str(value), where), where), where)
        else:
            found[target] = Setting(_checked(target, value, where), where)
    return found


def _secret(path: Path, where: str) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()  # editors and `echo` end a file with a newline
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{where} names the file {path}, which cannot be read: {told(error)}") from error


def _checked(name: str, value: object, where: str) -> Any:
    check, _ = SETTINGS[name]
    if isinstance(value, str) and len(bare := value.strip()) > 1 and bare[0] == bare[-1] and bare[0] in "\"'":
        raise ConfigurationError(
            f"{where}: it begins and ends with a quotation mark, which is part of the value here (an --env-file of Docker's,"
            " a secret's file, TOML with quotes in quotes). Leave both out."
        )
    try:
        return check(value)
    except ValueError as error:
        # The value itself is not repeated if it may contain a password.
        shown = "" if name in SECRET else f" {escaped(repr(value))}"
        raise ConfigurationError(f"{where}:{shown} is not valid: {error}") from None
    except ConfigurationError as error:
        raise ConfigurationError(f"{where}: {error}") from error


def _handlers(given: object, path: Path) -> dict[str, HandlerSettings]:
    if not isinstance(given, Mapping):
        raise ConfigurationError(f"file {path}: handlers must be a table of tables")
    return {name: _handler(name, told, path) for name, told in given.items()}


def _handler(name: str, given: object, path: Path) -> HandlerSettings:
    source = f"file {path}, handlers.{name}"
    if not isinstance(given, Mapping):
        raise ConfigurationError(f"{source}: give a table with {listed(_HANDLER_NAMES)}")
    _known(given, _HANDLER_NAMES, source)
    retry = given.get("retry")
    if retry is not None:
        if not isinstance(retry, Mapping):
            raise ConfigurationError(f"{source}: retry is a table, such as {{ delays = [1, 5, 60], max_attempts = 8 }}")
        _known(retry, _RETRY_NAMES, f"{source}.retry")
    tag = given.get("tag")
    topic = given.get("topic")
    return HandlerSettings(
        topic=topic,
        tag=tuple(tag) if isinstance(tag, list) else tag,
        retry=retry,
        concurrency=given.get("concurrency"),
        source=source,
    )
