"""Real processes and real signals: one worker, and several under their supervisor."""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from http.client import HTTPConnection
from itertools import pairwise
from pathlib import Path
from time import monotonic, sleep

import pytest

from exactly_once.daemon.supervisor import child_command
from tests.waiting import until

HERE = Path(__file__).parent
CHILD, PARENT = str(HERE / "processes_child.py"), str(HERE / "processes_parent.py")
Begin = Callable[..., "subprocess.Popen[bytes]"]

pytestmark = [
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="PR_SET_PDEATHSIG and /proc are Linux's"),
    pytest.mark.alone,  # "at once" is less than two seconds, with the end of a process in it
]


@pytest.fixture
def begin() -> Iterator[Begin]:
    """Start a process, and see to it that it ends with the test."""
    begun: list[subprocess.Popen[bytes]] = []

    def start(*command: object) -> "subprocess.Popen[bytes]":
        environment = {**os.environ, "PYTHONPATH": str(HERE.parent.parent)}
        environment.pop("EXACTLY_ONCE_SUPERVISED", None)
        begun.append(subprocess.Popen([sys.executable, *map(str, command)], env=environment))
        return begun[-1]

    yield start
    for process in begun:
        process.kill()
        process.wait()


@pytest.fixture
def supervise(begin: Begin, tmp_path: Path) -> Iterator[Begin]:
    def start(
        processes: int, mode: str, *, drain_s: float = 5, grace_s: float = 5, health: str = ""
    ) -> "subprocess.Popen[bytes]":
        return begin(PARENT, processes, drain_s, grace_s, health, CHILD, tmp_path, mode, drain_s)

    yield start
    for pid, _ in said(tmp_path, "started") + said(tmp_path, "running"):
        if lives(pid) and str(tmp_path).encode() in Path(f"/proc/{pid}/cmdline").read_bytes():
            os.kill(pid, signal.SIGKILL)  # only where the supervisor is broken


def said(folder: Path, what: str) -> list[tuple[int, float]]:
    """Who said it, and when."""
    path = folder / what
    lines = path.read_text().splitlines() if path.exists() else []
    return [(int(pid), float(at)) for pid, at in (line.split() for line in lines)]


def ask(port: int, path: str) -> tuple[int, object]:
    connection = HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        return response.status, json.loads(response.read())
    except ConnectionRefusedError:
        return 0, None
    finally:
        connection.close()


def lives(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


# -- one worker ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_the_worker_finish_and_exit_with_0(begin: Begin, tmp_path: Path, number: signal.Signals) -> None:
    process = begin(CHILD, tmp_path, "worker", 10)
    until(lambda: said(tmp_path, "running"), "it runs")
    process.send_signal(number)
    sleep(0.1)
    assert process.poll() is None, "it waits for what runs"
    (tmp_path / "finish").touch()
    assert process.wait(10) == 0
    assert said(tmp_path, "effect")


def test_work_given_back_is_exit_code_1(begin: Begin, tmp_path: Path) -> None:
    process = begin(CHILD, tmp_path, "worker", 0.2)
    until(lambda: said(tmp_path, "running"), "it runs")
    process.terminate()
    assert process.wait(10) == 1
    assert not said(tmp_path, "effect")


def test_a_second_signal_ends_at_once_with_143(begin: Begin, tmp_path: Path) -> None:
    process = begin(CHILD, tmp_path, "worker", 60)
    until(lambda: said(tmp_path, "running"), "it runs")
    process.terminate()
    sleep(0.1)
    assert process.poll() is None
    began = monotonic()
    process.send_signal(signal.SIGINT)
    assert process.wait(10) == 143
    assert monotonic() - began < 2


def test_a_signal_during_a_start_that_waits_ends_it_with_0(begin: Begin, tmp_path: Path) -> None:
    script = tmp_path / "waits.py"
    script.write_text(
        "import sys\nfrom pathlib import Path\nfrom threading import Event\n"
        "from exactly_once.daemon.signals import run_until_signal\n"
        "class Waits:\n"
        "    asked = Event()\n"
        "    def start(self): Path(sys.argv[1]).touch(); self.asked.wait(60); raise ValueError('told to stop')\n"
        "    def stop(self): self.asked.set(); return 0\n"
        "    def unready(self): return 'not started'\n"
        "w = Waits()\nsys.exit(run_until_signal(w, start=w.start))\n"
    )
    process = begin(script, tmp_path / "waiting")
    until((tmp_path / "waiting").exists, "it waits")
    process.terminate()
    assert process.wait(10) == 0


# -- several -------------------------------------------------------------------------------------------------------


def test_children_are_told_once_and_all_ending_with_0_is_0(supervise: Begin, tmp_path: Path) -> None:
    parent = supervise(3, "obey")
    until(lambda: len(said(tmp_path, "started")) == 3, "three run")
    parent.send_signal(signal.SIGINT)
    assert parent.wait(10) == 0
    assert len(said(tmp_path, "signal 1")) == 3
    assert not said(tmp_path, "signal 2")


def test_a_child_that_gave_work_back_makes_it_1(supervise: Begin, tmp_path: Path) -> None:
    parent = supervise(2, "back")
    until(lambda: len(said(tmp_path, "started")) == 2, "both run")
    parent.terminate()
    assert parent.wait(10) == 1


def test_a_child_that_does_not_end_is_killed_and_makes_it_1(supervise: Begin, tmp_path: Path) -> None:
    parent = supervise(2, "hang", drain_s=0.2, grace_s=0.2)
    until(lambda: len(said(tmp_path, "started")) == 2, "both run")
    parent.terminate()
    assert parent.wait(10) == 1
    assert not any(lives(pid) for pid, _ in said(tmp_path, "started"))


def test_a_second_signal_kills_the_children_and_is_143_at_once(supervise: Begin, tmp_path: Path) -> None:
    parent = supervise(2, "hang", drain_s=60)
    until(lambda: len(said(tmp_path, "started")) == 2, "both run")
    parent.terminate()
    until(lambda: len(said(tmp_path, "signal 1")) == 2, "the first is passed on")
    parent.terminate()
    assert parent.wait(30) == 143, "not after the 60 s it was given"
    until(lambda: not any(lives(pid) for pid, _ in said(tmp_path, "started")), "the children are gone", 20)


def test_a_child_that_ends_is_started_again_after_a_pause_that_doubles(supervise: Begin, tmp_path: Path) -> None:
    parent = supervise(1, "crash")
    until(lambda: len(said(tmp_path, "started")) == 5, "it was started five times")
    times = [at for _, at in said(tmp_path, "started")]
    pauses = [later - sooner for sooner, later in pairwise(times)]
    # at least so long: how much longer a start takes is the machine's business
    assert all(pause >= 0.1 * 2**number for number, pause in enumerate(pauses)), pauses
    last, _ = said(tmp_path, "started")[-1]
    until(lambda: not Path(f"/proc/{last}").exists(), "the supervisor has seen the last one end")
    parent.terminate()
    assert parent.wait(10) == 0, "it had no work when it was told to stop"


def test_a_child_killed_from_outside_is_replaced(supervise: Begin, tmp_path: Path) -> None:
    parent = supervise(2, "obey")
    until(lambda: len(said(tmp_path, "started")) == 2, "both run")
    os.kill(said(tmp_path, "started")[0][0], signal.SIGKILL)
    until(lambda: len(said(tmp_path, "started")) == 3, "it is replaced")
    parent.terminate()
    assert parent.wait(10) == 0
    assert len(said(tmp_path, "signal 1")) == 2


def test_wrong_usage_is_not_tried_again_and_is_2(supervise: Begin, tmp_path: Path) -> None:
    parent = supervise(3, "usage")
    assert parent.wait(20) == 2
    assert len(said(tmp_path, "started")) <= 3


def test_children_die_with_a_supervisor_that_is_killed(supervise: Begin, tmp_path: Path) -> None:
    parent = supervise(2, "hang")
    until(lambda: len(said(tmp_path, "started")) == 2, "both run")
    parent.kill()
    until(lambda: not any(lives(pid) for pid, _ in said(tmp_path, "started")), "the children are gone", 5)


def test_a_supervised_worker_is_not_ended_by_a_group_that_is_signalled_as_a_whole(
    supervise: Begin, tmp_path: Path
) -> None:
    """As systemd does it: everyone gets SIGTERM, and the children the supervisor's as well."""
    parent = supervise(1, "worker", drain_s=20)
    until(lambda: said(tmp_path, "running"), "it runs")
    [(child, _)] = said(tmp_path, "running")
    for pid in (child, parent.pid):
        os.kill(pid, signal.SIGTERM)
    sleep(0.3)
    assert parent.poll() is None
    assert lives(child)
    (tmp_path / "finish").touch()
    assert parent.wait(20) == 0
    assert said(tmp_path, "effect")


def test_one_port_answers_for_all_children(supervise: Begin, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    parent = supervise(2, "worker", drain_s=20, health=f"127.0.0.1:{port}")
    until(lambda: ask(port, "/ready") == (200, {"ready": True}), "both are ready")
    assert ask(port, "/live") == (200, {"live": True})
    until(lambda: len(said(tmp_path, "running")) == 2, "both run")
    stopped, _ = said(tmp_path, "running")[0]
    os.kill(stopped, signal.SIGTERM)
    until(lambda: "stopping" in str(ask(port, "/ready")), "one of them stops")
    os.kill(stopped, signal.SIGKILL)
    until(lambda: len(said(tmp_path, "running")) == 3, "it is replaced")
    until(lambda: ask(port, "/ready")[0] == 200, "both are ready again")
    (tmp_path / "finish").touch()
    parent.terminate()
    assert parent.wait(20) == 0


def test_a_supervisors_health_port_that_is_taken_is_an_error_before_any_child_starts(
    supervise: Begin, tmp_path: Path
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        parent = supervise(1, "obey", health=f"127.0.0.1:{other.getsockname()[1]}")
        assert parent.wait(20) != 0
    assert not said(tmp_path, "started")


def test_a_childs_command_has_one_process_and_no_health_port() -> None:
    given = ["run", "shop:eo", "--processes=4", "--transport", "sql://", "--health", ":8080"]
    assert child_command(given)[1:] == [
        "-m", "exactly_once", "run", "shop:eo", "--transport", "sql://", "--processes", "1"
    ]  # fmt: skip
