"""Recognises exceptions by which a handler asks another queue for something, and says what to raise instead. Pure.

A task that was written for Celery raises its Retry, Ignore or Reject, and FastStream's handlers raise AckMessage.
Here they have no special meaning: the message has failed, is counted and kept, and never acknowledged for that. It is not
retried at once: a request for later would be repeated three times, and a time limit that such a queue sets around a call would
fire only once. They are known by the base class that the queue's control exceptions share, so its other errors (a broker that
is away) stay normal errors.

Our own `Retry` is a policy and not an exception: Python refuses to raise it, with its general text for non-exceptions.
"""

from typing import Final

__all__ = ["advice_on"]

_ANSWERS: Final = frozenset(
    (
        ("celery", "TaskPredicate"),  # Retry, Ignore, Reject
        ("faststream", "HandlerException"),  # AckMessage, NackMessage, RejectMessage, SkipMessage
        ("dramatiq", "Retry"),
        ("arq", "Retry"),
        ("huey", "RetryTask"),
        ("huey", "CancelExecution"),
    )
)
_LIMITS: Final = frozenset((("billiard", "SoftTimeLimitExceeded"), ("rq", "BaseTimeoutException")))


def _said_of_no_exception() -> tuple[object, ...]:
    try:
        raise object()  # type: ignore[misc]
    except TypeError as error:
        return error.args


_NO_EXCEPTION: Final = _said_of_no_exception()
"""Taken from the interpreter, which has no class for this error and may change the text."""
_INSTEAD: Final = "RetryLater(timedelta(...)) to have it again then, Reject(reason) to keep it for a person"


def advice_on(error: BaseException) -> str:
    """Return what to raise instead of another queue's exception, or of something that is no exception; "" for any other error.

    Example:
        >>> advice_on(ValueError("no such sku"))
        ''
    """
    if type(error) is TypeError and error.args == _NO_EXCEPTION:
        return (
            "what was raised is no exception, and asks for nothing here (exactly_once's Retry is a policy, for retry= of the"
            f" decorator): the message failed, and counts. Raise {_INSTEAD}"
        )
    for cls in type(error).__mro__:
        known = (str(cls.__module__).partition(".")[0], cls.__name__)
        if known in _ANSWERS:
            return (
                f"{type(error).__name__} of {known[0]} asks for nothing here: the message failed, and counts. Raise"
                f" {_INSTEAD}; return to be done"
            )
        if known in _LIMITS:
            return (
                "a time limit of the code around the call cut the handler off: it was rolled back, counts as failed, and is"
                " not run again at once"
            )
    return ""
