"""Tasks that a handler began, and has not awaited, get their first turn before its COMMIT: what they send is seen then.

`asyncio.create_task(session.execute(...))` begins with the next await of whoever runs, and that is our COMMIT, where SQLAlchemy
refuses it: the handler's effects would be committed without the task's. Costs a turn of the loop (5 us), and no round trip; where
nothing waits for the loop, a look. Called behind an async handler, and behind the work of its steps.
"""

from asyncio import get_running_loop, sleep

from sqlalchemy.util import await_only

__all__ = ["let_tasks_begin"]


def let_tasks_begin() -> None:
    """Let the loop call what is ready; in a greenlet. A task that begins later is noticed by what it does, or refused."""
    # asyncio's own loops say whether anything is ready; of others nobody knows
    if getattr(get_running_loop(), "_ready", True):
        await_only(sleep(0))
