"""The suites for other people's transports and stores: they need pytest alone, fail where they must, and say by what values."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]

_SUITE = """
from dataclasses import replace
from datetime import timedelta
import pytest
from exactly_once.outcome import Ack
from exactly_once.testing.conformance import Conformance, Harness, LeaseConformance
from exactly_once.transports import memory

class Consumer(memory._MemoryConsumer):
    def settle(self, verdicts):
        {settle}

    def receive(self, limit, wait):
        found = super().receive(limit, wait)
        {receive}
        return found

memory._MemoryConsumer = Consumer

class MyHarness(Harness):
    lag, short_invisible = timedelta(seconds=0.3), timedelta(seconds=0.6)
    def transport(self, *, invisible=None):
        return memory.MemoryTransport("mine", invisible=invisible or memory._INVISIBLE)
    def topic(self, *, ordered=False, delayed=False):
        return f"t-{{id(object())}}"
    group = topic

class TestMine(Conformance):
    @pytest.fixture
    def harness(self):
        return MyHarness()

class TestLacking(Conformance): ...
class TestLackingToo(LeaseConformance): ...
"""
_AS_IT_IS = {"settle": "super().settle(verdicts)", "receive": "pass"}


def _run(folder: Path, chosen: str, **changed: str) -> str:
    """Run tests of the suite over a transport with a fault; returns what pytest said."""
    (folder / "test_mine.py").write_text(_SUITE.format(**_AS_IT_IS | changed))
    ended = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(folder), "-k", chosen, "-v"],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ended.returncode in (0, 1), ended.stdout + ended.stderr
    return ended.stdout


def test_a_transport_that_forgets_to_acknowledge_is_found(tmp_path: Path) -> None:
    chosen = "TestMine and acknowledged_message_does_not_come_again"
    # what is acknowledged is only put off
    said = _run(tmp_path, chosen, settle="self.extend([delivery for delivery, _ in verdicts])")
    assert "AssertionError: handed out again" in said


def test_a_failed_assertion_of_the_suite_says_its_values(tmp_path: Path) -> None:
    changed = "found = [replace(each, message=replace(each.message, body=b'changed')) for each in found]"
    said = _run(tmp_path, "TestMine and (without_key_tag_and_properties or no_bytes)", receive=changed)
    assert "1 passed" in said
    assert "assert [b'changed'] == [b'']" in said


def test_a_suite_without_its_fixture_says_what_is_missing(tmp_path: Path) -> None:
    said = _run(tmp_path, "TestLacking and (closing_a_producer_twice or a_look_at_nothing)")
    assert "TestLacking lacks what makes its transport: give it a fixture `harness`" in said
    assert "TestLackingToo lacks its store: give it a fixture `store`" in said


def test_without_pytest_the_rest_of_testing_is_there_and_the_suites_say_what_to_type() -> None:
    code = (
        "import sys; sys.modules['pytest'] = None\n"
        "from exactly_once.testing import DatabaseServer, bound\n"
        "try:\n    import exactly_once.testing.conformance\n"
        "except ImportError as error:\n    print(error)\n"
    )
    told = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert told.stdout.endswith("is not installed. Type: pip install pytest\n")


@pytest.mark.parametrize("name", ["Conformance", "ServerConformance", "TopicConformance", "LeaseConformance"])
def test_each_suite_shows_how_it_is_used(name: str) -> None:
    from exactly_once.testing import conformance

    assert "Example:" in (getattr(conformance, name).__doc__ or "")
