"""Checks everything that the guarantees depend on, and says what to do: handlers, databases, Redis, broker.

Each check returns findings. Nothing is changed: its test claims are rolled back, and its key in Redis lives for a
second. `databases` and `redis` check one server each. The command line prints the findings.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress

from exactly_once.app import ExactlyOnce
from exactly_once.doctor.databases import findings_for_database
from exactly_once.doctor.finding import Finding, Mark
from exactly_once.doctor.redis import findings_for_redis
from exactly_once.doctor.table_engines import findings_for_table_engines
from exactly_once.errors import ConfigurationError, TransportError
from exactly_once.executor.routing import decorated_above
from exactly_once.handlers.plan import Plan
from exactly_once.redis.connection import RedisConnection
from exactly_once.transports.contract import Away, Transport
from exactly_once.wording.installation import clash
from exactly_once.wording.redaction import redacted
from exactly_once.wording.text import listed

__all__ = ["Finding", "Mark", "examine"]


def examine(eo: ExactlyOnce, transport: Transport | None) -> Iterator[Finding]:
    """Yield the findings, in the order in which to repair them.

    Args:
        eo: The application.
        transport: Its broker; None checks no broker.
    """
    if (clashes := clash()) is not None:
        yield Finding(Mark.FAIL, clashes)
    try:
        plans = eo.plans
    except ConfigurationError as error:
        yield Finding(Mark.FAIL, str(error))
        return
    yield from _handlers(plans)
    failed: list[str] = []
    for store in eo.stores.values():
        fails = False
        for finding in findings_for_database(store, eo.group, plans, eo.config.concurrency.value):
            yield finding
            if finding.mark is Mark.FAIL:
                fails = True
                with suppress(ConfigurationError):  # a URL that cannot be used has no engine
                    failed.append(redacted(store.engine.url))
        if not fails:
            yield from findings_for_table_engines(store)
    for connection in _redises(eo):
        yield from findings_for_redis(connection)
    if transport is not None:
        yield from _broker(eo, transport, failed)
    else:
        yield Finding(Mark.WARN, "No broker was looked at: give --transport, or set EXACTLY_ONCE_TRANSPORT.")


# -- handlers --------------------------------------------------------------------------------------------------------


def _handlers(plans: tuple[Plan, ...]) -> Iterator[Finding]:
    if not plans:
        yield Finding(Mark.FAIL, "No handlers are registered. Import their module: EXACTLY_ONCE_IMPORTS=shop.consumers")
        return
    yield Finding(Mark.OK, f"{len(plans)} handler(s): {listed(plan.name for plan in plans)}")
    for plan in plans:
        for warning in plan.warnings:
            yield Finding(Mark.WARN, warning)
        if (above := decorated_above(plan, plans)) is not None:
            yield Finding(Mark.FAIL, above)


# -- every Redis -------------------------------------------------------------------------------------------------------


def _redises(eo: ExactlyOnce) -> Iterable[RedisConnection]:
    """Each Redis that the application uses, once: that of the settings, and those that its handlers name."""
    url = eo.config.redis.value
    return dict.fromkeys((*((eo.redis_at(url),) if url else ()), *eo.leases.redises))


# -- the broker ------------------------------------------------------------------------------------------------------


def _broker(eo: ExactlyOnce, transport: Transport, failed: Sequence[str]) -> Iterator[Finding]:
    try:
        problems = transport.check(eo.group, eo.subscriptions())
    except TransportError as error:
        yield Finding(Mark.FAIL, f"The broker does not answer: {error}")
        return
    for problem in problems:
        # A problem of a broker in a database that failed above was already reported.
        if not (isinstance(problem, Away) and any(url in problem for url in failed)):
            yield Finding(Mark.FAIL, problem)
    for concern in transport.concerns(eo.group, eo.subscriptions()):
        yield Finding(Mark.WARN, concern)
    if not problems:
        yield Finding(Mark.OK, "The broker answers; topics and group are as they must be")
    span = transport.features.redelivery_span
    if span is not None:
        yield Finding(
            Mark.OK, f"Copies may arrive for {span}: rows of message_idempotent must be kept longer than that"
        )
