"""Real processes over a real broker and the real librocketmq, really killed: nothing is lost, and poison ends parked."""

import re
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import count
from pathlib import Path
from time import monotonic

import pytest

from exactly_once.message import Message
from exactly_once.testing.child import wait_until
from exactly_once.transports.contract import Receipt, Surroundings
from exactly_once.transports.registry import transport_from
from tests.acceptance.rocketmq4_member import LEFT_IN_ORDER
from tests.services.rocketmq import ROOT, RocketMQ
from tests.services.rocketmq4_client import need_client

ENDLESS = 2147483647
_names = count()


class Scene:
    """One topic, one group, its ledger, and the processes that were started."""

    def __init__(self, server: RocketMQ, directory: Path) -> None:
        name = f"crash4-{next(_names)}"
        self.server, self.topic, self.group = server, name, f"{name}-group"
        server.create_topic(self.topic)
        server.create_group(self.group, retries=ENDLESS)
        self.ledger = directory / "ledger"
        self.ledger.touch()
        self.url = f"rocketmq4://{server.name_server}?state_dir={directory}"
        self.members: list[subprocess.Popen[bytes]] = []
        self._output = directory / "output"

    def start(self, *arguments: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-X", "faulthandler", "-m", "tests.acceptance.rocketmq4_member"]
        with self._output.open("ab") as output:
            member = subprocess.Popen(
                [*command, self.url, self.group, self.topic, str(self.ledger), *arguments],
                cwd=ROOT,
                stdout=output,
                stderr=output,
            )
        self.members.append(member)
        return member

    def send(self, bodies: Sequence[str], ordering_key: str | None = None) -> None:
        producer = transport_from(self.url, Surroundings()).producer()
        try:
            answers = producer.send([Message(self.topic, b.encode(), ordering_key=ordering_key) for b in bodies])
            assert all(isinstance(answer, Receipt) for answer in answers), answers
        finally:
            producer.close()

    def lines(self) -> list[tuple[str, int, str]]:
        """Return (state, attempt, body) of each line written so far."""
        found = re.findall(r"^\d+ (\w+) (\d+) (.*)$", self.ledger.read_text(), re.MULTILINE)
        return [(state, int(attempt), body) for state, attempt, body in found]

    def done(self) -> Counter[str]:
        return Counter(body for state, _, body in self.lines() if state == "done")

    def done_by_newest(self) -> int:
        """Return how many messages the process started last has finished."""
        return len(re.findall(rf"^{self.members[-1].pid} done ", self.ledger.read_text(), re.MULTILINE))

    def wait(self, condition: Callable[[], bool], what: str, patience_s: float = 40) -> None:
        try:
            wait_until(condition, what=what, patience_s=patience_s)
        except TimeoutError as error:
            raise AssertionError(f"{error}; {self.lines()[-20:]}; {self._output.read_text()[-3000:]}") from None

    def end(self) -> None:
        for member in self.members:
            member.kill()
            member.wait()


@pytest.fixture
def scene(rocketmq: RocketMQ, tmp_path: Path) -> Iterator[Scene]:
    need_client()
    tmp_path.chmod(0o700)
    scene = Scene(rocketmq, tmp_path)
    yield scene
    scene.end()


def well_under_way(scene: Scene) -> set[str]:
    """Send a few seconds' work, start a process, and return what was sent when that process has done some of it."""
    bodies = {f"m{len(scene.members)}-{n}" for n in range(300)}
    scene.send(sorted(bodies))
    scene.start("--work", "0.1")
    scene.wait(lambda: scene.done_by_newest() >= 40, "well under way")
    return bodies


def test_what_was_in_hand_at_a_sigkill_comes_again_and_everything_is_done(scene: Scene) -> None:
    everything: set[str] = set()
    for _ in range(3):
        everything |= well_under_way(scene)
        scene.members[-1].kill()
    scene.start()
    scene.wait(lambda: set(scene.done()) == everything, "all done")


def test_stopping_under_load_loses_nothing_and_exits_in_order(scene: Scene) -> None:
    everything: set[str] = set()
    for _ in range(3):
        everything |= well_under_way(scene)
        scene.members[-1].terminate()
        assert scene.members[-1].wait(30) == LEFT_IN_ORDER
    scene.start()
    scene.wait(lambda: set(scene.done()) == everything, "all done")
    assert {attempt for _, attempt, _ in scene.lines()} == {1}, "a stop in good order accuses nobody"


@pytest.mark.parametrize("order", ["concurrent", "orderly"])
def test_what_is_unsettled_at_a_stop_comes_again_at_once(scene: Scene, order: str) -> None:
    ordered = ["--ordered"] if order == "orderly" else []
    scene.start("--unsettled", *ordered)
    scene.send([f"m{n}" for n in range(40)])
    scene.wait(lambda: len(scene.lines()) >= 3, "some in hand")
    scene.members[-1].terminate()
    assert scene.members[-1].wait(30) == LEFT_IN_ORDER
    begun = monotonic()
    scene.start(*ordered)
    scene.wait(lambda: len(scene.done()) == 40, "all done")
    assert monotonic() - begun < 20, "no lock and no membership was left behind"


def test_a_message_that_kills_its_process_each_time_ends_parked_and_its_neighbours_done(scene: Scene) -> None:
    neighbours = {f"m{n}" for n in range(60)}
    scene.send([*sorted(neighbours)[:30], "poison", *sorted(neighbours)[30:]])
    scene.start("--work", "0.02", "--kill", "poison")
    deaths = 0
    deadline = monotonic() + 180
    while monotonic() < deadline and not (set(scene.done()) >= {*neighbours, "poison"}):
        if scene.members[-1].poll() is not None:
            assert scene.members[-1].returncode == -signal.SIGKILL
            deaths += 1
            scene.start("--work", "0.02", "--kill", "poison")
        wait_until(lambda: True, what="", patience_s=1)
    assert set(scene.done()) >= {*neighbours, "poison"}, scene.lines()[-20:]
    runs = [attempt for state, attempt, body in scene.lines() if body == "poison" and state == "run"]
    assert runs == [1, 2, 3, 4]
    assert [a for state, a, body in scene.lines() if body == "poison" and state == "parked"] == [5]
    assert deaths == 4
    accused = Counter(attempt for state, attempt, body in scene.lines() if state == "run" and body != "poison")
    assert max(accused) <= 2, f"a neighbour was in hand at more than one death: {accused}"
    assert not [body for state, _, body in scene.lines() if state == "parked" and body != "poison"]


def test_two_processes_share_what_they_know_of_a_poison(scene: Scene) -> None:
    scene.start("--kill", "poison")
    scene.start("--kill", "poison")
    scene.send([*(f"m{n}" for n in range(20)), "poison"])
    everything = {*(f"m{n}" for n in range(20)), "poison"}
    deadline = monotonic() + 180
    while monotonic() < deadline and not (set(scene.done()) >= everything):
        for member in list(scene.members):
            if member.poll() is not None:
                scene.members.remove(member)
                scene.start("--kill", "poison")
        wait_until(lambda: True, what="", patience_s=1)
    assert set(scene.done()) >= everything, scene.lines()[-20:]
    runs = [attempt for state, attempt, body in scene.lines() if body == "poison" and state == "run"]
    # a process may be given the message before anybody has looked at the journal of the one that just died
    assert len(runs) <= 5, runs
    assert runs == sorted(runs)
