"""Decides what becomes of a message that was not finished: who tries it again and when, or park it for a person. Pure.

    error of the handler -> decide -> Park | ByBroker | ByPump              counted as a failure
    in progress, unknown, waiting -> wait_delay -> ByBroker | ByPump        not counted: the message itself is sound
    arrives with no delivery left -> spent                                  look the claim up, else park without running

Each retry has one owner. `ByBroker`: the delivery is given back, and the broker redelivers it. `ByPump`: the failure store keeps
the message with a due time, the delivery is acknowledged, and the pump runs the message at that time. `ByPump` is chosen if the
broker's redelivery is missing or unsafe, if it cannot wait that long, or if the broker would soon drop the message for good. For
a consumer loop of the caller's (`process()`) it is always `ByBroker`: without a worker of ours there may be no pump either.

Never reads a clock, a store or a message. Called by `processing`: the failure store calls `decide` with the number of failures.
"""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Final, Literal, TypeAlias

from exactly_once.errors import (
    BadBody,
    BadKey,
    Misuse,
    PayloadConflict,
    Reject,
    RetryLater,
    StepError,
)
from exactly_once.exceptions.leaves import leaves
from exactly_once.exceptions.words import words_of
from exactly_once.handlers.retry import AT_ONCE, DEFAULT, Retry, RetrySpec, retry_for
from exactly_once.outcome import Outcome
from exactly_once.transports.contract import Features
from exactly_once.wording.text import escaped

__all__ = [
    "ByBroker",
    "ByPump",
    "Decision",
    "Park",
    "counts_as",
    "decide",
    "spent",
    "wait_delay",
]

# for waits that are not counted; each spends one delivery of the broker
LEAST_WAIT: Final = timedelta(seconds=1)
FARTHEST: Final = timedelta(days=36_500)  # every database, broker and clock can store that date
LONGEST_WAIT: Final = timedelta(seconds=30)  # if it is not known how long the other run may last


def counts_as(error: BaseException, spec: RetrySpec) -> BaseException:
    """Return the exception that decides for a whole exception group: the one that leaves the message the most tries.

    First choice is a `RetryLater`, the one with the longest delay. Else the exception whose policy allows the most attempts, the
    first of several. An exception that no retry can help decides only if there is no other. If `retry=` names the exception group
    itself, the group is returned.
    """
    found = leaves(error)
    if len(found) == 1 and found[0] is error:
        return error
    if not isinstance(spec, Retry) and any(
        issubclass(cls, BaseExceptionGroup) for cls in type(error).__mro__ if cls in spec
    ):
        return error
    if later := [each for each in found if isinstance(each, RetryLater)]:
        return max(later, key=lambda each: _delay_of(DEFAULT, each, 1))
    mended = [each for each in found if not _is_not_mended(each)]
    return max(mended or found, key=lambda each: retry_for(spec, each).max_attempts)


_NOT_MENDED: Final = (Reject, BadKey, BadBody, PayloadConflict, StepError)  # no retry can help


def _is_not_mended(error: BaseException) -> bool:
    return isinstance(error, _NOT_MENDED) or (isinstance(error, Misuse) and error.at_each_run)


@dataclass(frozen=True, slots=True)
class Park:
    """Keep the message whole in the failure store, in this state, for this reason, and acknowledge it.

    With `discarded` and `resolved` the stored row has that state already, and keeps it.
    """

    state: Literal["dead", "broken", "waiting", "discarded", "resolved"]
    reason: str


@dataclass(frozen=True, slots=True)
class ByBroker:
    """Give the delivery back; the broker redelivers it after `delay`. The failure row has no due time."""

    delay: timedelta


@dataclass(frozen=True, slots=True)
class ByPump:
    """Store the message with its due time, and acknowledge it once it is stored. The pump runs it."""

    delay: timedelta


Decision: TypeAlias = Park | ByBroker | ByPump


def decide(
    error: BaseException,
    *,
    attempts: int,
    retry: RetrySpec,
    features: Features,
    delivery_attempt: int,
    callers_loop: bool = False,
) -> Decision:
    """Decide what becomes of a message whose attempt failed.

    Args:
        error: What the handler, the decoding or the claim raised.
        attempts: The recorded failures of this message for this handler, this one included.
        retry: The handler's policy.
        features: What the broker can do.
        delivery_attempt: The broker's count for this delivery, from 1.
        callers_loop: The caller owns the consumer loop; it can only give back.

    Returns:
        `Park` at once if no retry can help (`Reject`, no key, no readable body, another payload with a known key, a step that
        must not be guessed, a mistake of the handler that each run makes), and after `max_attempts`. Else who tries again, and
        when. In an exception group `counts_as` chooses the exception that decides.
    """
    one = counts_as(error, retry)
    if isinstance(one, Reject):
        return Park("dead", f"rejected by the handler: {words_of(one)}")
    if _is_not_mended(one):
        return Park("dead", words_of(one))
    policy = retry_for(retry, one)
    if attempts >= policy.max_attempts:
        words = words_of(error)
        told = f"{type(error).__name__}: {escaped(words, 500)}" if words else type(error).__name__
        times = "once" if attempts == 1 else f"{attempts} times"
        return Park("dead", f"failed {times}, of {policy.max_attempts} allowed; the last error was {told}")
    return _owner(_delay_of(policy, one, attempts), features, delivery_attempt, callers_loop=callers_loop)


def _delay_of(policy: Retry, error: BaseException, attempts: int) -> timedelta:
    """The delay of the error, else of the policy. A class of the application's own may return anything, or raise."""
    asked: tuple[Callable[[], object], ...] = (
        lambda: error.delay if isinstance(error, RetryLater) else None,
        lambda: policy.delay(attempts),
    )
    for ask in asked:
        with suppress(Exception):  # if this raised, the failure would be neither counted nor stored
            if isinstance(delay := ask(), timedelta):
                return delay
    return DEFAULT.delay(attempts)


def wait_delay(
    outcome: Outcome,
    *,
    features: Features,
    delivery_attempt: int,
    remaining: timedelta | None = None,
    callers_loop: bool = False,
) -> ByBroker | ByPump:
    """Decide when to look again at a message without a fault of its own. Never counted as a failure.

    Args:
        outcome: IN_PROGRESS, UNKNOWN or WAITING.
        features: What the broker can do.
        delivery_attempt: The broker's count for this delivery, from 1. It grows with each wait, and so do the waits.
        remaining: For IN_PROGRESS: how long the lease of the other run still lasts, if it has one. A run that died keeps its key
            until then, and each earlier look would only spend a delivery.
        callers_loop: The caller owns the consumer loop; it can only give back.

    Returns:
        Who looks again, and when. With `remaining`: at its end, but at least after a second. Without: after a second, then twice
        as long with each delivery, at most 30 s. Never later than the broker can wait. `ByPump` also near the broker's limit: the
        message is then kept as *waiting*, not dead.
    """
    if outcome not in (Outcome.IN_PROGRESS, Outcome.UNKNOWN, Outcome.WAITING):
        raise ValueError(f"{outcome} is not waited for")
    if remaining is not None:
        delay = max(remaining, LEAST_WAIT)
    else:
        delay = min(LEAST_WAIT * 2 ** min(max(delivery_attempt, 1) - 1, 10), LONGEST_WAIT)
    if features.max_redelivery_delay is not None:
        delay = min(delay, features.max_redelivery_delay)  # an earlier look does no harm: it decides again
    return _owner(delay, features, delivery_attempt, callers_loop=callers_loop)


def _owner(delay: timedelta, features: Features, delivery_attempt: int, *, callers_loop: bool) -> ByBroker | ByPump:
    # every delay passes here. It is limited, because SQLite stores a date beyond its range as NULL: it would never be due
    delay = min(max(delay, AT_ONCE), FARTHEST)
    if callers_loop:
        return ByBroker(delay)
    too_long = features.max_redelivery_delay is not None and delay > features.max_redelivery_delay
    # hand over one delivery early: if this process dies before the row is stored, one delivery remains
    near_limit = features.max_attempts is not None and delivery_attempt >= features.max_attempts - 1
    return ByPump(delay) if not features.redelivers or too_long or near_limit else ByBroker(delay)


def spent(delivery_attempt: int, features: Features) -> bool:
    """Whether this is the broker's last delivery.

    A message whose handlers finish or fail never comes so far: it ended the process each time, or its acknowledgements were lost.
    The processor looks up the claim first (consumed: acknowledge). Else it parks the message without another run.
    """
    return features.counts_attempts and features.max_attempts is not None and delivery_attempt >= features.max_attempts
