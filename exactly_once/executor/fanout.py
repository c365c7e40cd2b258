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
# the outcome to report when handlers differ: first what is not acknowledged, then what happened
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


# outcomes after which the handler runs nothing when the same message comes again
_SETTLED: Final = frozenset({Outcome.PROCESSED, Outcome.DUPLICATE, Outcome.NOT_MINE})


def combine(results: Sequence[Result]) -> Result:
    """Combine the results of a delivery's handlers into one.

    The first rule that applies decides. A store does not answer: hold the delivery. A handler asks for redelivery: redeliver
    after the shortest delay. A handler waits for its key and the others have finished: wait for the key. Else acknowledge.
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
        # Redeliver wins over WaitForKey: a waiting message runs again for all its handlers, twice a second, and the handler
        # that asked for a delay would spend its attempts while another waits for a lease
        return Result(outcome, verdict)
    then = _soonest([each.then for each in kept])
    if any(each.outcome not in _SETTLED and not isinstance(each.verdict, WaitForKey) for each in results):
        return Result(outcome, then)  # the same if a handler's failure is stored for the pump, or for a person
    return Result(outcome, WaitForKey(min(each.again for each in kept), min(each.longest for each in kept), then))


def _soonest(verdicts: Sequence[Settlement]) -> Settlement:
    """Return the redelivery with the shortest delay. `Ack` only if none is asked for, or a handler would lose its message."""
    again = [each for each in verdicts if isinstance(each, Redeliver)]
    return min(again, key=lambda each: each.delay) if again else Ack()


class Parts:
    """Combines the results of handlers that run separately, when the last has ended.

    Args:
        number: How many handlers there are.
        end: Called with the combined result.
        fail: Called with an exception that a run raised. The delivery is then not acknowledged; when it comes again, it is a
            duplicate for the handlers that have finished.
    """

    def __init__(self, number: int, end: Callable[[Result], None], fail: Callable[[BaseException], None]) -> None:
        self._missing, self._end, self._fail = number, end, fail
        self._results: list[Result] = []
        self._errors: list[BaseException] = []
        self._lock = Lock()

    def ended(self, part: RunFuture) -> None:
        """Record the end of one handler's run."""
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
