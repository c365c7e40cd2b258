"""A worker that kills itself with SIGKILL at one named step of one message, once; run as a child by the crash-point tests.

    python -m tests.acceptance.crash_shop TRANSPORT_URL POINT MARKER_FILE

The database is EXACTLY_ONCE_DATABASE. Each step is the real function, wrapped from outside: nothing in the package knows
of it. The marker file makes it die once; started again, it runs to the end and exits when told to.
"""

import os
import signal
import sys
from collections.abc import Callable, Iterable
from datetime import timedelta
from pathlib import Path
from typing import Any

from sqlalchemy.orm import Session

from exactly_once import ExactlyOnce, Message, Retry
from tests.acceptance.orders import Reservation, take

VICTIM = "order-5"  # the message at which the process dies
FAILING = "order-7"  # the message whose handler fails twice before it succeeds


BETWEEN = "between two messages of a batch"

eo = ExactlyOnce(group="crash")
_failed: dict[str, int] = {}


RETRY = Retry(immediate=0, delays=[0.2], max_attempts=50)


def reserve(session: Session, order: dict[str, str], message: Message) -> None:
    if _point == BETWEEN and VICTIM in _begun:
        _die(BETWEEN, VICTIM)
    _begun.add(order["order_no"])
    _die("handler begins", order["order_no"])
    session.add(Reservation(order_no=order["order_no"]))
    session.flush()
    _die("between the handler's statements", order["order_no"])
    session.execute(take())
    _die("handler ends", order["order_no"])
    if order["order_no"] == FAILING and _failed.setdefault(FAILING, 0) < 2:
        _failed[FAILING] += 1
        raise ValueError("the handler fails, twice")


def reserve_all(session: Session, orders: list[dict[str, str]], messages: list[Message]) -> None:
    for order, message in zip(orders, messages, strict=True):
        reserve(session, order, message)


_begun: set[str] = set()
# one message a transaction, groups of calls, or one call for a group
match os.environ.get("EXACTLY_ONCE_TEST_CRASH"):
    case "batch":
        eo.handler("crash-orders", key="order_no", retry=RETRY, batch=6, linger=timedelta(milliseconds=200))(reserve)
    case "lists":
        eo.batch_handler(
            "crash-orders", key="order_no", name="reserve", retry=RETRY, batch=6, linger=timedelta(milliseconds=200)
        )(reserve_all)
    case _:
        eo.handler("crash-orders", key="order_no", retry=RETRY)(reserve)
_point = sys.argv[2] if len(sys.argv) == 4 else ""
_marker = Path(sys.argv[3]) if len(sys.argv) == 4 else Path()


def _die(point: str, order_no: str | None) -> None:
    if point != _point or (order_no is not None and order_no not in _wanted(point)):
        return
    try:
        _marker.touch(exist_ok=False)
    except FileExistsError:
        return
    os.kill(os.getpid(), signal.SIGKILL)


def _wanted(point: str) -> tuple[str, ...]:
    return (FAILING,) if "fail" in point or "pump" in point else (VICTIM,)


def _wrap(owner: Any, name: str, before: str | None, after: str | None, key: Callable[..., str | None]) -> None:
    real = getattr(owner, name)

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        found = key(*args, **kwargs)
        if before is not None and found is not None:
            _die(before, found)
        result = real(*args, **kwargs)
        if after is not None and found is not None:
            _die(after, found)
        return result

    setattr(owner, name, wrapped)


POINTS = (
    "received",
    "before the claim",
    "claimed",
    "handler begins",
    "between the handler's statements",
    "handler ends",
    "before COMMIT",
    "after COMMIT",
    "before the settle",
    "after the settle",
    "before a failure is recorded",
    "after a failure is recorded",
    "before a failure's settle",
    "after a failure's settle",
)
PUMP_POINTS = ("the pump took it", "before the pump's settle")


def install() -> None:
    from exactly_once.database.watched.watch import Watch
    from exactly_once.executor import executor
    from exactly_once.failures.store import FailureStore
    from exactly_once.guards.transaction import TransactionGuard
    from exactly_once.processing.batch import BatchProcessor
    from exactly_once.processing.processor import Processor
    from exactly_once.worker.lane import Lane

    current: dict[int, str] = {}
    import threading

    def number(message: Message) -> str:
        import json

        return str(json.loads(message.body or b"{}").get("order_no"))

    def one(numbers: Iterable[str]) -> str:
        """The number of a batch that the points look for, if it is in it."""
        every = list(numbers)
        return next((each for each in (VICTIM, FAILING) if each in every), every[0])

    _wrap(executor.Executor, "submit", "received", None, lambda self, delivery, features: number(delivery.message))

    real_run = Processor.run

    def run(self: Processor, message: Message, features: Any, **kwargs: Any) -> Any:
        current[threading.get_ident()] = number(message)
        told = real_run(self, message, features, **kwargs)
        if kwargs.get("pumped"):
            _die("the pump took it", number(message))
        return told

    Processor.run = run  # type: ignore[method-assign]
    _wrap(TransactionGuard, "claim", "before the claim", "claimed", lambda self, session, row: row.key)
    _wrap(
        TransactionGuard,
        "claim_batch",
        "before the claim",
        "claimed",
        lambda self, session, rows, **_: one(r.key for r in rows),
    )
    real_attempt = BatchProcessor._attempt

    def attempt(self: BatchProcessor, members: Any, run: Any) -> Any:
        found = current[threading.get_ident()] = one(number(member.work.message) for member in members)
        ended = real_attempt(self, members, run)
        _die("after COMMIT", found)
        return ended

    BatchProcessor._attempt = attempt  # type: ignore[method-assign]
    _wrap(Watch, "committing", "before COMMIT", None, lambda self: current[threading.get_ident()])
    _wrap(Processor, "_try", None, "after COMMIT", lambda self, work, *_, **__: number(work.message))
    _wrap(
        FailureStore,
        "record",
        "before a failure is recorded",
        "after a failure is recorded",
        lambda self, session, failure, decide: failure.key,
    )
    real_settle = Lane.__init__

    def made(self: Lane, consumer: Any, *args: Any, **kwargs: Any) -> None:
        real = consumer.settle

        def settle(verdicts: Any) -> None:
            numbers = [number(delivery.message) for delivery, _ in verdicts]
            for each in numbers:
                _die("before the settle", each)
                _die("before a failure's settle", each)
                if type(consumer).__name__ == "Pump":
                    _die("before the pump's settle", each)
            real(verdicts)
            for each in numbers:
                _die("after the settle", each)
                _die("after a failure's settle", each)

        consumer.settle = settle
        real_settle(self, consumer, *args, **kwargs)

    Lane.__init__ = made  # type: ignore[method-assign]


def main() -> int:
    url = sys.argv[1]
    install()
    return eo.run(url)


if __name__ == "__main__":
    # the module runs under its own name, so that classes and handlers exist once
    from tests.acceptance import crash_shop

    raise SystemExit(crash_shop.main())
