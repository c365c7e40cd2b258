"""What a handler raises to ask for something, and asks for nothing here: the error says what to raise instead. Pure.

A task that was written for Celery raises its Retry, Ignore or Reject, and FastStream's handlers raise AckMessage. Such a message
has failed like any other, is counted and kept, and never acknowledged for that. It does not run again at once: what was meant for
later would be asked again three times, and a limit of time that such a queue sets around a call comes once. Known by the class
that the queue's own exceptions of that kind have in common, so that its other errors (a broker that is away) stay what they are.

Our own `Retry` is a policy and no exception: Python refuses to raise it, in the words it has for all that is none.
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
"""Asked of the interpreter, which has no class for it and may word it otherwise one day."""
_INSTEAD: Final = "RetryLater(timedelta(...)) to have it again then, Reject(reason) to keep it for a person"


def advice_on(error: BaseException) -> str:
    """Return what to raise instead of another queue's exception, or of what is none; "" for any other.

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
