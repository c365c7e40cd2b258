"""What becomes of a message that was not finished: try again by whom and when, or keep it for a person. Pure.

    error of the handler -> decide -> Park | ByBroker | ByPump              counted as a failure
    in progress, unknown, waiting -> wait_delay -> ByBroker | ByPump        not counted: the message itself is sound
    arrives with no delivery left -> spent                                  look the claim up, else park without running

Each retry has one owner. `ByBroker`: the delivery is given back and the broker brings it again. `ByPump`: the failure
store keeps the message with a time, the broker is told it is done, and the pump runs it then; chosen where the broker's
redelivery is missing or unsafe, cannot wait that long, or where the broker would soon take the message away for good.
A foreign consumer loop (`process()`) only ever gives back: whoever runs no worker of ours may run no pump either.

Nothing here reads a clock, a store or a message. Called by `processor`, which has the failure store ask it with
the number of failures.
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

# for uncounted waits; each one spends one of the broker's deliveries
LEAST_WAIT: Final = timedelta(seconds=1)
FARTHEST: Final = timedelta(days=36_500)  # every database, broker and clock has that date
LONGEST_WAIT: Final = timedelta(seconds=30)  # where nothing says how long the other run may last


def counts_as(error: BaseException, spec: RetrySpec) -> BaseException:
    """Return the one of a group's exceptions that decides for all of it: the one after which the message has most tries left.

    That is a `RetryLater`, of several the one with the longest delay; else the first of those whose policy allows most attempts;
    and what no retry mends only where there is nothing else. A group that `retry=` names itself is none of its exceptions.
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


_NOT_MENDED: Final = (Reject, BadKey, BadBody, PayloadConflict, StepError)  # by any retry


def _is_not_mended(error: BaseException) -> bool:
    return isinstance(error, _NOT_MENDED) or (isinstance(error, Misuse) and error.at_each_run)


@dataclass(frozen=True, slots=True)
class Park:
    """Keep it whole in the failure store, in this state, for this reason; the broker is done with it.

    Discarded and resolved are what was found there: it stays so.
    """

    state: Literal["dead", "broken", "waiting", "discarded", "resolved"]
    reason: str


@dataclass(frozen=True, slots=True)
class ByBroker:
    """Give the delivery back; the broker brings it again after `delay`. The failure's row has no next time."""

    delay: timedelta


@dataclass(frozen=True, slots=True)
class ByPump:
    """Store it with the time it is due, and acknowledge once it is stored; the pump runs it."""

    delay: timedelta


Decision: TypeAlias = Park | ByBroker | ByPump


def decide(
    error: BaseException,
    *,
    attempts: int,
    retry: RetrySpec,
    features: Features,
    delivery_attempt: int,
    foreign: bool = False,
) -> Decision:
    """Decide what becomes of a message whose attempt failed.

    Args:
        error: What the handler, the decoding or the claim raised.
        attempts: Failures recorded of this message for this handler, this one included.
        retry: The handler's policy.
        features: What the broker can do.
        delivery_attempt: The broker's count for this delivery, from 1.
        foreign: The caller owns the consumer loop; it can only give back.

    Returns:
        `Park` at once for what no retry mends (`Reject`, no key, no readable body, another payload under a
        known key, a step that must not be guessed, a mistake of the handler's that each run makes)
        and after `max_attempts`; else who tries again, and when. Of a group `counts_as` says which of its exceptions decides.
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
    return _owner(_delay_of(policy, one, attempts), features, delivery_attempt, foreign=foreign)


def _delay_of(policy: Retry, error: BaseException, attempts: int) -> timedelta:
    """What the error asks for, else what the policy says; a class of the application's own may say anything, or raise."""
    asked: tuple[Callable[[], object], ...] = (
        lambda: error.delay if isinstance(error, RetryLater) else None,
        lambda: policy.delay(attempts),
    )
    for ask in asked:
        with suppress(Exception):  # raised from here, the failure would be neither counted nor stored
            if isinstance(delay := ask(), timedelta):
                return delay
    return DEFAULT.delay(attempts)


def wait_delay(
    outcome: Outcome,
    *,
    features: Features,
    delivery_attempt: int,
    remaining: timedelta | None = None,
    foreign: bool = False,
) -> ByBroker | ByPump:
    """Decide when to look again at a message that nothing is wrong with; never counted as a failure.

    Args:
        outcome: IN_PROGRESS, UNKNOWN or WAITING.
        features: What the broker can do.
        delivery_attempt: The broker's count for this delivery, from 1; it grows with each wait, and the waits with it.
        remaining: For IN_PROGRESS: how long the other run's lease still lasts, if it has one. A run that died keeps
            its key until then, and each look before it would spend a delivery to see just that.
        foreign: The caller owns the consumer loop; it can only give back.

    Returns:
        Who looks again, and when: as `remaining` ends, at least after a second; without it after a second, then twice
        as long with each delivery, at most 30 s. Never later than the broker can wait. `ByPump` also near the broker's
        limit: the message is then kept as *waiting*, not dead.
    """
    if outcome not in (Outcome.IN_PROGRESS, Outcome.UNKNOWN, Outcome.WAITING):
        raise ValueError(f"{outcome} is not waited for")
    if remaining is not None:
        delay = max(remaining, LEAST_WAIT)
    else:
        delay = min(LEAST_WAIT * 2 ** min(max(delivery_attempt, 1) - 1, 10), LONGEST_WAIT)
    if features.max_redelivery_delay is not None:
        delay = min(delay, features.max_redelivery_delay)  # sooner is as good: the next look decides again
    return _owner(delay, features, delivery_attempt, foreign=foreign)


def _owner(delay: timedelta, features: Features, delivery_attempt: int, *, foreign: bool) -> ByBroker | ByPump:
    # the one place every delay goes through: a time that no database has is stored as none by SQLite, and never comes
    delay = min(max(delay, AT_ONCE), FARTHEST)
    if foreign:
        return ByBroker(delay)
    too_long = features.max_redelivery_delay is not None and delay > features.max_redelivery_delay
    # one delivery short of the last: if this process dies before the row is stored, the last one still finds us
    near_limit = features.max_attempts is not None and delivery_attempt >= features.max_attempts - 1
    return ByPump(delay) if not features.redelivers or too_long or near_limit else ByBroker(delay)


def spent(delivery_attempt: int, features: Features) -> bool:
    """Tell whether this is the last delivery the broker will make.

    Such a message never gets here while its handlers can finish or fail: it ended the process each time, or its
    acknowledgements got lost. The attempt looks its claim up first (consumed: acknowledge) and else parks it without
    running it again.
    """
    return features.counts_attempts and features.max_attempts is not None and delivery_attempt >= features.max_attempts
