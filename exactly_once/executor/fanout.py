"""What several handlers of one delivery say, put into one voice; as values, or as parts that end in threads of their own."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from threading import Lock
from typing import Final

from exactly_once.executor.future import SmallFuture
from exactly_once.outcome import Ack, Outcome, Redeliver, RunFuture, Settlement, Verdict, WaitForKey, WaitForStore
from exactly_once.processing.processor import Result

__all__ = ["Part", "Parts", "combine"]

_NOT_MINE: Final = Result(Outcome.NOT_MINE, Ack())
# of several handlers' outcomes the one that says most: what is not acknowledged first, then what happened
_WEIGHT: Final = {
    outcome: weight
    for weight, outcome in enumerate(
        (
            Outcome.WAITING,
            Outcome.UNKNOWN,
            Outcome.IN_PROGRESS,
            Outcome.FAILED,
            Outcome.DEAD,
            Outcome.PROCESSED,
            Outcome.DUPLICATE,
            Outcome.NOT_MINE,
        )
    )
}


# told the same message again, a handler that ended so runs nothing
_SETTLED: Final = frozenset({Outcome.PROCESSED, Outcome.DUPLICATE, Outcome.NOT_MINE})


def combine(told: Sequence[Result]) -> Result:
    """Return what a delivery's handlers say with one voice.

    A store that does not answer holds the delivery; else the soonest redelivery anyone asks for; else it is kept, if
    anyone keeps it and the others have finished; else it is acknowledged.
    """
    if len(told) == 1:
        return told[0]
    if not told:
        return _NOT_MINE
    raises = next((each.raises for each in told if each.raises is not None), None)
    return replace(_one_voice(told), raises=raises)


def _one_voice(told: Sequence[Result]) -> Result:
    outcome = min((each.outcome for each in told), key=_WEIGHT.__getitem__)
    said: list[Verdict] = [each.verdict for each in told]
    for each in said:
        if isinstance(each, WaitForStore):
            return Result(outcome, each)
    kept = [each for each in said if isinstance(each, WaitForKey)]
    verdict = _soonest([each for each in said if not isinstance(each, (WaitForStore, WaitForKey))])
    if not kept or isinstance(verdict, Redeliver):
        # of a Keep and a Redeliver the latter: what is kept runs again for all its handlers, twice a second, and the one
        # that asked for a delay would spend its attempts on looks at another's lease
        return Result(outcome, verdict)
    then = _soonest([each.then for each in kept])
    if any(each.outcome not in _SETTLED and not isinstance(each.verdict, WaitForKey) for each in told):
        return Result(outcome, then)  # the same for one whose failure is stored for the pump, or for a person
    return Result(outcome, WaitForKey(min(each.again for each in kept), min(each.longest for each in kept), then))


def _soonest(verdicts: Sequence[Settlement]) -> Settlement:
    """Return the redelivery that is due first; `Ack` only where none is asked for, or someone's message would be lost."""
    again = [each for each in verdicts if isinstance(each, Redeliver)]
    return min(again, key=lambda each: each.delay) if again else Ack()


class Part(SmallFuture):
    """What one of a delivery's handlers makes of it, where they run apart: a `Result`, and no verdict yet."""

    __slots__ = ()


class Parts:
    """Puts together what a delivery's handlers say, when the last has ended."""

    def __init__(self, number: int, end: Callable[[Result], None], fail: Callable[[BaseException], None]) -> None:
        self._missing, self._end, self._fail = number, end, fail
        self._told: list[Result] = []
        self._errors: list[BaseException] = []
        self._lock = Lock()

    def ended(self, part: RunFuture) -> None:
        """Note one handler's end."""
        told: Result | None = None
        error: BaseException | None = None
        try:
            told = part.result()
        except BaseException as broke:  # noqa: BLE001, RUF100  (cancelled with its loop, too)
            error = broke
        with self._lock:
            if told is not None:
                self._told.append(told)
            if error is not None:
                self._errors.append(error)
            self._missing -= 1
            last = not self._missing
        if not last:
            return
        if self._errors:  # not acknowledged; who has finished will be a duplicate
            self._fail(self._errors[0])
        else:
            self._end(combine(self._told))
