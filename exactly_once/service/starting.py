"""Before a worker starts: waits for each server, and reports at once what waiting does not repair.

In the order that loses nothing: databases and schema, stores of leases, then the broker's topics and group. Changes nothing,
except by a transport's own check. Called by `worker_service`.
"""

from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta
from functools import partial
from threading import Event
from time import monotonic
from typing import Final

from exactly_once.alembic import ready
from exactly_once.database.probe import claims_twice
from exactly_once.database.store import Store
from exactly_once.errors import (
    ConfigurationError,
    ExactlyOnceError,
    ForkedProcess,
    SchemaError,
    StoreUnavailable,
    TransportError,
)
from exactly_once.executor.routing import Router
from exactly_once.transports.contract import Away, Subscription, Transport
from exactly_once.wording.redaction import redacted
from exactly_once.wording.steady_log import steady

__all__ = ["wait_for_servers"]

_WAITS_S: Final = (0.2, 5.0)
_REFUSED_S: Final = 8.0
"""Seconds. A topic or group may be missing on a running broker because its creator is about to make it."""
_RETURNING_S: Final = 60.0
"""Seconds. After a server did not answer, what it refuses may still be starting."""

_log = steady("exactly_once.worker")


def wait_for_servers(
    router: Router, transport: Transport, subscriptions: Sequence[Subscription], asked: Event, patience: timedelta
) -> None:
    """Wait for each server in turn. Report at once all that waiting does not repair, also about the servers that come later.

    Args:
        router: Handlers and databases.
        transport: The broker.
        subscriptions: What the group subscribes to.
        asked: Set to end the waiting.
        patience: How long to wait for all of them.

    Raises:
        ConfigurationError: Something is wrong that waiting does not repair.
        StoreUnavailable: A database stayed away too long, or `asked` was set. For the broker: TransportError.
    """
    deadline = monotonic() + patience.total_seconds()

    def broker() -> str | None:
        problems = transport.check(router.group, subscriptions)
        if any(not isinstance(problem, Away) for problem in problems):
            raise _Refused("\n".join(problems))
        return "\n".join(problems) or None

    databases = {f"the database {name!r}": store for name, store in router.stores.items()}
    looks: list[tuple[str, Callable[[], str | None], type[ExactlyOnceError]]] = [
        (what, partial(_database_problem, store, router.group), StoreUnavailable) for what, store in databases.items()
    ]
    looks += [(f"the store of leases {name}", problem, StoreUnavailable) for name, problem in router.leases.problems()]
    looks.append(("the broker", broker, TransportError))
    wrong: list[ConfigurationError] = []
    told_of: str | None = None
    behind: list[str] = []
    for what, look, vain in looks:
        if wrong:
            behind += _seen(look)
            continue
        try:
            _until(asked, deadline, look, what, vain)
        except ForkedProcess:
            raise
        except ConfigurationError as error:
            wrong.append(error)
            with suppress(Exception):  # a URL that cannot be used has no engine
                told_of = redacted(databases[what].engine.url)
    if wrong:
        said = str(wrong[0])
        for line in "\n".join(behind).splitlines():
            # One command may repair both; and if a database is wrong, a problem of the broker in it follows from that.
            if (line.partition("Type: ")[2] or line) not in said and (told_of is None or told_of not in line):
                said += f"\n{line}"
        raise wrong[0] if said == str(wrong[0]) else ConfigurationError(said) from wrong[0]


def _database_problem(store: Store, group: str) -> str | None:
    if (problem := ready.problem(store)) is not None:
        return problem
    try:
        seen = claims_twice(store.dialect, store.open, group)
    except Exception as error:
        if (refused := ready.refusal(store, error)) is not None:
            raise ConfigurationError(refused) from error
        if (problem := ready.waited_for(store, error)) is None:
            raise
        return problem
    if seen != (True, False):
        raise ConfigurationError(
            f"Through the driver of the database {store.name!r} a key claimed twice is seen as {seen}, not (True, False):"
            " duplicates would run. Type: exactly-once doctor"
        )
    return None


class _Refused(ConfigurationError):
    """The broker answers, but is not as it must be. It may have just started, and be ready in a moment."""


def _seen(look: Callable[[], str | None]) -> Sequence[str]:
    """Look once, and return what to report beside a problem that is already known."""
    try:
        problem = look()
    except ExactlyOnceError as error:
        problem = str(error)
    except Exception:  # it may only follow from the known problem; if not, the next start reports it
        problem = None
    return () if problem is None else (problem,)


def _until(
    asked: Event, deadline: float, look: Callable[[], str | None], what: str, vain: type[ExactlyOnceError]
) -> None:
    """Look until there is no problem. `look` raises if waiting does not repair it, and returns a text if waiting may.

    A problem at the first look is reported at once. For a while, a broker, or a server that did not answer before, may refuse
    what it will soon have: a name server answers before its broker has registered.
    """
    wait = _WAITS_S[0]
    told: bool | None = None
    refused_until: float | None = None
    while True:
        refused = False
        try:
            problem = look()
            refused_until = monotonic() + _RETURNING_S
        except TransportError as error:
            problem, refused_until = str(error), monotonic() + _RETURNING_S
        except (SchemaError, ForkedProcess):
            raise
        except ConfigurationError as error:
            if refused_until is None:
                refused_until = monotonic() + (_REFUSED_S if isinstance(error, _Refused) else 0)
            if monotonic() >= refused_until:
                raise
            problem, refused = str(error), True
        if problem is None:
            return
        left = max(0.0, refused_until - monotonic()) if refused else wait
        if monotonic() >= deadline:
            raise vain(f"Waited in vain for {what}: {problem}")
        if refused and told is not True:
            _log.error(
                "Not as it must be; looking again for %.0f s, in case it has only just started. %s", left, problem
            )
        elif not refused and told is not False:
            _log.warning("Waiting for %s: %s", what, problem)
        told = refused
        if asked.wait(min(wait, left)):
            raise vain(f"Stopped while waiting for {what}.")
        wait = min(2 * wait, _WAITS_S[1])
