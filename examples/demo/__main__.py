"""`python -m examples.demo`: arguments in, exit code out. 0: our ledger is right. 1: it is not. 2: it could not run."""

import argparse
import sys
from pathlib import Path

from exactly_once.errors import ExactlyOnceError
from examples.demo.broker import TRANSPORTS, Missing
from examples.demo.run import Demo


def main() -> int:
    """Run the demonstration."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.demo",
        description="Orders with duplicates, workers killed with SIGKILL; a hand-written consumer beside exactly_once.",
    )
    parser.add_argument("--transport", choices=TRANSPORTS, default="sql", help="what carries the messages (sql)")
    parser.add_argument("--orders", type=int, default=5000, metavar="N", help="how many orders (5000)")
    parser.add_argument("--seconds", type=float, default=24.0, help="over how long they are sent (24)")
    parser.add_argument("--kills", type=int, default=4, metavar="N", help="how often each worker is killed (4)")
    parser.add_argument(
        "--out", type=Path, default=Path("demo-ledger.svg"), metavar="FILE", help="the picture (demo-ledger.svg)"
    )
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="keep the workers' logs here")
    given = parser.parse_args()
    if given.orders < 100:
        parser.error("--orders must be 100 at least: fewer are over before a worker can be killed")
    try:
        return Demo(
            given.transport,
            orders=given.orders,
            send_s=given.seconds,
            kills=given.kills,
            picture=given.out,
            logs=given.keep,
        ).run()
    except (Missing, ExactlyOnceError) as error:
        print(f"The demonstration could not run: {error}", file=sys.stderr)
        return 2 if isinstance(error, Missing) else 1
    except KeyboardInterrupt:
        print("Stopped.", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
