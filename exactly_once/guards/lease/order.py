"""Which place each step of a run takes, held against what earlier attempts recorded. Pure: the ledger asks and acts.

A place is taken by being asked for, also by a step that then raises: asked for again it has the same place, so a handler that
goes on without it asks for the next one where it did before. Called by `guards.step_ledger`.
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
        """Take over what stands in the store now."""
        self._recorded = {step.ordinal: step for step in recorded}
        self._names = {step.name for step in self._recorded.values()}

    def place(self, name: str) -> int:
        """Return the place of a step that is asked for."""
        return self._places.setdefault(name, len(self._places))

    def recorded(self, place: int) -> StepRow | None:
        """Return what is recorded at a place."""
        return self._recorded.get(place)

    def conflict(self, name: str, place: int) -> str | None:
        """Say what is wrong with asking for a step at this place, None if nothing is."""
        known = self._recorded.get(place)
        if known is not None and known.name != name:
            return f"was asked for where an earlier attempt recorded '{known.name}'"
        if known is None and name in self._names:
            return "was recorded by an earlier attempt at another place"
        return None

    def finish(self, name: str) -> None:
        """It has a result."""
        self._finished.add(name)

    def is_finished(self, name: str) -> bool:
        """Say whether this run has its result."""
        return name in self._finished

    def left_out(self) -> str | None:
        """Return a step that is recorded and was not asked for; None where there is none."""
        return next((step.name for step in self._recorded.values() if step.name not in self._places), None)
