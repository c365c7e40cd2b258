"""Under a lease the process is killed, or stopped past its lease, at every step between claim and settle; a second finishes.

What was called is read from an outside service (`lease_ledger`), what stands from the stores. The stories of the chosen
tests run several at a time, each with a database of its own, because each mostly waits for a lease to end; a test looks at
how its own ended.
"""

import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

import pytest
from sqlalchemy import Engine, select, text
from sqlalchemy.orm import Session

from exactly_once.testing import bound
from exactly_once.testing.databases import DatabaseServer
from tests.acceptance import lease_ledger, lease_shop
from tests.acceptance.lease_ledger import Call, Ledger
from tests.acceptance.lease_shop import (
    CALLS,
    FIRST,
    LAST,
    LEASE,
    POINTS,
    RENEWING,
    STEPS,
    Order,
    Record,
    Shipment,
    message,
    records_in_redis,
    records_in_sql,
)
from tests.acceptance.lease_workers import PATIENCE_S, Worker
from tests.services import redis as redis_service
from tests.services.need import require
from tests.waiting import until

pytestmark = [
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="PR_SET_PDEATHSIG and /proc are Linux's"),
    pytest.mark.alone,  # six stories at a time take the whole machine, and their leases are of two seconds
]

STORES = ("sql", "redis")
RESTED = "the transaction step recorded"  # between two steps, the next of which is a call
AT_ONCE = 6  # stories at a time: they wait more than they work


@dataclass(frozen=True, slots=True)
class Story:
    """What happens to a worker, and where."""

    store: str
    point: str
    how: str = "kill"
    once: bool = False
    """The last call is one that may happen at most once."""
    then: str = "finished"
    """While the first one stands still, a second worker has "finished" the message; or has "overtaken" it and is in the
    middle; or it is "kept" from it by a lock; or the claim that takes it over is "claiming", and not committed yet."""

    def __str__(self) -> str:
        return f"{self.store}: {self.point}"


@dataclass(frozen=True, slots=True)
class Seen:
    """How it ended."""

    victim: str
    others: tuple[str, ...]
    calls: tuple[Call, ...]
    orders: Counter[str]
    shipments: Counter[str]
    records: Mapping[str, Record]
    failures: tuple[tuple[str, str, str, str], ...]
    """Key, state, class and text of the error."""
    left: int
    """Messages in the queue."""

    def called(self, key: str) -> list[tuple[str, int, bool]]:
        """Step, attempt and whether it was refused, of each call for a message."""
        return [(call.step, call.attempt, call.refused) for call in self.calls if call.message == key]


def _from_to(first: str, last: str) -> tuple[str, ...]:
    return POINTS[POINTS.index(first) : POINTS.index(last) + 1]


KILLED = [Story(store, point) for store in STORES for point in POINTS]
ONCE = [Story(store, point, once=True) for store in STORES for point in _from_to(RESTED, "the last step recorded")]
STOPPED = [
    Story(store, point, "stop")
    for store in STORES
    for point in (
        *_from_to("in the first call, not sent", "in the transaction step"),
        *_from_to("in the last call, not sent", "before complete"),
    )
    if (store, point) not in (("redis", "the last step recorded"), ("redis", "before complete"))
]
BETWEEN = [
    *(Story(store, point, "stop") for store in STORES for point in ("claimed", RESTED)),
    Story("sql", RENEWING, "stop"),
]
CLAIMING = [Story("sql", point, "stop", then="claiming") for point in ("claimed", RESTED)]
UNFENCED = [Story("redis", point, "stop") for point in ("the last step recorded", "before complete")]
HOLDING = [
    Story("sql", "before the transaction step's COMMIT", "stop", then="kept"),
    Story("redis", "before the transaction step's COMMIT", "stop", then="kept"),
    Story("sql", "before COMMIT", "stop", then="kept"),
]

OVERTAKEN = [
    *(
        Story("sql", point, "stop", then="overtaken")
        for point in ("the first call made, not recorded", "in the transaction step", "before complete")
    ),
    Story("redis", "the first call made, not recorded", "stop", then="overtaken"),
]


class Stage:
    """The servers all stories share, and the story."""

    def __init__(self, server: DatabaseServer, redis: redis_service.Redis, ledger: Ledger, folder: Path) -> None:
        self.server, self.redis, self.ledger, self.folder = server, redis, ledger, folder
        self._making = threading.Lock()
        self.wanted: Mapping[Story, Future[Seen]] = {}

    def play(self, story: Story) -> Seen:
        """Tell one story from its first message to the last."""
        name = uuid4().hex[:12]
        others = (f"{name}-1", f"{name}-2")
        victim = f"{name}-victim"
        with ExitStack() as ending:
            with self._making:
                database = ending.enter_context(self.server.fresh())
            lease_shop.Base.metadata.create_all(database)
            with self._making, bound(lease_shop.eo, database) as eo, eo.producer("sql://") as producer:
                # each twice: the second copy must be a duplicate whatever happened to the first
                keys = (*others, victim)
                producer.send_all([message(story.store, key, once=story.once) for key in keys for _ in range(2)])
            marker = self.folder / f"{name}.marker"
            first = self._worker(ending, database, name, story.point, story.how, str(marker))
            if story.how == "kill":
                assert first.ended() == -signal.SIGKILL, f"to die at this step: {first.told()}"
                second = self._worker(ending, database, name)
            else:
                until(lambda: first.is_stopped, lambda: f"to stop at this step: {first.told()}")
                second = self._stood_still(ending, story, database, name, first, marker)
                self._until_consumed(story, database, victim, second)
                first.send(signal.SIGTERM)
                assert first.ended() in (0, 1), first.told()  # 1: it gave back what another run had
            until(
                lambda: _count(database, "message_queue") == 0,
                lambda: (story, self._records(story, database, *keys), second.told()),
            )
            assert marker.exists()
            until(lambda: second.is_started, second.told)
            second.send(signal.SIGTERM)
            assert second.ended() == 0, second.told()
            return self._seen(story, database, victim, others)

    def _stood_still(
        self, ending: ExitStack, story: Story, database: Engine, name: str, first: Worker, marker: Path
    ) -> Worker:
        """The first worker has stopped: have it go on, and its run end; returns the second worker."""
        victim = f"{name}-victim"

        def goes_on() -> None:
            first.send(signal.SIGCONT)
            until(lambda: marker.read_text() == lease_shop.OVER, first.told)

        match story.then:
            case "finished":
                second = self._worker(ending, database, name)
                self._until_consumed(story, database, victim, second)
                goes_on()
            case "overtaken":
                second = self._worker(ending, database, name, "claimed", "stop", str(self.folder / f"{name}.taken"))
                until(lambda: second.is_stopped, lambda: f"to take it over: {second.told()}")
                goes_on()
                second.send(signal.SIGCONT)
            case "kept":
                second = self._worker(ending, database, name)
                time.sleep(2 * LEASE.total_seconds())  # nothing happens in it, and that is what it is for
                assert not self._records(story, database, victim)[victim].consumed
                goes_on()
            case _:
                until(lambda: _is_over(database, victim), first.told)
                with database.begin() as claiming:
                    claiming.execute(text(CLAIM), {"key": victim})
                    first.send(signal.SIGCONT)
                    time.sleep(1)  # whose the message is cannot be known now: the same
                goes_on()
                second = self._worker(ending, database, name)
        return second

    def _worker(self, ending: ExitStack, database: Engine, name: str, *arguments: str) -> Worker:
        environ = {
            "EXACTLY_ONCE_DATABASE": database.url.render_as_string(hide_password=False),
            "EXACTLY_ONCE_REDIS": self.redis.url,
            # one at a time, so that nothing but the victim is in the middle of something
            "EXACTLY_ONCE_CONCURRENCY": "1",
        }
        worker = Worker(environ, self.folder / f"{name}.log", "sql://?invisible_s=2", str(self.ledger.port), *arguments)
        ending.callback(worker.end)
        return worker

    def _until_consumed(self, story: Story, database: Engine, key: str, by: Worker) -> None:
        until(lambda: self._records(story, database, key)[key].consumed, lambda: f"{story}: {by.told()}")

    def _records(self, story: Story, database: Engine, *keys: str) -> Mapping[str, Record]:
        if story.store == "sql":
            return records_in_sql(database)
        with self.redis.client() as client:
            return records_in_redis(client, keys)

    def _seen(self, story: Story, database: Engine, victim: str, others: tuple[str, ...]) -> Seen:
        keys = (victim, *others)
        with Session(database) as session:
            orders = Counter(session.scalars(select(Order.order_no)))
            shipments = Counter(session.scalars(select(Shipment.order_no)))
            failures = session.execute(
                text("SELECT business_key, state, error_class, error_text FROM message_failure ORDER BY id")
            )
            return Seen(
                victim,
                others,
                tuple(call for call in self.ledger.calls() if call.message in keys),
                orders,
                shipments,
                self._records(story, database, *keys),
                tuple((key, state, kind, why) for key, state, kind, why in failures),
                _count(database, "message_queue"),
            )


@pytest.fixture(scope="module")
def own_redis_server() -> Iterator[redis_service.Redis]:
    """A Redis of this module's own that forgets nothing."""
    require(redis_service)
    with redis_service.Redis(persistent=True) as server:
        yield server


@pytest.fixture(scope="module")
def stage(
    request: pytest.FixtureRequest,
    eo_server: DatabaseServer,
    own_redis_server: redis_service.Redis,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Stage]:
    """The servers, and the stories of the tests that were chosen, under way."""
    if eo_server.dialect != "postgresql":
        pytest.skip(f"the test database is {eo_server.dialect}")
    folder = tmp_path_factory.mktemp("leases")
    with eo_server.fresh(), lease_ledger.ledger(folder) as ledger, ThreadPoolExecutor(AT_ONCE) as pool:
        made = Stage(eo_server, own_redis_server, ledger, folder)
        chosen = [
            item.callspec.params["story"]
            for item in request.session.items
            if item.path == request.path and "story" in getattr(getattr(item, "callspec", None), "params", {})
        ]
        made.wanted = {story: pool.submit(made.play, story) for story in dict.fromkeys(chosen)}
        yield made
        pool.shutdown(cancel_futures=True)


@pytest.fixture
def seen(stage: Stage, story: Story) -> Seen:
    """How this test's story ended."""
    return stage.wanted[story].result(5 * PATIENCE_S)


# what a claim that takes a message over does, of a run that dies with it
CLAIM = (
    "UPDATE message_idempotent SET token = 'another', retry_times = retry_times + 1, lease_until = clock_timestamp()"
    " WHERE business_key = :key"
)


def _is_over(database: Engine, key: str) -> bool:
    with database.connect() as connection:
        over = text("SELECT lease_until <= clock_timestamp() FROM message_idempotent WHERE business_key = :key")
        return bool(connection.execute(over, {"key": key}).scalar_one())


def _count(database: Engine, table: str) -> int:
    with database.connect() as connection:
        return int(connection.execute(text(f"SELECT count(*) FROM {table}")).scalar_one())


def _once_each(seen: Seen, keys: tuple[str, ...]) -> None:
    """These messages are done, every step once."""
    for key in keys:
        record = seen.records[key]
        assert record.consumed
        assert {step: finished for step, (finished, _) in record.steps.items()} == dict.fromkeys(STEPS, True)
        assert seen.orders[key] == 1
        # whoever called after a step was recorded has repeated a finished step
        for step, (_, attempt) in record.steps.items():
            assert all(call.attempt <= attempt for call in seen.calls if (call.message, call.step) == (key, step))


def _keys_are_stable(seen: Seen) -> None:
    """One idempotency key for each step of each message, whatever the attempt."""
    by_step: dict[tuple[str, str], set[str]] = {}
    for call in seen.calls:
        by_step.setdefault((call.message, call.step), set()).add(call.key)
    assert all(len(keys) == 1 for keys in by_step.values()), by_step
    assert len({key for keys in by_step.values() for key in keys}) == len(by_step), "and another for each"


# -- SIGKILL ---------------------------------------------------------------------------------------------------------

# the documented limit: a crash between an outside call and its record repeats that call
REPEATED = {"the first call made, not recorded": FIRST, "the last call made, not recorded": LAST}
BEFORE_ALL = POINTS[:1]


def _attempts(story: Story) -> int:
    """How many claims the victim takes: a second one unless the first was never made, or is known to have ended."""
    done = POINTS[POINTS.index("after COMMIT") :] if story.store == "sql" else POINTS[POINTS.index("after complete") :]
    return 1 if story.point in (*BEFORE_ALL, *done) else 2


@pytest.mark.parametrize("story", KILLED, ids=str)
def test_killed_at_this_point_no_finished_step_is_repeated_and_the_message_completes(story: Story, seen: Seen) -> None:
    everyone = (seen.victim, *seen.others)
    _once_each(seen, everyone)
    _keys_are_stable(seen)
    assert seen.records[seen.victim].attempt == _attempts(story)
    expected = Counter(CALLS)
    if story.point in REPEATED:
        expected[REPEATED[story.point]] += 1
    assert Counter(step for step, _, _ in seen.called(seen.victim)) == expected
    for key in seen.others:
        assert seen.called(key) == [(FIRST, 1, False), (LAST, 1, False)]
    # also where the leases are in another store, which was not told: the mark beside the handler's writes says it
    assert seen.shipments == Counter(dict.fromkeys(everyone, 1))
    assert seen.orders == Counter(everyone)
    assert not [failure for failure in seen.failures if failure[1] not in ("resolved", "discarded")]
    assert seen.left == 0


@pytest.mark.parametrize("story", ONCE, ids=str)
def test_a_call_that_may_happen_at_most_once_is_left_to_a_person_if_it_may_have_happened(
    story: Story, seen: Seen
) -> None:
    _once_each(seen, seen.others)
    _keys_are_stable(seen)
    called = Counter(step for step, _, _ in seen.called(seen.victim))
    assert called[FIRST] == 1
    assert seen.orders == Counter((seen.victim, *seen.others))
    if story.point in (RESTED, "the last step recorded"):  # before the marker, or behind it
        _once_each(seen, (seen.victim,))
        assert called[LAST] == 1
        assert seen.shipments[seen.victim] == 1
        assert not seen.failures
        return
    assert called[LAST] == (story.point == "the last call made, not recorded"), "never a second time"
    assert not seen.records[seen.victim].consumed
    assert seen.records[seen.victim].steps[LAST] == (False, 1)
    assert seen.shipments[seen.victim] == 0
    ((key, state, kind, why),) = seen.failures
    assert (key, state, kind) == (seen.victim, "dead", "StepError")
    assert f"The step '{LAST}' was begun by attempt 1 and has no result" in why
    assert f"exactly-once steps resolve {seen.victim} {LAST}" in why.replace("'", "")


# -- SIGSTOP ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("story", STOPPED, ids=str)
def test_stopped_past_its_lease_a_run_changes_nothing_when_it_goes_on(story: Story, seen: Seen) -> None:
    everyone = (seen.victim, *seen.others)
    _once_each(seen, everyone)
    _keys_are_stable(seen)
    assert seen.orders == Counter(everyone)
    assert seen.shipments == Counter(everyone)
    assert seen.records[seen.victim].attempt == 2
    assert not [failure for failure in seen.failures if failure[1] not in ("resolved", "discarded")]
    late = [(step, attempt) for step, attempt, refused in seen.called(seen.victim) if refused]
    # the limit: the one call it was in; the service knows it by its attempt, and need not do it
    in_call = {"in the first call, not sent": FIRST, "in the last call, not sent": LAST}
    assert late == ([(in_call[story.point], 1)] if story.point in in_call else [])
    done = Counter(step for step, _, refused in seen.called(seen.victim) if not refused)
    assert done == Counter(CALLS) + Counter([REPEATED[story.point]] if story.point in REPEATED else [])


@pytest.mark.parametrize("story", OVERTAKEN, ids=str)
def test_going_on_while_another_run_has_its_message_a_run_changes_nothing(story: Story, seen: Seen) -> None:
    everyone = (seen.victim, *seen.others)
    _once_each(seen, everyone)
    _keys_are_stable(seen)
    assert seen.orders == Counter(everyone)
    assert seen.shipments == Counter(everyone)
    assert seen.records[seen.victim].attempt == 2
    before = STEPS[: {"the first call made, not recorded": 0, "in the transaction step": 1}.get(story.point, 3)]
    assert seen.records[seen.victim].steps == {step: (True, 1 if step in before else 2) for step in STEPS}
    assert not [call for call in seen.calls if call.refused]
    assert not [failure for failure in seen.failures if failure[1] not in ("resolved", "discarded")]


@pytest.mark.parametrize("story", BETWEEN, ids=str)
def test_stopped_between_two_calls_past_its_lease_a_run_begins_nothing_when_it_goes_on(
    story: Story, seen: Seen
) -> None:
    everyone = (seen.victim, *seen.others)
    _once_each(seen, everyone)
    _keys_are_stable(seen)
    # the limit is the one call it was in, and it was in none
    assert [(step, attempt) for step, attempt, refused in seen.called(seen.victim) if refused] == []
    assert seen.shipments == Counter(everyone)


@pytest.mark.parametrize("story", CLAIMING, ids=str)
def test_going_on_while_the_next_claim_of_its_message_is_under_way_a_run_begins_nothing(
    story: Story, seen: Seen
) -> None:
    everyone = (seen.victim, *seen.others)
    _once_each(seen, everyone)
    _keys_are_stable(seen)
    first = 3 if story.point == "claimed" else 1
    assert seen.called(seen.victim) == [(FIRST, first, False), (LAST, 3, False)]
    assert seen.orders == Counter(everyone)
    assert seen.shipments == Counter(everyone)


@pytest.mark.parametrize("story", UNFENCED, ids=str)
def test_where_leases_are_elsewhere_a_run_that_was_stopped_may_commit_its_session_and_nothing_else(
    story: Story, seen: Seen
) -> None:
    everyone = (seen.victim, *seen.others)
    _once_each(seen, everyone)
    _keys_are_stable(seen)
    assert seen.records[seen.victim].attempt == 2
    assert Counter(step for step, _, _ in seen.called(seen.victim)) == Counter(CALLS)
    assert seen.shipments[seen.victim] in (1, 2), "the limit of a store that is not the handler's database"


@pytest.mark.parametrize("story", HOLDING, ids=str)
def test_stopped_with_its_row_locked_a_run_keeps_the_message_and_its_effects_are_single(
    story: Story, seen: Seen
) -> None:
    everyone = (seen.victim, *seen.others)
    _once_each(seen, everyone)
    _keys_are_stable(seen)
    assert seen.orders == Counter(everyone)
    assert seen.shipments == Counter(everyone)
    assert Counter(step for step, _, refused in seen.called(seen.victim) if not refused) == Counter(CALLS)
    assert not [failure for failure in seen.failures if failure[1] not in ("resolved", "discarded")]
