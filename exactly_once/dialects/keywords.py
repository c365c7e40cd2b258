"""Reads what a handler sends, by the first words of each statement in a text: may it be sent, and what does it change.

Three answers come from one reading, once for each text. *Refused*: it would end the handler's transaction. *Session*: the
connection is not what it was for whoever has it next. *Context*: from here on, statements of ours in this transaction
would run as somebody else, or find tables of another schema.

It reads first words and no SQL. So it cannot see what functions and procedures do: `SELECT set_config(...)`,
`SELECT pg_advisory_lock(...)`, `SELECT GET_LOCK(...)`, a COMMIT in a procedure, a trigger or a prepared text; nor a
temporary table made by `SELECT ... INTO TEMP` or by the name of its schema. `unseen` says that a statement runs a text
which is not there to read; the transaction's own witnesses tell what became of it.
"""

import re
from collections.abc import Callable, Sequence
from functools import cache, lru_cache
from itertools import product
from typing import Final, NamedTuple

from exactly_once.dialects.statements import MYSQL, POSTGRESQL, Grammar, statements

__all__ = ["IMPLICIT_COMMITS", "Read", "read", "reader", "refused"]


class Read(NamedTuple):
    """What a text is to the handler's transaction; each a keyword as people write it, None for no.

    Args:
        first: The first word of its first statement, in capitals; empty where there is none.
        refused: What would end the transaction; then nothing behind it was read.
        session: What changes the connection for longer than the transaction.
        context: What changes who runs our own statements, or where they find their tables.
        unseen: What runs a text that cannot be read here: CALL, EXECUTE, DO.
    """

    first: str
    refused: str | None = None
    session: str | None = None
    context: str | None = None
    unseen: str | None = None


_ENDS: Final = frozenset({"COMMIT", "BEGIN", "START", "END", "ABORT"})

# MySQL and MariaDB commit the open transaction before any of these, without a word; some of them only at times
IMPLICIT_COMMITS: Final = frozenset(
    {
        "ALTER", "ANALYZE", "BACKUP", "CACHE", "CHANGE", "CHECK", "CLONE", "CREATE", "DROP", "FLUSH", "GRANT", "IMPORT",
        "INSTALL", "LOAD", "LOCK", "OPTIMIZE", "RENAME", "REPAIR", "RESET", "REVOKE", "STOP", "TRUNCATE", "UNINSTALL",
        "UNLOCK",
    }
)  # fmt: skip
# a statement of MariaDB that holds others, each of which may end the transaction
_COMPOUND: Final = frozenset({"CASE", "DECLARE", "FOR", "IF", "LOOP", "REPEAT", "WHILE"})
_WHO_OR_WHERE: Final = frozenset({"ROLE", "SCHEMA", "SEARCH_PATH", "SESSION_AUTHORIZATION", "ALL"})
# questions about the database that have an argument; asked where SQLAlchemy reflects a table
_PRAGMA_QUESTIONS: Final = frozenset(
    {
        "FOREIGN_KEY_CHECK", "FOREIGN_KEY_LIST", "INDEX_INFO", "INDEX_LIST", "INDEX_XINFO", "INTEGRITY_CHECK",
        "QUICK_CHECK", "TABLE_INFO", "TABLE_LIST", "TABLE_XINFO",
    }
)  # fmt: skip

# nearly all that is ever sent, told without reading it: one statement, known by its first word
_FIRST: Final = re.compile(r"\s*([A-Za-z]+)")
_PLAIN: Final = {word: Read(word) for word in ("DELETE", "INSERT", "SELECT", "UPDATE", "WITH")}
_PLAIN |= {word.lower(): plain for word, plain in _PLAIN.items()}

_REMEMBERED: Final = 32_768
"""Characters. A longer text is read each time: its values stand in it, it does not come again, and many fill the memory."""


@cache
def reader(grammar: Grammar) -> Callable[[str], Read]:
    """Return what reads texts of one grammar, and remembers what it read: ask for it once, not for each text.

    Example:
        `reader(POSTGRESQL)("SELECT 1; SET ROLE clerk").context` is `"SET ROLE"`.
    """

    @lru_cache(maxsize=1024)
    def remembered(statement: str) -> Read:
        return _read(statement, grammar)

    def read(statement: str) -> Read:
        return remembered(statement) if len(statement) < _REMEMBERED else _read(statement, grammar)

    return read


def read(statement: str, grammar: Grammar) -> Read:
    """Read a text that is about to be sent.

    Args:
        statement: The text, before its values are put in.
        grammar: How its server reads it.
    """
    return reader(grammar)(statement)


def refused(statement: str, ddl_commits: bool) -> str | None:
    """Return the keyword by which a handler would end its transaction with this statement, None if it would not."""
    return read(statement, MYSQL if ddl_commits else POSTGRESQL).refused


def _read(statement: str, grammar: Grammar) -> Read:
    if ";" not in statement:
        found = _FIRST.match(statement)
        if found is not None and (plain := _PLAIN.get(found[1])) is not None:
            return plain
    elif grammar.dialect == "mysql" and "sql_mode" in statement.lower():
        # its first statement may change how the server reads the others
        for backslash, ansi_quotes in product((True, False), repeat=2):
            other = _judged(statement, grammar._replace(backslash=backslash, ansi_quotes=ansi_quotes))
            if other.refused is not None:
                return other
    return _judged(statement, grammar)


def _judged(statement: str, grammar: Grammar) -> Read:
    judge = _JUDGES[grammar.dialect]
    first, session, context, unseen, body = "", None, None, None, False
    for tokens in statements(statement, grammar):
        first = first or (tokens[0] if tokens[0].isalpha() else "")
        if body and tokens[0] == "END":
            body = False  # of a function or a trigger that is made, and does not run now
            continue
        said = judge(tokens)
        if said.refused is not None:
            return Read(first, said.refused)
        session, context, unseen = session or said.session, context or said.context, unseen or said.unseen
        body = body or _opens_body(tokens, grammar)
    return Read(first, None, session, context, unseen)


def _opens_body(tokens: Sequence[str], grammar: Grammar) -> bool:
    """Return whether statements follow that belong to this one, up to an END where a statement begins."""
    if tokens[0] == "EXPLAIN" and grammar.dialect == "sqlite":
        tokens = [token for token in tokens if token not in ("EXPLAIN", "QUERY", "PLAN")]
    if tokens[0] != "CREATE":
        return False
    if grammar.dialect == "sqlite":
        return "TRIGGER" in tokens[1:3]
    depth = 0
    for index, token in enumerate(tokens):
        depth += (token == "(") - (token == ")")
        if token == "BEGIN" and depth == 0 and tokens[index + 1 : index + 2] == ["ATOMIC"]:
            return tokens[index + 2 : index + 3] != ["END"]
    return False


def _ends(tokens: Sequence[str]) -> str | None:
    first = tokens[0]
    if first == "ROLLBACK":
        # ROLLBACK TO [SAVEPOINT] x is how savepoints end, and those are fine; SQLite lets the transaction have a name
        return None if "TO" in tokens[1 : 4 if tokens[1:2] == ["TRANSACTION"] else 3] else first
    return first if first in _ENDS else None


# -- PostgreSQL --------------------------------------------------------------------------------------------------------


def _postgresql(tokens: Sequence[str]) -> Read:
    first, second = tokens[0], tokens[1] if len(tokens) > 1 else ""
    if (ends := _ends(tokens)) is not None:
        return Read(first, ends)
    if first == "PREPARE" and second == "TRANSACTION":
        return Read(first, "PREPARE TRANSACTION")
    if first == "SET":
        return _set_postgresql(tokens)
    if first == "RESET":
        return Read(first, session="RESET", context=_who_or_where("RESET", tokens[1:]))
    if first in ("DISCARD", "LISTEN", "UNLISTEN", "PREPARE", "DEALLOCATE", "LOAD"):
        return Read(first, session=first)
    if first in ("CALL", "DO", "EXECUTE"):
        return Read(first, unseen=first)
    if first == "DECLARE" and _in_a_row(tokens[: tokens.index("FOR")] if "FOR" in tokens else tokens, "WITH", "HOLD"):
        return Read(first, session="DECLARE WITH HOLD")
    if first == "EXPLAIN" and "CREATE" in tokens:  # EXPLAIN ANALYZE makes the table, too
        tokens = tokens[tokens.index("CREATE") :]
    if _makes_temporary(tokens, "TEMP", "TEMPORARY") and not _in_a_row(tokens, "ON", "COMMIT", "DROP"):
        return Read(first, session="CREATE TEMPORARY")
    return Read(first)


def _set_postgresql(tokens: Sequence[str]) -> Read:
    rest, local = tokens[1:], False
    if rest[:1] in (["LOCAL"], ["SESSION"]) and rest[1:2] not in (["."], ["="], ["TO"], ["AUTHORIZATION"], []):
        local, rest = rest[0] == "LOCAL", rest[1:]
    context = _who_or_where("SET LOCAL" if local else "SET", rest)
    ends_with_the_transaction = local or (
        rest[:1] in (["TRANSACTION"], ["CONSTRAINTS"]) and rest[1:2] not in (["."], ["="], ["TO"])
    )
    return Read("SET", session=None if ends_with_the_transaction else "SET", context=context)


def _who_or_where(verb: str, rest: Sequence[str]) -> str | None:
    """Return verb and name of a setting that says who runs our statements, or where they find their tables."""
    if rest[:2] == ["SESSION", "AUTHORIZATION"]:
        return f"{verb} SESSION AUTHORIZATION"
    if not rest or rest[1:2] == ["."]:
        return None  # a setting of an extension's, or an application's
    name = rest[0].removeprefix('"').upper()
    if name == "U" and rest[1:2] == ["&"]:
        return f"{verb} U&"  # a name in escapes: whatever it says
    if name not in _WHO_OR_WHERE or (name == "ALL" and verb != "RESET"):
        return None
    return f"{verb} {name.lower() if '_' in name else name}"


# -- MySQL and MariaDB -------------------------------------------------------------------------------------------------


def _mysql(tokens: Sequence[str]) -> Read:
    first, second = tokens[0], tokens[1] if len(tokens) > 1 else ""
    if (ends := _ends(tokens)) is not None or first in _COMPOUND:
        return Read(first, ends or first)
    if first == "SET":
        return _set_mysql(tokens)
    if first == "DROP" and second == "PREPARE":
        return Read(first, session="DROP PREPARE")
    if _makes_temporary(tokens, "TEMPORARY") and "TABLE" in tokens[2:5]:
        return Read(first, session="CREATE TEMPORARY")  # the one CREATE that does not commit
    if first in IMPLICIT_COMMITS and not _commits_nothing(first, second):
        return Read(first, first)
    if first == "USE":
        return Read(first, session="USE", context="USE")
    if first in ("PREPARE", "DEALLOCATE") or (first == "HANDLER" and "OPEN" in tokens):
        return Read(first, session=first)
    if first in ("CALL", "EXECUTE"):
        return Read(first, unseen=first)
    return Read(first)


def _commits_nothing(first: str, second: str) -> bool:
    """Return whether a statement is not what commits although it begins like it."""
    match first:
        case "ANALYZE":  # of a statement, not of tables
            return second not in ("TABLE", "TABLES", "LOCAL", "NO_WRITE_TO_BINLOG")
        case "LOAD":
            return second in ("DATA", "XML")
        case "DROP":
            return second == "TEMPORARY"
        case "RESET":
            return second == "PERSIST"
    return False


def _set_mysql(tokens: Sequence[str]) -> Read:
    if tokens[1:2] == ["STATEMENT"]:
        return _behind_for(tokens)
    session = context = None
    for target in _assigned(tokens[1:]):
        if target[0] == "@" and target[1:2] != ["@"]:
            continue  # a variable of the user's: it stays, and nothing depends on it
        words = [token.removeprefix('"').upper() for token in target if token not in ("@", ".")]
        if not words or words[0] in ("GLOBAL", "PERSIST", "PERSIST_ONLY"):
            continue
        if words[-1] == "AUTOCOMMIT":
            return Read("SET", "SET autocommit")
        if words[0] == "PASSWORD" or words[:2] == ["DEFAULT", "ROLE"]:
            return Read("SET", "SET " + " ".join(words[: 1 if words[0] == "PASSWORD" else 2]))
        session = "SET"
        if words[0] == "ROLE":
            context = "SET ROLE"
    return Read("SET", session=session, context=context)


def _assigned(tokens: Sequence[str]) -> list[list[str]]:
    """Return what stands left of each = in a list of assignments; of a word list, all of it."""
    targets: list[list[str]] = [[]]
    depth, named = 0, False
    for token in tokens:
        depth += (token == "(") - (token == ")")
        if token == "," and depth == 0:
            targets.append([])
            named = False
        elif token in ("=", ":"):
            named = True
        elif not named:
            targets[-1].append(token)
    return [target for target in targets if target]


def _behind_for(tokens: Sequence[str]) -> Read:
    """SET STATEMENT x = y FOR z: z is what runs, with settings that end with it."""
    depth = 0
    for index, token in enumerate(tokens):
        depth += (token == "(") - (token == ")")
        if token == "FOR" and depth == 0 and list(tokens[index + 1 : index + 3]) != ["SET", "STATEMENT"]:
            return _mysql(tokens[index + 1 :])._replace(first="SET") if tokens[index + 1 :] else Read("SET")
    return Read("SET")


# -- SQLite ------------------------------------------------------------------------------------------------------------


def _sqlite(tokens: Sequence[str]) -> Read:
    first = tokens[0]
    if (ends := _ends(tokens)) is not None:
        return Read(first, ends)
    if first == "EXPLAIN":  # some settings are made while a statement is only prepared
        tokens = [token for token in tokens if token not in ("EXPLAIN", "QUERY", "PLAN")] or tokens
    if tokens[0] in ("ATTACH", "DETACH"):
        return Read(first, session=tokens[0])
    if _makes_temporary(tokens, "TEMP", "TEMPORARY"):
        return Read(first, session="CREATE TEMPORARY")
    if tokens[0] == "PRAGMA":
        name = tokens[1:4] if tokens[2:3] != ["."] else tokens[3:6]
        asks = len(name) < 2 or name[0].removeprefix('"').upper() in _PRAGMA_QUESTIONS
        return Read(first, session=None if asks else "PRAGMA")
    return Read(first)


# -- what several share ------------------------------------------------------------------------------------------------


def _makes_temporary(tokens: Sequence[str], *words: str) -> bool:
    if tokens[0] != "CREATE":
        return False
    for token in tokens[1:]:
        if token not in ("OR", "REPLACE", "LOCAL", "GLOBAL"):
            return token in words
    return False


def _in_a_row(tokens: Sequence[str], *words: str) -> bool:
    return any(
        tuple(tokens[index : index + len(words)]) == words for index, token in enumerate(tokens) if token == words[0]
    )


_JUDGES: Final = {"postgresql": _postgresql, "mysql": _mysql, "sqlite": _sqlite}
