"""Says whether foreign code raised in the middle of our database work, by the place where it was raised.

A signal handler can raise wherever the main thread is; Celery's soft time limit does. Such an exception says nothing of the
connection we waited for. If we repeated the work on another connection, the limit would be used up, and the run would have none.

Called where work that failed on a connection with earlier users may be repeated on another. Read only after a failure.
"""

import sys
from typing import Final

from exactly_once.exceptions.drivers import DRIVERS, is_drivers

__all__ = ["interrupted"]

# Packages whose frames lie between us and the server.
_ON_THE_WAY: Final = DRIVERS | {
    "exactly_once", "sqlalchemy", "greenlet", "psycopg_c", "psycopg_binary", "gevent", "eventlet"
}  # fmt: skip
_ENTRY: Final = "__main__"  # in the list of the standard library's names, but it is the program's own


def interrupted(error: BaseException) -> bool:
    """Say whether an error was raised by code that is neither ours, nor SQLAlchemy's, a driver's or the standard library's.

    An error that a listener of the program (`handle_error`) made from a driver's error counts as the driver's.
    """
    trace, around = error.__traceback__, error
    if trace is None:
        return False
    seen: set[int] = set()
    while id(around) not in seen:
        if is_drivers(around):
            return False
        seen.add(id(around))
        around = around.__cause__ or around.__context__ or around
    while trace.tb_next is not None:
        trace = trace.tb_next
    root = str(trace.tb_frame.f_globals.get("__name__", "")).partition(".")[0]
    return root == _ENTRY or (root not in _ON_THE_WAY and root not in sys.stdlib_module_names)
