"""Times no calendar has: a retry asked for in the year 5000, a policy that answers nonsense, births far from UTC. What is to be
tried again always has a time that comes, and each failure is counted."""

from collections.abc import Callable
from datetime import UTC, datetime, timedelta, timezone, tzinfo
from typing import Any

import pytest
from sqlalchemy.orm import Session

from exactly_once import Message, Outcome, Retry, RetryLater
from exactly_once.failures.decisions import Chosen, requeue
from exactly_once.outcome import Redeliver
from tests.integration.failing import BROKER, UNSAFE, deliver, own_engines, states
from tests.integration.shop import GROUP, Shop, order, put
from tests.integration.ways import WAYS, Way
from tests.waiting import until

pytestmark = pytest.mark.nightly(meet=2)
THREE = Retry(immediate=0, delays=[0.01], max_attempts=3)
AHEAD = timedelta(days=300)
LATEST = timedelta(days=36_501)


class Bare(RetryLater):
    def __init__(self, why: str) -> None:
        self.why = why


class Own(RetryLater):
    @property
    def delay(self) -> Any:  # type: ignore[override]
        raise LookupError("no delay")


def changed(delay: Any) -> RetryLater:
    error = RetryLater()
    error.delay = delay
    return error


@pytest.mark.parametrize(
    "delay", [30, 2.5, "30", datetime(2026, 1, 1, tzinfo=UTC)], ids=["int", "float", "text", "date"]
)
@pytest.mark.parametrize("way", WAYS, ids=str)
def test_a_delay_that_is_no_timedelta_is_a_failure_like_any_other(shop: Shop, way: Way, delay: Any) -> None:
    def do(session: Session, no: object) -> None:
        raise RetryLater(delay)

    way.handles(shop, do, retry=THREE)
    ends = [end for attempt in (1, 2, 3) for end in way.attempted(shop, [order(attempt=attempt)])]
    assert ends == [Outcome.FAILED, Outcome.FAILED, Outcome.DEAD]
    failure = shop.failure()
    assert (failure.attempts, failure.error_class) == (3, "TypeError")
    assert "RetryLater(timedelta(seconds=" in failure.error_text


FAR: dict[str, Callable[[], BaseException]] = {
    "the longest": lambda: RetryLater(timedelta.max),
    "8,000 years": lambda: RetryLater(timedelta(days=3_000_000)),
    "1,300,000 years": lambda: RetryLater(timedelta(days=500_000_000)),
    "before now": lambda: RetryLater(timedelta.min),
    "without a delay": lambda: Bare("x"),
    "a delay that raises": Own,
    "a number put in later": lambda: changed(30),
    "a text put in later": lambda: changed("soon"),
}


@pytest.mark.parametrize("kind", FAR)
def test_what_the_pump_is_to_run_has_a_time_that_comes(shop: Shop, kind: str) -> None:
    def do(session: Session) -> None:
        raise FAR[kind]()

    shop.handles(do, retry=THREE)
    for attempt in (1, 2):
        assert deliver(shop, order(attempt=attempt), UNSAFE).outcome is Outcome.FAILED
        failure = shop.failure()
        assert (failure.state, failure.attempts) == ("retrying", attempt)
        assert datetime.now(UTC) - timedelta(minutes=1) < failure.next_attempt_at < datetime.now(UTC) + LATEST
        assert (failure.next_attempt_at > datetime.now(UTC) + AHEAD) == ("year" in kind or "longest" in kind)
    assert deliver(shop, order(attempt=3), UNSAFE).outcome is Outcome.DEAD


@pytest.mark.parametrize("kind", FAR)
def test_what_the_broker_is_to_bring_again_has_a_delay_it_can_take(shop: Shop, kind: str) -> None:
    def do(session: Session) -> None:
        raise FAR[kind]()

    shop.handles(do, retry=THREE)
    verdict = deliver(shop, order(), BROKER).verdict
    assert isinstance(verdict, Redeliver)
    assert timedelta(0) <= verdict.delay < LATEST
    assert shop.failure().attempts == 1


class Nonsense(Retry):
    __slots__ = ()
    answers: Any = None

    def delay(self, attempts: int) -> timedelta:
        if isinstance(self.answers, Exception):
            raise self.answers
        return self.answers  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    "answer",
    [None, "soon", timedelta.max, timedelta(days=-1), float("nan"), float("inf"), 10**400, -1, LookupError("none")],
    ids=str,
)
def test_a_policy_that_answers_nonsense_loses_nothing(shop: Shop, answer: Any) -> None:
    class Policy(Nonsense):
        answers = answer

    def do(session: Session) -> None:
        raise ValueError("no")

    shop.handles(do, retry=Policy(immediate=0, max_attempts=3))
    assert deliver(shop, order(), UNSAFE).outcome is Outcome.FAILED
    failure = shop.failure()
    assert (failure.state, failure.attempts) == ("retrying", 1)
    assert datetime.now(UTC) - timedelta(minutes=1) < failure.next_attempt_at < datetime.now(UTC) + LATEST


@pytest.mark.parametrize("rate", [1e-300, float("nan")], ids=str)
def test_a_requeue_at_a_rate_that_is_none_gives_every_row_a_time(shop: Shop, rate: float) -> None:
    def do(session: Session) -> None:
        raise ValueError("no")

    shop.handles(do, retry=Retry(immediate=0, max_attempts=1))
    for no in range(3):
        shop.process(order(no))
    with shop.outside.begin() as connection:
        requeue(connection, shop.tables, Chosen(group=GROUP), by="me", why=None, per_second=rate)
    assert states(shop) == ["requeued"] * 3
    assert all(row.next_attempt_at is not None for row in shop.failures())


def test_a_message_asked_for_in_the_year_5000_stays_in_the_workers_queue(shop: Shop) -> None:
    runs: list[int] = []

    def do(session: Session) -> None:
        runs.append(1)
        raise RetryLater(timedelta.max)

    with own_engines(shop) as eo:
        shop.handles(do, retry=THREE)
        with eo.worker("sql://") as worker, eo.producer("sql://") as producer:
            producer.send(order())
            until(lambda: worker.counts.outcomes["failed"] == 1, "the only run")
    (queued,) = shop.rows(shop.tables.queue)
    assert datetime.now(UTC) + AHEAD < queued.deliver_at < datetime.now(UTC) + LATEST
    assert runs == [1]


# -- births ------------------------------------------------------------------------------------------------------------


class Summer(tzinfo):
    """A time zone of an application's own."""

    def utcoffset(self, at: datetime | None) -> timedelta:
        return timedelta(hours=2)

    def dst(self, at: datetime | None) -> timedelta:
        return timedelta(hours=1)


class Moment(datetime):
    """As libraries of dates make one."""

    def isoformat(self, *_: Any, **__: Any) -> str:
        return "in the morning"


BORN = {
    "23 h west": datetime(2026, 1, 1, 12, tzinfo=timezone(timedelta(hours=-23))),
    "23:59 east": datetime(2026, 1, 1, 12, tzinfo=timezone(timedelta(hours=23, minutes=59))),
    "odd seconds": datetime(1900, 1, 1, tzinfo=timezone(timedelta(seconds=-3211, microseconds=7))),
    "a zone of its own": datetime(2026, 7, 1, tzinfo=Summer()),
    "a class of its own": Moment(2026, 1, 1, tzinfo=timezone(timedelta(hours=20))),
    "before the year 1000 in UTC": datetime(1000, 1, 1, tzinfo=timezone(timedelta(hours=14))),
    "after the year 9998 in UTC": datetime(9998, 12, 31, 23, tzinfo=timezone(timedelta(hours=-23))),
    "no time in UTC": datetime.max.replace(tzinfo=timezone(timedelta(hours=-23))),
}


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("kind", BORN)
def test_a_birth_far_from_utc_is_written_wherever_one_is_written(shop: Shop, way: Way, kind: str) -> None:
    def do(session: Session, no: object) -> None:
        if no == "bad":
            raise ValueError("no")
        put(session, str(no))

    way.handles(shop, do, retry=Retry(immediate=0, max_attempts=1))
    messages = [order(no, born_at=BORN[kind]) for no in ("a", "b", "bad")]
    assert way.attempted(shop, messages) == [Outcome.PROCESSED, Outcome.PROCESSED, Outcome.DEAD]
    expected = None if "in UTC" in kind else BORN[kind]
    assert shop.failure().born_at == expected
    claims = [row for row in shop.rows(shop.tables.idempotent) if row.business_key != "bad"]
    assert [row.born_at for row in claims] == [expected] * 2


def test_a_birth_is_kept_in_utc() -> None:
    born = Message("orders", b"", born_at=BORN["a class of its own"]).born_at
    assert born == BORN["a class of its own"]
    assert (type(born), born.tzinfo if born else None) == (datetime, UTC)


def test_a_queue_in_a_table_takes_a_birth_far_from_utc(shop: Shop) -> None:
    shop.handles(lambda session: put(session, "done"))
    with own_engines(shop) as eo:
        shop.handles(lambda session: put(session, "done"))
        with eo.worker("sql://") as worker, eo.producer("sql://") as producer:
            producer.send_all([order(n, born_at=born) for n, born in enumerate(BORN.values())])
            worker.drain(timedelta(seconds=30))
    assert shop.effects() == ["done"] * len(BORN)
