"""Whether this process is one of several that a supervisor started."""

import os
from typing import Final

__all__ = ["SUPERVISED", "is_supervised"]

SUPERVISED: Final = "EXACTLY_ONCE_SUPERVISED"
"""Set in the environment of a supervisor's children, which stop gently, however many signals they get.

A terminal and systemd send a signal to every process of a process group, and the supervisor forwards its own: two would reach
a child that should get one. Only the supervisor ends a child at once, with SIGKILL.
"""


def is_supervised() -> bool:
    """Whether a supervisor started this process."""
    return bool(os.environ.get(SUPERVISED))
