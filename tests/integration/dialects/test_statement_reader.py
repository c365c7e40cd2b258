"""The reader of statements against the servers: random texts are sent, and it must have seen each that ended the transaction.

A savepoint set before the text is gone exactly when the text ended the transaction. The reader may refuse more than that
only where the server finds an error. EXACTLY_ONCE_TEST_FULL=1 sends many more texts, other ones each time.
"""

import os
import random
import re
import sqlite3
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import psycopg
import pymysql
import pytest
from psycopg.pq import ExecStatus, TransactionStatus
from pymysql.constants import CLIENT
from sqlalchemy import make_url

from exactly_once.database.dialects.keywords import read
from exactly_once.database.dialects.statements import MARIADB, POSTGRESQL, SQLITE, Grammar

FULL = os.environ.get("EXACTLY_ONCE_TEST_FULL") == "1"
TEXTS = 20_000 if FULL else 2_000
SEED = random.randrange(1 << 32) if FULL else 1

Ended = tuple[bool, bool]
"""Whether the text ended the transaction, and whether the server found an error in it."""
Send = Callable[[str], Ended]


# -- texts -------------------------------------------------------------------------------------------------------------

SOUP = [
    "'", "''", '"', '""', "\\", "\\\\", "\\'", '\\"', "' '", "E'", "e'", "U&'", "B'", "x'", "N'", "_utf8'", "`", "``", "[",
    "]", ";", ";", "; COMMIT;", ";COMMIT--", "COMMIT", "SELECT", "SELECT 1", "FROM", "AS", "END", "BEGIN", "case", "TO w",
    "--", "-- ", "--\t", "#", "/*", "*/", "/*/", "*", "/", "-", "/*!", "/*!50000 ", "/*!999999 ", "/*!80000 ", "/*M!",
    "/*M!50000", "$$", "$a$", "$b$", "$", "$1", "a$b$", "a", "e", "1", "1.5", "0x1F", "é", "\u00a0", "\n", "\r", "\n'",
    "\n--\n'", " ", " ", "\t", "\x0b", ",", "=", "@", "@@", ".", ":", "%", "+", "|",
]  # fmt: skip
ENDS = [
    "COMMIT", "COMMIT", "commit work", "ROLLBACK", "END", "ABORT", "COMMIT;BEGIN", "/**/COMMIT", "COMMIT/*;*/", "--\nCOMMIT",
    "\nEnd", "COMMIT #x\n", "/*!COMMIT*/", "/*!50000 COMMIT*/", "/*M!50000COMMIT */", "/*!999999 ' */ COMMIT",
    "ROLLBACK /*!999999 x*/ TO w",
]  # fmt: skip
ENDS_MARIADB = [
    *ENDS,
    "SET @a = 1, autocommit = 1",
    "SET STATEMENT max_statement_time = 1 FOR COMMIT",
    "DROP TABLE IF EXISTS none",
    "IF 1 THEN COMMIT; END IF",
]
STAYS = ["SELECT 1", "(SELECT 1)", "ROLLBACK TO w", "rollback to savepoint w", "VALUES (1)", "", " ", "SAVEPOINT v"]
BODIES = {
    "postgresql": [
        "CREATE FUNCTION {} RETURNS int BEGIN ATOMIC SELECT 1; SELECT 'x;' AS a; END",
        "CREATE FUNCTION {} RETURNS int BEGIN ATOMIC SELECT 1 case; SELECT CASE WHEN true THEN 2 END; END",
        "CREATE FUNCTION {} RETURNS int LANGUAGE sql AS 'SELECT 1;'",
    ],
    "mysql": ["SET STATEMENT max_statement_time = 1 FOR SELECT 1", "SET @a = 'x;', @b = (SELECT 1)"],
    "sqlite": ["CREATE TRIGGER {} AFTER INSERT ON other BEGIN SELECT 1; SELECT CASE WHEN 1 THEN 2 END; END"],
}


def text_of(chance: random.Random, dialect: str, number: int) -> str:
    """A text of a few statements; most are right, some are nearly."""
    statements = []
    for _ in range(chance.randint(1, 4)):
        kind = chance.random()
        if kind < 0.2:
            statements.append(chance.choice(ENDS_MARIADB if dialect == "mysql" else ENDS))
        elif kind < 0.3:
            statements.append(chance.choice(STAYS))
        elif kind < 0.35:
            name = f"f{number}_{len(statements)}"
            statements.append(chance.choice(BODIES[dialect]).format(name + "()" * (dialect == "postgresql")))
        elif kind < 0.4:
            statements.append(soup(chance))
        else:
            values = [value(chance, dialect) for _ in range(chance.randint(1, 3))]
            statements.append(f"SELECT {', '.join(values)}")
    text = ";".join(statements)
    if chance.random() < 0.15:  # one character more, or less
        at = chance.randrange(len(text) + 1)
        text = text[:at] + (chance.choice(SOUP) if chance.random() < 0.5 else "") + text[at + chance.randint(0, 1) :]
    return text


def soup(chance: random.Random) -> str:
    return "".join(chance.choice(SOUP) for _ in range(chance.randint(0, 8)))


def value(chance: random.Random, dialect: str) -> str:
    """A value in quotes, or beside a comment; its quotes doubled or escaped as one of the dialects would have it."""
    inside = soup(chance)
    doubled, escaped = inside.replace("'", "''"), inside.replace("\\", "\\\\").replace("'", "\\'")
    forms = [
        f"'{doubled}'",
        f"'{escaped}'",
        f"'{inside}'",
        "'" + inside.replace("\\", "\\\\").replace("'", "''") + "'",
        '1 AS "' + inside.replace('"', '""') + 'x"',
        "/*" + inside.replace("*/", "").replace("/*", "") + "*/ 1",
        f"/*{inside}*/ 1",
        "1 -- " + inside.replace("\n", "").replace("\r", "") + "\n",
        f"1 --{inside}\n",
    ]
    if dialect == "postgresql":
        forms += [
            f"E'{escaped}'",
            f"e'{escaped}'\n'{escaped}'",
            f"'{doubled}' --'\n '{doubled}'",
            f"$${inside.replace('$', '')}$$",
            f"$a${inside.replace('$a', '')}$a$",
            f"text'{doubled}'",
            f"U&'{doubled}'",
            f"/*/*{inside}*/{chance.choice(SOUP).replace('*/', '').replace('/*', '')};*/ 1",
            "1 --" + inside.replace("\n", "").replace("\r", "") + "\r",
            "B'01'",
            "1 a$b$",
            "2*/*'*/3",
        ]
    elif dialect == "mysql":
        forms += [
            '"' + inside.replace("\\", "\\\\").replace('"', '\\"') + '"',
            '"' + inside.replace('"', '""') + '"',
            "1 AS `" + inside.replace("`", "``") + "x`",
            "1 # " + inside.replace("\n", "") + "\n",
            f"1 --'{escaped}'",
            f"/*!{inside}*/ 1",
            f"/*!999999 {inside}*/ 1",
            f"/*!50000 '{escaped}', */ 1",
            f"/*M! '{doubled}', */ 1",
            "/*! 2*/*'*/3",
            f"_utf8'{escaped}'",
        ]
    else:
        forms += ["1 AS [" + inside.replace("]", "") + "]", "1 AS `" + inside.replace("`", "``") + "x`"]
    return chance.choice(forms)


def compare(send: Send, grammar: Grammar) -> Counter[str]:
    """Send texts; return how many ended the transaction, stayed in it, were errors, and were errors that were refused."""
    chance = random.Random(SEED)
    seen: Counter[str] = Counter()
    for number in range(TEXTS):
        text = text_of(chance, grammar.dialect, number)
        said = read(text, grammar).refused
        ended, error = send(text)
        if ended:
            assert said is not None, f"it ended the transaction (seed {SEED}): {text!r}"
        elif not error and said != "BEGIN":  # refused by its name, and no more than a warning to PostgreSQL
            assert said is None, f"it did not end the transaction, and was refused for {said} (seed {SEED}): {text!r}"
        seen["ended" if ended else "error" if error else "stayed"] += 1
        seen["refused although the server found an error first"] += error and not ended and said is not None
    print(grammar, dict(seen))
    # a text in four, at least, of each kind that is compared: else the test would see little
    assert seen["ended"] > TEXTS / 8
    assert seen["stayed"] > TEXTS / 8
    return seen


# -- servers -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def postgres(postgres_url: str) -> Iterator[psycopg.Connection]:
    url = make_url(postgres_url).set(drivername="postgresql")
    with psycopg.connect(
        url.render_as_string(hide_password=False), autocommit=True, prepare_threshold=None
    ) as connection:
        yield connection


def on_postgres(connection: psycopg.Connection) -> Send:
    pgconn = connection.pgconn

    def send(text: str) -> Ended:
        pgconn.exec_(b"BEGIN; SAVEPOINT w")
        error = pgconn.exec_(text.encode()).status == ExecStatus.FATAL_ERROR
        ended = pgconn.transaction_status == TransactionStatus.IDLE
        if not ended:
            ended = pgconn.exec_(b"ROLLBACK TO w").status == ExecStatus.FATAL_ERROR
            pgconn.exec_(b"ROLLBACK")
        return ended, error

    return send


@pytest.fixture
def mariadb(mariadb_url: str) -> Iterator[pymysql.Connection]:
    url = make_url(mariadb_url)
    connection = pymysql.connect(
        host=url.host or "",
        port=url.port or 0,
        user=url.username,
        password=url.password or "",
        database=url.database,
        client_flag=CLIENT.MULTI_STATEMENTS,
        read_timeout=30,
    )
    with connection:
        connection.query("CREATE TABLE other (a INT)")
        connection.query("CREATE DATABASE IF NOT EXISTS eo_elsewhere")
        connection.query("CREATE OR REPLACE ROLE eo_clerk WITH ADMIN CURRENT_USER")
        connection.query("CREATE TEMPORARY TABLE mine (a INT)")
        yield connection


def on_mariadb(connection: pymysql.Connection) -> Send:
    def send(text: str) -> Ended:
        error = False
        connection.query("SET autocommit = 0")
        connection.query("START TRANSACTION")
        connection.query("SAVEPOINT w")
        cursor = connection.cursor()
        try:
            cursor.execute(text)
            while cursor.nextset():
                pass
        except pymysql.MySQLError:
            error = True
        try:
            connection.query("ROLLBACK TO SAVEPOINT w")
        except pymysql.MySQLError as gone:
            assert gone.args[0] == 1305  # noqa: PT017  # of our own statement
            return True, error
        finally:
            connection.query("ROLLBACK")
        return False, error

    return send


def version_of(connection: pymysql.Connection) -> int:
    found = re.search(r"(\d+)\.(\d+)\.(\d+)-MariaDB", connection.get_server_info())
    assert found is not None
    major, minor, patch = map(int, found.groups())
    return major * 10_000 + minor * 100 + patch


def on_sqlite(connection: sqlite3.Connection) -> Send:
    def send(text: str) -> Ended:
        error = False
        try:
            connection.executescript("BEGIN; SAVEPOINT w;" + text)
        except sqlite3.Error:
            error = True
        if not connection.in_transaction:
            return True, error
        try:
            connection.execute("ROLLBACK TO w")
        except sqlite3.Error:
            return True, error
        finally:
            connection.execute("ROLLBACK")
        return False, error

    return send


# -- what is compared --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("conforming", [True, False], ids=["conforming strings", "escaping strings"])
def test_what_postgresql_takes_for_the_end_of_the_transaction_is_refused(
    postgres: psycopg.Connection, conforming: bool
) -> None:
    postgres.execute(f"SET standard_conforming_strings = {'on' if conforming else 'off'}")  # type: ignore[arg-type]
    assert postgres.info.parameter_status("standard_conforming_strings") == ("on" if conforming else "off")
    compare(on_postgres(postgres), POSTGRESQL._replace(backslash=not conforming))


@pytest.mark.parametrize("mode", ["", "NO_BACKSLASH_ESCAPES", "ANSI_QUOTES", "NO_BACKSLASH_ESCAPES,ANSI_QUOTES"])
def test_what_mariadb_takes_for_the_end_of_the_transaction_is_refused(
    mariadb: pymysql.Connection,
    mode: str,
) -> None:
    mariadb.query(f"SET sql_mode = '{mode}'")
    grammar = MARIADB._replace(
        backslash="BACKSLASH" not in mode, ansi_quotes="ANSI" in mode, version=version_of(mariadb)
    )
    compare(on_mariadb(mariadb), grammar)


def test_what_sqlite_takes_for_the_end_of_the_transaction_is_refused(tmp_path: Path) -> None:
    connection = sqlite3.connect(tmp_path / "texts.db", isolation_level=None)
    connection.execute("PRAGMA synchronous = OFF")
    connection.execute("CREATE TABLE other (a INT)")
    compare(on_sqlite(connection), SQLITE)
    connection.close()


# -- statements that end a transaction without its name, and statements that outlive it --------------------------------

COMMITS = """
    ALTER TABLE other ADD COLUMN b INT | ANALYZE TABLE other | ANALYZE LOCAL TABLE other | BACKUP LOCK other
    BACKUP UNLOCK | CHECK TABLE other | CREATE TABLE more (a INT) | CREATE OR REPLACE TABLE more (a INT)
    CREATE INDEX i ON mine (a) | CREATE TEMPORARY SEQUENCE s | CREATE USER someone | DROP TABLE IF EXISTS more
    FLUSH STATUS | GRANT SELECT ON *.* TO someone | REVOKE SELECT ON *.* FROM someone | DROP USER someone
    LOCK TABLES other WRITE | OPTIMIZE TABLE other | RENAME TABLE other TO another | RENAME TABLE another TO other
    REPAIR TABLE other | RESET QUERY CACHE | TRUNCATE mine | TRUNCATE TABLE other | INSTALL SONAME 'none'
    UNINSTALL SONAME 'none' | SET autocommit = 1 | SET @@autocommit = ON | SET @@session.`autocommit` = 1
    SET LOCAL autocommit = 1 | SET @a = COALESCE(1, 2), autocommit = 1 | SET PASSWORD = PASSWORD('')
    SET DEFAULT ROLE NONE | SET STATEMENT max_statement_time = 1 FOR TRUNCATE other
    SET STATEMENT max_statement_time = 1 + SUBSTRING('1' FROM 1 FOR 1) FOR COMMIT
    SET STATEMENT max_statement_time = 1 FOR SET STATEMENT max_statement_time = 2 FOR SET autocommit = 1
    IF 1 THEN COMMIT; END IF | CASE 1 WHEN 1 THEN COMMIT; END CASE | REPEAT COMMIT; UNTIL 1 END REPEAT
    WHILE @@in_transaction DO COMMIT; END WHILE | FOR i IN 1 .. 2 DO COMMIT; END FOR | BEGIN NOT ATOMIC COMMIT; END
    START TRANSACTION | BEGIN | COMMIT AND CHAIN | ROLLBACK AND CHAIN
"""
COMMITS_NOT = """
    ANALYZE SELECT 1 | ANALYZE FORMAT=JSON SELECT 1 | CHECKSUM TABLE other | CREATE TEMPORARY TABLE some (a INT)
    CREATE OR REPLACE TEMPORARY TABLE some (a INT) | DROP TEMPORARY TABLE some | DROP TEMPORARY SEQUENCE IF EXISTS s
    LOAD DATA LOCAL INFILE '/dev/null' INTO TABLE other | PREPARE p FROM 'TRUNCATE other' | DROP PREPARE p
    DEALLOCATE PREPARE none | SET @a = 1 | SET @autocommit = 1 | SET @a = @@autocommit | SET GLOBAL autocommit = 0
    SET @@global.autocommit = 0 | SET NAMES utf8mb4 | SET ROLE NONE | SET sql_mode = DEFAULT | HANDLER other OPEN
    SET STATEMENT max_statement_time = 1 FOR SELECT * FROM other FOR UPDATE | DO 1 | HELP 'x' | XA RECOVER
    SAVEPOINT v | ROLLBACK WORK TO SAVEPOINT w | ROLLBACK TO w | (SELECT 1) | SELECT 1 INTO @commit
"""


def listed(statements: str) -> list[str]:
    return [each.strip() for line in statements.strip().splitlines() for each in line.split(" | ")]


def test_what_commits_by_itself_on_mariadb_is_refused_and_nothing_that_looks_like_it(
    mariadb: pymysql.Connection,
) -> None:
    send = on_mariadb(mariadb)
    for text in listed(COMMITS):
        ended, _ = send(text)
        mariadb.query("UNLOCK TABLES")
        assert (text, ended, read(text, MARIADB).refused is not None) == (text, True, True)
    for text in listed(COMMITS_NOT):
        ended, _ = send(text)
        assert (text, ended, read(text, MARIADB).refused) == (text, False, None)


OUTLIVES_POSTGRES = """
    SET lock_timeout = 77 | SET SESSION lock_timeout = 77 | SET TIME ZONE 'Asia/Tokyo' | SET NAMES 'LATIN1'
    SET ROLE eo_clerk | SET role = eo_clerk | SET SESSION ROLE eo_clerk | SET SESSION AUTHORIZATION eo_clerk
    SET session_authorization TO eo_clerk | SET SESSION SESSION AUTHORIZATION eo_clerk | SET search_path = pg_catalog
    SET "Search_Path" TO pg_catalog | SET SCHEMA 'pg_catalog' | SET U&"search\\005fpath" = pg_catalog
    SET local.path = 'x' | SET SESSION CHARACTERISTICS AS TRANSACTION READ ONLY | LISTEN orders | PREPARE p AS SELECT 1
    DECLARE c CURSOR WITH HOLD FOR SELECT 1 | DECLARE c BINARY NO SCROLL BINARY BINARY BINARY BINARY CURSOR WITH HOLD FOR SELECT 1
    CREATE TEMP TABLE x (a int) | CREATE LOCAL TEMPORARY TABLE x (a int) | CREATE OR REPLACE TEMP VIEW x AS SELECT 1
    CREATE TEMP SEQUENCE x | EXPLAIN ANALYZE CREATE TEMP TABLE x AS SELECT 1
    CREATE TEMP TABLE x ON COMMIT PRESERVE ROWS AS SELECT 1
"""
OUTLIVES_NOT_POSTGRES = """
    SET LOCAL lock_timeout = 77 | SET LOCAL TIME ZONE 'Asia/Tokyo' | SET LOCAL ROLE eo_clerk | SET LOCAL role TO eo_clerk
    SET LOCAL SESSION AUTHORIZATION eo_clerk | SET LOCAL session_authorization = eo_clerk | SET LOCAL search_path = pg_catalog
    SET LOCAL SCHEMA 'pg_catalog' | SET LOCAL "search_path" = pg_catalog | SET LOCAL local.path = 'x'
    SET CONSTRAINTS ALL DEFERRED | SET TRANSACTION READ ONLY | SET SESSION TRANSACTION READ ONLY | NOTIFY orders
    DECLARE c CURSOR FOR SELECT 1 | CREATE TEMP TABLE x (a int) ON COMMIT DROP | LOCK TABLE pg_temp.mine | SAVEPOINT x
"""
KEPT_BY_POSTGRES = """
    SELECT (SELECT array_agg(row(name, setting, reset_val)::text ORDER BY name) FROM pg_settings
        WHERE name NOT IN ('transaction_read_only', 'transaction_isolation', 'transaction_deferrable')),
    (SELECT array_agg(n) FROM pg_listening_channels() n), (SELECT count(*) FROM pg_prepared_statements),
    (SELECT count(*) FROM pg_cursors WHERE is_holdable), current_setting('local.path', true) IS NOT DISTINCT FROM 'x',
    (SELECT count(*) FROM pg_catalog.pg_class WHERE relnamespace = pg_my_temp_schema() AND relname IN ('x', 'mine'))
"""


@pytest.mark.parametrize("outlives", [True, False], ids=["outlives it", "ends with it"])
def test_what_outlives_a_transaction_on_postgresql_is_told(postgres: psycopg.Connection, outlives: bool) -> None:
    postgres.execute("DROP ROLE IF EXISTS eo_clerk")
    postgres.execute("CREATE ROLE eo_clerk")
    for text in listed(OUTLIVES_POSTGRES if outlives else OUTLIVES_NOT_POSTGRES):
        # what the reader knows not to follow; a table made before the text is told apart from one that it makes
        postgres.execute("RESET SESSION AUTHORIZATION")
        postgres.execute("DISCARD ALL")
        postgres.execute("CREATE TEMP TABLE mine (a int)")
        before = postgres.execute(KEPT_BY_POSTGRES).fetchone()
        postgres.execute("BEGIN")
        postgres.execute(text.encode())
        postgres.execute("COMMIT")
        changed = postgres.execute(KEPT_BY_POSTGRES).fetchone() != before
        said = read(text, POSTGRESQL)
        assert (text, changed, said.session is not None) == (text, outlives, outlives)
    postgres.execute("RESET SESSION AUTHORIZATION")
    postgres.execute("DROP ROLE eo_clerk")


OUTLIVES_MARIADB = """
    SET sql_mode = 'ANSI_QUOTES' | SET @a = 1, sql_mode = 'ANSI_QUOTES' | SET SESSION sql_mode = 'ANSI_QUOTES'
    SET @@sql_mode = 'ANSI_QUOTES' | SET @@session.sql_mode = 'ANSI_QUOTES' | SET @@local.`sql_mode` = 'ANSI_QUOTES'
    SET NAMES latin1 | SET CHARACTER SET latin1 | SET CHARSET latin1 | SET SESSION TRANSACTION ISOLATION LEVEL SERIALIZABLE
    SET ROLE eo_clerk | USE eo_elsewhere | /*! USE eo_elsewhere */ | SET STATEMENT max_statement_time = 1 FOR USE eo_elsewhere
    CREATE TEMPORARY TABLE x (a INT) | CREATE OR REPLACE TEMPORARY TABLE x (a INT)
    SET @a = 1 | SET @a := 1, @b = 2 | SET @sql_mode = 1
"""
OUTLIVES_NOT_MARIADB = """
    SET GLOBAL max_connections = 300
    SET @@global.max_connections = 300 | SET STATEMENT sql_mode = 'ANSI_QUOTES' FOR SELECT 1 | SELECT 1 AS `use`
"""
KEPT_BY_MARIADB = "SELECT DATABASE(), CURRENT_ROLE(), @@sql_mode, @@character_set_client, @@tx_isolation, @a, @sql_mode"


@pytest.mark.parametrize("outlives", [True, False], ids=["outlives it", "ends with it"])
def test_what_outlives_a_transaction_on_mariadb_is_told(mariadb: pymysql.Connection, outlives: bool) -> None:
    def ask(question: str) -> object:
        with mariadb.cursor() as cursor:
            try:
                cursor.execute(question)
            except pymysql.MySQLError as error:
                return error.args[0]
            return cursor.fetchall()

    ours = str(mariadb.db, "ascii") if isinstance(mariadb.db, bytes) else mariadb.db
    for text in listed(OUTLIVES_MARIADB if outlives else OUTLIVES_NOT_MARIADB):
        for reset in (
            "SET sql_mode = DEFAULT",
            "SET NAMES utf8mb4",
            "SET ROLE NONE",
            "SET tx_isolation = DEFAULT",
            "SET @a = NULL, @sql_mode = NULL",
        ):
            mariadb.query(reset)
        mariadb.select_db(ours)
        mariadb.query("DROP TEMPORARY TABLE IF EXISTS x")
        before = ask(KEPT_BY_MARIADB), ask(f"SELECT * FROM {ours}.x")
        mariadb.query("START TRANSACTION")
        mariadb.query(text)
        mariadb.commit()
        changed = (ask(KEPT_BY_MARIADB), ask(f"SELECT * FROM {ours}.x")) != before
        said = read(text, MARIADB)
        assert (text, changed, said.session is not None, said.refused) == (text, outlives, outlives, None)
