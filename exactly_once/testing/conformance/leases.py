"""What every store of leases must do, said once; a module that subclasses `LeaseConformance` gives the store.

Nothing here knows a store: it asks through `LeaseStore`, and waits with deadlines for leases to run out. Called by pytest, for
the stores of this package and for those of others.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from time import monotonic, sleep
from typing import Final
from uuid import uuid4

import pytest

from exactly_once.claim import ClaimRow, LeaseAnswer, StepRow
from exactly_once.guards.lease.contract import HeldLease, LeaseState, LeaseStore, Recorded, judge

__all__ = ["LEASE", "SHORT", "LeaseConformance", "message", "until"]

LEASE: Final = timedelta(seconds=30)
SHORT: Final = timedelta(seconds=1)
"""Waited for until it has run out: as long as a slow machine needs for a few statements, and no longer."""


def message(key: str = "A-1", fingerprint: bytes = b"\x01aaaPAYLOAD") -> ClaimRow:
    """Return the claim of one message.

    Args:
        key: Its business key.
        fingerprint: Of its body; its first bytes say how it was made.
    """
    return ClaimRow("shop", "checkout", key, fingerprint, "id-1", owner="test")


def until(what: Callable[[], bool], patience_s: float = 10) -> None:
    """Wait until something is so.

    Raises:
        AssertionError: It was not so in time.
    """
    deadline = monotonic() + patience_s
    while not what():
        assert monotonic() < deadline, f"not within {patience_s} s"
        sleep(0.02)


class LeaseConformance:
    """What every store of leases does. Subclass it under a name that begins with Test, and give a fixture `store`.

    Example:
        class TestMyLeases(LeaseConformance):
            @pytest.fixture
            def store(self, my_server: MyServer) -> LeaseStore:
                return MyLeases(my_server)      # empty: each test claims the same keys
    """

    @pytest.fixture
    def store(self) -> LeaseStore:
        """Give an empty store."""
        raise NotImplementedError(
            f"{type(self).__name__} lacks its store: give it a fixture `store` that returns an empty LeaseStore."
        )

    def claim(
        self, store: LeaseStore, row: ClaimRow | None = None, token: str | None = None, lease: timedelta = LEASE
    ) -> tuple[LeaseAnswer, HeldLease]:
        """Claim, and return the answer with the lease that is held if it was won."""
        row = row or message()
        token = token or uuid4().hex
        seen = store.claim(row, token, lease, also=row.fingerprint, steps=True)
        return seen, HeldLease(row, token, seen.attempt, lease, seen.steps)

    def won(self, store: LeaseStore, row: ClaimRow | None = None, lease: timedelta = LEASE) -> HeldLease:
        """Claim what is free."""
        seen, held = self.claim(store, row, lease=lease)
        assert seen.won
        return held

    def test_the_first_claim_wins_and_is_attempt_1(self, store: LeaseStore) -> None:
        seen, _ = self.claim(store)
        assert (seen.won, seen.consumed, seen.attempt, seen.steps) == (True, False, 1, ())

    def test_a_second_claim_is_told_how_long_the_first_one_lasts(self, store: LeaseStore) -> None:
        self.won(store)
        seen, _ = self.claim(store)
        assert not seen.won
        assert not seen.consumed
        assert judge(seen, message().fingerprint) is LeaseState.RUNNING
        assert seen.remaining is not None
        assert timedelta(seconds=25) < seen.remaining <= LEASE

    def test_a_completed_key_is_consumed_for_ever(self, store: LeaseStore) -> None:
        held = self.won(store)
        assert store.complete(held)
        seen, _ = self.claim(store)
        assert judge(seen, message().fingerprint) is LeaseState.CONSUMED
        assert seen.attempt == 1

    def test_a_released_key_is_won_at_once_as_the_next_attempt(self, store: LeaseStore) -> None:
        held = self.won(store)
        assert store.release(held)
        seen, _ = self.claim(store)
        assert (seen.won, seen.attempt) == (True, 2)

    def test_a_lease_that_ran_out_is_taken_over_as_the_next_attempt(self, store: LeaseStore) -> None:
        self.won(store, lease=SHORT)
        until(lambda: self.claim(store)[0].won)
        seen, _ = self.claim(store)
        assert seen.attempt == 2

    def test_who_was_taken_over_changes_nothing(self, store: LeaseStore) -> None:
        first = self.won(store, lease=SHORT)
        until(lambda: self.claim(store)[0].won)
        assert not store.complete(first)
        assert not store.release(first)
        assert list(store.renew([first])) == [first]
        assert store.record(first, StepRow("ship", 0, True, b"1")) is Recorded.LOST
        seen = store.look(message())
        assert seen is not None
        assert (seen.consumed, seen.attempt, seen.steps) == (False, 2, ())
        assert seen.remaining is not None
        assert seen.remaining > timedelta(0)

    def test_an_expired_lease_that_nobody_took_is_still_its_owners(self, store: LeaseStore) -> None:
        held = self.won(store, lease=SHORT)
        until(lambda: self._remaining(store) <= timedelta(0))
        assert list(store.renew([held])) == []
        assert self._remaining(store) > timedelta(0)
        assert store.complete(held)

    def _remaining(self, store: LeaseStore) -> timedelta:
        seen = store.look(message())
        assert seen is not None
        assert seen.remaining is not None
        return seen.remaining

    def test_another_payload_is_a_conflict_while_the_first_runs_and_after(self, store: LeaseStore) -> None:
        other = message(fingerprint=b"\x01aaaANOTHER")
        held = self.won(store)
        assert judge(self.claim(store, other)[0], other.fingerprint) is LeaseState.CONFLICT
        store.release(held)
        assert judge(self.claim(store, other)[0], other.fingerprint) is LeaseState.CONFLICT
        seen, held = self.claim(store)
        assert seen.won
        assert store.complete(held)
        assert judge(self.claim(store, other)[0], other.fingerprint) is LeaseState.CONFLICT

    def test_a_fingerprint_of_another_kind_is_not_compared(self, store: LeaseStore) -> None:
        store.release(self.won(store))
        other = message(fingerprint=b"\x01bbbOTHERWISE")
        seen, _ = self.claim(store, other)
        assert judge(seen, other.fingerprint) is LeaseState.FREE
        token = uuid4().hex
        again = store.claim(other, token, LEASE, also=seen.fingerprint, steps=True)
        assert (again.won, again.fingerprint) == (True, other.fingerprint)

    def test_the_same_claim_sent_twice_is_one(self, store: LeaseStore) -> None:
        _, held = self.claim(store, token="t" * 32)
        seen, _ = self.claim(store, token="t" * 32)
        assert (seen.won, seen.attempt) == (True, 1)
        assert store.complete(held)
        assert store.complete(held), "its answer may have been lost"

    def test_letting_go_twice_is_once_and_does_not_let_go_of_another_run(self, store: LeaseStore) -> None:
        first = self.won(store)
        assert store.release(first)
        second = self.won(store)
        store.release(first)
        seen, _ = self.claim(store)
        assert not seen.won
        assert store.complete(second)

    def test_renewing_keeps_many_alive_at_once(self, store: LeaseStore) -> None:
        many: list[HeldLease] = []
        for n in range(60):
            many.append(self.won(store, message(f"A-{n}"), SHORT))
            if n % 10 == 9:  # on a slow machine sixty claims take longer than the lease
                assert list(store.renew(many)) == []
        for _ in range(8):
            sleep(0.3)  # the lease is what is waited for
            assert list(store.renew(many)) == []
        assert not any(self.claim(store, message(f"A-{n}"))[0].won for n in range(60))

    def test_renewing_tells_the_lost_from_the_living(self, store: LeaseStore) -> None:
        kept, done, freed = (self.won(store, message(f"A-{n}")) for n in range(3))
        store.complete(done)
        store.release(freed)
        assert set(store.renew([kept, done, freed])) == {done, freed}

    def test_steps_come_back_in_order_with_the_next_claim(self, store: LeaseStore) -> None:
        held = self.won(store)
        results = [b'{"hold": 1}', "\u4f60\u597d".encode(), b"\x00\x01\n\xff"]
        for n, result in enumerate(results):
            assert store.record(held, StepRow(f"step {9 - n}", n, True, result)) is Recorded.STORED
        store.release(held)
        seen, _ = self.claim(store)
        assert [(step.name, step.ordinal, step.finished, step.result, step.attempt) for step in seen.steps] == [
            ("step 9", 0, True, results[0], 1),
            ("step 8", 1, True, results[1], 1),
            ("step 7", 2, True, results[2], 1),
        ]

    def test_a_step_that_was_begun_and_not_finished_says_so(self, store: LeaseStore) -> None:
        held = self.won(store)
        assert store.record(held, StepRow("charge", 0, False, None)) is Recorded.STORED
        store.release(held)
        (step,) = self.claim(store)[0].steps
        assert (step.finished, step.result) == (False, None)

    def test_a_step_that_was_begun_is_finished_by_the_same_attempt(self, store: LeaseStore) -> None:
        held = self.won(store)
        store.record(held, StepRow("charge", 0, False, None))
        assert store.record(held, StepRow("charge", 0, True, b"7"), begun=True) is Recorded.STORED
        assert store.record(held, StepRow("charge", 0, True, b"7"), begun=True) is Recorded.STORED, "sent twice"
        store.release(held)
        (step,) = self.claim(store)[0].steps
        assert (step.finished, step.result) == (True, b"7")

    def test_a_step_recorded_twice_by_one_attempt_stands_once(self, store: LeaseStore) -> None:
        held = self.won(store)
        assert store.record(held, StepRow("ship", 0, True, b"1")) is Recorded.STORED
        assert store.record(held, StepRow("ship", 0, True, b"1")) is Recorded.STORED
        store.release(held)
        again = self.won(store)
        assert store.record(again, StepRow("ship", 0, True, b"2")) is Recorded.KNOWN
        seen = store.look(message())
        assert seen is not None
        assert [step.result for step in seen.steps] == [b"1"]

    def test_a_taken_over_attempt_cannot_finish_the_step_it_began(self, store: LeaseStore) -> None:
        held = self.won(store, lease=SHORT)
        store.record(held, StepRow("charge", 0, False, None))
        until(lambda: self.claim(store)[0].won)
        assert store.record(held, StepRow("charge", 0, True, b"7"), begun=True) is Recorded.LOST
        seen = store.look(message())
        assert seen is not None
        assert [step.finished for step in seen.steps] == [False]

    def test_a_person_resolves_what_is_not_running(self, store: LeaseStore) -> None:
        held = self.won(store)
        store.record(held, StepRow("charge", 0, False, None))
        assert not store.resolve(message(), "charge", b'"paid"'), "it runs"
        store.release(held)
        assert store.resolve(message(), "charge", b'"paid"')
        assert store.resolve(message(), "ship", b"null"), "one that has no record goes to the end"
        seen, held = self.claim(store)
        assert seen.won
        assert [(step.name, step.ordinal, step.finished, step.result) for step in seen.steps] == [
            ("charge", 0, True, b'"paid"'),
            ("ship", 1, True, b"null"),
        ]
        assert store.complete(held)
        assert not store.resolve(message(), "charge", b"1"), "it is consumed"
        assert not store.resolve(message("unknown"), "charge", b"1")

    def test_identities_that_look_alike_are_not_one(self, store: LeaseStore) -> None:
        rows = [
            message()._replace(group=group, handler=handler, key=key)
            for group, handler, key in (
                ("a", "b", "c"), ("a", "b:c", ""), ("a:b", "c", "d"), ("a", "b", "C"), ("a", "b", "c "),
                ("a", 'b","c', "d"), ("a", "b", 'c","d'), ("\u00e4", "b", "c"), ("a", "b", "\U0001f4e6"),
            )
        ]  # fmt: skip
        assert all(self.claim(store, row)[0].won for row in rows if row.key)
        assert not any(self.claim(store, row)[0].won for row in rows if row.key)

    def test_of_many_claims_at_once_one_wins(self, store: LeaseStore) -> None:
        with ThreadPoolExecutor(8) as threads:
            for n in range(10):
                row = message(f"B-{n}")
                for attempt in (1, 2):  # new, then one that was let go of
                    claims = list(threads.map(self.claim, [store] * 8, [row] * 8))
                    ((seen, held),) = [(seen, held) for seen, held in claims if seen.won]
                    assert seen.attempt == attempt
                    assert store.release(held)

    def test_a_look_at_nothing_is_none(self, store: LeaseStore) -> None:
        assert store.look(message("nothing")) is None
