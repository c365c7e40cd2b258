"""The wall around librocketmq and `rocketmq-client-python`: finds the library, loads it whatever its age, types its calls.

Nothing outside this file imports `rocketmq`. It starts no client and connects to nothing. Called by the rocketmq4
transport, and by user code that wants the client's own classes over an old library: `load().client`.

What is walled off here:

* `rocketmq-client-python` 2.0.0 binds at import four functions that librocketmq 1.0.1 lacks, and fails. The
  package index has only that version of librocketmq (inside the wheel `rocketmq` 0.4.4), so `_Complete` makes it usable.
* The wheels `rocketmq-client-python`, `rocketmq` and `rocketmq-python-client` (RocketMQ 5 over gRPC, a different
  client) all install a package called `rocketmq`.
* A body's length: see `exactly_once.clients.rocketmq4`.
* It writes log files to `$HOME/logs/rocketmq-cpp`. A home directory may not exist or not be writable, and librocketmq 1.0.1
  ignores the configured path: `_send_logs_to` sends them to a directory of ours.
* A process that was forked from one that had loaded the library waits at its exit for threads that do not exist. So it ends
  without that exit code. If the library was also used before the fork, every use in the child is refused: `enter`.
* At interpreter exit librocketmq's static objects are torn down while its threads still use them: `leave_without_it`.
"""

import ctypes
import ctypes.util
import importlib
import os
import sys
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from threading import Lock
from types import ModuleType
from typing import Any, Final

from exactly_once import fork
from exactly_once.clients.rocketmq4 import BodyOf, body_reader
from exactly_once.errors import ConfigurationError, ForkedProcess, MissingExtra
from exactly_once.transports.inflight import default_directory
from exactly_once.wording.installation import to_install

__all__ = ["LIBRARY_VARIABLE", "LOG_ERROR", "CallFailed", "Library", "enter", "leave_without_it", "load"]

LIBRARY_VARIABLE: Final = "EXACTLY_ONCE_LIBROCKETMQ"
"""The environment variable that may name librocketmq's file."""

_INSTALL: Final = (
    "Install the C++ client of Apache RocketMQ, 2.0 or newer (its release page has rpm and deb packages), or on x86-64 "
    "Linux take the library from a wheel, in this order: pip install --no-deps rocketmq==0.4.4 && "
    "pip install --no-deps --force-reinstall rocketmq-client-python==2.0.0; "
    f"or name the library's file in {LIBRARY_VARIABLE}."
)
LOG_ERROR: Final = 2  # `E_LOG_LEVEL_ERROR`; at the default level a busy client writes a line for each message

_handle, _text, _number = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int

# Called inside callbacks, or on a message of our own: none of them waits for anything.
_QUICK: Final[dict[str, tuple[list[Any], Any]]] = {
    "CreateMessage": ([_text], _handle),
    "DestroyMessage": ([_handle], _number),
    "SetMessageKeys": ([_handle, _text], _number),
    "SetMessageTags": ([_handle, _text], _number),
    "SetByteMessageBody": ([_handle, _text, _number], _number),
    "SetMessageProperty": ([_handle, _text, _text], _number),
    "SetDelayTimeLevel": ([_handle, _number], _number),
    "GetMessageTopic": ([_handle], _text),
    "GetMessageTags": ([_handle], _text),
    "GetMessageKeys": ([_handle], _text),
    "GetMessageId": ([_handle], _text),
    "GetMessageProperty": ([_handle, _text], _text),
    "GetMessageBornTimestamp": ([_handle], ctypes.c_longlong),
    "SetPushConsumerMessageModel": ([_handle, _number], _number),
    "GetLatestErrorMessage": ([], _text),
    "CreateProducer": ([_text], _handle),
    "DestroyProducer": ([_handle], _number),
    "SetProducerLogLevel": ([_handle, _number], _number),
}
# These wait for the network or for other threads, which may be waiting for the interpreter's lock.
_SLOW: Final[dict[str, tuple[list[Any], Any]]] = {
    "SetProducerNameServerAddress": ([_handle, _text], _number),
    "SetProducerSessionCredentials": ([_handle, _text, _text, _text], _number),
    "SetProducerMaxMessageSize": ([_handle, _number], _number),
    "SetProducerSendMsgTimeout": ([_handle, _number], _number),
    "SetProducerLogPath": ([_handle, _text], _number),
    "StartProducer": ([_handle], _number),
    "ShutdownProducer": ([_handle], _number),
    "SendMessageSync": ([_handle, _handle, _handle], _number),
    "SendMessageOrderly": ([_handle, _handle, _handle, _handle, _number, _handle], _number),
    "CreatePushConsumer": ([_text], _handle),
    "SetPushConsumerNameServerAddress": ([_handle, _text], _number),
    "SetPushConsumerSessionCredentials": ([_handle, _text, _text, _text], _number),
    "SetPushConsumerInstanceName": ([_handle, _text], _number),
    "SetPushConsumerThreadCount": ([_handle, _number], _number),
    "SetPushConsumerMessageBatchMaxSize": ([_handle, _number], _number),
    "SetPushConsumerLogPath": ([_handle, _text], _number),
    "SetPushConsumerLogLevel": ([_handle, _number], _number),
    "Subscribe": ([_handle, _text, _text], _number),
    "RegisterMessageCallback": ([_handle, _handle], _number),
    "RegisterMessageCallbackOrderly": ([_handle, _handle], _number),
    "StartPushConsumer": ([_handle], _number),
    "ShutdownPushConsumer": ([_handle], _number),
}


class CallFailed(Exception):
    """A function of librocketmq returned an error status."""

    def __init__(self, function: str, status: int, said: str) -> None:
        super().__init__(f"librocketmq's {function} failed with status {status}: {said or 'it does not say why'}")
        self.status = status
        self.said = said


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class Library:
    """librocketmq, loaded and tested.

    Args:
        path: The file from which it was loaded.
        client: The module `rocketmq.client`, imported and usable.
        call: Every function we use, with its types, by name.
        body: Reads a received message's whole body.
        logs: The directory of its log files.
    """

    path: str
    client: ModuleType
    call: Any
    body: BodyOf
    logs: str

    def forked(self) -> None:
        """Runs in a forked child: see this module's first lines."""
        leave_without_it()

    def check(self, function: str, status: int) -> None:
        """Raise `CallFailed` unless the status means success."""
        if status != 0:
            said = self.call.GetLatestErrorMessage() or b""
            raise CallFailed(function, status, " ".join(said.decode("utf-8", "replace").split()))


class _Functions:
    """Every function of `_QUICK` and `_SLOW` as an attribute."""

    def __init__(self, path: str) -> None:
        for dll, functions in ((ctypes.PyDLL(path), _QUICK), (ctypes.CDLL(path), _SLOW)):
            for name, (arguments, result) in functions.items():
                function = getattr(dll, name)
                function.argtypes, function.restype = arguments, result
                setattr(self, name, function)


class _Missing:
    """Replaces a function that the library lacks: "not supported", or NULL if a pointer is wanted."""

    argtypes: Any = None
    restype: Any = None

    def __call__(self, *_: object) -> int | None:
        # -1 would be used as an address.
        return None if self.restype is ctypes.c_void_p else -1


class _Complete:
    """A library with every function that a caller may ask for. A function that the real one lacks answers "not supported" (-1).

    At import the client binds functions for transactions and for ordered producers, which librocketmq 1.0.1 does not
    have. We use none of them; a user who calls one gets the client's own error for status -1.
    """

    def __init__(self, real: ctypes.CDLL) -> None:
        self._real = real
        self._name = real._name  # noqa: SLF001  (where ctypes keeps a library's path; there is no public name)

    def __getattr__(self, name: str) -> Any:
        try:
            function = getattr(self._real, name)
        except AttributeError:
            function = _Missing()
        setattr(self, name, function)
        return function


def _send_logs_to(directory: Path, call: Any) -> None:
    """Make the logger while HOME names our directory: it reads HOME once in the life of a process."""
    directory.mkdir(mode=0o700, exist_ok=True)
    home = os.environ.get("HOME")
    os.environ["HOME"] = str(directory)
    try:
        producer = call.CreateProducer(b"exactly-once-logger")
        call.SetProducerLogLevel(producer, LOG_ERROR)
        call.DestroyProducer(producer)
    finally:
        if home is None:
            del os.environ["HOME"]
        else:
            os.environ["HOME"] = home


_importing = Lock()


@lru_cache(maxsize=1)
def load() -> Library:
    """Load librocketmq and `rocketmq.client`, once.

    Returns:
        The library, after a check of its functions, and of a body with NUL bytes.

    Raises:
        MissingExtra: `rocketmq-client-python` is not installed.
        ConfigurationError: The other client is installed instead, or librocketmq is missing, for
            another architecture, or too old.
    """
    with _importing:
        client = _imported()
    ffi = sys.modules["rocketmq.ffi"]
    path: str = ffi.dll._name  # noqa: SLF001  (see _Complete)
    try:
        functions = _Functions(path)
    except AttributeError as error:
        raise ConfigurationError(f"The librocketmq at {path} is too old: {error}. {_INSTALL}") from error
    logs = default_directory("librocketmq").parent / "librocketmq"
    _send_logs_to(logs, functions)
    library = Library(path, client, functions, body_reader(path), str(logs))
    fork.tell(library)
    return library


def _imported() -> ModuleType:
    if "rocketmq.ffi" not in sys.modules:
        _refuse_another_client()
    path = _library_file()
    found, loads = ctypes.util.find_library, ctypes.cdll.LoadLibrary
    try:
        if path and "rocketmq.ffi" not in sys.modules:
            complete: Any = _Complete(ctypes.CDLL(path))
            # During this import only, and for this library only: all others get what they ask for.
            ctypes.util.find_library = lambda name: path if name == "rocketmq" else found(name)
            loader: Any = ctypes.cdll
            loader.LoadLibrary = lambda name: complete if "librocketmq" in str(name) or name == path else loads(name)
        return importlib.import_module("rocketmq.client")
    except (ImportError, OSError, AttributeError, NotImplementedError) as error:
        sys.modules.pop("rocketmq.ffi", None)
        raise ConfigurationError(
            f"rocketmq4:// needs librocketmq, which could not be loaded: {error}. {_INSTALL}"
        ) from error
    finally:
        ctypes.util.find_library, ctypes.cdll.LoadLibrary = found, loads  # type: ignore[method-assign]


def _package() -> Path:
    spec = find_spec("rocketmq")
    places = list(spec.submodule_search_locations or []) if spec else []
    if not places:
        raise MissingExtra("rocketmq4://", "rocketmq4")
    return Path(places[0])


def _refuse_another_client() -> None:
    package = _package()
    if not (package / "ffi.py").exists():
        raise ConfigurationError(
            f"The package `rocketmq` at {package} is rocketmq-python-client, the client of rocketmq://. rocketmq4:// "
            "needs rocketmq-client-python, and both are called `rocketmq`: they need two environments. Make another one "
            f"and type there: {to_install('rocketmq4')}"
        )


def _library_file() -> str | None:
    named = os.environ.get(LIBRARY_VARIABLE)
    if named:
        if not Path(named).is_file():
            raise ConfigurationError(f"{LIBRARY_VARIABLE} names {named}, and there is no such file.")
        return named
    beside = _package() / ("librocketmq.dylib" if sys.platform == "darwin" else "librocketmq.so")
    return str(beside) if beside.exists() else ctypes.util.find_library("rocketmq")


_users: list[
    object
] = []  # the process that started a native client first, of those this one is forked off, and this one


def enter() -> None:
    """Start native clients in this process from now on.

    Raises:
        ForkedProcess: It was forked from a process that did. The client's threads do not exist here, and a call may never return.
    """
    if _users and _users[0] is not fork.here:
        raise ForkedProcess(
            "This process was forked off one that had used rocketmq4:// before, and its client (librocketmq) does not work"
            " on this side of a fork: nothing was sent or received. Let the parent use it only after it has forked, or"
            " never, or start processes by subprocess or by multiprocessing's 'spawn'."
        )
    if not _users:
        _users.append(fork.here)


@lru_cache(maxsize=1)
def leave_without_it() -> None:
    """Make this process end without running librocketmq's exit code. Its exit status does not change.

    Needed once a native client is left running: its threads would otherwise use objects that the exit is tearing
    down, and a clean exit would end as a segmentation fault. glibc runs exit functions last first. So Python has
    finished and flushed by then, and only functions registered before this call are skipped. Without glibc this does nothing.
    """
    libc = ctypes.CDLL(None)
    on_exit = getattr(libc, "on_exit", None)
    if on_exit is not None:
        # _exit(status) is called with (status, argument), and ignores the second
        on_exit(ctypes.cast(getattr(libc, "_exit"), ctypes.c_void_p), None)  # noqa: B009  (not private: it is exit's name)
