"""Detects that a SQLite file was deleted, moved or replaced while an engine has it open. Its connections are not used again.

A process keeps the file that it opened, whatever its name is now. After `rm shop.db` nobody reads what is written there (in WAL
mode; else SQLite reports it as read-only), and a worker waits for messages in a file to which nobody sends. So each connection
remembers which file it opened, and is compared with the name at checkout: one `stat`, no round trip. The new file is opened
instead. If there is no file, we make none: the command that makes the tables makes it, or it was moved by mistake and comes back.

Never looks at a database in memory, nor at one that is named by a `file:` URI. Called by `store`; `transports.sql` asks.
"""

import os
from typing import Any, Final
from weakref import WeakKeyDictionary

from sqlalchemy import Dialect, Engine
from sqlalchemy.exc import DisconnectionError

from exactly_once.database.errors.not_made import file_of, no_file, upgrade_command
from exactly_once.database.listeners import listen
from exactly_once.errors import StoreUnavailable
from exactly_once.wording.steady_log import steady

__all__ = ["replaced", "watch_file"]

_FILE: Final = "exactly_once.file"
_log = steady("exactly_once.store")

_File = tuple[str, int, int]


class _OpenedFile:
    """For one engine: which file was opened last, and how often it was a different one."""

    def __init__(self) -> None:
        self.opened: _File | None = None
        self.times = 0


# All copies of an engine share its dialect.
_opened_files: WeakKeyDictionary[Dialect, _OpenedFile] = WeakKeyDictionary()


def watch_file(engine: Engine, *, ours: bool) -> None:
    """Compare each connection of an engine, at checkout, with the file that has its name now.

    Args:
        engine: An engine of any database.
        ours: We made the engine, and make no tables through it: connecting must not create a missing file.
    """
    if file_of(engine.url) is None or engine.dialect in _opened_files:
        return
    seen = _opened_files[engine.dialect] = _OpenedFile()
    listen(engine, "do_connect", lambda *_: _still_there(engine, seen, ours=ours))
    listen(engine, "connect", lambda _, record: _opened(engine, seen, record))
    listen(engine, "checkout", lambda _, record, __: _compared(seen, record))


def replaced(engine: Engine) -> int:
    """Return how often another file had replaced this engine's file."""
    seen = _opened_files.get(engine.dialect)
    return 0 if seen is None else seen.times


def _opened(engine: Engine, seen: _OpenedFile, record: Any) -> None:
    path = os.path.abspath(file_of(engine.url) or "")  # absolute: the program may change its folder
    if (found := _found(path)) is not None:  # else a connect function of the application's leads elsewhere
        record.info[_FILE] = seen.opened = found


def _still_there(engine: Engine, seen: _OpenedFile, *, ours: bool) -> None:
    """Runs before connecting, which would make an empty file."""
    if seen.opened is not None:
        if not os.path.exists(seen.opened[0]):
            raise _gone(seen.opened[0])
    elif ours and (told := no_file(engine.url, upgrade_command(engine))) is not None:
        raise told


def _compared(seen: _OpenedFile, record: Any) -> None:
    opened: _File | None = record.info.get(_FILE)
    if opened is None or (now := _found(opened[0])) == opened:
        return
    if now is None:
        raise _gone(opened[0])
    if seen.opened == opened:
        seen.opened = now
        seen.times += 1
        _log.warning("%s was deleted or replaced while it was open; the new file is used from here on.", opened[0])
    raise DisconnectionError("another file has its name")  # the pool opens the new file


def _found(path: str) -> _File | None:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return path, found.st_dev, found.st_ino


def _gone(path: str) -> StoreUnavailable:
    return StoreUnavailable(
        f"{path} was deleted or moved while it was open. Put it back; or make a new one, which knows of no message that"
        " was processed: exactly-once db upgrade"
    )
