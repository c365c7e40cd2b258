"""Several worker processes under one supervisor: it starts, restarts and stops them, and never leaves one behind.

The supervisor receives no message and opens no database. Each child is a new interpreter with a command line of its
own (no fork: connections, threads and C clients do not survive a fork). Called by the command line for `--processes N`.

A child that ends is started again after a pause, which doubles while it keeps ending early. Exit code 2, wrong usage or
configuration, is the exception: the child would end like that each time, so everything stops and the supervisor
returns 2 as well.
If the supervisor dies, in any way, the kernel kills its children (Linux: prctl(2), PR_SET_PDEATHSIG). Their messages in
hand come back from the broker.
"""

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from datetime import timedelta
from time import monotonic
from typing import Final

from exactly_once.configuration.supervised import SUPERVISED
from exactly_once.daemon.health import Health
from exactly_once.daemon.heartbeat import REPORT_TO, HeartbeatReader, open_heartbeat
from exactly_once.daemon.signals import KILLED, leave, signals_wake
from exactly_once.wording.steady_log import steady

__all__ = ["child_command", "supervise"]

PAUSE_S: Final = (0.1, 30.0)
"""Seconds before a child is started again: the first, then twice as long each time it ends early, up to the second."""
LONG_LIFE_S: Final = 60.0
"""A child that lived this many seconds did not end early: the next pause is the first again."""
GRACE: Final = timedelta(seconds=30)
"""Added to `drain_timeout`: for the last settlements, the closing of consumers and the end of the interpreter."""
WRONG_USAGE: Final = 2
_PR_SET_PDEATHSIG: Final = 1  # <sys/prctl.h>

_log = steady("exactly_once.processes")


class _Child:
    """One of the N children: its number, and its present process."""

    def __init__(self, number: int, command: Sequence[str], prepare: Callable[[], None] | None) -> None:
        self.number, self._command, self._prepare = number, command, prepare
        self._pause = PAUSE_S[0]
        self._began = 0.0
        self.process: subprocess.Popen[bytes] | None = None
        self.heartbeat: HeartbeatReader | None = None
        self.due = 0.0
        """When to start it, on the monotonic clock, while `process` is None."""

    def start(self) -> None:
        self._began = monotonic()
        heartbeat, into = open_heartbeat()
        environment = {**os.environ, SUPERVISED: str(self.number), REPORT_TO: str(into)}
        # A session of its own: Ctrl-C in a terminal goes to the supervisor alone, which forwards it once.
        # preexec_fn is unsafe if it waits for a lock that another thread held at the fork; this one is a single system call.
        try:
            self.process = subprocess.Popen(  # noqa: S603  (the command is our own)
                self._command,
                env=environment,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                pass_fds=[into],
                preexec_fn=self._prepare,  # noqa: PLW1509
            )
        finally:
            os.close(into)
        self.heartbeat = heartbeat
        _log.info("Process %d started (pid %d).", self.number, self.process.pid)

    def ended(self) -> int | None:
        """If the process has ended, return its exit code, once, and plan the next start. Else read its heartbeat."""
        if self.process is None:
            return None
        if (code := self.process.poll()) is None:
            if self.heartbeat is not None:
                self.heartbeat.read()
            return None
        self._gone()
        lived = monotonic() - self._began
        if lived >= LONG_LIFE_S:
            self._pause = PAUSE_S[0]
        self.due = monotonic() + self._pause
        self._pause = min(2 * self._pause, PAUSE_S[1])
        return code

    def send(self, number: signal.Signals) -> None:
        if self.process is not None:
            self.process.send_signal(number)  # does nothing if it has ended

    def kill(self) -> None:
        """Kill it and wait for its end: its messages in hand come back from the broker."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self._gone()

    def _gone(self) -> None:
        self.process, heartbeat, self.heartbeat = None, self.heartbeat, None
        if heartbeat is not None:
            heartbeat.close()


class _Together:
    """All children as one worker, for the health endpoint."""

    def __init__(self, children: Sequence[_Child]) -> None:
        self._children = children

    def stuck(self, after: timedelta) -> Sequence[str]:
        said: list[str] = []
        for child in self._children:
            if heartbeat := child.heartbeat:
                said += [f"process {child.number}, {name}" for name in heartbeat.stuck]
                if heartbeat.is_silent(after):
                    said.append(f"process {child.number}, main thread")
        return said

    def unready(self) -> str | None:
        states = (
            (child.number, heartbeat.unready if (heartbeat := child.heartbeat) else "not running")
            for child in self._children
        )
        return "; ".join(f"process {number}: {why}" for number, why in states if why) or None


def child_command(arguments: Sequence[str]) -> list[str]:
    """Return a child's command line for these arguments of the supervisor.

    Args:
        arguments: What followed `exactly-once`, such as `["run", "shop:eo", "--processes", "4"]`. `--processes` becomes
            1, and `--health` is removed: only one process can listen on its port, and the supervisor does.

    Example:
        >>> child_command(["run", "shop:eo", "--processes", "4", "--health=:8080"])[1:]
        ['-m', 'exactly_once', 'run', 'shop:eo', '--processes', '1']
    """
    kept: list[str] = []
    rest = iter(arguments)
    for argument in rest:
        if argument in ("--processes", "--health"):
            next(rest, None)
        elif not argument.startswith(("--processes=", "--health=")):
            kept.append(argument)
    return [sys.executable, "-m", "exactly_once", *kept, "--processes", "1"]


def supervise(
    command: Sequence[str],
    *,
    processes: int,
    drain_timeout: timedelta,
    grace: timedelta = GRACE,
    health: str | None = None,
) -> int:
    """Keep `processes` children running until SIGTERM or SIGINT, then let them stop.

    The first signal is forwarded once as SIGTERM. Children that run longer than `drain_timeout` + `grace` are killed. A
    second signal kills them and ends the supervisor at once with 143.

    Args:
        command: A child's whole command line; `child_command` makes it.
        processes: How many.
        drain_timeout: How long a child lets running messages finish.
        grace: How much longer it may take to end.
        health: `HOST:PORT` on which to answer for all of them: live while no child has a stuck thread,
            ready while every child is.

    Returns:
        0 if every child that ran when the signal came ended with 0; 1 if one did not, because it gave work back or
        had to be killed; 2 if one reported that its usage or configuration is wrong.

    Raises:
        ConfigurationError: Called outside the main thread, or the address of `health` cannot be listened on.
        OSError: The command cannot be started at all.

    Example:
        sys.exit(supervise(child_command(sys.argv[1:]), processes=4, drain_timeout=timedelta(seconds=25)))
    """
    if processes < 1:
        raise ValueError(f"processes must be at least 1, not {processes}")
    prepare = _dies_with_us()
    children = [_Child(number, command, prepare) for number in range(1, processes + 1)]

    def told(number: int, count: int) -> None:
        if count > 1:
            for child in children:
                child.send(signal.SIGKILL)
            leave(KILLED)

    serving = Health(_Together(children), health) if health else nullcontext()
    with serving, signals_wake({signal.SIGTERM: told, signal.SIGINT: told}) as wait:
        try:
            code = _keep_running(children, wait)
            return _stop(children, wait, drain_timeout + grace) if code is None else code
        finally:
            for child in children:  # also after an exception: no child is left behind
                child.kill()


def _keep_running(children: Sequence[_Child], wait: Callable[[float], "signal.Signals | None"]) -> int | None:
    """Return None at a signal, and 2 if a child reports wrong usage."""
    while True:
        now = monotonic()
        for child in children:
            if (code := child.ended()) is not None:
                if code == WRONG_USAGE:
                    _log.error("Process %d ended with 2, wrong usage or configuration; stopping all.", child.number)
                    _stop(children, wait, timedelta(seconds=5))
                    return WRONG_USAGE
                _log.warning(
                    "Process %d ended (%s); starting it again in %.1f s.", child.number, _how(code), child.due - now
                )
            if child.process is None and child.due <= now:
                child.start()
        if wait(0.1):
            return None


def _stop(children: Sequence[_Child], wait: Callable[[float], "signal.Signals | None"], patience: timedelta) -> int:
    """Tell the children once, wait, and kill those that are left. 0 if all of them ended with 0."""
    for child in children:
        child.send(signal.SIGTERM)
    deadline = monotonic() + patience.total_seconds()
    worst = 0
    while running := [child for child in children if child.process is not None]:
        late = monotonic() >= deadline
        for child in running:
            if (code := child.ended()) is not None:
                if code not in (0, -signal.SIGTERM):  # -SIGTERM: it had not begun to listen for signals, nor to receive
                    _log.warning("Process %d ended while stopping (%s).", child.number, _how(code))
                    worst = 1
            elif late:
                _log.error("Process %d did not end in %s; killing it.", child.number, patience)
                child.kill()
                worst = 1
        wait(0.05)
    return worst


def _how(code: int) -> str:
    return f"signal {-code}" if code < 0 else f"exit code {code}"


def _dies_with_us() -> Callable[[], None] | None:
    """Make the function that a child runs between fork and exec. Bound here, so that it imports and looks up nothing there."""
    if not sys.platform.startswith("linux"):
        return None
    prctl, parent, getppid, ended = ctypes.CDLL(None).prctl, os.getpid(), os.getppid, os._exit
    number = int(signal.SIGKILL)

    def prepare() -> None:
        prctl(_PR_SET_PDEATHSIG, number, 0, 0, 0)
        if getppid() != parent:  # it died before the line above
            ended(KILLED)

    return prepare
