"""Who owns a claim: one attempt of one process, and never another attempt.

With one owner for a whole process, an attempt would take another attempt's row for its own: that of a copy of
the message which ran a moment before in the same process. So each attempt has its own name. The name is in the claim's row, and
in the name of the savepoint by which MySQL and MariaDB tell whether the claim's transaction still exists. Called by
`processing.attempt`, `guards.claiming`, `probe` and what watches or tries a claim.
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
    """The prefix of all owners in one process."""

    def __init__(self) -> None:
        self.forked()
        fork.tell(self)

    def forked(self) -> None:
        """Make a new prefix in a forked child: with the parent's prefix, the two processes would make the same owners."""
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
