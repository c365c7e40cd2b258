"""Health over real sockets."""

import json
import socket
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from datetime import timedelta
from http.client import HTTPConnection
from threading import Event

import pytest

from exactly_once.daemon.health import Health, host_and_port
from exactly_once.errors import ConfigurationError
from exactly_once.outcome import Ack, Result, WaitForStore
from exactly_once.transports.contract import Delivery, Features
from exactly_once.worker.worker import Worker
from tests.unit.worker.worker_doubles import Shelf, done
from tests.waiting import until

SECOND = timedelta(seconds=1)


class State:
    """What a worker would say of itself."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.why: str | None = None

    def stuck(self, after: timedelta) -> Sequence[str]:
        return self.names

    def unready(self) -> str | None:
        return self.why


@pytest.fixture
def state() -> State:
    return State()


@pytest.fixture
def health(state: State) -> Iterator[Health]:
    with Health(state, "127.0.0.1:0") as health:
        yield health


def ask(port: int, path: str, method: str = "GET", host: str = "127.0.0.1") -> tuple[int, dict[str, object]]:
    connection = HTTPConnection(host, port, timeout=5)
    try:
        connection.request(method, path)
        response = connection.getresponse()
        body = response.read()
        assert response.getheader("Content-Type") == "application/json"
        return response.status, json.loads(body) if body else {}
    finally:
        connection.close()


def test_live_and_ready_say_200_while_all_is_well(health: Health) -> None:
    assert ask(health.port, "/live") == (200, {"live": True})
    assert ask(health.port, "/ready?from=kubelet") == (200, {"ready": True})
    assert ask(health.port, "/ready", "HEAD") == (200, {})
    assert ask(health.port, "/metrics")[0] == 404


def test_a_thread_that_does_not_turn_is_not_live(state: State, health: Health) -> None:
    state.names = ["receive: consumer 1 (Shelf)"]
    assert ask(health.port, "/live") == (503, {"live": False, "stuck": ["receive: consumer 1 (Shelf)"]})


def test_an_outage_is_not_ready_but_live(state: State, health: Health) -> None:
    state.why = "no answer from: eu"
    assert ask(health.port, "/ready") == (503, {"ready": False, "reason": "no answer from: eu"})
    assert ask(health.port, "/live")[0] == 200


def test_a_worker_tells_its_own_story() -> None:
    up, release = Event(), Event()

    def run(delivery: Delivery, features: Features) -> Future[Result]:
        return done(Ack() if up.is_set() else WaitForStore("eu"))

    shelf = Shelf([b"a"])
    worker = Worker(
        [shelf],
        run,
        capacity=2,
        drain_timeout=SECOND,
        answers=lambda store: up.is_set(),
        poll=timedelta(milliseconds=20),
    )
    with Health(worker, "127.0.0.1:0", stuck_after=2 * SECOND) as health:
        assert ask(health.port, "/ready") == (503, {"ready": False, "reason": "not started"})
        assert ask(health.port, "/live")[0] == 200
        worker.start()
        until(lambda: ask(health.port, "/ready")[1].get("reason") == "no answer from: eu", "the outage shows")
        assert ask(health.port, "/live")[0] == 200
        up.set()
        until(lambda: ask(health.port, "/ready")[0] == 200, "it is ready again")
        shelf.on_receive = lambda: release.wait(20)
        until(lambda: ask(health.port, "/live")[0] == 503, "a receiving thread that hangs shows")
        release.set()
        until(lambda: ask(health.port, "/live")[0] == 200, "it turns again")
        worker.stop()
        assert ask(health.port, "/ready") == (503, {"ready": False, "reason": "stopped"})
        assert ask(health.port, "/live")[0] == 200


def test_a_port_that_is_taken_says_what_to_do() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(ConfigurationError, match=rf"127\.0\.0\.1:{port} is taken .* give another port"):
            Health(State(), f"127.0.0.1:{port}")


def test_an_address_that_is_not_ours_says_what_to_give() -> None:
    with pytest.raises(ConfigurationError, match=r"cannot be listened on .* Give an address of this machine"):
        Health(State(), "192.0.2.1:8080")


@pytest.mark.parametrize(
    "address", ["", "localhost", "host:", "host:http", "host:65536", "http://h:80", "::1:80", "u@h:1"]
)
def test_an_address_that_makes_no_sense_is_refused(address: str) -> None:
    with pytest.raises(ConfigurationError, match="takes HOST:PORT"):
        host_and_port(address)


def test_a_port_alone_is_loopback_and_every_interface_has_to_be_asked_for() -> None:
    assert host_and_port("8080") == ("127.0.0.1", 8080)
    assert host_and_port(":8080") == ("0.0.0.0", 8080)
    assert host_and_port("[::1]:8080") == ("::1", 8080)


def test_a_client_that_says_nothing_holds_up_nobody(health: Health) -> None:
    with socket.create_connection(("127.0.0.1", health.port)):
        assert ask(health.port, "/live")[0] == 200


def test_closing_frees_the_port_and_twice_is_once(state: State) -> None:
    first = Health(state, "127.0.0.1:0")
    port = first.port
    first.close()
    first.close()
    with Health(state, f"127.0.0.1:{port}") as second:
        assert ask(second.port, "/live")[0] == 200
