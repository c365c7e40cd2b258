"""A card number goes into statements that fail, on every database: it stands in no log, no row, no alert and no reason."""

import json
import logging
import traceback
from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    Column,
    Date,
    Enum,
    ForeignKey,
    Integer,
    MetaData,
    NullPool,
    String,
    Table,
    bindparam,
    create_engine,
    insert,
    literal,
    select,
    text,
)
from sqlalchemy.orm import Session

from exactly_once import Alert, Outcome, Reject, Retry
from exactly_once.exceptions.words import words_of
from tests.integration.shop import Do, Shop, order
from tests.services.mariadb import MYSQLD

pytestmark = pytest.mark.nightly(meet=2)

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


def sent(statement: str, **bound: Any) -> Do:
    def do(session: Session) -> None:
        session.execute(text(statement), bound).all()

    return do


def in_a_text(session: Session) -> None:
    session.execute(select(CARDS).where(CARDS.c.no.in_(CARD)))  # type: ignore[arg-type]


def no_condition(session: Session) -> None:
    session.execute(select(CARDS).where(CARD))  # type: ignore[arg-type]


def ordered_by_a_text(session: Session) -> None:
    session.execute(select(CARDS).order_by(f"no = '{CARD}'"))


def in_place(session: Session) -> None:
    session.execute(select(bindparam("x", CARD, Date, literal_execute=True))).all()


def read_back(session: Session) -> None:
    session.execute(select(literal(CARD, String).cast(Enum("a", "b", native_enum=False, length=40)))).all()


def told_in_one_line(session: Session) -> None:
    said = ""
    try:
        unique(session)
    except Exception as error:
        said = " ".join(f"not saved: {error.orig}".split())  # type: ignore[attr-defined]
    raise RuntimeError(said)


def told_as_json_later(session: Session) -> None:
    said = ""
    try:
        unique(session)
    except Exception as error:
        said = json.dumps({"error": str(error.orig)})  # type: ignore[attr-defined]
    raise RuntimeError(said)


def told_its_argument_later(session: Session) -> None:
    said = ""
    try:
        unique(session)
    except Exception as error:
        said = f"not saved: {error.orig.args[-1]}"  # type: ignore[attr-defined]
    raise RuntimeError(said)


def the_trace(session: Session) -> None:
    try:
        unique(session)
    except Exception:
        raise RuntimeError(traceback.format_exc()) from None


def in_double_quotes(session: Session) -> None:
    """A literal on MySQL and SQLite, a name on PostgreSQL."""
    mark = "'" if session.get_bind().dialect.name == "postgresql" else '"'
    session.execute(text(f"INSERT INTO missing_table (no) VALUES ({mark}Carpenter{mark})"))


class NotSaved(Exception):
    """Keeps the error, and tells of it when it is asked."""

    def __init__(self, error: Any) -> None:
        super().__init__("not saved")
        self.error = error

    def __str__(self) -> str:
        bound = self.error.params
        return f"not saved: {list(bound.values()) if isinstance(bound, dict) else list(bound)}"


def told_of_bound(name: Any, told_as: Callable[[Any], str]) -> Do:
    """The application's own error tells what was bound, and is raised from the database's."""

    def do(session: Session) -> None:
        try:
            session.execute(text("INSERT INTO missing_table (no) VALUES (:name)"), {"name": name})
        except Exception as error:
            raise RuntimeError(told_as(name)) from error

    return do


def told_its_statement(session: Session) -> None:
    try:
        session.execute(text("INSERT INTO missing_table (no) VALUES ('Carpenter')"))
    except Exception as error:
        raise RuntimeError(f"not saved: {error.statement}") from error  # type: ignore[attr-defined]


def no_partition(session: Session) -> None:
    if session.get_bind().dialect.name == "sqlite":
        check(session)
    options = "PARTITION BY RANGE (no) (PARTITION low VALUES LESS THAN (10))"
    if session.get_bind().dialect.name == "postgresql":
        options = "PARTITION BY RANGE (no)"
    with create_engine(session.get_bind().url, poolclass=NullPool).begin() as outside:  # type: ignore[union-attr]
        outside.execute(text("DROP TABLE IF EXISTS parts"))
        outside.execute(text(f"CREATE TABLE parts (no BIGINT) {options}"))
    session.execute(text("INSERT INTO parts (no) VALUES (:no)"), {"no": int(CARD)})


def raised_in_the_database(session: Session) -> None:
    """The application's own words in the database's code, with a value in them."""
    match session.get_bind().dialect.name:
        case "postgresql":
            make = (
                "CREATE OR REPLACE FUNCTION refuse(no text) RETURNS int LANGUAGE plpgsql AS"
                " $$ BEGIN RAISE EXCEPTION 'card with % is refused', no; END $$"
            )
            call = "SELECT refuse(:no)"
        case "sqlite":
            check(session)
            return
        case _:
            make = (
                "CREATE OR REPLACE PROCEDURE refuse(no TEXT) BEGIN"
                " SET @said = CONCAT('card with ', no, ' is refused');"
                " SIGNAL SQLSTATE '45000' SET MESSAGE_TEXT = @said; END"
            )
            call = "CALL refuse(:no)"
    with create_engine(session.get_bind().url, poolclass=NullPool).begin() as outside:  # type: ignore[union-attr]
        outside.exec_driver_sql(make)
    session.execute(text(call), {"no": f"x{CARD}"})


ON_POSTGRESQL: dict[str, Do] = {
    "a table by a value in words": sent("SELECT CAST(:x AS regclass)", x="Carpenter"),
    "a search in words": sent("SELECT to_tsquery(:x)", x="cards Carpenter & & x"),
    "a table by a value": sent("SELECT CAST(:x AS regclass)", x=f"t{CARD}"),
    "a sequence by a value": sent("SELECT nextval(:x)", x=f"s{CARD}"),
    "a setting by a value": sent("SELECT current_setting(:x)", x=f"a{CARD}"),
    "a role by a value": sent("SELECT set_config('role', :x, true)", x=f"r{CARD}"),
    "a language by a value": sent("SELECT to_tsvector(CAST(:x AS regconfig), 'a')", x=f"c{CARD}"),
    "a type by a value": sent("SELECT CAST(:x AS regtype)", x=f"c{CARD}"),
    "a function by a value": sent("SELECT CAST(:x AS regprocedure)", x=f"f{CARD}(int)"),
    "a search": sent("SELECT to_tsquery(:x)", x=f"{CARD} & & x"),
    "a search with quotes": sent("SELECT to_tsquery(:x)", x=f'"to_tsquery" {CARD}" & & x'),
    "a path": sent("SELECT jsonb_path_query('{}', CAST(:x AS jsonpath))", x=f"$.{CARD}["),
    "a time zone": sent("SELECT now() AT TIME ZONE :x", x=CARD),
    "a regular expression": sent("SELECT 'a' ~ :x", x=f"({CARD}"),
    "XML": sent("SELECT CAST(:x AS xml)", x=f"<{CARD}"),
    "a date in a format": sent("SELECT to_date(:x, 'YYYY-MM-DD')", x=f"x{CARD}"),
    "an encoding": sent("SELECT convert_to('a', :x)", x=CARD),
    "a statement made of a value": sent("SELECT query_to_xml(:x, true, true, '')", x=f"SELECT {CARD}x"),
    "quotes with a tag": sent(f"SELECT missing_column, $x$Carpenter {CARD}$x$ FROM cards"),
    "quotes with a tag first": sent("SELECT CAST($tag_1$Carpenter$tag_1$ AS integer) FROM cards"),
    "a sentence of such quotes": sent("SELECT CAST($x$Carpenter$x$ AS regclass) FROM cards"),
    "a comment in a comment": sent("SELECT /* of /* the */ Carpenter */ missing_column FROM cards"),
    "a name with an apostrophe": sent("""SELECT "it's", 'Carpenter', "it's" FROM cards WHERE no = 'Carpenter'"""),
}
ON_MARIADB: dict[str, Do] = {
    "too large a product": sent("SELECT CAST(:x AS UNSIGNED) * 18446744073709551615", x=CARD),
    "a regular expression": sent("SELECT 'a' REGEXP :x", x=f"({CARD}"),
    "a path of XML": sent("SELECT EXTRACTVALUE('<a/>', :x)", x=f"//{CARD}["),
    "a lock's name": sent("SELECT GET_LOCK(:x, 0)", x="x" * 300 + CARD),
    "a statement made of a value": sent("EXECUTE IMMEDIATE CONCAT('SELECT ', :x)", x=f"DE{CARD}"),
    "a comment behind a hash": sent(f"SELECT missing_column # of Carpenter {CARD}\n FROM cards"),
    "a column made of a value": sent("EXECUTE IMMEDIATE CONCAT('SELECT ', :x)", x="Carpenter"),
    "a table made of a value": sent("EXECUTE IMMEDIATE CONCAT('SELECT 1 FROM ', :x)", x="Carpenter"),
}
ON_SQLITE: dict[str, Do] = {
    "a path": sent("SELECT json_extract('{}', :x)", x=f"{CARD}["),
    "a search": sent("SELECT * FROM found WHERE found MATCH :x", x=f"no:{CARD} AND"),
    "a search in a column": sent("SELECT * FROM found WHERE found MATCH :x", x=f"x{CARD}:1"),
    "a search with a mistake": sent("SELECT * FROM found WHERE found MATCH :x", x='found "Carpenter" AND "'),
    "a search for another column": sent("SELECT * FROM found WHERE found MATCH :x", x="Carpenter411111111:1"),
    "a pattern": sent("SELECT 'a' REGEXP :x", x=f"({CARD}"),
}

WAYS: dict[str, Do] = {
    "its parameters": told(lambda error: RuntimeError(f"not saved: {error.params}")),  # type: ignore[attr-defined]
    "its statement and its parameters": told(
        lambda error: RuntimeError(f"not saved: {error.statement} with {error.params!r}")  # type: ignore[attr-defined]
    ),
    "its parameters as JSON": told(lambda error: RuntimeError(json.dumps(error.params))),  # type: ignore[attr-defined]
    "the beginning of its parameters": told(
        lambda error: RuntimeError(f"not saved: {str(error.params)[:25]}...")  # type: ignore[attr-defined]
    ),
    "one of its parameters": told(lambda error: RuntimeError(f"no card x{CARD}x")),
    "asked for its text": told(NotSaved),
    "beside it in a group": told(
        lambda error: ExceptionGroup("two", [error, ValueError(f"with {error.params}")])  # type: ignore[attr-defined]
    ),
    "a name that was bound": told_of_bound("Carpenter", lambda name: f"not saved: {name}!"),
    "in bytes": told_of_bound(b"Carpenter", lambda name: f"not saved: {name}"),
    "with a line's end": told_of_bound("Mrs.\nCarpenter", lambda name: f"not saved: {[name]}"),
    "escaped": told_of_bound("Carpenter \u00fc", lambda name: json.dumps([name])),
    "the statement with a literal": told_its_statement,
    "a comment": sent(f"SELECT missing_column /* of Carpenter {CARD} */ FROM cards"),
    "a comment first": sent("/* of Carpenter */ SELECT missing_column FROM cards"),
    "a comment to the end of the line": sent(f"SELECT missing_column -- of Carpenter {CARD}\n FROM cards"),
    "a comment with an apostrophe": sent("SELECT no, 'x' -- don't\n, 'Carpenter', missing_column FROM cards"),
    "a comment that does not end": sent("SELECT missing_column FROM cards /* Carpenter"),
    "digits in groups": sent("SELECT missing_column, 4111 1111 1111 1111 FROM cards"),
    "digits with dashes": sent("SELECT missing_column, 4111-1111-1111-1111 FROM cards"),
    "digits of another script": sent("SELECT missing_column, \u0664\u0661\u0661\u0661\u0661\u0661\u0661 FROM cards"),
    "double quotes": in_double_quotes,
    "no list": in_a_text,
    "no condition": no_condition,
    "an order": ordered_by_a_text,
    "in place of a parameter": in_place,
    "read back": read_back,
    "no partition": no_partition,
    "raised in the database": raised_in_the_database,
    "a number with letters": sent(f"SELECT * FROM cards WHERE no = {CARD}x"),
    "no quotes": sent(f"SELECT * FROM cards WHERE no = DE{CARD}"),
    "one line": told(lambda error: RuntimeError(" ".join(f"not saved: {error.orig}".split()))),  # type: ignore[attr-defined]
    "one line later": told_in_one_line,
    "one line of SQLAlchemy's": told(lambda error: RuntimeError(str(error).replace("\n", " | "))),
    "the beginning": told(lambda error: RuntimeError(f"not saved: {str(error.orig)[:90]}")),  # type: ignore[attr-defined]
    "its last argument": told(lambda error: RuntimeError(f"not saved: {error.orig.args[-1]}")),  # type: ignore[attr-defined]
    "its last argument later": told_its_argument_later,
    "as JSON": told(lambda error: RuntimeError(json.dumps({"error": str(error.orig)}))),  # type: ignore[attr-defined]
    "as JSON later": told_as_json_later,
    "a trace": the_trace,
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


OF_A_SERVER = {"postgres": ON_POSTGRESQL, "mariadb": ON_MARIADB, "sqlite": ON_SQLITE}


@pytest.mark.parametrize(
    "way", [*WAYS, *(f"{server}: {name}" for server in OF_A_SERVER for name in OF_A_SERVER[server])]
)
@pytest.mark.where(lambda ground, way: ":" not in way or way.startswith(ground[0]))  # not another server's statement
def test_a_value_of_a_statement_stands_in_no_log_row_alert_or_reason(
    shop: Shop, way: str, caplog: pytest.LogCaptureFixture
) -> None:
    server, colon, name = way.partition(": ")
    do = OF_A_SERVER[server][name] if colon else WAYS[way]
    _METADATA.create_all(shop.outside)
    with shop.outside.begin() as connection:
        connection.execute(CARDS.delete())
        if shop.dialect == "sqlite":
            connection.exec_driver_sql("CREATE VIRTUAL TABLE IF NOT EXISTS found USING fts5(no)")
    alerts: list[Alert] = []
    shop.fresh_eo(alert=alerts.append)
    shop.handles(do, retry=Retry(immediate=0, max_attempts=1))
    with caplog.at_level(logging.DEBUG, "exactly_once"):
        assert shop.process(order()) is Outcome.DEAD
    told = shop.failure().error_text
    logged = "\n".join(logging.Formatter().format(record) for record in caplog.records)
    assert "message_failed" in logged
    for where in (told, alerts[0].reason, logged):
        assert CARD not in where
        for value in (CARD[:9], "4111 1111", "4111-1111", "\u0664\u0661\u0661\u0661", "Carpenter"):
            assert value not in where
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


CHILD = Table(
    "child",
    _METADATA,
    Column("id", Integer, primary_key=True),
    Column("parent", ForeignKey("cards.no", name="child_of")),
    Column("name", String(40), nullable=False),
    mariadb_engine="InnoDB",
    mariadb_default_charset="utf8mb4",
)


def without_a_parent(session: Session) -> None:
    session.execute(insert(CHILD).values(id=1, parent="child_of", name="name"))
    check(session)  # SQLite looks at no foreign key unless it is told to


STILL_TOLD: dict[str, tuple[Do, dict[str, str]]] = {
    "no such table": (
        sent("SELECT * FROM missing_table WHERE a = :a", a=1),
        {
            "postgres": 'relation "missing_table" does not exist (SQLSTATE 42P01)',
            "mariadb": "missing_table' doesn't exist (errno 1146)",
            "sqlite": "no such table: missing_table",
        },
    ),
    "no such column": (
        sent("SELECT missing_column FROM cards WHERE no = :no", no=CARD),
        {
            "postgres": 'column "missing_column" does not exist (SQLSTATE 42703)',
            "mariadb": "Unknown column 'missing_column' in",
            "sqlite": "no such column: missing_column",
        },
    ),
    "null": (
        lambda session: session.execute(text("INSERT INTO child (id, name) VALUES (1, :name)"), {"name": None}),
        {
            "postgres": 'null value in column "name" of relation "child" violates not-null constraint (SQLSTATE 23502)',
            "mariadb": "Column 'name' cannot be null (errno 1048)",
            "sqlite": "NOT NULL constraint failed: child.name",
        },
    ),
    "a foreign key": (
        without_a_parent,
        {
            "postgres": 'insert or update on table "child" violates foreign key constraint "child_of" (SQLSTATE 23503)',
            "mariadb": "CONSTRAINT `child_of` FOREIGN KEY (`parent`) REFERENCES `cards` (`no`)) (errno 1452)",
            "sqlite": "CHECK constraint failed: cards_fit",
        },
    ),
    "a check": (
        check,
        {
            "postgres": 'new row for relation "cards" violates check constraint "cards_fit" (SQLSTATE 23514)',
            "mariadb": "'cards_fit' is violated." if MYSQLD else "CONSTRAINT `cards_fit` failed for",
            "sqlite": "CHECK constraint failed: cards_fit",
        },
    ),
    "syntax": (
        sent("SELECT no FROM cards WHERE WHERE no = :no", no=CARD),
        {
            "postgres": 'syntax error at or near "WHERE" (SQLSTATE 42601)',
            "mariadb": "(errno 1064)",
            "sqlite": 'near "WHERE": syntax error',
        },
    ),
    "a function": (
        sent("SELECT missing_function(:no)", no=CARD),
        {
            "postgres": "function missing_function(unknown) does not exist (SQLSTATE 42883)",
            "mariadb": "missing_function does not exist (errno 1305)",
            "sqlite": "no such function: missing_function",
        },
    ),
}


@pytest.mark.parametrize("case", STILL_TOLD)
def test_the_names_a_developer_wrote_are_still_told(shop: Shop, case: str) -> None:
    do, says = STILL_TOLD[case]
    _METADATA.create_all(shop.outside)

    shop.handles(do, retry=Retry(immediate=0, max_attempts=1))
    assert shop.process(order()) is Outcome.DEAD
    told = shop.failure().error_text
    assert says[shop.dialect] in told
    assert CARD[:9] not in told


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
        (
            ExceptionGroup("two", [Speechless(), Unreadable("x")]),
            "two (2 sub-exceptions): Speechless: (its text cannot be read: ValueError); Unreadable: x",
        ),
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
