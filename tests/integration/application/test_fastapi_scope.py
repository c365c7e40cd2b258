"""A FastAPI dependency ends after the answer is sent, unless told otherwise: 200 says nothing of the COMMIT then."""

import re
import runpy
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any

import pytest
from fastapi import Depends, FastAPI
from fastapi.testclient import TestClient
from pydantic import BaseModel
from sqlalchemy import Engine, create_engine, event, text
from sqlalchemy.orm import Session

from exactly_once import ExactlyOnce

ROOT = Path(__file__).parents[3]
PAGE = ROOT / "docs" / "how-to" / "own-loop.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.DOTALL | re.MULTILINE)
EXAMPLE = ROOT / "examples" / "fastapi_producer" / "main.py"

EXAMPLES_ORDERS = """
    CREATE TABLE fastapi_order (order_no text PRIMARY KEY REFERENCES shop_of_lines (name) DEFERRABLE INITIALLY DEFERRED,
                                quantity int)
"""
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


class Order(BaseModel):
    no: str


def create(session: Session, order: Order) -> None:
    session.execute(text("INSERT INTO line VALUES (:no, 'nowhere')"), {"no": order.no})


def nothing_is_there(engine: Engine) -> None:
    with engine.connect() as connection:
        assert connection.execute(text("SELECT count(*) FROM message_idempotent")).scalar_one() == 0
        assert connection.execute(text("SELECT count(*) FROM line")).scalar_one() == 0


@pytest.fixture
def page(engine: Engine) -> dict[str, Any]:
    """The names that stand after the page's own code has run, with only the shop's definitions supplied."""

    def a_session() -> Iterator[Session]:
        with Session(engine) as session, session.begin():
            create(session, Order(no="A-1"))  # what the route would do, whose body the page leaves out
            yield session

    [code] = [block for block in BLOCKS if "a dependency that ends before the answer" in block]
    shop = {"engine": engine, "Session": Session, "Order": Order, "create": create, "a_session": a_session}
    names = shop | {"app": FastAPI(), "eo": ExactlyOnce(group="scope"), "Annotated": Annotated, "Depends": Depends}
    exec(compile(code, str(PAGE), "exec", dont_inherit=True), names)
    return names


def test_the_route_of_the_page_answers_no_200_where_commit_is_refused(engine: Engine, page: dict[str, Any]) -> None:
    with TestClient(page["app"], raise_server_exceptions=False) as client:
        assert client.post("/orders", json={"no": "A-1"}).status_code == 500
    nothing_is_there(engine)


@pytest.mark.parametrize(("scope", "status"), [("as the page has it", 500), ("request", 200)])
def test_the_dependency_of_the_page_ends_before_the_answer(
    scope: str, status: int, engine: Engine, page: dict[str, Any]
) -> None:
    """FastAPI's own scope is seen beside it: 200 is what is to be avoided."""
    route = page["create_order"]  # the later of the two of that name
    if scope == "request":
        (dependency,) = route.__annotations__["session"].__metadata__
        route.__annotations__["session"] = Annotated[Session, Depends(dependency.dependency, scope=scope)]
    app = FastAPI()
    app.post("/orders")(route)
    with TestClient(app, raise_server_exceptions=False) as client:
        assert client.post("/orders", json={"no": "A-1"}).status_code == status
    nothing_is_there(engine)


def test_the_example_answers_no_201_and_sends_nothing_where_commit_is_refused(
    sqlite_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EXACTLY_ONCE_DATABASE", sqlite_url)
    names = runpy.run_path(str(EXAMPLE))
    engine, app, sent = names["engine"], names["app"], []
    event.listen(engine, "connect", lambda dbapi, record: dbapi.execute("PRAGMA foreign_keys = ON"))
    with engine.begin() as connection:
        connection.execute(text("CREATE TABLE shop_of_lines (name text PRIMARY KEY)"))
        connection.execute(text(EXAMPLES_ORDERS))
    app.state.producer = SimpleNamespace(send=sent.append)
    # not as a context manager, which would run its lifespan: that one makes the tables
    client = TestClient(app, raise_server_exceptions=False)
    assert client.post("/orders", json={"order_no": "A-1", "quantity": 1}).status_code == 500
    engine.dispose()
    assert sent == []
