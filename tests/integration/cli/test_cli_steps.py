"""What a person does about a step nobody knows of, as they type it: look, resolve, requeue; in the database and in Redis."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SHOP = """
import sys
from datetime import timedelta
from pathlib import Path
from exactly_once import ExactlyOnce, Lease, Message, Retry, Steps

eo = ExactlyOnce(group="shop")
calls = Path(__file__).with_name("calls.txt")

def note(what):
    with calls.open("a") as file:
        file.write(what + "\\n")
    return what

guard = Lease(timedelta(minutes=10), store=STORE)

@eo.handler("orders", key="no", name="checkout", retry=Retry(immediate=0, delays=[0.1]), guard=guard)
def checkout(order: dict[str, str], steps: Steps) -> None:
    steps.run("lock stock", lambda key: note("lock"))
    receipt = steps.run("charge", lambda key: 1 / 0, at_most_once=True)
    note(f"mail {receipt}")

if __name__ == "__main__":
    for attempt in (1, 2):
        print(eo.process(Message("orders", b'{"no": "A-1"}', attempt=attempt)).value)
"""


class Desk:
    """A folder with an application, and somebody who types commands in it."""

    def __init__(self, folder: Path, url: str, redis_url: str | None) -> None:
        self.folder = folder
        (folder / "shop.py").write_text(SHOP.replace("STORE", repr("redis" if redis_url else None)))
        self.environment = os.environ | {"EXACTLY_ONCE_DATABASE": url, "EXACTLY_ONCE_GROUP": "shop"}
        if redis_url:
            self.environment["EXACTLY_ONCE_REDIS"] = redis_url

    def types(self, *words: str, code: int = 0) -> str:
        """Type a command, and return what it said, both streams."""
        done = subprocess.run(
            [sys.executable, *words], cwd=self.folder, env=self.environment, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout + done.stderr

    def command(self, *words: str, code: int = 0) -> str:
        return self.types("-m", "exactly_once", *words, code=code)

    @property
    def calls(self) -> list[str]:
        return (self.folder / "calls.txt").read_text().splitlines()


@pytest.fixture(params=["database", "redis"])
def desk(request: pytest.FixtureRequest, postgres_url: str, tmp_path: Path) -> Desk:
    return Desk(tmp_path, postgres_url, request.getfixturevalue("redis_url") if request.param == "redis" else None)


def test_a_person_looks_resolves_and_requeues_and_nothing_is_repeated(desk: Desk) -> None:
    assert desk.types("shop.py").splitlines()[:2] == ["failed", "dead"]
    app = ("--app", "shop:eo")
    (failure,) = desk.command("failures", "list", "--json").splitlines()[:1]
    assert "exactly-once steps resolve A-1 charge --handler checkout --result JSON" in json.loads(failure)["error_text"]
    shown = desk.command("steps", "show", "A-1", *app)
    assert "checkout  A-1  not finished, not running, attempt 2" in shown
    assert '0  lock stock  finished by attempt 1: "lock"' in shown
    assert "1  charge  begun by attempt 1, no result" in shown
    assert "--result is not JSON" in desk.command("steps", "resolve", "A-1", "charge", "--result", "paid", *app, code=2)
    wrong = desk.command("steps", "resolve", "A-1", "charg", "--result", "1", *app, code=2)
    assert "no record of a step 'charg'. Did you mean 'charge'?" in wrong
    assert "failures requeue" in desk.command("steps", "resolve", "A-1", "charge", "--result", '"paid\u202e"', *app)
    told = desk.command("steps", "show", "A-1", "--json", *app).strip()
    assert json.loads(told)["steps"][1]["result"] == "paid\u202e"
    assert told.isprintable(), "it would turn the direction of the terminal's line"
    desk.command("failures", "requeue", "--key", "A-1")
    desk.types("-c", "import shop\nwith shop.eo.worker('memory://desk') as worker: worker.drain()")
    assert desk.calls == ["lock", "mail paid\u202e"]
    assert "consumed" in desk.command("steps", "show", "A-1", *app)
    refused = desk.command("steps", "resolve", "A-1", "charge", "--result", "1", *app, code=1)
    assert "Nothing was recorded: 'A-1' of checkout is consumed" in refused


def test_what_is_not_there_is_said_so(desk: Desk) -> None:
    assert "Nothing is recorded under the key 'A-9'" in desk.command("steps", "show", "A-9", code=1)
    assert "--app" in desk.command("steps", "show", "A-9", code=1)
    said = desk.command("steps", "resolve", "A-9", "charge", "--result", "1", "--app", "shop:eo", code=1)
    assert "Nothing is recorded" in said
