"""A card number goes into statements that fail, on every database: it stands in no log, no row, no alert and no reason."""

import logging
from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import BigInteger, CheckConstraint, Column, Date, Integer, MetaData, String, Table, insert, text
from sqlalchemy.orm import Session

from exactly_once import Alert, Outcome, Reject, Retry
from exactly_once.error_words import words_of
from tests.integration.shop import Do, Shop, order

CARD = "4111111111111111"

_METADATA = MetaData()
CARDS = Table(
    "cards",
    _METADATA,
    Column("no", String(40), primary_key=True),
    Column("short", String(5)),
    Column("number", BigInteger),
    Column("small", Integer),
    Column("day", Date),
    CheckConstraint("length(no) < 20", name="cards_fit"),
    mariadb_engine="InnoDB",
    mariadb_default_charset="utf8mb4",
)


def unique(session: Session) -> None:
    session.execute(insert(CARDS).values(no=CARD))
    session.execute(insert(CARDS).values(no=CARD))


def check(session: Session) -> None:
    session.execute(insert(CARDS).values(no=CARD * 2))


def too_long(session: Session) -> None:
    session.execute(insert(CARDS).values(no="1", short=CARD))
    check(session)  # SQLite takes the one above


def wrong_type(session: Session) -> None:
    session.execute(text("INSERT INTO cards (no, number) VALUES ('1', :number)"), {"number": f"{CARD}x"})
    check(session)


def wrong_day(session: Session) -> None:
    session.execute(text("INSERT INTO cards (no, day) VALUES ('1', :day)"), {"day": CARD})
    check(session)


def no_day(session: Session) -> None:
    session.execute(insert(CARDS).values(no="1", day=CARD))
    check(session)


def out_of_range(session: Session) -> None:
    session.execute(insert(CARDS).values(no="1", small=int(CARD)))
    check(session)


def as_a_name(session: Session) -> None:
    session.execute(text("INSERT INTO cards (no) VALUES (:no) ON NOTHING"), {"no": CARD})


def in_the_statement(session: Session) -> None:
    session.execute(text(f"INSERT INTO cards (no, number) VALUES ('{CARD}', {CARD}), ('{CARD}', {CARD})"))


def told(wrap: Callable[[Exception], BaseException]) -> Do:
    """The application makes its own error of the database's."""

    def do(session: Session) -> None:
        try:
            unique(session)
        except Exception as error:
            raise wrap(error) from error

    return do


def told_from_none(session: Session) -> None:
    try:
        unique(session)
    except Exception as error:
        raise RuntimeError(f"not saved: {error}") from None


def told_later(session: Session) -> None:
    said = ""
    try:
        unique(session)
    except Exception as error:
        said = f"not saved: {error}"
    raise RuntimeError(said)


def told_later_by_the_driver(session: Session) -> None:
    said = ""
    try:
        unique(session)
    except Exception as error:
        said = f"not saved: {error.orig}"  # type: ignore[attr-defined]
    raise RuntimeError(said)


def behind_sqlalchemy(session: Session) -> None:
    driver: Any = session.connection().connection.driver_connection
    if hasattr(driver, "cursor") and type(driver).__module__.partition(".")[0] in ("psycopg", "pymysql", "sqlite3"):
        cursor = session.connection().connection.cursor()
        place = "?" if "sqlite" in type(driver).__module__ else "%s"
        for _ in range(2):
            cursor.execute(f"INSERT INTO cards (no) VALUES ({place})", (CARD,))
    unique(session)


WAYS: dict[str, Do] = {
    "unique": unique,
    "check": check,
    "too long": too_long,
    "wrong type": wrong_type,
    "wrong day": wrong_day,
    "no day": no_day,
    "out of range": out_of_range,
    "syntax": as_a_name,
    "in the statement": in_the_statement,
    "in another's text": told(lambda error: RuntimeError(f"not saved: {error}")),
    "in another's repr": told(lambda error: RuntimeError(f"not saved: {error!r}")),
    "as an argument": told(lambda error: RuntimeError("not saved", error)),
    "the driver's text": told(lambda error: RuntimeError(f"not saved: {error.orig}")),  # type: ignore[attr-defined]
    "the driver's repr": told(lambda error: RuntimeError(f"not saved: {error.orig!r}")),  # type: ignore[attr-defined]
    "the driver's": told(lambda error: error.orig),  # type: ignore[attr-defined]
    "in a group": told(lambda error: ExceptionGroup(f"not saved: {error}", [error, ValueError("other")])),
    "in a group's member": told(lambda error: ExceptionGroup("several", [RuntimeError(f"not saved: {error}")])),
    "in a reject": told(lambda error: Reject(f"not saved: {error}")),
    "from none": told_from_none,
    "later": told_later,
    "later, of the driver": told_later_by_the_driver,
    "behind SQLAlchemy": behind_sqlalchemy,
}


@pytest.mark.parametrize("way", WAYS)
def test_a_value_of_a_statement_stands_in_no_log_row_alert_or_reason(
    shop: Shop, way: str, caplog: pytest.LogCaptureFixture
) -> None:
    _METADATA.create_all(shop.outside)
    with shop.outside.begin() as connection:
        connection.execute(CARDS.delete())
    alerts: list[Alert] = []
    shop.fresh_eo(alert=alerts.append)
    shop.handles(WAYS[way], retry=Retry(immediate=0, max_attempts=1))
    with caplog.at_level(logging.DEBUG, "exactly_once"):
        assert shop.process(order()) is Outcome.DEAD
    told = shop.failure().error_text
    logged = "\n".join(logging.Formatter().format(record) for record in caplog.records)
    assert "message_failed" in logged
    for where in (told, alerts[0].reason, logged):
        assert CARD not in where
        assert CARD[:9] not in where
    assert told
    if "(at " in told:
        assert "test_error_words.py" in told, "the line is named"
    if way == "unique":
        assert "cards" in told, "what is unique is named"


def test_what_a_person_needs_is_still_told(shop: Shop) -> None:
    _METADATA.create_all(shop.outside)
    with shop.outside.begin() as connection:
        connection.execute(CARDS.delete())
    shop.handles(unique)
    shop.process(order())
    wanted = {
        "postgres": 'violates unique constraint "cards_pkey" (SQLSTATE 23505, table cards)',
        "mariadb": "PRIMARY (errno 1062)",  # MySQL says its table, too
        "sqlite": "UNIQUE constraint failed: cards.no",
    }[shop.dialect]
    assert wanted in shop.failure().error_text
    assert "[in: INSERT INTO cards (no) VALUES (" in shop.failure().error_text


class Speechless(Exception):
    def __str__(self) -> str:
        raise ValueError("no words")

    __repr__ = __str__


class Unreadable(Exception):
    @property
    def __cause__(self) -> Any:  # type: ignore[override]
        raise ValueError("no cause")


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (Speechless(), "(its text cannot be read: ValueError)"),
        (Unreadable("has words"), "has words"),
        (ExceptionGroup("two", [Speechless(), Unreadable("x")]), "two (2 sub-exceptions)"),
        (RuntimeError(Speechless()), "(its text cannot be read: ValueError)"),
    ],
    ids=["no text", "no cause", "in a group", "as an argument"],
)
def test_an_error_that_cannot_be_read_is_written_down_all_the_same(shop: Shop, error: Exception, says: str) -> None:
    def fail(_: Session) -> None:
        raise error

    shop.handles(fail, retry=Retry(immediate=0, max_attempts=1))
    assert shop.process(order()) is Outcome.DEAD
    assert shop.failure().error_text.startswith(says)
    assert words_of(error) == says
