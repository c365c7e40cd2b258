"""Exactly-once effects for SQLAlchemy message handlers.

    from exactly_once import ExactlyOnce, Message, keys

A broker delivers at least once. A handler registered here runs in a transaction that begins with inserting the message's
business key into `message_idempotent`; both commit together, and a duplicate fails on the primary key.

Names are imported when they are first used, so that importing the package costs little more than importing SQLAlchemy.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from exactly_once import keys
    from exactly_once.app import ExactlyOnce
    from exactly_once.errors import (
        BadBody,
        BadKey,
        ConfigurationError,
        ExactlyOnceError,
        ForkedProcess,
        InProgress,
        LeaseLost,
        MissingExtra,
        Misuse,
        PayloadConflict,
        RefusedResult,
        Reject,
        RetryLater,
        SchemaError,
        SendFailed,
        StepError,
        StoreUnavailable,
        TransportError,
    )
    from exactly_once.events.alert import Alert
    from exactly_once.handlers.guard_options import Lease, Lock, Transaction
    from exactly_once.handlers.retry import Retry
    from exactly_once.handlers.steps import AsyncSteps, Steps
    from exactly_once.message import Message
    from exactly_once.outcome import Outcome

__all__ = [
    "Alert",
    "AsyncSteps",
    "BadBody",
    "BadKey",
    "ConfigurationError",
    "ExactlyOnce",
    "ExactlyOnceError",
    "ForkedProcess",
    "InProgress",
    "Lease",
    "LeaseLost",
    "Lock",
    "Message",
    "MissingExtra",
    "Misuse",
    "Outcome",
    "PayloadConflict",
    "RefusedResult",
    "Reject",
    "Retry",
    "RetryLater",
    "SchemaError",
    "SendFailed",
    "StepError",
    "Steps",
    "StoreUnavailable",
    "Transaction",
    "TransportError",
    "keys",
]

_ROOMS = {
    "Alert": "events.alert",
    "AsyncSteps": "handlers.steps",
    "ExactlyOnce": "app",
    "Lease": "handlers.guard_options",
    "Lock": "handlers.guard_options",
    "Message": "message",
    "Outcome": "outcome",
    "Retry": "handlers.retry",
    "Steps": "handlers.steps",
    "Transaction": "handlers.guard_options",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        if name == "keys":
            found = import_module(f"{__name__}.keys")
        else:
            found = getattr(import_module(f"{__name__}.{_ROOMS.get(name, 'errors')}"), name)
    except (ImportError, AttributeError) as error:
        from exactly_once.wording.installation import clash

        if (told := clash()) is not None:  # another project's files lie over some of ours
            raise ImportError(f"{error}. {told}") from error
        raise
    globals()[name] = found  # asked once
    return found


def __dir__() -> list[str]:
    return sorted(__all__)
