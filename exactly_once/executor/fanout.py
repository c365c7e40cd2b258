"""One delivery for several handlers: what they say becomes one result. Runs nothing."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from threading import Lock
from typing import Final

from exactly_once.outcome import (
    Ack,
    Outcome,
    Redeliver,
    Result,
    RunFuture,
    Settlement,
    Verdict,
    WaitForKey,
    WaitForStore,
)

__all__ = ["Parts", "combine"]

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


def combine(results: Sequence[Result]) -> Result:
    """Combine what a delivery's handlers say into one result.

    A store that does not answer holds the delivery; else the soonest redelivery anyone asks for; else it waits for its key, if
    anyone's does and the others have finished; else it is acknowledged.
    """
    if len(results) == 1:
        return results[0]
    if not results:
        return _NOT_MINE
    raises = next((each.raises for each in results if each.raises is not None), None)
    return replace(_combined(results), raises=raises, handlers=[one for each in results for one in each.handlers])


def _combined(results: Sequence[Result]) -> Result:
    outcome = min((each.outcome for each in results), key=_WEIGHT.__getitem__)
    verdicts: list[Verdict] = [each.verdict for each in results]
    for each in verdicts:
        if isinstance(each, WaitForStore):
            return Result(outcome, each)
    kept = [each for each in verdicts if isinstance(each, WaitForKey)]
    verdict = _soonest([each for each in verdicts if not isinstance(each, (WaitForStore, WaitForKey))])
    if not kept or isinstance(verdict, Redeliver):
        # of a WaitForKey and a Redeliver the latter: what waits runs again for all its handlers, twice a second, and the one
        # that asked for a delay would spend its attempts on looks at another's lease
        return Result(outcome, verdict)
    then = _soonest([each.then for each in kept])
    if any(each.outcome not in _SETTLED and not isinstance(each.verdict, WaitForKey) for each in results):
        return Result(outcome, then)  # the same for one whose failure is stored for the pump, or for a person
    return Result(outcome, WaitForKey(min(each.again for each in kept), min(each.longest for each in kept), then))


def _soonest(verdicts: Sequence[Settlement]) -> Settlement:
    """Return the redelivery that is due first; `Ack` only where none is asked for, or someone's message would be lost."""
    again = [each for each in verdicts if isinstance(each, Redeliver)]
    return min(again, key=lambda each: each.delay) if again else Ack()


class Parts:
    """Combines what a delivery's handlers say where they run apart, when the last has ended.

    Args:
        number: How many there are.
        end: Given the result of all.
        fail: Given what one of them raised: the delivery is not acknowledged, and who has finished will be a duplicate.
    """

    def __init__(self, number: int, end: Callable[[Result], None], fail: Callable[[BaseException], None]) -> None:
        self._missing, self._end, self._fail = number, end, fail
        self._results: list[Result] = []
        self._errors: list[BaseException] = []
        self._lock = Lock()

    def ended(self, part: RunFuture) -> None:
        """Note one handler's end."""
        result: Result | None = None
        error: BaseException | None = None
        try:
            result = part.result()
        except BaseException as broke:  # noqa: BLE001, RUF100  (cancelled with its loop, too)
            error = broke
        with self._lock:
            if result is not None:
                self._results.append(result)
            if error is not None:
                self._errors.append(error)
            self._missing -= 1
            last = not self._missing
        if not last:
            return
        if self._errors:
            self._fail(self._errors[0])
        else:
            self._end(combine(self._results))
