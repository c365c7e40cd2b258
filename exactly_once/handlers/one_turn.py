"""Lets tasks that a handler started, and did not await, begin before its COMMIT, so that their statements are seen.

`asyncio.create_task(session.execute(...))` begins at the next await. Without this, that is our COMMIT, where SQLAlchemy refuses
the statement: the handler's effects would be committed without the task's. Costs one turn of the loop (5 us) and no round trip;
nothing if no task waits. Called by `processing` after an async handler, and by `steps` after the work of a step.
"""

from asyncio import get_running_loop, sleep

from sqlalchemy.util import await_only

__all__ = ["let_tasks_begin"]


def let_tasks_begin() -> None:
    """Let the loop run what is ready. Called in a greenlet. What a later task does is noticed, or refused."""
    # asyncio's own loops show whether anything is ready; other loops do not
    if getattr(get_running_loop(), "_ready", True):
        await_only(sleep(0))
