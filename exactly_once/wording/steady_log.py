"""The loggers of this package: an exception in the program's logging does not change the work that is going on.

A filter of the application may raise on a record of ours (one that reads a context variable of a request, or expects all
values to be texts). Without this, a message would come again although its row is dead, a thread that renews leases
would end, or a held message would be forgotten. As `logging` does for an error of a handler, the exception is printed on
stderr, unless `logging.raiseExceptions` is off. Every log line of ours uses it.
"""

import logging
import traceback
from typing import Any

__all__ = ["Log", "steady"]

Log = logging.LoggerAdapter[logging.Logger]


class _Steady(Log):
    def process(self, msg: object, kwargs: Any) -> tuple[object, Any]:
        return msg, kwargs  # `extra` is the line's own

    def log(self, level: int, msg: object, *args: object, **kwargs: Any) -> None:
        try:
            super().log(level, msg, *args, stacklevel=kwargs.pop("stacklevel", 1) + 1, **kwargs)
        except Exception:  # an exception of a filter
            if logging.raiseExceptions:
                traceback.print_exc()


def steady(name: str) -> Log:
    """Return the logger of this name, whose lines raise nothing.

    Example:
        >>> steady("exactly_once.failures").name
        'exactly_once.failures'
    """
    return _Steady(logging.getLogger(name), {})
