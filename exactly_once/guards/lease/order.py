"""Compares the order of a run's steps with the order that earlier attempts recorded. Pure: the ledger asks and acts.

A step takes its place when the handler asks for it, even if it then raises. Asked for again, it has the same place. So a handler
that goes on without it asks for the following steps at the same places as before. Called by `ledger`.
"""

from collections.abc import Iterable

from exactly_once.claim import StepRow

__all__ = ["StepOrder"]


class StepOrder:
    """The steps of one run, in order.

    Args:
        recorded: What earlier attempts recorded.
    """

    def __init__(self, recorded: Iterable[StepRow]) -> None:
        self._places: dict[str, int] = {}
        self._finished: set[str] = set()
        self.learn(recorded)

    def learn(self, recorded: Iterable[StepRow]) -> None:
        """Replace the recorded steps by what the store has now."""
        self._recorded = {step.ordinal: step for step in recorded}
        self._names = {step.name for step in self._recorded.values()}

    def place(self, name: str) -> int:
        """Return the place of a step that the handler asks for."""
        return self._places.setdefault(name, len(self._places))

    def recorded(self, place: int) -> StepRow | None:
        """Return what is recorded at a place."""
        return self._recorded.get(place)

    def conflict(self, name: str, place: int) -> str | None:
        """Return why a step cannot stand at this place, or None."""
        known = self._recorded.get(place)
        if known is not None and known.name != name:
            return f"was asked for where an earlier attempt recorded '{known.name}'"
        if known is None and name in self._names:
            return "was recorded by an earlier attempt at another place"
        return None

    def finish(self, name: str) -> None:
        """Record that this run has the step's result."""
        self._finished.add(name)

    def is_finished(self, name: str) -> bool:
        """Whether this run has the step's result."""
        return name in self._finished

    def left_out(self) -> str | None:
        """Return a recorded step that this run did not ask for, or None."""
        return next((step.name for step in self._recorded.values() if step.name not in self._places), None)
