"""The sweeps of a worker, as jobs: close failures of messages processed since, and delete messages that nobody will take.

Each of several processes sweeps: two at the same time take different rows, or the second finds nothing. Never receives, and never
runs a handler. Called by `service`, which gives the jobs to the executor.
"""

from datetime import timedelta
from functools import partial
from typing import Final

from exactly_once.database.connections.own_transaction import own_transaction
from exactly_once.database.store import Store
from exactly_once.executor.background import Job
from exactly_once.failures.due import DueFailures
from exactly_once.transports.contract import Consumer, Tidied
from exactly_once.wording.steady_log import steady

__all__ = ["FAILURES_EVERY", "failures_job", "queue_job"]

FAILURES_EVERY: Final = timedelta(seconds=30)

_log = steady("exactly_once.pump")


def failures_job(store: Store, group: str) -> Job:
    """Return the job that closes failures whose message was processed on another path.

    Args:
        store: The database.
        group: The consumer group.
    """
    failures = DueFailures(lambda: store.tables)

    def sweep() -> None:
        try:
            closed = failures.sweep(partial(own_transaction, store.engine), group)
        except Exception as error:
            if store.away(error):
                return  # the worker learns of the outage from its messages
            if (told := store.gone(error)) is not None:
                raise told from error
            raise
        if closed:
            _log.info("failures_resolved count=%d reason=processed_on_another_path", closed)

    return Job(f"sweep failures in {store.name}", FAILURES_EVERY, sweep)


def queue_job(consumer: Consumer) -> Job | None:
    """Return the job that deletes queued messages that no handler of the group will take. None: this consumer has no such.

    Args:
        consumer: The consumer of the queue.
    """
    if not isinstance(consumer, Tidied) or consumer.tidy_every is None:
        return None
    return Job(f"tidy {consumer.topic}", consumer.tidy_every, consumer.tidy)
