"""A handler that was written for another task queue raises its exceptions: none acknowledges, and the row says what to raise."""

import logging
from collections.abc import Callable
from typing import Any

import pytest
from celery.exceptions import Ignore, OperationalError, Retry, SoftTimeLimitExceeded
from celery.exceptions import Reject as CelerysReject
from sqlalchemy.orm import Session

from exactly_once import Outcome
from exactly_once import Retry as Policy
from tests.integration.grounds import ground
from tests.integration.shop import Shop, order, put
from tests.integration.ways import ALONE, Way, by_itself, each_way, thrice

__all__ = ["ground"]

F, DEAD = Outcome.FAILED, Outcome.DEAD
pytestmark = pytest.mark.nightly(meet=2)
POLICY = Policy(immediate=2, delays=[0.01], max_attempts=3)


def of_faststream() -> Exception:
    base = type("HandlerException", (Exception,), {"__module__": "faststream.exceptions"})
    made: Exception = type("AckMessage", (base,), {"__module__": "faststream.exceptions"})()
    return made


def _raised(given: Any) -> Exception:
    """What Python makes of `raise Retry(...)`."""
    try:
        raise given
    except TypeError as error:
        return error


RAISED: dict[str, Callable[[], Exception]] = {
    "Retry": lambda: Retry("again, please", when=3),
    "Ignore": Ignore,
    "Reject": lambda: CelerysReject("no such order", requeue=False),
    "Reject, to be brought again": lambda: CelerysReject("later", requeue=True),
    "a class of the application's": type("Ours", (Ignore,), {}),
    "FastStream's AckMessage": of_faststream,
    "our own Retry": lambda: _raised(Policy(delays=[30])),
    "in a group": lambda: ExceptionGroup("tasks", [Ignore()]),
}


def raising(make: Callable[[], Exception], runs: list[Any]) -> Callable[[Session, Any], None]:
    def do(session: Session, no: Any) -> None:
        runs.append(no)
        put(session, "undone")
        raise make()

    return do


@each_way
@pytest.mark.parametrize("kind", RAISED)
def test_it_is_counted_kept_and_told_what_to_raise(
    shop: Shop, way: Way, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    runs: list[Any] = []
    way.handles(shop, raising(RAISED[kind], runs), retry=POLICY)
    with caplog.at_level(logging.WARNING, logger="exactly_once"):
        assert thrice(shop, way) == [F, F, DEAD]
    assert len(runs) == 3, "none runs again at once: each would ask the same"
    row = shop.failure()
    assert (row.state, row.attempts, shop.effects()) == ("dead", 3, [])
    for told in (row.error_text, caplog.records[-1].getMessage()):
        assert "asks for nothing here" in told
        assert "RetryLater" in told


@by_itself
def test_a_soft_time_limit_of_celery_is_met_by_one_run(shop: Shop, way: Way) -> None:
    """It is raised once, where the handler is; another run at once would have the hard limit only, which kills the process."""
    runs: list[Any] = []
    way.handles(shop, raising(SoftTimeLimitExceeded, runs), retry=POLICY)
    assert way.attempted(shop, [order(1)]) == [F]
    assert len(runs) == 1
    assert "a time limit of the code around the call" in shop.failure().error_text


def test_other_errors_of_such_a_queue_are_what_they_are(shop: Shop) -> None:
    runs: list[Any] = []
    ALONE.handles(shop, raising(lambda: OperationalError("the broker is away"), runs), retry=POLICY)
    assert shop.process(order(1)) is F
    assert len(runs) == 3
    assert shop.failure().error_text.startswith("the broker is away")
    assert "asks for nothing" not in shop.failure().error_text
