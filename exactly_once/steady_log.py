"""A logger for the lines between what was written down and the verdict: what the program's logging raises changes neither.

A filter of the application's may raise on a record of ours (one that reads a context variable of a request, or takes all
values for texts). The message would come again although its row says that it is dead. As `logging` does with an error of a
handler, it is printed on stderr, unless `logging.raiseExceptions` is off.
"""

import logging
import traceback
from typing import Any

__all__ = ["steady"]


class _Steady(logging.LoggerAdapter[logging.Logger]):
    def log(self, level: int, msg: object, *args: object, **kwargs: Any) -> None:
        try:
            super().log(level, msg, *args, stacklevel=kwargs.pop("stacklevel", 1) + 1, **kwargs)
        except Exception:  # a filter's: whatever it says, the row is written
            if logging.raiseExceptions:
                traceback.print_exc()


def steady(name: str) -> logging.LoggerAdapter[logging.Logger]:
    """Return the logger of this name, whose lines raise nothing.

    Example:
        >>> steady("exactly_once.failures").name
        'exactly_once.failures'
    """
    return _Steady(logging.getLogger(name), {})
