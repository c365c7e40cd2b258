"""Who a claim belongs to: one attempt of one process, and no other one ever.

An owner made for a whole process would let an attempt take another's row for its own: that of a copy which ran a moment
before in the same process. So each attempt has a name of its own. It stands in the claim's row, and in the name of the
savepoint by which MySQL and MariaDB tell whether the claim's transaction is still there. Called by `delivery` and `guards`.
"""

import os
import secrets
import socket
from itertools import count
from typing import Final

__all__ = ["new_owner", "savepoint_of"]

_HOST: Final = socket.gethostname()[:30]
_NUMBER: Final = count(1)
_prefix = ""


def _named_anew() -> None:
    """A forked child is another process: with its parent's names the two would share owners."""
    global _prefix  # noqa: PLW0603  (read for each message: a name of the module costs least)
    _prefix = f"{_HOST}:{os.getpid()}:{secrets.token_hex(4)}:"


_named_anew()
os.register_at_fork(after_in_child=_named_anew)


def new_owner() -> str:
    """Return the name of a new attempt: host, process, a random part and a number; at most 64 characters.

    Example:
        >>> new_owner() == new_owner()
        False
    """
    return f"{_prefix}{next(_NUMBER):x}"


def savepoint_of(owner: str) -> str:
    """Return the name of an attempt's savepoint, the same for the same owner.

    Example:
        >>> savepoint_of("host:17:0badcafe:2a")
        'eo_0badcafe_2a'
    """
    _, random, number = owner.rsplit(":", 2)
    return f"eo_{random}_{number}"
