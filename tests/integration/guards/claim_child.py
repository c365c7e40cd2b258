"""One of two processes that get the same messages at the same moment: `python claim_child.py URL COUNT`.

It says "ready", waits for a line, and then runs each message; at the end it says what became of how many.
"""

import sys
from collections import Counter

from sqlalchemy.orm import Session

from exactly_once import ExactlyOnce, Transaction
from tests.integration.shop import GROUP, order, put


def main(url: str, count: int) -> None:
    from datetime import timedelta

    eo = ExactlyOnce(url, group=GROUP)

    @eo.handler("orders", key="no", name="handler", guard=Transaction(claim_wait=timedelta(seconds=20)))
    def reserve(session: Session, body: dict[str, int]) -> None:
        put(session, str(body["no"]))

    print("ready", flush=True)
    sys.stdin.readline()
    outcomes = Counter(eo.process(order(no)).value for no in range(count))
    print(dict(outcomes), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
