"""What is told of an error, and of the errors behind it; the texts of servers are those of several languages."""

import json
import logging
import sqlite3
from datetime import date
from decimal import Decimal
from time import process_time
from typing import Any

import pymysql
import pytest
from sqlalchemy import column, select
from sqlalchemy.exc import ArgumentError, IntegrityError, InvalidRequestError, PendingRollbackError, StatementError

from exactly_once.database.errors.drivers_own import original
from exactly_once.errors import Reject
from exactly_once.events.alert import Alert, raise_alert
from exactly_once.events.throttled_log import ThrottledLog
from exactly_once.exceptions.drivers import is_drivers
from exactly_once.exceptions.struck import (
    bound,
    code_of,
    shown,
    sought,
    without_bound,
    without_numbers,
    without_parameters,
    without_quoted,
)
from exactly_once.exceptions.words import place_of, trace_of, words_of

CARD = "4111111111111111"


def statement_error(orig: Exception) -> IntegrityError:
    return IntegrityError("INSERT INTO cards VALUES (%(no)s)", {"no": CARD}, orig)


@pytest.mark.parametrize(
    ("errno", "text", "says"),
    [
        (
            1062,
            f"Duplicate entry '{CARD}' for key 'cards.PRIMARY'",
            "duplicate entry for key cards.PRIMARY (errno 1062)",
        ),
        (1062, f"Doppelter Eintrag '{CARD}' für Schlüssel 'no'", "duplicate entry for key no (errno 1062)"),
        (1062, f"Duplicate entry 'it's {CARD}' for key 'no'", "duplicate entry for key no (errno 1062)"),
        (1062, f"Duplicate entry '{CARD}", "duplicate entry (errno 1062)"),
        (
            1366,
            f"Incorrect integer value: '{CARD}x' for column `shop`.`cards`.`number` at row 1",
            "errno 1366, column number",
        ),
        (1366, f"Falscher integer-Wert: '{CARD}x' für Feld 'number' in Zeile 1", "errno 1366, column number"),
        (1292, f"Incorrect date value: '{CARD}'", "Incorrect date value: ... (errno 1292)"),
        (1064, f"You have an error near ''{CARD}') x' at line 1", "You have an error near ... (errno 1064)"),
        (1690, f"BIGINT value is out of range in '({CARD} * 9)'", "BIGINT value is out of range in ... (errno 1690)"),
        (1406, "Data too long for column 'no' at row 1", "Data too long for column 'no' at row 1 (errno 1406)"),
        (1213, "Deadlock found", "Deadlock found (errno 1213)"),
        (1526, f"Table has no partition for value {CARD}", "Table has no partition for value ... (errno 1526)"),
        (1526, f"Tabelle hat keine Partition für den Wert {CARD}", "Partition für den Wert ... (errno 1526)"),
        (1054, f"Unknown column 'DE{CARD}' in 'WHERE'", "' in 'WHERE' (errno 1054)"),
        (1644, f"card {CARD} is refused", " is refused (errno 1644)"),
        (2003, "Can't connect to MySQL server on 'db'", "Can't connect to MySQL server on 'db' (errno 2003)"),
        (9999, f"Etwas mit '{CARD}' ist falsch", "Etwas mit ... (errno 9999)"),
    ],
)
def test_mysqls_sentences_are_told_without_the_values_in_them(errno: int, text: str, says: str) -> None:
    for error in (pymysql.err.DataError(errno, text), statement_error(pymysql.err.IntegrityError(errno, text))):
        assert says in words_of(error)
        assert CARD[:9] not in words_of(error)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('relation "cards" does not exist', 'relation "cards" does not exist'),
        ('relation "Cards" does not exist', 'relation "Cards" does not exist'),
        ('relation "customers" does not exist', 'relation "..." does not exist'),
        ("Relation »cards« existiert nicht", "Relation »cards« existiert nicht"),
        ("Relation »customers« existiert nicht", "Relation »...« existiert nicht"),
        (
            "la relation « customers » n'existe pas",
            "la relation « customers » n'existe pas".replace(" customers ", "..."),
        ),
        ("関係「customers」は存在しません", "関係「...」は存在しません"),
        ('syntax error in tsquery: "cards" or "Mrs. X', 'syntax error in tsquery: "cards" or "...'),
        ('near "a "cards" b" of it', 'near "..." of it'),
        ('could not determine data type of parameter "$1"', 'could not determine data type of parameter "$1"'),
        ('relation "message_failure" does not exist', 'relation "message_failure" does not exist'),
        ("doesn't exist", "doesn't exist"),
    ],
)
def test_of_what_a_server_quotes_only_the_statements_own_words_stay(text: str, says: str) -> None:
    assert (
        without_quoted(text, code_of("SELECT no FROM cards WHERE name = 'customers' AND no = 'it''s customers'"))
        == says
    )


def test_what_was_bound_is_struck_wherever_it_stands() -> None:
    values = bound([{"no": f"x{CARD}", "name": b"Mrs. Carpenter"}, ("Smith", None, 12, [4711])])
    assert values is not None
    said = f"card X{CARD} of carpenter, Smithson and 4711 at 12: cards"
    assert without_bound(said, values, ("cards",), own_words=True) == "card ... of ..., ... and ... at 12: cards"
    assert without_bound('carpenter "cards" Carpenter "4711"', values, ("cards",)) == 'carpenter "cards" ... "..."'
    assert bound(["x" * 1_500_000, "y" * 600_000]) is None


@pytest.mark.parametrize(
    ("text", "bound", "says"),
    [
        (
            "not saved: {'of': ['Mrs.', 'Carpenter']}",
            {"name": {"of": ["Mrs.", "Carpenter"]}},
            "not saved: {'of': [..., ...]}",
        ),
        ("row 7 of Annual", [{"id": 7, "name": "Ann"}], "row 7 of Annual"),
        (f"x{CARD}x and Ann", [(CARD, "Ann")], "x...x and ..."),
        ("Mrs. Carpenter-Smith of", ["Mrs. Carpenter"], "...-Smith of"),
        ("no date 2024-01-31 (datetime.date(2024, 1, 31))", [date(2024, 1, 31)], "no date ... (...)"),
        ("amount 12.50", [Decimal("12.50")], "amount ..."),
        ("so many: Mrs. Carp", ["Mrs. Carpenter"], "so many: ..."),
        ("Mrs. Carpet", ["Mrs. Carpenter"], "Mrs. Carpet"),
        ("b'Mrs. Carpenter' 6d72732e", [b"Mrs. Carpenter", b"mrs."], "... ..."),
        (f"of card {CARD} in Annual", ['{"card": "4111111111111111", "of": "Annual"}'], "of card ... in Annual"),
        ("nothing of it", [], "nothing of it"),
        ("stays: ok", [None, True, "", "o"], "stays: ok"),
    ],
)
def test_what_was_bound_is_struck_out_of_an_applications_text_where_it_stands_as_it_is(
    text: str, bound: Any, says: str
) -> None:
    assert without_parameters(text, sought(bound)) == says


def test_of_a_text_cut_off_in_a_value_nothing_of_that_value_stays() -> None:
    document = json.dumps([{"customer": "Gwendolyn Ashworth", "iban": "DE02120300000000202051"}] * 2000)
    told = without_parameters(f"could not store {document}", sought([document]))
    assert told == "could not store ..."


def test_of_very_much_that_was_bound_each_word_is_struck_or_nothing_is_told_and_soon() -> None:
    began = process_time()
    many = [{"name": f"Mrs. Carpenter{n}", "no": n} for n in range(30_000)]
    assert without_parameters("not saved: Mrs. Carpenter29999", sought(many)) == "not saved: .... ..."
    assert without_parameters("not saved: Carpenter", sought(["x" * 3_000_000])) is None
    assert len(without_parameters("y" * 10_000_000 + " Carpenter", sought(["Carpenter"])) or "") < 100_000
    assert process_time() - began < 20  # it was minutes; the processor's time, for others may have it meanwhile
    error = raised(RuntimeError("not saved: Carpenter"), IntegrityError("INSERT", ["x" * 3_000_000], Exception()))
    assert "Carpenter" not in words_of(error)


def test_a_large_group_of_errors_with_much_behind_each_is_told_soon() -> None:
    def one(number: int) -> BaseException:
        many = [{"a": f"v{number}-{n}"} for n in range(1500)]
        return raised(RuntimeError(f"{number} {'x y z ' * 5000}"), IntegrityError("INSERT", many, Exception()))

    group = ExceptionGroup("several", [one(number) for number in range(50)])  # type: ignore[type-var]
    began = process_time()
    assert words_of(group).startswith("several (50 sub-exceptions): RuntimeError: 0 x y")
    assert process_time() - began < 20  # it was minutes; the processor's time, for others may have it meanwhile


def test_what_is_bound_behind_a_group_is_looked_through_once_for_all_of_it() -> None:
    def behind(number: int) -> Exception:
        rows = [{"name": f"Smith-{number}-{n} of Sheffield", "no": 10_000_000 + n} for n in range(5000)]
        driver = IntegrityError("INSERT INTO t VALUES (:name, :no)", rows, Exception())
        return raised(RuntimeError(f"not saved: {'y' * 19_000} Smith-{number}-{number} of Sheffield"), driver)

    group = ExceptionGroup("several", [behind(number) for number in range(10)])
    for words in (words_of, trace_of):
        began = process_time()
        told = words(group)
        assert process_time() - began < 20  # it was minutes; the processor's time, for others may have it meanwhile
        assert "RuntimeError: not saved: ..." in told
        assert "Sheffield" not in told


def test_of_a_group_with_too_much_bound_behind_it_no_text_is_told() -> None:
    def behind(number: int) -> Exception:
        return raised(RuntimeError("Carpenter"), IntegrityError("INSERT", ["Carpenter", "x" * 300_000], Exception()))

    group = ExceptionGroup("Carpenter", [behind(number) for number in range(10)])
    assert "Carpenter" not in words_of(group)
    assert "Carpenter" not in trace_of(group)


def test_an_error_with_no_end_hides_none_of_what_is_bound_behind_the_others() -> None:
    endless: Exception = ValueError("endless")
    at: BaseException = endless
    for number in range(200):
        at.__cause__ = at = ValueError(str(number))
    values = raised(RuntimeError("x"), IntegrityError("INSERT", ["Carpenter"], Exception()))
    group = ExceptionGroup("tasks", [values, RuntimeError("of Carpenter"), endless])
    assert "Carpenter" not in words_of(group)


@pytest.mark.parametrize(
    ("statement", "doubled", "says"),
    [
        ("SELECT a, $x$Carpenter$x$, b", False, "SELECT a, ..."),
        ("SELECT a$x$b FROM t", False, "SELECT a$x$b FROM t"),
        ("SELECT $1, $2 FROM t WHERE a = $3", False, "SELECT $1, $2 FROM t WHERE a = $3"),
        ("SELECT a -- Carpenter\n, b", False, "SELECT a , b"),
        ("SELECT a -- Carpenter", False, "SELECT a"),
        ("/* Carpenter */ SELECT a /*+ INDEX(t) */", True, "SELECT a"),
        ("SELECT /* a /* b */ Carpenter */ c", False, "SELECT c"),
        ("SELECT a # Carpenter\n, b", True, "SELECT a , b"),
        ("SELECT a #> b", False, "SELECT a #> b"),
        ('SELECT "it\'s" FROM t', False, 'SELECT "it\'s" FROM t'),
        ('SELECT "it\'s" FROM t', True, "SELECT ..."),
        ("SELECT `it's`, 'x'", True, "SELECT `it's`, ..."),
        ("SELECT `it's", True, "SELECT"),
    ],
)
def test_a_statement_is_shown_without_its_comments_up_to_its_first_literal(
    statement: str, doubled: bool, says: str
) -> None:
    assert shown(statement, doubled=doubled) == says
    assert "carpenter" not in code_of(statement, doubled=doubled)


def test_numbers_in_groups_are_struck_and_dates_and_small_ones_are_not() -> None:
    for number in (
        "4111111111111111",
        "4111 1111 1111 1111",
        "4111-1111-1111-1111",
        "+49 30 123 456 78",
        "123-45-6789",
    ):
        assert not any(digit in without_numbers(number) for digit in "3456789"), number
    for kept in ("at row 1, column 12", "2024-01-31", "VALUES (1, 2, 3, 4, 5, 6, 7, 8, 9)", "port 5432"):
        assert without_numbers(kept) == kept


def test_a_long_text_that_was_bound_takes_no_word_of_the_servers_own() -> None:
    text = (
        "Cannot execute statement: impossible to write, since the table has no space at all. violates constraint failed"
    )
    for told in (pymysql.err.OperationalError(1665, text), pymysql.err.OperationalError(1999, text.replace("'", ""))):
        error = IntegrityError("INSERT INTO cards VALUES (%s)", (text,), told)
        assert words_of(error).startswith("Cannot execute statement: impossible to write, since the table has no space")
    failed = IntegrityError("INSERT", (text,), sqlite3.IntegrityError("NOT NULL constraint failed: cards.table"))
    assert words_of(failed).startswith("NOT NULL constraint failed: cards.table")


def test_where_more_is_bound_than_can_be_looked_through_the_sentence_is_not_told() -> None:
    error = IntegrityError("SELECT 1", {"no": "x" * 3_000_000}, sqlite3.IntegrityError("RAISE: Mrs. Carpenter"))
    assert "Carpenter" not in words_of(error)


def test_a_value_that_could_not_be_made_ready_is_not_told() -> None:
    error = StatementError("(builtins.ValueError)", "INSERT INTO t VALUES (?)", {}, ValueError(f"no date: {CARD}"))
    assert words_of(error) == "ValueError for a value of the statement [in: INSERT INTO t VALUES (?)]"
    missing = StatementError("", "SELECT :a", {}, InvalidRequestError("A value is required for bind parameter 'a'"))
    assert "A value is required for bind parameter 'a'" in words_of(missing)


def test_a_session_that_tells_of_an_earlier_error_tells_no_value() -> None:
    error = PendingRollbackError(f"Original exception was: {statement_error(sqlite3.IntegrityError('UNIQUE'))}")
    assert words_of(error).startswith("Original exception was: (sqlite3.IntegrityError) [cut")
    assert CARD not in words_of(error)


def test_a_drivers_error_of_another_kind_is_told_by_its_class() -> None:
    class OtherDriversError(Exception):
        pass

    error = statement_error(OtherDriversError(f"The duplicate key value is ({CARD})"))
    assert words_of(error).startswith("OtherDriversError, whose text may hold values")


@pytest.mark.parametrize("text", ["", "no such sku", "50% [of 7] (a.b) is 'it'", "(12, 'x')", "two\nlines: DETAIL"])
def test_an_applications_own_words_stay_as_they_are(text: str) -> None:
    assert words_of(ValueError(text)) == text
    assert words_of(Reject(text)) == text


def raised(error: BaseException, cause: BaseException | None = None) -> BaseException:
    try:
        raise error from cause  # noqa: TRY301
    except BaseException as caught:  # noqa: BLE001, RUF100
        return caught


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (
            "Server error '500' for url 'https://me:hunter2@bank.test/v1?api_key=k1&page=2'",
            "Server error '500' for url 'https://me:***@bank.test/v1?api_key=***&page=2'",
        ),
        (
            "clone of https://ghp_abc123@example.test/shop.git failed",
            "clone of https://***@example.test/shop.git failed",
        ),
        ("redis://:s3cret@cache:6379/0 refused", "redis://:***@cache:6379/0 refused"),
        ("(amqps://me:p@ss@mq:5671/) timed out", "(amqps://me:***@mq:5671/) timed out"),
        (
            "GET http://x.test/cb?state=1&access_token=t0k#top: 401",
            "GET http://x.test/cb?state=1&access_token=***#top: 401",
        ),
        (
            "https://a.test/?X-Amz-Signature=abc&X-Amz-Date=2 late",
            "https://a.test/?X-Amz-Signature=***&X-Amz-Date=2 late",
        ),
        # no secret stands in these
        ("http://registry:4873/@scope/pkg: 404", "http://registry:4873/@scope/pkg: 404"),
        ("see https://shop.test/orders?figure=1&no=7 or mail me@shop.test", None),
        ("postgresql://me@db:5432/shop: refused", None),
    ],
)
def test_a_secret_in_a_url_that_a_library_writes_into_its_error_is_not_told(text: str, says: str | None) -> None:
    error = RuntimeError(text)
    assert words_of(error) == (text if says is None else says)
    assert (text if says is None else says) in trace_of(error)
    assert (text if says is None else says) in words_of(ExceptionGroup("calls", [error]))


def test_a_text_of_many_megabytes_is_told_in_part_and_soon() -> None:
    began = process_time()
    told = words_of(ValueError("no such article: " + "body " * 6_000_000))
    assert process_time() - began < 1
    assert told.startswith("no such article: body body")
    assert len(told) < 100_000
    assert "30,000,017 characters" in told


def test_of_a_text_of_many_megabytes_behind_a_database_error_nothing_is_told() -> None:
    """Where a value ends that it repeats cannot be seen in a part of it."""
    value = "4111111111111111 " * 100_000
    behind = IntegrityError("INSERT INTO card VALUES (:a)", {"a": value}, Exception("refused"))
    alone = raised(ValueError(f"could not keep {value}"), behind)
    beside = ExceptionGroup("calls", [ValueError(f"could not keep {value}"), raised(ValueError("other"), behind)])
    for error in (alone, beside):
        assert "4111" not in words_of(error)
        assert "cut" in words_of(error)


def test_a_traceback_names_every_line_and_no_value() -> None:
    database = raised(statement_error(pymysql.err.IntegrityError(1062, f"Duplicate entry '{CARD}' for key 'no'")))
    group = ExceptionGroup("several", [database, ValueError("other")])  # type: ignore[list-item]
    for error in (raised(RuntimeError(f"not saved: {database}"), database), raised(group, database)):
        told = trace_of(error)
        assert CARD not in told
        assert told.index("IntegrityError: duplicate entry for key no") < told.index("Then, because of it:")
        assert told.count(", in raised") == 2
        assert type(error).__qualname__ in told


def test_a_chain_that_goes_round_ends() -> None:
    first, second = ValueError("first"), ValueError("second")
    first.__cause__, second.__cause__ = second, first
    assert trace_of(first).count("ValueError") == 2
    assert words_of(first) == "first"


class Unreadable(Exception):
    @property
    def __cause__(self) -> Any:  # type: ignore[override]
        raise ValueError("no cause")

    __context__ = args = __traceback__ = __suppress_context__ = exceptions = __cause__  # type: ignore[assignment]

    def __str__(self) -> str:
        raise SystemExit


def test_an_error_that_cannot_be_read_at_all_is_told_by_why() -> None:
    error = Unreadable("x")
    assert words_of(error) == "(its text cannot be read: SystemExit)"
    assert "Unreadable: (its text cannot be read: SystemExit)" in trace_of(error)
    assert place_of(error) == ""
    assert words_of(raised(ValueError("outer"), Unreadable())) == "outer"


def test_a_hook_that_fails_in_the_database_is_logged_without_values(caplog: pytest.LogCaptureFixture) -> None:
    def hook(alert: Alert) -> None:
        raise statement_error(sqlite3.IntegrityError("UNIQUE constraint failed: pages.no"))

    raise_alert(hook, Alert("parked", "g", "h", "k", "r"))
    ThrottledLog(logging.getLogger("exactly_once.worker")).warning(
        "run", "broke", error=raised(statement_error(Exception()))
    )
    told = [logging.Formatter().format(record) for record in caplog.records]
    assert "UNIQUE constraint failed: pages.no" in told[1]
    assert "in hook" in told[1]
    assert "in raised" in told[2]
    assert not any(CARD in line for line in told)


def test_an_entity_given_for_an_expression_is_not_told() -> None:
    class Customer:
        def __repr__(self) -> str:
            return "<Customer Ann Smith>"

    with pytest.raises(ArgumentError) as raised:
        select(column("id")).where(Customer())  # type: ignore[arg-type]
    assert "Ann" not in words_of(raised.value)
    assert words_of(raised.value).startswith("SQL expression for WHERE/HAVING role expected, got ")


def test_an_exception_whose_class_names_no_module_is_told_as_any_other() -> None:
    nowhere = type("Nowhere", (Exception,), {"__module__": None})
    assert "Nowhere: gone" in trace_of(nowhere("gone"))
    assert words_of(nowhere("gone")) == "gone"
    assert not is_drivers(nowhere("gone"))
    assert original(nowhere("gone")).args == ("gone",)


def test_lines_whose_loader_cannot_give_them_are_left_out() -> None:
    class Loader:
        def get_source(self, name: str) -> str:
            raise KeyError(name)

    made: dict[str, Any] = {"__name__": "rules", "__loader__": Loader()}
    exec(compile("def rule(): 1 / 0", "rules/one.rule", "exec"), made)
    with pytest.raises(ZeroDivisionError) as raised:
        made["rule"]()
    assert trace_of(raised.value).endswith("ZeroDivisionError: division by zero")
