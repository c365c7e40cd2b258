"""Tells from a statement's first words whether it ends a transaction, and what it changes in the session. One judge per dialect.

It reads first words, not SQL: it does not know what a function or a procedure does. Called by `keywords`.
"""

from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Final, NamedTuple

from exactly_once.database.dialects.statements import Grammar

__all__ = ["JUDGES", "Read", "opens_body"]


class Read(NamedTuple):
    """What a text does to the handler's transaction. Each field is a keyword as people write it; None for no.

    Args:
        first: The first word of its first statement, in capitals; empty if there is none.
        refused: What would end the transaction. Nothing after it was read.
        session: What changes the connection for longer than the transaction.
        unseen: What runs a text that cannot be read here: CALL, EXECUTE, DO.
        unless: Names of parameters, in capitals. If each of them is true, the session is not changed.
    """

    first: str
    refused: str | None = None
    session: str | None = None
    unseen: str | None = None
    unless: tuple[str, ...] = ()

    def changes(self, values: object) -> str | None:
        """Say what changes the session if the text is sent with these values."""
        if not self.unless or not isinstance(values, Mapping):
            return self.session
        asked = frozenset(self.unless)
        local = [value is True for name, value in values.items() if str(name).upper() in asked]
        return None if local and all(local) else self.session


_ENDS: Final = frozenset({"COMMIT", "BEGIN", "START", "END", "ABORT"})

# MySQL and MariaDB silently commit the open transaction before any of these; before some of them only sometimes.
_IMPLICIT_COMMITS: Final = frozenset(
    {
        "ALTER", "ANALYZE", "BACKUP", "CACHE", "CHANGE", "CHECK", "CLONE", "CREATE", "DROP", "FLUSH", "GRANT", "IMPORT",
        "INSTALL", "LOAD", "LOCK", "OPTIMIZE", "RENAME", "REPAIR", "RESET", "REVOKE", "STOP", "TRUNCATE", "UNINSTALL",
        "UNLOCK",
    }
)  # fmt: skip
# Statements of MariaDB that contain others, each of which may end the transaction.
_COMPOUND: Final = frozenset({"CASE", "DECLARE", "FOR", "IF", "LOOP", "REPEAT", "WHILE"})
# PRAGMAs with an argument that only ask; SQLAlchemy sends them to reflect a table.
_PRAGMA_QUESTIONS: Final = frozenset(
    {
        "FOREIGN_KEY_CHECK", "FOREIGN_KEY_LIST", "INDEX_INFO", "INDEX_LIST", "INDEX_XINFO", "INTEGRITY_CHECK",
        "QUICK_CHECK", "TABLE_INFO", "TABLE_LIST", "TABLE_XINFO",
    }
)  # fmt: skip
_PRAGMA_OF_THE_TRANSACTION: Final = "DEFER_FOREIGN_KEYS"  # SQLite resets it with each COMMIT and ROLLBACK


def opens_body(tokens: list[str], grammar: Grammar) -> bool:
    """Return whether the following statements belong to this one, up to a statement that begins with END."""
    if grammar.dialect == "sqlite":
        made = [word for word in _explained(tokens)[:3] if word not in ("TEMP", "TEMPORARY")]
        return made[:2] == ["CREATE", "TRIGGER"]
    made = tokens[3:4] if tokens[1:3] == ["OR", "REPLACE"] else tokens[1:2]
    if tokens[0] != "CREATE" or made not in (["FUNCTION"], ["PROCEDURE"]):
        return False
    for index, word in _outside_brackets(tokens):
        if word == "BEGIN" and tokens[index + 1 : index + 2] == ["ATOMIC"]:
            return tokens[index + 2 : index + 3] != ["END"]
    return False


def _ends(tokens: list[str]) -> str | None:
    first = tokens[0]
    if first == "ROLLBACK":
        # ROLLBACK TO [SAVEPOINT] x rolls back to a savepoint, which is allowed. On SQLite the transaction may have a name.
        return None if "TO" in tokens[1 : 4 if tokens[1:2] == ["TRANSACTION"] else 3] else first
    if tokens[:2] == ["PREPARE", "TRANSACTION"] and tokens[2:3] not in (["AS"], ["("], ["FROM"]):
        return "PREPARE TRANSACTION"  # not a statement of that name
    return first if first in _ENDS else None


# -- PostgreSQL --------------------------------------------------------------------------------------------------------


def _postgresql(tokens: list[str]) -> Read:
    first = tokens[0]
    if (ends := _ends(tokens)) is not None:
        return Read(first, ends)
    if first == "SET":
        return _set_postgresql(tokens)
    if first == "RESET":
        return Read(first, session="RESET")
    if first in ("DISCARD", "LISTEN", "UNLISTEN", "PREPARE", "DEALLOCATE", "LOAD"):
        return Read(first, session=first)
    if first in ("CALL", "DO", "EXECUTE"):
        return Read(first, unseen=first)
    if first == "DECLARE" and _in_a_row(tokens[: tokens.index("FOR")] if "FOR" in tokens else tokens, "WITH", "HOLD"):
        return Read(first, session="DECLARE WITH HOLD")
    if first == "EXPLAIN" and "CREATE" in tokens:  # EXPLAIN ANALYZE makes the table, too
        tokens = tokens[tokens.index("CREATE") :]
    made = _makes_temporary(tokens, "TEMP", "TEMPORARY") or _makes_in(tokens, "PG_TEMP")
    if made and not _in_a_row(tokens, "ON", "COMMIT", "DROP"):
        return Read(first, session="CREATE TEMPORARY")
    return Read(first)


def _set_postgresql(tokens: list[str]) -> Read:
    rest, local = tokens[1:], False
    if rest[:1] in (["LOCAL"], ["SESSION"]) and rest[1:2] not in (["."], ["="], ["TO"], ["AUTHORIZATION"], []):
        local, rest = rest[0] == "LOCAL", rest[1:]
    ends_with_the_transaction = local or (
        rest[:1] in (["TRANSACTION"], ["CONSTRAINTS"]) and rest[1:2] not in (["."], ["="], ["TO"])
    )
    return Read("SET", session=None if ends_with_the_transaction else "SET")


# -- MySQL and MariaDB -------------------------------------------------------------------------------------------------


def _mysql(tokens: list[str]) -> Read:
    first, second = tokens[0], tokens[1] if len(tokens) > 1 else ""
    if (ends := _ends(tokens)) is not None or first in _COMPOUND:
        return Read(first, ends or first)
    if first == "SET":
        return _set_mysql(tokens)
    if first == "DROP" and second == "PREPARE":
        return Read(first, session="DROP PREPARE")
    if _makes_temporary(tokens, "TEMPORARY") and "TABLE" in tokens[2:5]:
        return Read(first, session="CREATE TEMPORARY")  # the only CREATE that does not commit
    if first in _IMPLICIT_COMMITS and not _commits_nothing(first, second):
        return Read(first, first)
    if first == "USE":
        return Read(first, session="USE")
    if first in ("PREPARE", "DEALLOCATE") or (first == "HANDLER" and "OPEN" in tokens):
        return Read(first, session=first)
    # An output argument, a column that is read into a variable, a diagnostic: the next handler would find the variable.
    variable = "@variable" if first in ("CALL", "EXECUTE", "GET", "LOAD") and _names_variable(tokens) else None
    if first == "EXECUTE" and second == "IMMEDIATE":
        return Read(first, session="EXECUTE IMMEDIATE", unseen=first)  # its text may set anything
    return Read(first, session=variable, unseen=first if first in ("CALL", "EXECUTE") else None)


def _commits_nothing(first: str, second: str) -> bool:
    """Return whether a statement commits nothing although its first word is that of one that does."""
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


def _set_mysql(tokens: list[str]) -> Read:
    if tokens[1:2] == ["STATEMENT"]:
        return _behind_for(tokens)
    session = None
    for target in _assigned(tokens[1:]):
        if target[0] == "@" and target[1:2] != ["@"]:
            session = "SET"  # a user variable: the next handler would find it
            continue
        words = [word.removeprefix('"').upper() for word in target if word not in ("@", ".")]
        if not words or words[0] in ("GLOBAL", "PERSIST", "PERSIST_ONLY"):
            continue
        if words[-1] == "AUTOCOMMIT":
            return Read("SET", "SET autocommit")
        if words[0] == "PASSWORD" or words[:2] == ["DEFAULT", "ROLE"]:
            return Read("SET", "SET " + " ".join(words[: 1 if words[0] == "PASSWORD" else 2]))
        session = "SET"
    return Read("SET", session=session)


def _assigned(tokens: list[str]) -> list[list[str]]:
    """Return what is to the left of each = in a list of assignments; for a list of words, all of it."""
    targets: list[list[str]] = [[]]
    named = False
    for _, word in _outside_brackets(tokens):
        if word == ",":
            targets.append([])
            named = False
        elif word in ("=", ":"):
            named = True
        elif not named:
            targets[-1].append(word)
    return [target for target in targets if target]


def _behind_for(tokens: list[str]) -> Read:
    """SET STATEMENT x = y FOR z: z runs, and the settings end with it."""
    for index, word in _outside_brackets(tokens):
        if word == "FOR" and tokens[index + 1 : index + 3] != ["SET", "STATEMENT"]:
            return _mysql(tokens[index + 1 :])._replace(first="SET") if tokens[index + 1 :] else Read("SET")
    return Read("SET")


# -- SQLite ------------------------------------------------------------------------------------------------------------


def _sqlite(tokens: list[str]) -> Read:
    first = tokens[0]
    if (ends := _ends(tokens)) is not None:
        return Read(first, ends)
    tokens = _explained(tokens)  # some settings take effect while a statement is only prepared
    if tokens[0] in ("ATTACH", "DETACH"):
        return Read(first, session=tokens[0])
    if _makes_temporary(tokens, "TEMP", "TEMPORARY") or _makes_in(tokens, "TEMP", "TEMPORARY"):
        return Read(first, session="CREATE TEMPORARY")
    if tokens[0] == "PRAGMA":
        name = tokens[1:4] if tokens[2:3] != ["."] else tokens[3:6]
        called = name[0].removeprefix('"').upper() if name else ""
        stays = len(name) > 1 and called not in _PRAGMA_QUESTIONS and called != _PRAGMA_OF_THE_TRANSACTION
        return Read(first, session="PRAGMA" if stays else None)
    return Read(first)


def _explained(tokens: list[str]) -> list[str]:
    if tokens[0] != "EXPLAIN":
        return tokens
    return tokens[3 if tokens[1:3] == ["QUERY", "PLAN"] else 1 :] or tokens


# -- what several share ------------------------------------------------------------------------------------------------


def _makes_temporary(tokens: list[str], *words: str) -> bool:
    if tokens[0] != "CREATE":
        return False
    for word in tokens[1:]:
        if word not in ("OR", "REPLACE", "LOCAL", "GLOBAL"):
            return word in words
    return False


def _makes_in(tokens: list[str], *schemas: str) -> bool:
    """Say whether something is created in a schema of the session's own, named explicitly."""
    if tokens[0] != "CREATE":
        return False
    for word, following in pairwise(tokens):
        if word in ("(", "AS"):  # the name of the new object is read
            return False
        if following == "." and word.removeprefix('"').upper() in schemas:
            return True
    return False


def _names_variable(tokens: list[str]) -> bool:
    """Say whether there is a user variable: @name, not @@name, which is the server's."""
    return any(
        word == "@" and tokens[index - 1] != "@" and tokens[index + 1 : index + 2] != ["@"]
        for index, word in enumerate(tokens)
    )


def _outside_brackets(tokens: list[str]) -> Iterator[tuple[int, str]]:
    depth = 0
    for index, word in enumerate(tokens):
        depth += (word == "(") - (word == ")")
        if depth == 0 and word != ")":
            yield index, word


def _in_a_row(tokens: list[str], *words: str) -> bool:
    return any(
        tuple(tokens[index : index + len(words)]) == words for index, word in enumerate(tokens) if word == words[0]
    )


JUDGES: Final = {"postgresql": _postgresql, "mysql": _mysql, "sqlite": _sqlite}
