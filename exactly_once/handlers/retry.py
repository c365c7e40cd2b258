"""How often and how soon a handler's failed messages are tried again: `retry=`, checked at the decorator. Pure."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Final, TypeAlias

from exactly_once.errors import ConfigurationError

__all__ = ["AT_ONCE", "DEFAULT", "LONGEST_DELAY", "Retry", "RetrySpec", "check_retry", "retry_for"]

AT_ONCE: Final = timedelta(0)
MOST_ATTEMPTS: Final = 1_000_000
LONGEST_DELAY: Final = timedelta(days=365)


@dataclass(frozen=True, slots=True)
class Retry:
    """How often and how soon a failed message is tried again.

    Args:
        immediate: How many more tries follow at once, in new transactions within the same delivery. Only the failure of the last
            try is recorded and counted.
        delays: The wait after each recorded failure, as timedelta or seconds. The last one repeats.
        max_attempts: After so many failures the message is kept for a person.

    Raises:
        ConfigurationError: A value is out of range.

    Example:
        >>> policy = Retry(immediate=1, delays=[5, timedelta(minutes=1)])
        >>> [str(policy.delay(attempts)) for attempts in (1, 2, 3)]
        ['0:00:05', '0:01:00', '0:01:00']
    """

    immediate: int = 2
    delays: Sequence[timedelta | float] = (1.0, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
    max_attempts: int = 16

    def __post_init__(self) -> None:
        _whole("immediate", self.immediate, 0)
        _whole("max_attempts", self.max_attempts, 1)
        if isinstance(self.delays, (str, bytes, timedelta, int, float)) or not isinstance(self.delays, Sequence):
            raise ConfigurationError(f"Retry(delays={self.delays!r}): give a list, such as delays=[1, 5, 60]")
        if not self.delays:
            raise ConfigurationError(
                "Retry(delays=[]): give at least one delay; the last one repeats. [0] retries at once"
            )
        object.__setattr__(self, "delays", tuple(_delay(given) for given in self.delays))

    def delay(self, attempts: int) -> timedelta:
        """Return how long to wait after the failure number `attempts`, counted from 1."""
        delay = self.delays[min(attempts, len(self.delays)) - 1]
        assert isinstance(delay, timedelta)  # converted by __post_init__
        return delay


RetrySpec: TypeAlias = Retry | Mapping[type[BaseException], Retry]


def _whole(name: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= MOST_ATTEMPTS:
        raise ConfigurationError(f"Retry({name}={value!r}): give a whole number from {least} to {MOST_ATTEMPTS:,}")


def _delay(given: object) -> timedelta:
    if isinstance(given, (int, float)) and not isinstance(given, bool):
        # also refuses nan, for which every comparison is false
        if not 0 <= given <= LONGEST_DELAY.total_seconds():
            raise ConfigurationError(
                f"Retry(delays=...): {given!r} seconds is not between 0 and {LONGEST_DELAY.days} days"
            )
        return timedelta(seconds=given)
    if not isinstance(given, timedelta):
        raise ConfigurationError(f"Retry(delays=...): {given!r} is neither a timedelta nor a number of seconds")
    if not AT_ONCE <= given <= LONGEST_DELAY:
        raise ConfigurationError(f"Retry(delays=...): {given} is not between 0 and {LONGEST_DELAY.days} days")
    return given


def check_retry(spec: object) -> RetrySpec:
    """Return `retry=` if it is a `Retry`, or a mapping of exception classes to `Retry`.

    Raises:
        ConfigurationError: It is something else.
    """
    if isinstance(spec, Retry):
        return spec
    if spec is Retry:
        raise ConfigurationError("retry=Retry: call it: retry=Retry()")
    if not isinstance(spec, Mapping) or not spec:
        raise ConfigurationError(
            f"retry={spec!r}: give Retry(...), or {{TimeoutError: Retry(...), Exception: Retry(...)}}"
        )
    for raised, policy in spec.items():
        if not (isinstance(raised, type) and issubclass(raised, BaseException)):
            raise ConfigurationError(f"retry={{{raised!r}: ...}}: the keys are exception classes")
        if not isinstance(policy, Retry):
            raise ConfigurationError(f"retry={{{raised.__name__}: {policy!r}}}: the values are Retry(...)")
    return dict(spec)


def retry_for(spec: RetrySpec, error: BaseException) -> Retry:
    """Return the policy for an error. In a mapping: the policy of its nearest base class.

    An error that no class of the mapping covers gets the default, `Retry()`: a missing policy never loses a message.

    Example:
        >>> spec = {OSError: Retry(max_attempts=3), Exception: Retry(max_attempts=5)}
        >>> retry_for(spec, TimeoutError()).max_attempts, retry_for(spec, ValueError()).max_attempts
        (3, 5)
    """
    if isinstance(spec, Retry):
        return spec
    for ancestor in type(error).__mro__:
        if ancestor in spec:
            return spec[ancestor]
    return DEFAULT


DEFAULT: Final = Retry()
