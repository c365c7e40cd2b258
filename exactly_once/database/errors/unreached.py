"""Whether an error was raised where a connection was to be had: told by where it was raised, and never by what it is.

To connect runs code of the application's, too: `creator=`, and listeners of `do_connect`, `connect` and `checkout`. It may ask
a service for a token, and what that raises when it is away (OSError, ValueError, an error of its client's own) is no error of a
driver's. No message is to be blamed for it: the database could not be reached.

Called by whatever meets an error of a store.
"""

from collections.abc import Sequence
from typing import Final

from sqlalchemy import Engine, Pool

from exactly_once.errors import ConfigurationError, StoreUnavailable
from exactly_once.exceptions.leaves import leaves

__all__ = ["unreached"]

# both, for a pool can be asked directly, and an engine be given a pool that does not know its dialect. What shares the dialect
# is one database: the pool of before an engine's `dispose`, and an engine with options of its own
_DIALECT_IN: Final = {Engine.raw_connection.__code__: "dialect", Pool.connect.__code__: "_dialect"}


def unreached(error: BaseException, engines: Sequence[Engine]) -> bool:
    """Say whether an error was raised while somebody waited for a connection of one of these engines, or made one.

    Of a group, such as a TaskGroup raises, all members must have been.

    Args:
        error: What was raised.
        engines: Those of one database.
    """
    return all(_unreached(each, engines) for each in leaves(error))


def _unreached(error: BaseException, engines: Sequence[Engine]) -> bool:
    if isinstance(error, StoreUnavailable) and error.__cause__ is not None:
        error = error.__cause__  # what it was made of was raised there
    if isinstance(error, ConfigurationError):
        return False  # waiting mends neither a setting nor a process that was forked
    trace = error.__traceback__
    while trace is not None:
        name = _DIALECT_IN.get(trace.tb_frame.f_code)
        if name is not None:
            dialect = getattr(trace.tb_frame.f_locals.get("self"), name, None)
            if any(dialect is engine.dialect for engine in engines):
                return True
        trace = trace.tb_next
    return False
