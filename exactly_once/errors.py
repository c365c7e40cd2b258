"""Every exception a user can meet, as one tree. The messages are sentences that say what to do next.

ExactlyOnceError
|- ConfigurationError         the program or its settings are wrong; nothing was started
|  |- SchemaError             our tables are missing or old
|  |- MissingExtra            an optional package is not installed
|  |- RefusedResult           a handler returned an answer, which nobody reads
|  `- ForkedProcess           what is used belongs to the parent of this forked process
|- InProgress                 another run holds the key
|- PayloadConflict            the key is known with another payload
|- BadKey                     the message has no usable business key
|- BadBody                    the body cannot be decoded
|- Misuse                     the handler touched its transaction
|- LeaseLost                  another run has taken this message over
|- StepError                  a step cannot go on by itself; a person decides
|- StoreUnavailable           the database, or Redis, does not answer
|- TransportError             the broker refused or does not answer
|  `- SendFailed              a message could not be sent; it is in the error
|- Reject                     raised by handlers: park this message now
`- RetryLater                 raised by handlers: ask again after a delay
"""

from datetime import timedelta
from typing import TYPE_CHECKING

from sqlalchemy.exc import DontWrapMixin

if TYPE_CHECKING:
    from exactly_once.claim import ClaimRow
    from exactly_once.message import Message

__all__ = [
    "BadBody",
    "BadKey",
    "ConfigurationError",
    "ExactlyOnceError",
    "ForkedProcess",
    "InProgress",
    "LeaseLost",
    "MissingExtra",
    "Misuse",
    "PayloadConflict",
    "RefusedResult",
    "Reject",
    "RetryLater",
    "SchemaError",
    "SendFailed",
    "StepError",
    "StoreUnavailable",
    "TransportError",
]


class ExactlyOnceError(Exception):
    """The root of all errors this package raises."""


class ConfigurationError(ExactlyOnceError):
    """The program, its settings or a server is wrong; nothing was started."""

    store: str | None = None
    """The database's name, if a claim found the error: the messages of that database are held until it is repaired."""
    of_the_server = False
    """Found as the transaction of a handler or a step was to begin: no message is to blame."""


class SchemaError(ConfigurationError):
    """Our tables are missing, old or too new in the database."""


class MissingExtra(ConfigurationError):
    """An optional package is not installed; the text is the command that installs it."""

    def __init__(self, what: str, extra: str) -> None:
        from exactly_once.wording.installation import to_install

        super().__init__(f"{what} needs a package that is not installed. Type: {to_install(extra)}")
        self.extra = extra


class RefusedResult(ConfigurationError):
    """A handler returned an answer (a bool, a number, text, a member of an Enum), which nobody reads.

    The handler is wrong, not the message: nothing was committed, counted, kept or acknowledged.
    """


class ForkedProcess(ConfigurationError, DontWrapMixin):  # raised inside a statement, it is not wrapped by SQLAlchemy
    """This process was forked, and what is used belongs to its parent; nothing was done to it."""


class InProgress(ExactlyOnceError):
    """Another run holds this key right now and may still fail: do not acknowledge; ask again later."""


class PayloadConflict(ExactlyOnceError):
    """This key was consumed with another payload."""


class BadKey(ExactlyOnceError):
    """The message has no usable business key."""


class BadBody(ExactlyOnceError):
    """The message's body cannot be decoded to the type that the handler asks for."""


class Misuse(ExactlyOnceError):
    """A handler committed, rolled back, left or began the transaction it was given."""

    at_each_run = False
    """The handler's code does so in each run, whatever the message: no retry repairs it."""

    place = ""
    """The line that did it, in the form of `place_of`, if it was noticed there and is raised elsewhere."""


class LeaseLost(ExactlyOnceError):
    """Another run has taken this message over: nothing that this run does from here on counts or is recorded."""


class StepError(ExactlyOnceError):
    """A step cannot go on by itself, and a guess would repeat it or leave it out: the message is kept for a person.

    Args:
        text: What happened and what to type.
        step: Its name.
    """

    def __init__(self, text: str, step: str) -> None:
        super().__init__(text)
        self.step = step


class StoreUnavailable(ExactlyOnceError):
    """The database, or Redis, does not answer; nothing was acknowledged.

    Args:
        text: What does not answer, and what to do.
        store: Its name, without passwords, if it is not the database of the message.
    """

    asked_by_handler = False
    """A store that the handler itself asked, with `eo.claim` or `eo.lock`, does not answer. The message's store may be well."""

    by_application = False
    """Code of the application raised while a connection was made or checked out (`creator=`, a listener), not the server."""

    claim: "ClaimRow | None" = None
    """The test claim that the table refused, if it refuses every claim. It is tried again before any message is."""

    def __init__(self, text: str, *, store: str | None = None) -> None:
        super().__init__(text)
        self.store = store


class TransportError(ExactlyOnceError):
    """The broker refused, or does not answer."""


class SendFailed(TransportError):
    """A message could not be sent after all tries; `message` is that message."""

    def __init__(self, text: str, message: "Message") -> None:
        super().__init__(text)
        self.message = message


class Reject(ExactlyOnceError):
    """Raise it in a handler to park the message at once, for a person.

    Args:
        reason: Why; stored with the message and shown by `exactly-once failures list`.
    """

    # A default: without it `raise Reject` would be a TypeError, which is retried.
    def __init__(self, reason: str = "rejected by the handler, which gave no reason") -> None:
        super().__init__(reason)
        self.reason = reason


class RetryLater(ExactlyOnceError):
    """Raise it in a handler to get the message again after `delay`; counted as an attempt.

    Args:
        delay: How long from now, at least; at most a hundred years. None: as the handler's `retry=` says.

    Raises:
        TypeError: `delay` is no timedelta. In a handler that is a failure like any other: counted, and retried.
    """

    delay: timedelta | None = None  # also for a subclass that does not call `__init__`

    def __init__(self, delay: timedelta | None = None) -> None:
        if delay is not None and not isinstance(delay, timedelta):
            kind = type(delay).__name__
            raise TypeError(f"RetryLater takes a timedelta, not {kind}. Write RetryLater(timedelta(seconds=...))")
        super().__init__(f"asked to be retried after {delay}" if delay else "asked to be retried")
        self.delay = delay
