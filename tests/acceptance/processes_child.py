"""A child for the supervisor's tests; told by its arguments how to behave, it writes down in a folder that it lived.

    processes_child.py FOLDER MODE

Modes: `obey` ends with 0 at a signal, `back` with 1, `hang` never, `crash` at once with 3, `usage` at once with 2,
`worker` runs a real worker whose one message never ends until `FOLDER/finish` is there, with run_until_signal.
"""

import os
import signal
import sys
import time
from pathlib import Path

folder, mode = Path(sys.argv[1]), sys.argv[2]


def said(what: str) -> None:
    with (folder / what).open("a") as file:
        file.write(f"{os.getpid()} {time.monotonic()}\n")


def work() -> int:
    from concurrent.futures import ThreadPoolExecutor
    from datetime import timedelta

    from exactly_once.daemon.signals import run_until_signal
    from exactly_once.outcome import Ack, Outcome, Result
    from exactly_once.worker.worker import Worker
    from tests.unit.worker.worker_doubles import Shelf

    pool = ThreadPoolExecutor(1)

    def handle() -> Result:
        said("running")
        while not (folder / "finish").exists():
            time.sleep(0.01)
        said("effect")
        return Result(Outcome.PROCESSED, Ack())

    drain = timedelta(seconds=float(sys.argv[3]))
    worker = Worker([Shelf([b"m"])], lambda d, f: pool.submit(handle), capacity=2, drain_timeout=drain)
    code = run_until_signal(worker, start=worker.start)
    said(f"code {code}")
    sys.stdout.flush()
    os._exit(code)  # the pool's thread may still run; a daemon's would not be waited for


if mode == "worker":
    work()

if mode in ("crash", "usage"):
    said("started")
    sys.exit({"crash": 3, "usage": 2}[mode])

ends = {"obey": 0, "back": 1}.get(mode)
times = 0


def told(number: int, frame: object) -> None:
    global times  # noqa: PLW0603  (a script of one page)
    times += 1
    said(f"signal {times}")


signal.signal(signal.SIGTERM, told)
signal.signal(signal.SIGINT, told)
said("started")
while ends is None or not times:
    time.sleep(0.02)
time.sleep(0.2)  # time for a second signal to come, if one were sent
sys.exit(ends)
