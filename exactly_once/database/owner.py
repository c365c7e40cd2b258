"""Who a claim belongs to: one attempt of one process, and no other one ever.

An owner made for a whole process would let an attempt take another's row for its own: that of a copy which ran a moment
before in the same process. So each attempt has a name of its own. It stands in the claim's row, and in the name of the
savepoint by which MySQL and MariaDB tell whether the claim's transaction is still there. Called by
`attempt`, `guards` and `store`.
"""

import os
import secrets
import socket
from itertools import count
from typing import Final

from exactly_once import fork

__all__ = ["new_owner", "savepoint_of"]

_HOST: Final = socket.gethostname()[:30]
_NUMBER: Final = count(1)


class _Process:
    """What the owners of one process begin with."""

    def __init__(self) -> None:
        self.forked()
        fork.tell(self)

    def forked(self) -> None:
        """A child is another process: with its parent's name the two would share owners."""
        self.name = f"{_HOST}:{os.getpid()}:{secrets.token_hex(4)}:"


_PROCESS: Final = _Process()


def new_owner() -> str:
    """Return the name of a new attempt: host, process, a random part and a number; at most 64 characters.

    Example:
        >>> new_owner() == new_owner()
        False
    """
    return f"{_PROCESS.name}{next(_NUMBER):x}"


def savepoint_of(owner: str) -> str:
    """Return the name of an attempt's savepoint, the same for the same owner.

    Example:
        >>> savepoint_of("host:17:0badcafe:2a")
        'eo_0badcafe_2a'
    """
    return "eo_" + "_".join(owner.rsplit(":", 2)[-2:])
