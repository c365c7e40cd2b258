"""A FastAPI dependency ends after the answer is sent, unless told otherwise: 200 says nothing of the COMMIT then."""

from collections.abc import Iterator
from typing import Annotated, Any

import pytest
from fastapi import Depends, FastAPI
from fastapi.testclient import TestClient
from sqlalchemy import Engine, create_engine, event, text
from sqlalchemy.orm import Session

from exactly_once import ExactlyOnce

DEFERRED = """
    CREATE TABLE line (order_no text PRIMARY KEY,
                       shop text REFERENCES shop_of_lines (name) DEFERRABLE INITIALLY DEFERRED)
"""


@pytest.fixture
def engine(sqlite_url: str) -> Iterator[Engine]:
    """COMMIT is refused, for a line's shop is not there."""
    engine = create_engine(sqlite_url)
    event.listen(engine, "connect", lambda dbapi, record: dbapi.execute("PRAGMA foreign_keys = ON"))
    with engine.begin() as connection:
        connection.execute(text("CREATE TABLE shop_of_lines (name text PRIMARY KEY)"))
        connection.execute(text(DEFERRED))
    yield engine
    engine.dispose()


@pytest.mark.parametrize(("how", "status"), [("request", 200), ("function", 500), ("in the route", 500)])
def test_what_the_client_is_told_where_commit_is_refused(how: Any, status: int, engine: Engine) -> None:
    """As docs/how-to/own-loop.md has it; 200 is what is to be avoided."""
    eo = ExactlyOnce(group="scope")
    app = FastAPI()

    def a_session() -> Iterator[Session]:
        with Session(engine) as session, session.begin():
            yield session

    def store(session: Session, no: str) -> None:
        if eo.claim(session, "store_order", no):
            session.execute(text("INSERT INTO line VALUES (:no, 'nowhere')"), {"no": no})

    if how == "in the route":

        @app.post("/orders/{no}")
        def in_the_route(no: str) -> None:
            with Session(engine) as session, session.begin():
                store(session, no)
    else:

        @app.post("/orders/{no}")
        def by_dependency(no: str, session: Annotated[Session, Depends(a_session, scope=how)]) -> None:
            store(session, no)

    with TestClient(app, raise_server_exceptions=False) as client:
        assert client.post("/orders/A-1").status_code == status
    with engine.connect() as connection:
        assert connection.execute(text("SELECT count(*) FROM message_idempotent")).scalar_one() == 0
        assert connection.execute(text("SELECT count(*) FROM line")).scalar_one() == 0
