"""Says whether an error was raised while a connection was being made, by the place where it was raised, never by its type.

Connecting runs code of the application, too: `creator=`, and listeners of `do_connect`, `connect` and `checkout`.
Such code may ask a service for a token. What it raises when that service is away (OSError, ValueError, an error of the
service's client) is not a driver's error. No message is to be blamed for it: the database could not be reached.

Called wherever an error of a store is handled.
"""

from collections.abc import Sequence
from typing import Final

from sqlalchemy import Engine, Pool

from exactly_once.errors import ConfigurationError, StoreUnavailable
from exactly_once.exceptions.leaves import leaves

__all__ = ["unreached"]

# Both, because a pool can be asked directly, and an engine can have a pool that does not know its dialect. All that share the
# dialect are one database: the pool before an engine's `dispose`, and an engine with execution options.
_DIALECT_IN: Final = {Engine.raw_connection.__code__: "dialect", Pool.connect.__code__: "_dialect"}


def unreached(error: BaseException, engines: Sequence[Engine]) -> bool:
    """Say whether an error was raised while somebody waited for, or made, a connection of one of these engines.

    For an exception group, such as a TaskGroup raises, all members must have been raised there.

    Args:
        error: What was raised.
        engines: The engines of one database.
    """
    return all(_unreached(each, engines) for each in leaves(error))


def _unreached(error: BaseException, engines: Sequence[Engine]) -> bool:
    if isinstance(error, StoreUnavailable) and error.__cause__ is not None:
        error = error.__cause__  # the cause was raised there
    if isinstance(error, ConfigurationError):
        return False  # waiting repairs neither a setting nor a forked process
    trace = error.__traceback__
    while trace is not None:
        name = _DIALECT_IN.get(trace.tb_frame.f_code)
        if name is not None:
            dialect = getattr(trace.tb_frame.f_locals.get("self"), name, None)
            if any(dialect is engine.dialect for engine in engines):
                return True
        trace = trace.tb_next
    return False
