"""The hand-off between a client's callback threads and the worker: plain threads, no broker."""

import fcntl
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from time import monotonic

import pytest

from exactly_once.message import Message
from exactly_once.outcome import Ack, Redeliver
from exactly_once.testing.child import wait_until
from exactly_once.transports.handoff import Handoff
from exactly_once.transports.inflight import InFlight

SECOND = timedelta(seconds=1)
SOON = timedelta(milliseconds=50)


class Client:
    """Callback threads, each with a message."""

    def __init__(self, handoff: Handoff) -> None:
        self.handoff = handoff
        self.pool = ThreadPoolExecutor(16)

    def push(self, *names: str) -> list[Future[bool]]:
        before = self.handoff.holding
        answers = [self.pool.submit(self.handoff.offer, Message("t", b"", message_id=name)) for name in names]
        wait_until(lambda: self.handoff.holding == before + len(names), what="offered", patience_s=5)
        return answers


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "state"


@pytest.fixture
def handoff(directory: Path) -> Handoff:
    return Handoff(InFlight(directory, 16))


@pytest.fixture
def client(handoff: Handoff) -> Iterator[Client]:
    client = Client(handoff)
    yield client
    handoff.stop()
    handoff.release()
    client.pool.shutdown()


def die_holding(directory: Path, *names: str) -> None:
    """Leave the journal of a process that is gone: nobody holds its lock."""
    journal = InFlight(directory, 16)
    for name in names:
        journal.take(name)
    fcntl.flock(journal._file, fcntl.LOCK_UN)


def learn(handoff: Handoff, name: str) -> None:
    """Wait until the hand-off knows of a death; it does not look all the time."""

    def known() -> bool:
        handoff._in_flight.look()
        return handoff._in_flight.deaths(name) > 0

    wait_until(known, what=f"{name} is suspected", patience_s=5)


def test_a_callback_returns_true_only_once_its_message_is_acknowledged(handoff: Handoff, client: Client) -> None:
    [answer] = client.push("a")
    [delivery] = handoff.receive(5, SECOND)
    assert not answer.done()
    handoff.settle([(delivery, Ack())])
    assert answer.result(5) is True


def test_receive_takes_no_more_than_its_limit_and_does_not_wait_for_more(handoff: Handoff, client: Client) -> None:
    client.push(*"abcde")
    begun = monotonic()
    assert [len(handoff.receive(2, 10 * SECOND)) for _ in range(3)] == [2, 2, 1]
    assert monotonic() - begun < 5
    assert handoff.receive(0, 10 * SECOND) == []


def test_a_redelivered_message_stays_with_its_thread_and_comes_again_when_due(handoff: Handoff, client: Client) -> None:
    [answer] = client.push("a")
    [first] = handoff.receive(5, SECOND)
    settled = monotonic()
    handoff.settle([(first, Redeliver(timedelta(seconds=0.3)))])
    assert handoff.receive(5, SOON) == []
    [second] = handoff.receive(5, 5 * SECOND)
    assert monotonic() - settled >= 0.3
    assert second.message == first.message
    assert not answer.done()
    handoff.settle([(second, Ack())])
    assert answer.result(5) is True


def test_a_receive_that_waits_is_woken_by_a_shorter_delay_and_by_stop(handoff: Handoff, client: Client) -> None:
    client.push("a")
    [delivery] = handoff.receive(5, SECOND)
    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(handoff.receive, 5, 60 * SECOND)
        handoff.settle([(delivery, Redeliver(SOON))])
        assert len(waiting.result(5)) == 1
        waiting = pool.submit(handoff.receive, 5, 60 * SECOND)
        handoff.stop()
        assert waiting.result(5) == []


def test_nothing_is_answered_between_stop_and_release_and_then_everything_is_given_back(
    handoff: Handoff, client: Client
) -> None:
    answers = client.push("handed out", "not handed out")
    [delivery] = handoff.receive(1, SECOND)
    handoff.stop()
    handoff.settle([(delivery, Redeliver())])
    answers += client.push("late")
    assert handoff.receive(5, SECOND) == []
    assert not any(answer.done() for answer in answers)
    handoff.release()
    assert [answer.result(5) for answer in answers] == [False] * 3
    assert handoff.offer(Message("t", b"")) is False


def test_settling_twice_and_after_release_does_nothing(handoff: Handoff, client: Client) -> None:
    [one, two] = client.push("1", "2")
    first, second = handoff.receive(2, SECOND)
    handoff.settle([(first, Ack()), (first, Ack())])
    handoff.stop()
    handoff.release()
    handoff.settle([(second, Ack())])
    assert (one.result(5), two.result(5)) == (True, False)


def test_a_suspect_is_handed_out_alone_with_its_deaths_counted(
    handoff: Handoff, client: Client, directory: Path
) -> None:
    die_holding(directory, "suspect")
    learn(handoff, "suspect")
    client.push("a", "b")
    busy = handoff.receive(5, SECOND)
    assert len(busy) == 2
    client.push("suspect", "c")
    assert handoff.receive(5, SOON) == [], "others are in hand"
    handoff.settle([(delivery, Ack()) for delivery in busy])
    [suspect] = handoff.receive(5, SECOND)
    assert (suspect.message.message_id, suspect.message.attempt) == ("suspect", 2)
    assert handoff.receive(5, SOON) == [], "the suspect is in hand"
    handoff.settle([(suspect, Ack())])
    [other] = handoff.receive(5, SECOND)
    assert (other.message.message_id, other.message.attempt) == ("c", 1)
    handoff.settle([(other, Ack())])
    assert InFlight(directory, 1).deaths("suspect") == 0, "acknowledged, so forgotten"


def test_of_two_suspects_only_the_one_that_kills_is_accused_again(directory: Path) -> None:
    die_holding(directory, "poison", "innocent")
    handoff = Handoff(InFlight(directory, 16))
    client = Client(handoff)
    client.push("poison", "innocent")
    [first] = handoff.receive(5, SECOND)
    die_holding(directory, first.message.message_id or "")  # what this process' own journal would say
    assert InFlight(directory, 1).deaths("poison") == 2
    assert InFlight(directory, 1).deaths("innocent") == 1
    handoff.stop()
    handoff.release()
    client.pool.shutdown()


def test_a_suspect_waits_for_others_only_so_long(
    handoff: Handoff, client: Client, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("exactly_once.transports.handoff.ALONE_WITHIN_S", 0.2)
    die_holding(directory, "suspect")
    learn(handoff, "suspect")
    client.push("slow")
    handoff.receive(5, SECOND)
    client.push("suspect")
    [suspect] = handoff.receive(5, 5 * SECOND)
    assert suspect.message.message_id == "suspect"


def test_a_message_nobody_can_read_is_kept_until_release(handoff: Handoff, client: Client) -> None:
    answer = client.pool.submit(handoff.keep)
    wait_until(lambda: handoff.holding == 1, what="kept", patience_s=5)
    assert handoff.receive(1, SOON) == []
    handoff.release()
    assert answer.result(5) is False
