"""The wall around importing `rocketmq-python-client`: protects the program from its import and its threads.

It does not import the client and opens nothing. Called by the transport before the first import of the other modules of this
package, which import the client at their top.

The client (5.1.2) does two things to a program that merely imports it, and one as long as a server is away:

* `rocketmq.v5.log` makes the folder `~/logs/rocketmq_python` and runs `logging.config.dictConfig`, which closes every
  log handler of the program: a stand-in module replaces it.
* Its heartbeat raises inside a future's callback, so `concurrent.futures` prints a traceback every 10 s while the
  proxy is away: a filter drops exactly the records whose traceback ends inside the client.
* gRPC cannot be used in a process that was forked from one that used it: its threads do not exist there, and a call never
  returns. Such a child gets an error that says so: `enter`. gRPC's own fork handlers crashed half of such children
  before they ran a line (1.85); they are switched off, unless the environment says otherwise.
* `rocketmq-client-python`, the older client, has the same top-level package. Which one is installed is read from the disk,
  because importing the wrong one loads a C++ library.
"""

import logging
import os
import sys
from importlib.util import find_spec
from pathlib import Path
from threading import Lock
from types import ModuleType

from exactly_once import fork
from exactly_once.errors import ConfigurationError, ForkedProcess, MissingExtra
from exactly_once.wording.installation import source
from exactly_once.wording.steady_log import steady

__all__ = ["CLIENT_LOGGER", "build", "enter", "forked", "missing", "require"]

CLIENT_LOGGER = "rocketmq-python-client"
"""The client's own logger keeps its name, and is silent until its level is set: we log once what it repeats."""

_LOG_MODULE = "rocketmq.v5.log"
_LOCK = Lock()


def require() -> None:
    """Check, without importing it, that the right client is installed.

    Raises:
        MissingExtra: No client is installed.
        ConfigurationError: The installed client is `rocketmq-client-python`, which serves `rocketmq4://`.
    """
    if "rocketmq.v5" in sys.modules:
        return
    try:
        spec = find_spec("rocketmq")
    except ValueError:  # a module without a spec is registered under that name
        spec = None
    if spec is None:
        raise MissingExtra("The transport rocketmq://", "rocketmq")
    folders = [Path(folder) for folder in spec.submodule_search_locations or ()]
    if any((folder / "v5").is_dir() for folder in folders):
        return
    raise ConfigurationError(
        "rocketmq:// needs the package rocketmq-python-client, but the installed package `rocketmq` is another one "
        "(rocketmq-client-python, which serves rocketmq4://). Both claim the same name, so each needs an environment of "
        f"its own. Type: python -m venv rocketmq5 && rocketmq5/bin/pip install {source('rocketmq')}, or use rocketmq4://."
    )


def missing() -> str | None:
    """Say why this transport cannot be used in this environment, or return None."""
    try:
        require()
    except ConfigurationError as error:
        return str(error)
    return None


def build() -> None:
    """Install the stand-in and the filter. Must run before the first import of the client; does nothing the second time."""
    with _LOCK:
        if "grpc" not in sys.modules:  # gRPC reads it once
            os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
        # If the program imported the client before us, the log folder exists; replacing the logger then helps nobody.
        if _LOG_MODULE not in sys.modules and "rocketmq" not in sys.modules:
            logger = logging.getLogger(CLIENT_LOGGER)
            if logger.level == logging.NOTSET:
                logger.setLevel(logging.CRITICAL + 1)
            # An exception in a filter would end the client's thread. So would the deprecated `warn`, if warnings are errors.
            log = steady(CLIENT_LOGGER)
            log.warn = log.warning  # type: ignore[method-assign]
            stand_in = ModuleType(_LOG_MODULE, "Stands in for the client's module, which reconfigures all logging.")
            stand_in.logger = log  # type: ignore[attr-defined]
            sys.modules[_LOG_MODULE] = stand_in
        futures = logging.getLogger("concurrent.futures")
        if not any(isinstance(one, _NotFromTheClient) for one in futures.filters):
            futures.addFilter(_NotFromTheClient())


_users: list[object] = []  # the process that used gRPC first, of those this one is forked off, and this one


def enter() -> None:
    """Use gRPC in this process from now on.

    Raises:
        ForkedProcess: It was forked from a process that used gRPC.
    """
    if _users and _users[0] is not fork.here:
        raise forked()
    if not _users:
        _users.append(fork.here)


def forked() -> ForkedProcess:
    """Return the error for a child whose parent used gRPC."""
    return ForkedProcess(
        "This process was forked off one that had used rocketmq:// before, and its client (gRPC) does not work on this side"
        " of a fork: nothing was sent or received. Let the parent use it only after it has forked, or never, or start"
        " processes by subprocess or by multiprocessing's 'spawn'."
    )


class _NotFromTheClient(logging.Filter):
    """Drops what `concurrent.futures` logs about callbacks of the client; passes everything else."""

    def filter(self, record: logging.LogRecord) -> bool:
        trace = record.exc_info[2] if record.exc_info else None
        while trace is not None:
            # By the module whose frame raised, not by the text.
            if str(trace.tb_frame.f_globals.get("__name__", "")).startswith("rocketmq."):
                return False
            trace = trace.tb_next
        return True
