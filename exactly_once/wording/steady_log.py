"""The loggers of this package: what the program's logging raises changes nothing of what is going on.

A filter of the application's may raise on a record of ours (one that reads a context variable of a request, or takes all
values for texts). A message would come again although its row says that it is dead, a thread that renews leases would end, a
message that is held would be forgotten. As `logging` does with an error of a handler, it is printed on stderr, unless
`logging.raiseExceptions` is off. Every line of ours goes through here.
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
        except Exception:  # a filter's
            if logging.raiseExceptions:
                traceback.print_exc()


def steady(name: str) -> Log:
    """Return the logger of this name, whose lines raise nothing.

    Example:
        >>> steady("exactly_once.failures").name
        'exactly_once.failures'
    """
    return _Steady(logging.getLogger(name), {})
