"""Registers handlers: the two decorators, and the plans that they make. The facade is a subclass.

A plan is made when the decorator runs, so that a mistake is an error at import, with its line in the traceback.
"""

import sys
from collections.abc import Callable, Sequence
from datetime import timedelta
from types import FrameType
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from exactly_once.errors import ConfigurationError
from exactly_once.handlers.plan import Plan, plan
from exactly_once.handlers.retry import RetrySpec
from exactly_once.handlers.wrong_arguments import explained, of_a_decorator

if TYPE_CHECKING:
    from exactly_once.handlers.fingerprint import FingerprintSpec
    from exactly_once.handlers.guard_options import GuardOption, Transaction
    from exactly_once.keys import KeySpec

__all__ = ["Registrations"]

F = TypeVar("F", bound=Callable[..., Any])


class Registrations:
    """The handlers of one application, by name."""

    def __init__(self) -> None:
        self._plans: dict[str, Plan] = {}

    @explained(of_a_decorator)
    def handler(
        self,
        topic: str,
        *,
        key: "KeySpec",
        tag: str | Sequence[str] | None = None,
        name: str | None = None,
        guard: "GuardOption | None" = None,
        retry: RetrySpec | None = None,
        fingerprint: "FingerprintSpec" = "body",
        ordered: bool = False,
        after_dead: Literal["wait", "go on"] = "wait",
        concurrency: int | None = None,
        batch: int | None = None,
        batch_order: "KeySpec | None" = None,
        linger: timedelta | None = None,
    ) -> Callable[[F], F]:
        """Register a function to run once for each message of a topic. Returns the function unchanged.

        Its annotations, which are read now, say what it asks for: a `Session` or `AsyncSession` in the message's transaction, the
        `Message`, `Steps` or `AsyncSteps` under a lease, and one other parameter without a default, which is the body. A
        parameter with a default is never filled.

        Args:
            topic: The topic.
            key: What names the *event*: a path into the JSON body, or a tuple of parts (`exactly_once.keys`).
            tag: Only messages with this tag, or with one of these.
            name: The handler's name, a part of every claim's identity. None: the function's `__name__`.
            guard: `Transaction(claim_wait=...)`; `Lease(...)` for work outside the database; `Lock(...)`.
            retry: `Retry(...)`, or one for each exception class.
            fingerprint: What two copies of one event must have in common: "body", paths, a function, or None.
            ordered: Handle the messages of one ordering key in order, also behind a failed message.
            after_dead: With `ordered`: "wait" behind a dead message until a person decides, or "go on".
            concurrency: The most runs of this handler at a time in a process.
            batch: In a worker, up to so many waiting messages share one transaction and one commit. Each message is still a call
                of its own, one after the other on one session. If one fails, it runs alone, and the others without it.
            batch_order: Names the row that a message locks. The calls of a batch are sorted by it, so that two batches do not
                deadlock on each other's rows.
            linger: How long a message waits for others that share its transaction. None: 5 ms.

        Raises:
            ConfigurationError: The function or an argument is wrong; the text says what to write instead.

        Example:
            >>> eo = ExactlyOnce(group="inventory")
            >>> @eo.handler("orders", tag="created", key="order_no")
            ... def reserve_stock(session: Session, order: dict[str, str], message: Message) -> None:
            ...     ...
        """
        return self._registering(
            sys._getframe(2),  # noqa: SLF001  (annotations may name classes that live in the caller's function only)
            topic=topic,
            tag=tag,
            key=key,
            name=name,
            guard=guard,
            retry=retry,
            fingerprint=fingerprint,
            ordered=ordered,
            after_dead=after_dead,
            concurrency=concurrency,
            batch=batch,
            batch_order=batch_order,
            linger=linger,
        )

    @explained(of_a_decorator)
    def batch_handler(
        self,
        topic: str,
        *,
        key: "KeySpec",
        tag: str | Sequence[str] | None = None,
        name: str | None = None,
        guard: "Transaction | None" = None,
        retry: RetrySpec | None = None,
        fingerprint: "FingerprintSpec" = "body",
        batch: int = 500,
        batch_order: "KeySpec | None" = None,
        linger: timedelta | None = None,
    ) -> Callable[[F], F]:
        """Register a function that handles a whole batch in one call, for set-based SQL. Returns the function unchanged.

        The function gets lists of the new messages, without duplicates: `list[Order]` has the bodies, `list[Message]` the
        messages, both in the same order. If it raises, the whole batch is rolled back, and smaller batches run, down to single
        messages. So a list may have one element. Outside a worker (`eo.process`) it always has one.

        Args:
            topic: As for `handler`, like all arguments that are not explained here.
            key: What names the event.
            tag: Only messages with this tag, or with one of these.
            name: The handler's name.
            guard: `Transaction(claim_wait=...)`; leases and locks are for single messages.
            retry: For a message that fails alone.
            fingerprint: What two copies of one event must have in common.
            batch: The most messages in a call.
            batch_order: The value by which the lists are sorted: names the row that a message locks.
            linger: How long a message waits for others. None: 5 ms.

        Raises:
            ConfigurationError: The function or an argument is wrong; the text says what to write instead.

        Example:
            >>> eo = ExactlyOnce(group="inventory")
            >>> @eo.batch_handler("orders", key="order_no", batch_order="sku")
            ... def reserve_all(session: Session, orders: list[dict[str, str]]) -> None:
            ...     ...
        """
        return self._registering(
            sys._getframe(2),  # noqa: SLF001
            topic=topic,
            tag=tag,
            key=key,
            name=name,
            guard=guard,
            retry=retry,
            fingerprint=fingerprint,
            batch=batch,
            batch_order=batch_order,
            linger=linger,
            in_lists=True,
        )

    def _registering(self, caller: FrameType, **options: Any) -> Callable[[F], F]:
        def register(function: F) -> F:
            made = plan(function, caller_locals=caller.f_locals, caller_globals=caller.f_globals, **options)
            if made.name in self._plans:
                raise ConfigurationError(
                    f"Two handlers are named {made.name!r}: they would take each other's messages for duplicates."
                    " Give one of them another name: @eo.handler(..., name=...)."
                )
            self._plans[made.name] = made
            self._registered()
            return function

        return register

    def _registered(self) -> None:
        """Called after a handler was added. A subclass may override it."""
