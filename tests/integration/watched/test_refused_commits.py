"""PostgreSQL refuses COMMIT with any number, an outage's among them, or cuts the connection there: no message waits for ever.

A deferred trigger decides at COMMIT, and what it raises has the number it likes. Believed, "the disk is full" of one message
would stop a worker whose database works. So the store is looked at; where it works, the message has failed, and that is counted.
Where nobody knows what became of COMMIT, that is bounded too.
"""

import time
from collections import Counter
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.orm import Session

from exactly_once import Lease, Outcome, Retry
from tests.integration.grounds import ground_on
from tests.integration.outside import run
from tests.integration.shop import COLOURS, Shop, order, put
from tests.integration.ways import ALONE, IN_A_BATCH, IN_A_STEP, UNDER_A_LEASE, Way

pytestmark = pytest.mark.nightly(meet=2)

LEASE = timedelta(seconds=1)
REFUSING = (
    """CREATE OR REPLACE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
    IF NEW.text = 'terminates' THEN PERFORM pg_terminate_backend(pg_backend_pid()); PERFORM pg_sleep(1);
    ELSIF NEW.text = 'cancels' THEN PERFORM pg_cancel_backend(pg_backend_pid()); PERFORM pg_sleep(1);
    ELSE RAISE EXCEPTION 'refused at the end' USING ERRCODE = NEW.text; END IF; RETURN NULL; END $$""",
    "DROP TRIGGER IF EXISTS refuse ON only_one",
    """CREATE CONSTRAINT TRIGGER refuse AFTER INSERT ON only_one DEFERRABLE INITIALLY DEFERRED
    FOR EACH ROW EXECUTE FUNCTION refuse()""",
)


@pytest.fixture(params=COLOURS)
def postgres(request: pytest.FixtureRequest) -> Iterator[Shop]:
    for shop in ground_on(request, "postgres", request.param):
        run(shop, *REFUSING)
        yield shop


@pytest.mark.parametrize("way", [ALONE, IN_A_BATCH, UNDER_A_LEASE, IN_A_STEP], ids=str)
@pytest.mark.parametrize(
    "code", ["53100", "53300", "25006", "3D000", "08006", "57P01", "58030", "40001", "23505", "terminates", "cancels"]
)
def test_a_commit_refused_with_whatever_number_ends_and_its_neighbours_go_on(
    postgres: Shop, way: Way, code: str
) -> None:
    def do(session: Session, no: Any) -> None:
        put(session, f"{no} before")
        if no == 3:
            session.execute(text("INSERT INTO only_one VALUES (:code)"), {"code": code})
        put(session, f"{no} after")

    more = {"guard": Lease(LEASE)} if way.lease else {}
    way.handles(postgres, do, retry=Retry(immediate=1, delays=[0.01], max_attempts=3), **more)
    numbers = [1, 2, 3, 4] if way.together else [3]
    for attempt in range(1, 13):
        ends = way.attempted(postgres, [order(no, attempt=min(attempt, 4)) for no in numbers])
        if all(isinstance(end, Outcome) and end.acknowledge for end in ends):
            break
        if way.lease and Outcome.UNKNOWN in ends:
            time.sleep(LEASE.total_seconds())  # of whom nobody knows whether it committed: its lease runs out
    assert all(isinstance(end, Outcome) and end.acknowledge for end in ends), ends
    assert Counter(postgres.effects()) == Counter(
        f"{no} {part}" for no in numbers if no != 3 for part in ("before", "after")
    )
    assert postgres.failure().state in ("dead", "waiting")
