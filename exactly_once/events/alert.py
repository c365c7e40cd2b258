"""Tells a person at once: that a message is kept for them, or that a run takes too long.

Each is an ERROR line in the log, and a call of the application's own hook, `ExactlyOnce(alert=...)`. Called by `processing`,
`executor.routing` and `guards.lease.renewal`, in the thread that noticed.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from inspect import iscoroutine, iscoroutinefunction
from shlex import quote
from typing import Literal

from exactly_once.errors import ConfigurationError
from exactly_once.exceptions.stops import asked_from_outside
from exactly_once.exceptions.words import trace_of
from exactly_once.wording.steady_log import steady
from exactly_once.wording.text import escaped

__all__ = ["Alert", "Hook", "check_hook", "raise_alert"]

_log = steady("exactly_once.alert")


@dataclass(frozen=True, slots=True)
class Alert:
    """Something for a person to look at.

    Args:
        what: "parked": kept in the failure store until a person decides. "overrun": runs longer than its `max_run`.
        group: The consumer group.
        handler: The handler's name.
        key: The business key, or the message id if there is none.
        reason: A sentence.
    """

    what: Literal["parked", "overrun"]
    group: str
    handler: str
    key: str
    reason: str


Hook = Callable[[Alert], object]


def check_hook(hook: Hook) -> None:
    """Refuse a hook that would do nothing.

    Raises:
        ConfigurationError: It is no function, or an async one: the hook is called in any thread, which may have no loop.
    """
    called: object = hook
    while isinstance(called, partial):
        called = called.func
    if not callable(called):
        raise ConfigurationError(f"alert= is a {type(hook).__name__}; give a function that takes an Alert.")
    if iscoroutinefunction(called) or iscoroutinefunction(type(called).__call__):
        raise ConfigurationError(
            "alert= is an async function, and it is called in a thread without a loop: it would never run. Give a plain"
            " function; to go on in a loop of yours: lambda alert: asyncio.run_coroutine_threadsafe(page(alert), loop)"
        )


def raise_alert(hook: Hook | None, alert: Alert) -> None:
    """Log an alert and call the application's hook. What the hook raises is logged, and changes nothing."""
    reason = escaped(alert.reason, 400)
    if alert.what == "parked":
        reason = f"{reason} (kept whole; look: exactly-once failures list --group {quote(alert.group)})"
    _log.error(
        "message_%s group=%s handler=%s key=%s: %s",
        alert.what,
        alert.group,
        alert.handler,
        escaped(alert.key, 120),
        reason,
    )
    if hook is None:
        return
    try:
        returned = hook(alert)
        if iscoroutine(returned):
            returned.close()
            raise TypeError("the hook returned a coroutine, which nobody awaits here: nothing ran")  # noqa: TRY301
    except BaseException as error:  # a pager that does not answer must not stop the messages
        if asked_from_outside(error):
            raise
        _log.error("alert_hook_failed what=%s handler=%s\n%s", alert.what, alert.handler, trace_of(error))
