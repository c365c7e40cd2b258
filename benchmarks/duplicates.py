"""What duplicates cost, by their share: none, one in a hundred, every second, all; against hand-written code.

Duplicates are mixed with new messages, in a new random order each time. Each was handled before by the same contender.
"""

from collections.abc import Callable, Iterator
from random import Random
from statistics import median
from typing import Final

from benchmarks import contenders
from benchmarks.contenders import BY_NAME, Contender
from benchmarks.measure import US, Figure, ratios, take_turns
from benchmarks.orders import messages
from benchmarks.shop import require
from benchmarks.stage import Stage
from exactly_once import Message

__all__ = ["measure"]

SHARES: Final = (0, 1, 50, 100)
ONLY_DUPLICATES: Final = 0.60
SKUS: Final = 20_000
BY_HAND: Final = "by hand"
WHAT: Final = {"ours": "single", "groups": f"batch={contenders.GROUP}"}
TIMES: Final = {"groups": 4}


def measure(stage: Stage, *, quick: bool) -> Iterator[Figure]:
    """Measure each share."""
    names = (BY_HAND, *WHAT)
    rounds, each = (2, 50) if quick else (15, 100)
    with stage.database(skus=SKUS) as database:
        mixed = {name: _Mixed(BY_NAME[name](database.url), TIMES.get(name, 1)) for name in names}
        for each_mixed in mixed.values():
            each_mixed.handle_first(each)
        turns = {f"{name}, {share}": mixed[name].with_share(share) for name in names for share in SHARES}
        took = take_turns(turns, rounds=rounds, each=each)
        require(database.engine, sum(each_mixed.new for each_mixed in mixed.values()))
    for name, kind in WHAT.items():
        for share in SHARES:
            ours, by_hand = took[f"{name}, {share}"], took[f"{BY_HAND}, {share}"]
            yield Figure(
                name="duplicates",
                what=f"ours, {kind} / by hand, time; {share} % are duplicates",
                rounds=ratios(ours, by_hand),
                target=ONLY_DUPLICATES if (name, share) == ("ours", 100) else None,
                measured={"ours": f"{median(ours) * US:,.0f} us", "by hand": f"{median(by_hand) * US:,.0f} us"},
            )


class _Mixed:
    """A contender that gets duplicates among its messages.

    Args:
        contender: The contender.
        times: How many messages it has in a turn for each message of the others.
    """

    def __init__(self, contender: Contender, times: int) -> None:
        self._contender, self._times = contender, times
        self._handled: list[Message] = []
        self._dice = Random(7)
        self.new = 0

    def handle_first(self, each: int) -> None:
        """Handle the messages that will come again."""
        self._handled = messages(each * self._times, skus=SKUS)
        self._run(self._handled, len(self._handled))

    def with_share(self, share: int) -> Callable[[int], float]:
        """Return its turn with so many duplicates in a hundred messages. The turn returns the seconds for one message."""

        def turn(each: int) -> float:
            total = each * self._times
            again = self._dice.sample(self._handled, total * share // 100)
            given = messages(total - len(again), skus=SKUS) + again
            self._dice.shuffle(given)
            return self._run(given, total - len(again))

        return turn

    def _run(self, given: list[Message], new: int) -> float:
        self._contender.take(given, new)
        span = self._contender.run()
        self.new += new
        return 1 / span.rate
