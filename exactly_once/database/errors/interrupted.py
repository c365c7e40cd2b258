"""Whether code of somebody else's raised in the middle of our work with a database: told by where it was raised.

A signal's handler may, such as that of Celery's soft time limit, wherever the main thread is. What it raises says nothing of the
connection that was waited for. Were the work done again on another one, the limit would be spent, and the run have none.

Called where what failed on a connection that others had before is asked for again. Read after a failure only.
"""

import sys
from typing import Final

from exactly_once.exceptions.drivers import DRIVERS, is_drivers

__all__ = ["interrupted"]

# whose frames stand between us and the server
_ON_THE_WAY: Final = DRIVERS | {
    "exactly_once", "sqlalchemy", "greenlet", "psycopg_c", "psycopg_binary", "gevent", "eventlet"
}  # fmt: skip
_ENTRY: Final = "__main__"  # of the standard library's names one is the program's own


def interrupted(error: BaseException) -> bool:
    """Say whether an error was raised by code that is neither ours, nor SQLAlchemy's, a driver's or the standard library's.

    What a listener of the program's made of a driver's error (`handle_error`) is that error still.
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
