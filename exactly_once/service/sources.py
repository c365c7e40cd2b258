"""Makes, for an application and a transport, a worker's pumps and the jobs that run by the clock beside it."""

from collections.abc import Sequence
from functools import partial

from exactly_once.executor.background import Job
from exactly_once.executor.routing import Router
from exactly_once.failures.due import DueFailures
from exactly_once.failures.pump import Pump
from exactly_once.maintenance.sweeps import failures_job, queue_job
from exactly_once.transports.contract import Consumer

__all__ = ["jobs", "pumps"]


def pumps(router: Router) -> Sequence[Consumer]:
    """Return a consumer of due failures for each database."""
    ordered = [plan for plan in router.plans if plan.ordered]
    return [
        Pump(
            store.engine,
            DueFailures(partial(getattr, store, "tables")),
            router.group,
            handlers=[plan.name for plan in router.plans],
            ordered=[plan.name for plan in ordered],
            waits=[plan.name for plan in ordered if plan.after_dead == "wait"],
            name=name,
            away=store.away,
            gone=store.gone,
        )
        for name, store in router.stores.items()
    ]


def jobs(router: Router, consumers: Sequence[Consumer]) -> Sequence[Job]:
    """Return the sweeps of each database and of each queue.

    Args:
        router: The application's handlers and databases.
        consumers: The transport's consumers.
    """
    failures = [failures_job(store, router.group) for store in router.stores.values()]
    return failures + [job for consumer in consumers if (job := queue_job(consumer)) is not None]
