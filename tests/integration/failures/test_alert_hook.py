"""The hook that is told of a message kept for a person: whatever it raises, the message is kept and acknowledged."""

import asyncio
import logging
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from itertools import count
from typing import Any

import pytest

from exactly_once import Alert, ConfigurationError, ExactlyOnce, Outcome, Retry
from exactly_once.events.alert import raise_alert
from tests.integration.failing import Panic
from tests.integration.shop import GROUP, Shop, order
from tests.waiting import until

pytestmark = pytest.mark.nightly(meet=2)

_names = count(1)
ONCE = Retry(immediate=0, max_attempts=1)
RAISED: dict[str, Callable[[], BaseException]] = {
    "Panic": lambda: Panic("the pager"),
    "CancelledError": asyncio.CancelledError,
    "a group": lambda: BaseExceptionGroup("g", [Panic("the pager")]),
}


def fails(session: Any) -> None:
    raise ValueError("no")


@pytest.mark.parametrize("raised", RAISED)
def test_what_it_raises_is_logged_and_changes_nothing(
    shop: Shop, raised: str, caplog: pytest.LogCaptureFixture
) -> None:
    def hook(alert: Alert) -> None:
        raise RAISED[raised]()

    shop.fresh_eo(alert=hook)
    shop.handles(fails, retry=ONCE)
    with caplog.at_level(logging.ERROR, "exactly_once.alert"):
        assert shop.process(order()) is Outcome.DEAD
    assert shop.failure().attempts == 1
    assert "alert_hook_failed" in caplog.text


@pytest.mark.parametrize("raised", [*RAISED, "SystemExit"])
@pytest.mark.parametrize("batch", [None, 10])
def test_a_worker_acknowledges_the_message_all_the_same(shop: Shop, raised: str, batch: int | None) -> None:
    told: list[Alert] = []

    def hook(alert: Alert) -> None:
        told.append(alert)
        raise SystemExit(2) if raised == "SystemExit" else RAISED[raised]()

    shop.eo = ExactlyOnce(shop.url, group=GROUP, alert=hook)
    shop.handles(fails, batch=batch, retry=ONCE)
    url = f"memory://hooks-{next(_names)}"
    with shop.eo.worker(url, concurrency=2, drain_timeout=timedelta(seconds=1)) as worker:
        with shop.eo.producer(url) as producer:
            producer.send_all([order(1), order(2)])
        until(lambda: worker.counts.acked == 2, "both are acknowledged")
    assert [row.attempts for row in shop.failures()] == [1, 1]
    assert len(told) == 2


@pytest.mark.parametrize("stop", [KeyboardInterrupt(), SystemExit(1)], ids=["KeyboardInterrupt", "SystemExit"])
def test_what_a_signal_raises_in_it_is_raised_on_in_the_main_thread(shop: Shop, stop: BaseException) -> None:
    def hook(alert: Alert) -> None:
        raise stop

    shop.fresh_eo(alert=hook)
    shop.handles(fails, retry=ONCE)
    with pytest.raises(type(stop)):
        shop.process(order())
    assert shop.failure().state == "dead"  # written before


class Pager:
    async def __call__(self, alert: Alert) -> None: ...

    async def page(self, how: str, alert: Alert) -> None: ...


async def page(alert: Alert) -> None: ...


@pytest.mark.parametrize("hook", [page, Pager(), Pager().page, partial(Pager().page, "loud"), partial(Pager()), "page"])
def test_what_would_never_run_is_refused(hook: Any) -> None:
    with pytest.raises(ConfigurationError, match="alert="):
        ExactlyOnce(group=GROUP, alert=hook)


def test_a_coroutine_that_nobody_awaits_is_said(shop: Shop, caplog: pytest.LogCaptureFixture) -> None:
    def hook(alert: Alert) -> Any:
        return page(alert)

    shop.fresh_eo(alert=hook)
    shop.handles(fails, retry=ONCE)
    with caplog.at_level(logging.ERROR, "exactly_once.alert"):
        assert shop.process(order()) is Outcome.DEAD
    assert "returned a coroutine" in caplog.text


@pytest.mark.parametrize("batch", [None, 10])
def test_a_filter_of_the_programs_logging_that_raises_changes_no_verdict(
    shop: Shop, batch: int | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Such as one that reads a context variable of a request: a dead message would run again, for ever."""

    def reads_the_request(record: logging.LogRecord) -> bool:
        raise LookupError("no request here")

    for name in ("failures", "alert", "delivery"):
        monkeypatch.setattr(logging.getLogger(f"exactly_once.{name}"), "filters", [reads_the_request])
    told: list[Alert] = []
    shop.eo = ExactlyOnce(shop.url, group=GROUP, alert=told.append)
    shop.handles(fails, batch=batch, retry=ONCE)
    assert shop.process(order()) is Outcome.DEAD
    assert (shop.failure().state, [alert.what for alert in told]) == ("dead", ["parked"])
    assert "no request here" in capsys.readouterr().err


def test_a_parked_message_is_said_to_be_kept_and_where_to_look(caplog: pytest.LogCaptureFixture) -> None:
    for what in ("parked", "overrun"):
        raise_alert(None, Alert(what, "the shop", "reserve", "A-1", "no stock"))  # type: ignore[arg-type]
    parked, overrun = caplog.messages
    assert parked == (
        "message_parked group=the shop handler=reserve key=A-1: no stock (kept whole; look: exactly-once failures list"
        " --group 'the shop')"
    )
    assert overrun == "message_overrun group=the shop handler=reserve key=A-1: no stock"
