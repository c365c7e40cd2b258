"""The journal of what is in hand: real processes, really killed; no broker."""

import fcntl
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from exactly_once.errors import ConfigurationError
from exactly_once.testing.child import wait_until
from exactly_once.transports.inflight import InFlight, journal_directory, why_it_goes

POISON = "0100007F000033EC000060BDD96B0100"
HOLDER = """
import sys
from pathlib import Path
from exactly_once.transports.inflight import InFlight
journal = InFlight(Path(sys.argv[1]), 8)
places = {name: journal.take(name) for name in sys.argv[2].split(",")}
for name in filter(None, sys.argv[3].split(",")):
    journal.give(places[name])
print("holding", flush=True)
sys.stdin.read()
if sys.argv[4] == "close":
    journal.close()
"""


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "state"


def holder(directory: Path, takes: str, gives: str = "", end: str = "") -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(directory), takes, gives, end],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "holding\n"
    return process


def kill(process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGKILL)
    process.communicate()


def looked(journal: InFlight) -> InFlight:
    journal._looked = 0.0  # the next look is not too soon
    journal.look()
    return journal


def test_what_a_killed_process_had_in_hand_is_counted_and_what_it_had_finished_is_not(directory: Path) -> None:
    kill(holder(directory, f"{POISON},neighbour,finished", gives="finished"))
    journal = InFlight(directory, 4)
    assert [journal.deaths(name) for name in (POISON, "neighbour", "finished", "stranger")] == [1, 1, 0, 0]


def test_each_death_counts_once_however_many_look(directory: Path) -> None:
    peers = [InFlight(directory, 4) for _ in range(3)]
    for expected in range(1, 5):
        kill(holder(directory, POISON))
        assert [looked(peer).deaths(POISON) for peer in (*peers, *peers)] == [expected] * 6


def test_a_living_process_accuses_nobody(directory: Path) -> None:
    process = holder(directory, POISON)
    try:
        assert looked(InFlight(directory, 4)).deaths(POISON) == 0
    finally:
        kill(process)


def test_a_process_that_ends_in_good_order_accuses_nobody(directory: Path) -> None:
    process = holder(directory, POISON, end="close")
    process.communicate("")
    assert process.returncode == 0
    assert InFlight(directory, 4).deaths(POISON) == 0
    assert not list(directory.glob(f"{process.pid}-*"))


def test_an_acknowledged_message_is_forgotten_by_everybody(directory: Path) -> None:
    peer = InFlight(directory, 4)
    kill(holder(directory, f"{POISON},neighbour"))
    journal = InFlight(directory, 4)
    journal.forget("neighbour")
    assert (looked(peer).deaths("neighbour"), looked(peer).deaths(POISON)) == (0, 1)


def test_a_second_process_learns_of_a_death_while_it_runs(directory: Path) -> None:
    journal = InFlight(directory, 4)
    kill(holder(directory, POISON))

    def known() -> bool:
        journal.look()
        return journal.deaths(POISON) == 1

    wait_until(known, what="the death is counted", patience_s=5)


@pytest.mark.parametrize("name", ["x" * 127, "x" * 128, "ü" * 100, "x" * 5000, "\0", ""], ids=len)
def test_names_of_any_length_and_letters_are_known_again(directory: Path, name: str) -> None:
    journal = InFlight(directory, 4)
    journal.take(name)
    fcntl.flock(journal._file, fcntl.LOCK_UN)  # as the kernel does at a death
    assert InFlight(directory, 4).deaths(name) == 1


def test_places_are_used_again(directory: Path) -> None:
    journal = InFlight(directory, 2)
    for _ in range(1000):
        places = [journal.take("a"), journal.take("b")]
        assert sorted(places) == [0, 1]
        for place in places:
            journal.give(place)


def test_a_directory_that_others_can_enter_is_refused(directory: Path) -> None:
    directory.mkdir(mode=0o755)
    with pytest.raises(ConfigurationError, match="chmod 700"):
        InFlight(directory, 1)


def test_a_link_to_a_directory_is_refused(directory: Path, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir(mode=0o700)
    directory.symlink_to(tmp_path / "real")
    with pytest.raises(ConfigurationError, match="must be a directory"):
        InFlight(directory, 1)


# -- where journals are, when nobody says -----------------------------------------------------------------------------

DIES = """
import os
from exactly_once.transports.inflight import InFlight, journal_directory
journal = InFlight(journal_directory("broker", "group"), 4)
print(journal.deaths("poison"), flush=True)
journal.take("poison")
os.kill(os.getpid(), 9)
"""


@pytest.mark.parametrize("given", ["HOME", "XDG_STATE_HOME", "STATE_DIRECTORY"])
def test_what_killed_a_service_is_known_after_a_restart_with_another_temporary_folder(
    tmp_path: Path, given: str
) -> None:
    told = []
    for n in range(3):
        (tmp_path / f"tmp{n}").mkdir()
        environment = {
            "PATH": os.environ["PATH"],
            "PYTHONPATH": os.pathsep.join(sys.path),
            given: str(tmp_path / "stays"),
        }
        environment |= {"TMPDIR": str(tmp_path / f"tmp{n}")}
        ended = subprocess.run(
            [sys.executable, "-c", DIES], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=60
        )
        assert ended.returncode == -signal.SIGKILL, ended.stderr
        told.append(ended.stdout.strip())
        assert not list((tmp_path / f"tmp{n}").iterdir())
    assert told == ["0", "1", "2"]


def test_a_service_that_may_write_nowhere_else_has_its_journal_in_the_temporary_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.delenv("STATE_DIRECTORY", raising=False)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))  # no folder, and none can be made below
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    directory = journal_directory("broker", "group")
    assert directory.is_relative_to(tmp_path)
    assert "temporary folder" in (why_it_goes(directory) or "")


def test_a_folder_that_goes_with_its_container_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    marker = tmp_path / "marker"
    directory = tmp_path / "state" / "group"
    assert why_it_goes(directory, markers=(marker,), system=tmp_path) is None
    marker.touch()
    assert why_it_goes(directory, markers=(marker,), system=tmp_path) == "it goes with this container"
    assert why_it_goes(Path("/dev/shm/group"), markers=(marker,), system=tmp_path) is None, "a volume of its own"
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    assert why_it_goes(directory, markers=(), system=tmp_path) == "it goes with this container"


def test_that_a_process_died_lately_is_known_to_those_who_did_not_find_it(directory: Path) -> None:
    peer = InFlight(directory, 4)
    assert not peer.died_lately
    kill(holder(directory, POISON))
    looked(peer)
    assert InFlight(directory, 4).died_lately
