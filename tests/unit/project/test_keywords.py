"""What the reader of statements says of a text: what ends a transaction, and what outlives it."""

import time

import pytest

from exactly_once.database.dialects.keywords import Read, read, reader
from exactly_once.database.dialects.statements import MARIADB, MYSQL, POSTGRESQL, SQLITE, Grammar

ESCAPING = POSTGRESQL._replace(backslash=True)
NO_ESCAPES = MARIADB._replace(backslash=False)
ANSI = MARIADB._replace(ansi_quotes=True)
MARIADB_10_11 = MARIADB._replace(version=101106)
MYSQL_8 = MYSQL._replace(version=80036)

ENDS: list[tuple[Grammar, str, str | None]] = [
    # quotes
    (POSTGRESQL, r"SELECT 'C:\'; COMMIT; BEGIN; SELECT 'D:\'", "COMMIT"),
    (ESCAPING, r"SELECT 'C:\'; COMMIT; BEGIN; SELECT 'D:\'", None),
    (ESCAPING, r"SELECT 'it\'s'; COMMIT", "COMMIT"),
    (POSTGRESQL, r"SELECT E'it\'s; COMMIT; '", None),
    (POSTGRESQL, r"SELECT e'it\''; COMMIT; SELECT 'x'", "COMMIT"),
    (POSTGRESQL, r"SELECT nameE'\'; COMMIT; SELECT '\'", "COMMIT"),
    (POSTGRESQL, "SELECT E'a'\n'b\\'; COMMIT; SELECT '", None),
    (POSTGRESQL, "SELECT E'a' -- '\n 'b\\''; COMMIT; SELECT ''", "COMMIT"),
    (POSTGRESQL, "SELECT E'a' 'b\\'; COMMIT; SELECT '", "COMMIT"),
    (ESCAPING, r"SELECT B'\'; COMMIT; SELECT B'\'", "COMMIT"),
    (POSTGRESQL, r"SELECT U&'\'; COMMIT; SELECT '\'", "COMMIT"),
    (POSTGRESQL, 'SELECT 1 AS "a;""; COMMIT; "', None),
    (POSTGRESQL, "SELECT $$;'$$; COMMIT", "COMMIT"),
    (POSTGRESQL, "SELECT $ä_1$; COMMIT; $a$ $$ $ä_1$", None),
    (POSTGRESQL, "SELECT a$b$; COMMIT; SELECT 1 AS c$b$", "COMMIT"),
    (POSTGRESQL, "SELECT $a$ $b$a$; COMMIT", "COMMIT"),
    (POSTGRESQL, "DO LANGUAGE $l$plpgsql$l$$b$ BEGIN; COMMIT; END $b$; COMMIT", "COMMIT"),
    (POSTGRESQL, "SELECT `'`; COMMIT; '", None),
    (MARIADB, r"SELECT 'it\'; COMMIT; '", None),
    (MARIADB, r'SELECT "it\"; COMMIT; "', None),
    (NO_ESCAPES, r"SELECT 'C:\'; COMMIT; SELECT 'D:\'", "COMMIT"),
    (ANSI, r'SELECT 1 AS "C:\"; COMMIT; SELECT 1 AS "D:\"', "COMMIT"),
    (ANSI, r"SELECT 'it\'; COMMIT; '", None),
    (MARIADB, "SELECT 1 AS `a\\`; COMMIT; SELECT 1 AS `b\\`", "COMMIT"),
    (MARIADB, r"SET sql_mode = 'NO_BACKSLASH_ESCAPES'; SELECT 'C:\'; COMMIT; SELECT 'D:\'", "COMMIT"),
    (MARIADB, "SELECT $$; COMMIT; $$", "COMMIT"),
    (SQLITE, r"SELECT 'C:\'; COMMIT; SELECT 'D:\'", "COMMIT"),
    (SQLITE, "SELECT 1 AS [';]; COMMIT; SELECT 1 AS [']", "COMMIT"),
    # comments
    (POSTGRESQL, "/* /* */ COMMIT; */ SELECT 1", None),
    (POSTGRESQL, "/* /* */ */ COMMIT", "COMMIT"),
    (POSTGRESQL, "SELECT 2*/*'*/1; COMMIT; --'", "COMMIT"),
    (POSTGRESQL, "SELECT 1 -- '\r; COMMIT; -- '", "COMMIT"),
    (POSTGRESQL, "SELECT 1 --; COMMIT", None),
    (POSTGRESQL, "ROLLBACK\0 TO x", "ROLLBACK"),
    (MARIADB, "/* /* */ COMMIT", "COMMIT"),
    (MARIADB, "SELECT 1 -- ; COMMIT", None),
    (MARIADB, "SELECT 1 --1 ; COMMIT", "COMMIT"),
    (MARIADB, "SELECT 1 # ; COMMIT", None),
    (MARIADB, "SELECT 1 -- '\r; COMMIT", None),
    (SQLITE, "SELECT 1 /* ; COMMIT", None),
    (SQLITE, "/* /* */ COMMIT", "COMMIT"),
    (SQLITE, "\ufeff COMMIT", "COMMIT"),
    # comments that are executed
    (MARIADB, "/*! COMMIT */", "COMMIT"),
    (MARIADB, "/*!50000 COMMIT */", "COMMIT"),
    (MARIADB, "/*M!100000 COMMIT */", "COMMIT"),
    (MARIADB, "/*!50000/*x*/COMMIT*/", "COMMIT"),
    (MARIADB, "/*! ROLLBACK */ TO SAVEPOINT x", None),
    (MARIADB, "SELECT /*! 2*/*'*/; COMMIT; -- '", None),
    (MARIADB_10_11, "/*!100000 COMMIT */", "COMMIT"),
    (MARIADB_10_11, "/*!999999 COMMIT */", None),
    (MARIADB_10_11, "/*!80000 COMMIT */", None),
    (MARIADB_10_11, "/*M!80000 COMMIT */", "COMMIT"),
    (MARIADB_10_11, "/*!999999 /* ' */ ' */ SELECT 1; COMMIT; -- '", "COMMIT"),
    (MYSQL_8, "/*!80000 COMMIT */", "COMMIT"),
    (MYSQL_8, "/*!90000 ' */ COMMIT -- '", "COMMIT"),
    (MYSQL_8, "/*M! ' */ COMMIT -- '", "COMMIT"),
    (MARIADB, "ROLLBACK /*!999999 TO SAVEPOINT x */", "ROLLBACK"),
    (MARIADB, "/*!999999 ' */ SELECT 1; COMMIT; -- '", "COMMIT"),
    # bodies of what is made now and runs later
    (POSTGRESQL, "CREATE FUNCTION f() RETURNS int BEGIN ATOMIC SELECT 1; SELECT 2; END", None),
    (POSTGRESQL, "CREATE FUNCTION f() RETURNS int BEGIN ATOMIC SELECT 1; END; COMMIT", "COMMIT"),
    (POSTGRESQL, "CREATE FUNCTION f() RETURNS int BEGIN ATOMIC SELECT 1 case; END; END", "END"),
    (POSTGRESQL, "CREATE PROCEDURE p() BEGIN /* */ ATOMIC END; END", "END"),
    (POSTGRESQL, "CREATE FUNCTION f(begin atomic) RETURNS int AS ''; END", "END"),
    (POSTGRESQL, "CREATE RULE r AS ON INSERT TO t DO ALSO (SELECT 1; SELECT 2)", None),
    (SQLITE, "CREATE TRIGGER g AFTER INSERT ON t BEGIN SELECT 1; END", None),
    (SQLITE, "CREATE TEMP TRIGGER g AFTER INSERT ON t BEGIN SELECT 1; END; END", "END"),
    (POSTGRESQL, "CREATE VIEW v AS SELECT * FROM begin atomic; END", "END"),
    (SQLITE, "CREATE TABLE trigger (a); END", "END"),
    (SQLITE, "EXPLAIN QUERY PLAN", None),
    (SQLITE, "EXPLAIN; END", "END"),
    # savepoints are the handler's own
    (POSTGRESQL, "ROLLBACK TRANSACTION TO SAVEPOINT x", None),
    (POSTGRESQL, "ROLLBACK; SAVEPOINT to_x", "ROLLBACK"),
    (SQLITE, "ROLLBACK TRANSACTION mine TO x", None),
    (POSTGRESQL, "PREPARE TRANSACTION E'x'", "PREPARE TRANSACTION"),
    (POSTGRESQL, "PREPARE transaction (int) AS SELECT $1", None),
    (MARIADB, "PREPARE transaction FROM 'SELECT 1'", None),
    # MySQL and MariaDB: what commits by itself, and what only begins like it
    (MARIADB, "CREATE OR REPLACE TEMPORARY TABLE x (a int)", None),
    (MARIADB, "CREATE TEMPORARY SEQUENCE x", "CREATE"),
    (MARIADB, "DROP TEMPORARY TABLE x", None),
    (MARIADB, "DROP PREPARE x", None),
    (MARIADB, "ANALYZE TABLE t", "ANALYZE"),
    (MARIADB, "ANALYZE FORMAT=JSON SELECT 1", None),
    (MARIADB, "LOAD DATA LOCAL INFILE 'x' INTO TABLE t", None),
    (MARIADB, "SET @a = 1, autocommit = 1", "SET autocommit"),
    (MARIADB, "SET @@session.`autocommit` = ON", "SET autocommit"),
    (MARIADB, "SET @a = (SELECT 1, autocommit)", None),
    (MARIADB, "SET GLOBAL autocommit = 1", None),
    (MARIADB, "SET PASSWORD = 'x'", "SET PASSWORD"),
    (MARIADB, "SET STATEMENT max_statement_time = 1 FOR TRUNCATE t", "TRUNCATE"),
    (MARIADB, "SET STATEMENT a = SUBSTRING('1' FROM 1 FOR 1) FOR SET STATEMENT b = 1 FOR COMMIT", "COMMIT"),
    (MARIADB, "SET STATEMENT max_statement_time = 1 FOR SELECT * FROM t FOR UPDATE", None),
    (MARIADB, "IF 1 THEN COMMIT; END IF", "IF"),
    (MARIADB, "REPEAT COMMIT; UNTIL 1 END REPEAT", "REPEAT"),
    (MARIADB, "BEGIN NOT ATOMIC COMMIT; END", "BEGIN"),
    (POSTGRESQL, "TRUNCATE t; SET autocommit = 1", None),
]


@pytest.mark.parametrize(
    ("grammar", "text", "keyword"), ENDS, ids=lambda value: value if isinstance(value, str) else ""
)
def test_a_statement_that_ends_the_transaction_is_found_wherever_the_server_finds_it(
    grammar: Grammar, text: str, keyword: str | None
) -> None:
    assert read(text, grammar).refused == keyword


KEEPS = [
    (POSTGRESQL, "SET LOCAL lock_timeout = 1", None),
    (POSTGRESQL, "set lock_timeout to 1", "SET"),
    (POSTGRESQL, "SET SESSION TIME ZONE 'UTC'", "SET"),
    (POSTGRESQL, "SET local.x = 1", "SET"),
    (POSTGRESQL, "SET LOCAL local.search_path = 1", None),
    (POSTGRESQL, "SET CONSTRAINTS ALL DEFERRED", None),
    (POSTGRESQL, "SET TRANSACTION READ ONLY", None),
    (POSTGRESQL, "SET SESSION CHARACTERISTICS AS TRANSACTION READ ONLY", "SET"),
    (POSTGRESQL, "SET ROLE clerk", "SET"),
    (POSTGRESQL, "SET LOCAL ROLE clerk", None),
    (POSTGRESQL, "SET LOCAL role TO clerk", None),
    (POSTGRESQL, "SET SESSION ROLE NONE", "SET"),
    (POSTGRESQL, "SET SESSION AUTHORIZATION clerk", "SET"),
    (POSTGRESQL, "SET LOCAL SESSION AUTHORIZATION clerk", None),
    (POSTGRESQL, "SET session_authorization = clerk", "SET"),
    (POSTGRESQL, "SET search_path TO other", "SET"),
    (POSTGRESQL, "/* x */ SET LOCAL /* y */ \"Search_Path\" = other", None),
    (POSTGRESQL, "SET LOCAL U&\"search\\005fpath\" = other", None),
    (POSTGRESQL, "SET SCHEMA 'other'", "SET"),
    (POSTGRESQL, "SELECT 1; SELECT 2; SET LOCAL SCHEMA 'other'", None),
    (POSTGRESQL, "RESET ALL", "RESET"),
    (POSTGRESQL, "RESET SESSION AUTHORIZATION", "RESET"),
    (POSTGRESQL, "RESET lock_timeout", "RESET"),
    (POSTGRESQL, "DISCARD TEMP", "DISCARD"),
    (POSTGRESQL, "LISTEN orders", "LISTEN"),
    (POSTGRESQL, "UNLISTEN *", "UNLISTEN"),
    (POSTGRESQL, "PREPARE p AS SELECT 1", "PREPARE"),
    (POSTGRESQL, "DEALLOCATE ALL", "DEALLOCATE"),
    (POSTGRESQL, "LOAD 'auto_explain'", "LOAD"),
    (POSTGRESQL, "LOCK TABLE t", None),
    (POSTGRESQL, "DECLARE c BINARY BINARY BINARY BINARY BINARY CURSOR WITH HOLD FOR SELECT 1", "DECLARE WITH HOLD"),
    (POSTGRESQL, "DECLARE c CURSOR FOR SELECT 1 AS with, 2 AS hold", None),
    (POSTGRESQL, "CREATE TEMP TABLE x (a int)", "CREATE TEMPORARY"),
    (POSTGRESQL, "create or replace local temporary view x as select 1", "CREATE TEMPORARY"),
    (POSTGRESQL, "CREATE TEMP TABLE x (a int) ON COMMIT DROP", None),
    (POSTGRESQL, "CREATE TABLE temp (a int)", None),
    (POSTGRESQL, "EXPLAIN ANALYZE CREATE TEMP TABLE x AS SELECT 1", "CREATE TEMPORARY"),
    (POSTGRESQL, "CREATE TABLE IF NOT EXISTS pg_temp.x (a int)", "CREATE TEMPORARY"),
    (POSTGRESQL, "CREATE TABLE \"pg_temp\".x (a int)", "CREATE TEMPORARY"),
    (POSTGRESQL, "CREATE TABLE x AS SELECT a FROM pg_temp.x", None),
    (POSTGRESQL, "SELECT a INTO TEMP x FROM t", "SELECT INTO TEMPORARY"),
    (POSTGRESQL, "(select a into local /* x */ temporary table x from t)", "SELECT INTO TEMPORARY"),
    (POSTGRESQL, "WITH y AS (SELECT 1) SELECT a INTO -- here\n pg_temp.x FROM y", "SELECT INTO TEMPORARY"),
    (POSTGRESQL, "EXPLAIN ANALYZE SELECT 1 INTO TEMP x", "SELECT INTO TEMPORARY"),
    (POSTGRESQL, "SELECT 1 AS a INTO TABLE pg_temp.kept", "SELECT INTO TEMPORARY"),
    (POSTGRESQL, "SELECT 1 AS a INTO TEMP TABLE kept", "SELECT INTO TEMPORARY"),
    (POSTGRESQL, "SELECT 1 AS a INTO GLOBAL TEMPORARY TABLE kept", "SELECT INTO TEMPORARY"),
    (POSTGRESQL, "INSERT INTO t VALUES (1); SELECT 1 INTO TEMP x", "SELECT INTO TEMPORARY"),
    (POSTGRESQL, "/* x */ INSERT INTO temp VALUES (1) RETURNING a; SELECT 1 INTO TEMP x", "SELECT INTO TEMPORARY"),
    (POSTGRESQL, "WITH y AS (SELECT 1) SELECT insert INTO TEMP x FROM t", "SELECT INTO TEMPORARY"),
    (POSTGRESQL, "WITH y AS (INSERT INTO t VALUES (1) RETURNING a) SELECT a INTO TEMP x FROM y", "SELECT INTO TEMPORARY"),
    (POSTGRESQL, "WITH x AS (SELECT 1 AS a) INSERT INTO pg_temp.stage SELECT a FROM x", None),
    (POSTGRESQL, "WITH x AS (SELECT 1 AS a) INSERT INTO temp SELECT a FROM x", None),
    (POSTGRESQL, "WITH x AS (INSERT INTO pg_temp.stage VALUES (1) RETURNING a) SELECT a FROM x", None),
    (POSTGRESQL, "EXPLAIN ANALYZE INSERT INTO temp VALUES (1)", None),
    (POSTGRESQL, "MERGE INTO temp USING t ON true WHEN MATCHED THEN DELETE", None),
    (POSTGRESQL, "SELECT a INTO TABLE kept FROM t", None),
    (POSTGRESQL, "SELECT a INTO x FROM t", None),
    (POSTGRESQL, "SELECT a INTO template FROM t", None),
    (POSTGRESQL, "INSERT INTO temp VALUES (1)", None),
    (POSTGRESQL, "SELECT 'a INTO TEMP x'", None),
    (POSTGRESQL, "SELECT set_config('a.b', 'c', false)", "set_config"),
    (POSTGRESQL, "INSERT INTO t SELECT \"set_config\"('a.b', f(1, 2), /* x */ FALSE)", "set_config"),
    (POSTGRESQL, "SELECT set_config('a.b', 'c', true), set_config('a.c', 'true)', 'f')", "set_config"),
    (POSTGRESQL, "SELECT set_config('a.b', set_config('a.c', 'd', true), false)", "set_config"),
    (POSTGRESQL, "SELECT pg_catalog.set_config('a.b', (SELECT 'c, true'), true)", None),
    (POSTGRESQL, "SELECT set_config(setting_name => 'a.b', new_value => 'c', is_local => true)", None),
    (POSTGRESQL, "SELECT set_config('a.b', 'c', NOT true)", "set_config"),
    (POSTGRESQL, "SELECT set_config('a.b', 'c', %s)", "set_config"),
    (POSTGRESQL, "SELECT set_config('a.b', 'c', 'true'), set_config('a.c', 'd', ' T ')", None),
    (POSTGRESQL, "SELECT set_config('a.b', 'c', true::boolean), set_config('a.c', 'd', 't'::bool)", None),
    (POSTGRESQL, "SELECT set_config('a.b', 'c', CAST(true AS boolean)), set_config('a.c', 'd', CAST('on' AS bool))", None),
    (POSTGRESQL, "SELECT set_config('a.b', 'c', is_local => 'true')", None),
    (POSTGRESQL, "SELECT set_config(is_local => false, setting_name => 'a.b', new_value => 'true')", "set_config"),
    (POSTGRESQL, "SELECT set_config('a.b', 'c', 'false')", "set_config"),
    (POSTGRESQL, "SELECT set_config('a.b', 'c', E'\\x66')", "set_config"),
    (POSTGRESQL, "SELECT set_config('a.b', 'c', NOT true::boolean)", "set_config"),
    (POSTGRESQL, "SELECT set_config('a.b', 'c', CAST(false AS boolean) AND CAST(true AS boolean))", "set_config"),
    (POSTGRESQL, "SELECT set_config('a.b', 'c', true) || set_config('a.c', f(ARRAY[1, 2], 'x, true'), false)", "set_config"),
    (POSTGRESQL, "SELECT 'set_config(a, b, false)', set_config FROM t", None),
    (POSTGRESQL, "UPDATE pg_settings SET setting = 'x' WHERE name = 'TimeZone'", "UPDATE pg_settings"),
    (POSTGRESQL, "WITH x AS (SELECT 1) update only pg_catalog.\"pg_settings\" SET setting = 'x'", "UPDATE pg_settings"),
    (POSTGRESQL, "DO $$ BEGIN UPDATE pg_settings SET setting = 'x'; END $$", "UPDATE pg_settings"),
    (POSTGRESQL, "UPDATE t SET a = (SELECT setting FROM pg_settings WHERE name = 'TimeZone')", None),
    (POSTGRESQL, "CREATE FUNCTION f() RETURNS text LANGUAGE sql AS $$ SELECT set_config('a.b', 'c', false) $$", None),
    (POSTGRESQL, "SELECT setseed(0.5)", "setseed"),
    (POSTGRESQL, "SELECT dblink_connect('here', 'dbname=x')", "dblink_connect"),
    (POSTGRESQL, "SELECT pg_advisory_unlock_all()", "a lock of the session"),
    (POSTGRESQL, "SELECT pg_advisory_xact_lock(1)", None),
    (POSTGRESQL, "SET x.y = 1; SELECT pg_advisory_lock(1)", "a lock of the session"),
    (POSTGRESQL, "DO $$ BEGIN UPDATE t SET a = 1; PERFORM set_config('a.b', 'c', true); SET LOCAL a.b = 1; END $$", None),
    (POSTGRESQL, "DO $x$ DECLARE a int; BEGIN IF true THEN SET a.b = 1; END IF; END $x$", "SET"),
    (POSTGRESQL, "DO $$ BEGIN PERFORM 1; RESET ALL; END $$", "RESET"),
    (POSTGRESQL, "DO $$ BEGIN CREATE TEMP TABLE x (a int); END $$", "CREATE TEMPORARY"),
    (POSTGRESQL, "DO $$ BEGIN EXECUTE 'SET a.b = 1'; END $$", "EXECUTE"),
    (POSTGRESQL, "SELECT 1; DO 'BEGIN SET a.b = 1; END'", "DO"),
    (POSTGRESQL, "DO LANGUAGE plpython3u $$ plpy.execute('SET a.b = 1') $$", "DO"),
    (POSTGRESQL, "INSERT INTO t VALUES (1) ON CONFLICT DO NOTHING", None),
    (MARIADB, "SELECT 7 INTO @a", "@variable"),
    (MARIADB, "SELECT 7 into /* here */ @`a` FOR UPDATE", "@variable"),
    (MARIADB, "SELECT 7 /*! INTO @a */", "@variable"),
    (MARIADB, "SELECT @a := @a + 1", "@variable"),
    (MARIADB, "UPDATE t SET a = (@a := 1)", "@variable"),
    (MARIADB, "DO @a := 1", "@variable"),
    (MARIADB, "SELECT @a, @@sql_mode", None),
    (MARIADB, "INSERT INTO t VALUES ('x into @a', 'b := 1', '@')", None),
    (MARIADB, "CALL p(1, 2, 3, 4, @a)", "@variable"),
    (MARIADB, "CALL p(@@sql_mode)", None),
    (MARIADB, "LOAD DATA LOCAL INFILE 'x' INTO TABLE t (@a, b)", "@variable"),
    (MARIADB, "GET DIAGNOSTICS @a = ROW_COUNT", "@variable"),
    (MARIADB, "EXECUTE IMMEDIATE 'SET @a = 1'", "EXECUTE IMMEDIATE"),
    (MARIADB, "EXECUTE p", None),
    (MARIADB, "DO RELEASE_ALL_LOCKS()", "a lock of the session"),
    (SQLITE, "CREATE TABLE temp.x (a int)", "CREATE TEMPORARY"),
    (SQLITE, "CREATE TABLE x AS SELECT temp.a FROM t temp", None),
    (MARIADB, "SET @a = 1, @b := 2", "SET"),
    (MARIADB, "SET @a = 1, sql_mode = ''", "SET"),
    (MARIADB, "SET @@sql_mode = ''", "SET"),
    (MARIADB, "SET NAMES utf8mb4", "SET"),
    (MARIADB, "SET CHARACTER SET utf8mb4", "SET"),
    (MARIADB, "SET GLOBAL max_connections = 5", None),
    (MARIADB, "SET @@global.max_connections = 5", None),
    (MYSQL, "SET PERSIST max_connections = 5", None),
    (MARIADB, "SET STATEMENT max_statement_time = 1 FOR SELECT 1", None),
    (MARIADB, "SET STATEMENT max_statement_time = 1 FOR USE other", "USE"),
    (MARIADB, "SET ROLE clerk", "SET"),
    (MARIADB, "USE other", "USE"),
    (MARIADB, "PREPARE p FROM 'SELECT 1'", "PREPARE"),
    (MARIADB, "DEALLOCATE PREPARE p", "DEALLOCATE"),
    (MARIADB, "DROP PREPARE p", "DROP PREPARE"),
    (MARIADB, "HANDLER shop.t OPEN", "HANDLER"),
    (MARIADB, "HANDLER t CLOSE", None),
    (MARIADB, "CREATE TEMPORARY TABLE IF NOT EXISTS x (a int)", "CREATE TEMPORARY"),
    (MARIADB, "/*!40101 SET NAMES utf8mb4 */", "SET"),
    (SQLITE, "PRAGMA foreign_keys = OFF", "PRAGMA"),
    (SQLITE, "PRAGMA main.synchronous(0)", "PRAGMA"),
    (SQLITE, "EXPLAIN PRAGMA foreign_keys = OFF", "PRAGMA"),
    (SQLITE, "PRAGMA foreign_keys", None),
    (SQLITE, "PRAGMA defer_foreign_keys = ON", None),
    (SQLITE, "PRAGMA main.defer_foreign_keys(1)", None),
    (SQLITE, "PRAGMA main.table_info('t')", None),
    (SQLITE, "ATTACH 'x.db' AS x", "ATTACH"),
    (SQLITE, "DETACH x", "DETACH"),
    (SQLITE, "CREATE TEMP TABLE x (a int)", "CREATE TEMPORARY"),
]  # fmt: skip


@pytest.mark.parametrize(("grammar", "text", "session"), KEEPS)
def test_a_statement_tells_what_outlives_it(grammar: Grammar, text: str, session: str | None) -> None:
    said = read(text, grammar)
    assert (said.session, said.refused) == (session, None)


@pytest.mark.parametrize(
    ("grammar", "text", "unseen"),
    [
        (MARIADB, "SELECT 1; CALL p()", "CALL"),
        (MARIADB, "EXECUTE IMMEDIATE 'COMMIT'", "EXECUTE"),
        (MARIADB, "SET STATEMENT max_statement_time = 1 FOR CALL p()", "CALL"),
        (MARIADB, "DO 1", None),
        (POSTGRESQL, "DO $$ BEGIN PERFORM 1; END $$", "DO"),
        (POSTGRESQL, "(CALL p())", "CALL"),
        (SQLITE, "SELECT 1", None),
    ],
)
def test_a_statement_that_runs_what_cannot_be_read_is_told(grammar: Grammar, text: str, unseen: str | None) -> None:
    assert read(text, grammar).unseen == unseen


def test_the_first_word_is_told_and_what_is_sent_most_is_told_without_reading() -> None:
    assert read("-- why\n(Select 1)", POSTGRESQL) == Read("SELECT")
    assert read("'", POSTGRESQL) == read("", POSTGRESQL) == Read("")
    said = read("insert into t values (1)", POSTGRESQL)
    assert said == Read("INSERT")
    assert reader(POSTGRESQL)("INSERT INTO t VALUES (2)") == said


def test_what_is_set_for_the_transaction_or_the_session_by_a_parameter_is_told_by_its_value() -> None:
    said = read(
        "SELECT set_config(%(a)s::VARCHAR, 'b', %(Local)s), set_config('c', 'd', %(also)s::BOOLEAN)", POSTGRESQL
    )
    assert (said.session, said.unless) == ("set_config", ("LOCAL", "ALSO"))
    assert said.changes({"a": "x", "Local": True, "also": True}) is None
    for session in (
        {"Local": True, "also": False},
        {"Local": None, "also": True},
        {},
        [{"Local": True}],
        ("x", True),
        None,
    ):
        assert said.changes(session) == "set_config"
    assert read("SELECT set_config('a', 'b', %(c)s), set_config('c', 'd', false)", POSTGRESQL).unless == ()
    assert read("SELECT set_config('a', 'b', CAST(%(c)s AS BOOLEAN))", POSTGRESQL).unless == ("C",)


@pytest.mark.parametrize(
    "local", ["%(c)s IS NOT TRUE", "%(c)s = false", "NOT %(c)s", "%(c)s::boolean AND false", "coalesce(%(c)s, true)"]
)
def test_a_parameter_within_an_expression_says_nothing_of_what_is_set(local: str) -> None:
    said = read(f"SELECT set_config('a', 'b', {local})", POSTGRESQL)
    assert (said.session, said.unless) == ("set_config", ())
    assert said.changes({"c": True}) == "set_config"


LONG = [
    "into temp ",
    "into @a ",
    "set_config(",
    "set_config('a', 'b', %(c)s), ",
    "set_config('a', 'b', true), (",
    "insert into temp ",
    "-- ",
    "/**/",
    "BEGIN UPDATE pg_settings ",
    "into /* ",
    "SELECT 1; SELECT 'a', E'b\\'' , $$x$$ , foo; ",
    "SELECT E'\\'",
    "'",
    "\\",
    "/*",
    "/*!",
    "/*!50000 ",
    "SET a = 1, ",
    "SET STATEMENT a = 1 FOR ",
    "CREATE FUNCTION f() BEGIN ATOMIC ",
    "DECLARE c WITH ",
    "$a$",
    "$",
    "-- \n",
    "E'a'\n",
    "(",
    ";",
    "a",
    '"',
    "[",
]


@pytest.mark.parametrize("piece", LONG)
@pytest.mark.parametrize("grammar", [POSTGRESQL, ESCAPING, MARIADB, SQLITE], ids=["on", "off", "mariadb", "sqlite"])
def test_a_text_ten_times_as_long_takes_about_ten_times_as_long(grammar: Grammar, piece: str) -> None:
    def seconds(characters: int) -> float:
        text = "SELECT 'a" + piece * (characters // len(piece)) + ";x"
        other = piece * (characters // len(piece)) + ";x"
        begun = time.process_time()
        read(text, grammar)
        read(other, grammar)
        read("DO $$ " + piece * (characters // len(piece)), grammar)
        number = characters // len(piece)
        read("SELECT " + piece * number + "1" + ", true)" * number, grammar)
        return time.process_time() - begun

    # quadratic would be a hundred times as long
    assert seconds(50_000) < 30 * max(seconds(5_000), 0.01)


def test_a_megabyte_of_values_is_read_at_once_and_not_kept() -> None:
    text = "INSERT INTO t VALUES " + "(1, 'one;')," * 90_000 + "(1, 'one'); COMMIT"
    begun = time.process_time()
    assert read(text, POSTGRESQL).refused == "COMMIT"
    assert time.process_time() - begun < 5
    values = "(1, 'one@')," * 90_000 + "(1, 'one')"
    for grammar, one in (
        (POSTGRESQL, "INSERT INTO t VALUES " + values),
        (POSTGRESQL, "INSERT INTO temperature VALUES " + values),
        (POSTGRESQL, "/* 00-1 */ INSERT INTO temp VALUES " + values),
        (POSTGRESQL, "WITH x AS (SELECT 1) INSERT INTO template VALUES " + values),
        (MARIADB, "INSERT INTO t VALUES " + values),
    ):
        begun = time.process_time()
        for _ in range(100):
            read(one, grammar)
        # one statement, known by its first word; and a search for what it might leave in the session
        assert time.process_time() - begun < 2
