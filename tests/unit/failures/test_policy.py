"""Retry policy: who tries again, when, and when a person is asked."""

from datetime import timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from exactly_once.errors import BadBody, BadKey, ConfigurationError, PayloadConflict, Reject, RetryLater
from exactly_once.failures.policy import ByBroker, ByPump, Decision, Park, counts_as, decide, spent, wait_delay
from exactly_once.handlers.retry import Retry, check_retry, retry_for
from exactly_once.outcome import Outcome
from exactly_once.transports.contract import Features

BROKER = Features(redelivers=True, counts_attempts=True, max_attempts=16)
ENDLESS = Features(redelivers=True, counts_attempts=False)
UNSAFE = Features(redelivers=False, counts_attempts=True)


def seconds(amount: float) -> timedelta:
    return timedelta(seconds=amount)


def decided(error: BaseException, attempts: int = 1, features: Features = BROKER, **more: Any) -> Decision:
    given: dict[str, Any] = {"retry": Retry(), "delivery_attempt": 1} | more
    return decide(error, attempts=attempts, features=features, **given)


def test_recorded_failures_are_retried_after_the_delays_and_the_last_repeats() -> None:
    retry = Retry(immediate=2, delays=[1, seconds(5), 0.5], max_attempts=16)
    assert [retry.delay(n) for n in range(1, 6)] == [seconds(s) for s in (1, 5, 0.5, 0.5, 0.5)]
    assert Retry(immediate=0, delays=[7]).delay(1) == seconds(7)


def test_the_default_is_sixteen_attempts_up_to_ten_minutes_apart() -> None:
    assert (Retry().immediate, Retry().max_attempts, Retry().delay(15)) == (2, 16, timedelta(minutes=10))


@pytest.mark.parametrize(
    "wrong",
    [
        {"immediate": -1},
        {"immediate": True},
        {"immediate": 1.5},
        {"max_attempts": 0},
        {"max_attempts": None},
        {"delays": []},
        {"delays": 5},
        {"delays": "15"},
        {"delays": [-1]},
        {"delays": [float("nan")]},
        {"delays": [float("inf")]},
        {"delays": [True]},
        {"delays": ["1"]},
        {"delays": [timedelta(days=366)]},
    ],
)
def test_a_wrong_policy_is_refused_when_it_is_written(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match=next(iter(wrong))):
        Retry(**wrong)


@pytest.mark.parametrize("wrong", [Retry, {}, 5, {"TimeoutError": Retry()}, {TimeoutError: 5}, {Retry: Retry()}])
def test_a_wrong_mapping_is_refused(wrong: Any) -> None:
    with pytest.raises(ConfigurationError):
        check_retry(wrong)


def test_the_nearest_class_of_an_error_decides() -> None:
    spec = {Exception: Retry(max_attempts=9), OSError: Retry(max_attempts=3), KeyError: Retry(max_attempts=5)}
    assert retry_for(spec, ConnectionResetError()).max_attempts == 3
    assert retry_for(spec, KeyError()).max_attempts == 5
    assert retry_for(spec, ValueError()).max_attempts == 9
    assert retry_for({OSError: Retry(max_attempts=3)}, ValueError()) == Retry()


@pytest.mark.parametrize(
    "error", [Reject("no such sku"), BadKey("no key"), BadBody("no JSON"), PayloadConflict("other")]
)
@pytest.mark.parametrize("features", [BROKER, ENDLESS, UNSAFE])
@pytest.mark.parametrize("callers_loop", [True, False])
def test_what_no_retry_mends_is_parked_at_once(error: Exception, features: Features, callers_loop: bool) -> None:
    parked = decided(error, features=features, callers_loop=callers_loop)
    assert isinstance(parked, Park)
    assert parked.state == "dead"
    assert str(error) in parked.reason


@pytest.mark.parametrize("callers_loop", [True, False])
def test_after_its_attempts_a_message_is_parked_with_its_last_error(callers_loop: bool) -> None:
    retry = Retry(max_attempts=3)
    assert isinstance(decided(ValueError("x"), 2, retry=retry, callers_loop=callers_loop), ByBroker)
    parked = decided(ValueError("stock is -1"), 3, retry=retry, callers_loop=callers_loop)
    assert isinstance(parked, Park)
    assert "3 times" in parked.reason
    assert "ValueError: stock is -1" in parked.reason
    assert isinstance(decided(ValueError(), 4, retry=retry), Park)
    assert "once" in decided(ValueError(), 1, retry=Retry(max_attempts=1)).reason  # type: ignore[union-attr]


def test_a_broker_that_redelivers_keeps_its_message() -> None:
    # immediate tries are no deliveries: the first delay follows the first failure that was recorded
    assert decided(ValueError()) == ByBroker(seconds(1))
    assert decided(ValueError(), 3) == ByBroker(seconds(10))


def test_a_broker_whose_redelivery_is_unsafe_is_told_that_it_is_done() -> None:
    assert decided(ValueError(), 3, UNSAFE) == ByPump(seconds(10))


def test_a_delay_the_broker_cannot_wait_is_the_pumps() -> None:
    features = Features(redelivers=True, counts_attempts=True, max_redelivery_delay=seconds(10))
    retry = Retry(immediate=0, delays=[10, 11])
    assert decided(ValueError(), 1, features, retry=retry) == ByBroker(seconds(10))
    assert decided(ValueError(), 2, features, retry=retry) == ByPump(seconds(11))


def test_before_the_brokers_last_delivery_the_pump_takes_over() -> None:
    owners = [type(decided(ValueError(), delivery_attempt=n)).__name__ for n in (13, 14, 15, 16)]
    assert owners == ["ByBroker", "ByBroker", "ByPump", "ByPump"]


def test_a_loop_of_the_callers_never_schedules() -> None:
    for features in (BROKER, ENDLESS, UNSAFE, Features(redelivers=True, counts_attempts=True, max_attempts=1)):
        for attempts in (1, 5, 15):
            assert isinstance(
                decided(ValueError(), attempts, features, callers_loop=True, delivery_attempt=15), ByBroker
            )
        for outcome in (Outcome.IN_PROGRESS, Outcome.UNKNOWN, Outcome.WAITING):
            assert isinstance(wait_delay(outcome, features=features, delivery_attempt=15, callers_loop=True), ByBroker)


def test_a_handler_may_name_its_own_delay_and_it_counts() -> None:
    assert decided(RetryLater(seconds(77))) == ByBroker(seconds(77))
    assert decided(RetryLater(seconds(77)), features=UNSAFE) == ByPump(seconds(77))
    assert decided(RetryLater(), 3) == ByBroker(seconds(10))
    assert decided(RetryLater(seconds(0)), 3) == ByBroker(seconds(0))
    assert isinstance(decided(RetryLater(seconds(77)), 16), Park)


def test_waits_grow_and_do_not_end_in_a_dead_letter() -> None:
    waits = [wait_delay(Outcome.IN_PROGRESS, features=ENDLESS, delivery_attempt=n) for n in (1, 2, 3, 6, 100)]
    assert waits == [ByBroker(seconds(s)) for s in (1, 2, 4, 30, 30)]
    for outcome in (Outcome.IN_PROGRESS, Outcome.UNKNOWN, Outcome.WAITING):
        assert isinstance(wait_delay(outcome, features=BROKER, delivery_attempt=15), ByPump)
        assert isinstance(wait_delay(outcome, features=UNSAFE, delivery_attempt=1), ByPump)


def leased(remaining: float, features: Features = BROKER, attempt: int = 1, **more: Any) -> ByBroker | ByPump:
    given: dict[str, Any] = {"features": features, "delivery_attempt": attempt, "remaining": seconds(remaining)}
    return wait_delay(Outcome.IN_PROGRESS, **(given | more))


@pytest.mark.parametrize("attempt", [1, 2, 14])
def test_behind_a_lease_the_next_look_is_as_it_ends_and_not_sooner(attempt: int) -> None:
    assert leased(55, attempt=attempt) == ByBroker(seconds(55))
    assert leased(3, attempt=attempt) == ByBroker(seconds(3))
    for over in (0.2, 0, -7):
        assert leased(over, attempt=attempt) == ByBroker(seconds(1)), "not in a tight circle"


def test_behind_a_lease_the_brokers_limits_hold() -> None:
    assert leased(55, attempt=15) == ByPump(seconds(55)), "kept as waiting, not dead"
    assert leased(55, UNSAFE) == ByPump(seconds(55))
    assert leased(55, attempt=15, callers_loop=True) == ByBroker(seconds(55))


def test_a_wait_is_no_longer_than_the_broker_can_wait() -> None:
    short = Features(redelivers=True, counts_attempts=True, max_redelivery_delay=seconds(5))
    assert wait_delay(Outcome.WAITING, features=short, delivery_attempt=9) == ByBroker(seconds(5))
    assert leased(55, short) == ByBroker(seconds(5)), "then it is looked at again, and waits the next part"


@given(
    attempt=st.integers(-3, 10_000),
    remaining=st.none() | st.timedeltas(timedelta(days=-1), timedelta(days=2)),
    longest=st.none() | st.timedeltas(seconds(1), timedelta(days=1)),
    most=st.none() | st.integers(2, 100),
    redelivers=st.booleans(),
    callers_loop=st.booleans(),
)
def test_every_wait_is_between_a_second_and_what_it_waits_for(
    attempt: int,
    remaining: timedelta | None,
    longest: timedelta | None,
    most: int | None,
    redelivers: bool,
    callers_loop: bool,
) -> None:
    features = Features(redelivers=redelivers, counts_attempts=True, max_attempts=most, max_redelivery_delay=longest)
    waits = wait_delay(
        Outcome.IN_PROGRESS, features=features, delivery_attempt=attempt, remaining=remaining, callers_loop=callers_loop
    )
    most_s = seconds(30) if remaining is None else max(remaining, seconds(1))
    assert seconds(1) <= waits.delay <= min(most_s, longest or most_s)
    if remaining is not None:
        assert waits.delay == min(most_s, longest or most_s), "nothing is gained by an earlier look"
    near = most is not None and attempt >= most - 1
    assert isinstance(waits, ByBroker if callers_loop or (redelivers and not near) else ByPump)


def test_only_what_waits_is_waited_for() -> None:
    with pytest.raises(ValueError, match="not waited for"):
        wait_delay(Outcome.DEAD, features=BROKER, delivery_attempt=1)


def test_the_last_delivery_is_for_parking() -> None:
    assert [spent(n, BROKER) for n in (1, 15, 16, 17)] == [False, False, True, True]
    assert not spent(99, ENDLESS)
    assert not spent(99, Features(redelivers=True, counts_attempts=False, max_attempts=3))


class Odd(RetryLater):
    def __init__(self) -> None: ...

    @property
    def delay(self) -> timedelta:  # type: ignore[override]
        raise RuntimeError("no delay")


class Own(ExceptionGroup[Exception]):
    @property
    def exceptions(self) -> Any:
        raise RuntimeError("none of yours")


def test_a_group_counts_as_the_exception_after_which_most_tries_are_left() -> None:
    few, many, none, later = OSError("few"), ValueError("many"), Reject("none"), RetryLater(seconds(7))
    spec = {OSError: Retry(max_attempts=2), Exception: Retry(max_attempts=9)}
    for of, one in (
        ([few, many], many),
        ([none, few], few),
        ([none, BadKey("x")], none),
        ([many, none, later], later),
        ([Odd(), later], later),
        ([RetryLater(), RetryLater(seconds(3)), later], later),
        ([ExceptionGroup("inside", [none, few]), many], many),
    ):
        assert counts_as(ExceptionGroup("g", of), spec) is one
    assert counts_as(many, spec) is many
    named = Own("g", [none])
    assert counts_as(named, {Own: Retry()}) is named
    assert counts_as(named, spec) is none
    assert isinstance(decided(ExceptionGroup("g", [Odd()])), ByBroker)
