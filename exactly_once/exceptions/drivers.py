"""The text of a database error: fields of the driver's error, and those parts of its sentence that cannot be a value. Pure.

Decided by SQLSTATE, errno and names, never by a whole sentence, which comes in many languages.
"""

import re
from typing import Any, Final

from exactly_once.exceptions.struck import bound, code_of, shown, without_bound, without_numbers, without_quoted
from exactly_once.wording.redaction import struck

__all__ = ["DRIVERS", "cause_of", "in_statement", "is_drivers", "of_driver"]

DRIVERS: Final = frozenset(
    ("psycopg", "psycopg2", "asyncpg", "pymysql", "asyncmy", "aiomysql", "MySQLdb", "mysql", "sqlite3", "aiosqlite")
)

_DUPLICATE_ENTRY: Final = 1062
_VALUE_OF_A_COLUMN: Final = (1265, 1292, 1366)  # the sentence ends with the column and the row, in every language
_CLIENTS: Final = range(2000, 3000)  # errors of the client library itself, about connections
_NAMES_ONLY: Final = frozenset(
    # Locks, rights, names, columns, constraints: these errors quote names only.
    (
        *(
            1020,
            1040,
            1044,
            1045,
            1046,
            1048,
            1049,
            1051,
            1052,
            1054,
            1093,
            1099,
            1100,
            1109,
            1136,
            1142,
            1143,
            1146,
            1205,
        ),
        *(
            1213,
            1222,
            1227,
            1241,
            1242,
            1264,
            1290,
            1305,
            1317,
            1318,
            1364,
            1370,
            1406,
            1442,
            1451,
            1452,
            1614,
            1637,
        ),
        *(1665, 1792, 1836, 1927, 1969, 3024, 3572, 3819, 4025),
    )
)
_NO_SUCH_NAME: Final = (1049, 1051, 1054, 1109, 1146, 1305)
_COLUMN_AT_THE_END: Final = re.compile(r"[`']([A-Za-z_]\w*)[`'] [^`'0-9]+ [0-9]+$")
_KEY_AT_THE_END: Final = re.compile(r"'([A-Za-z_][\w.$-]*)'[^']*$")
_QUOTE_OR_NUMBER: Final = re.compile(r"['\"`0-9]")
_RAISED: Final = "P0001"
_SIGNALLED: Final = 1644
_HELD: Final = ("SQLITE_BUSY", "SQLITE_LOCKED")
_HOLDER: Final = (
    "another connection holds the file, perhaps a handler's own: in a handler use the session you are given"
)
_OF_A_CONSTRAINT: Final = "SQLITE_CONSTRAINT"
_NAMES: Final = ("table_name", "column_name", "constraint_name", "schema_name", "datatype_name")
cause_of = BaseException.__dict__["__cause__"].__get__
_args_of = BaseException.__dict__["args"].__get__


def is_drivers(error: BaseException) -> bool:
    """Say whether it is an error of a database driver."""
    return any(str(cls.__module__).partition(".")[0] in DRIVERS for cls in type(error).__mro__)


def in_statement(error: BaseException | None, statement: str) -> str:
    """Return the beginning of the statement that failed."""
    # If a value could not be prepared, we do not know for which server it was.
    own = None if error is None else _drivers_own(error)
    doubled = own is None or _mysqls(own) is not None or not _is_postgresqls(own)
    return f" [in: {shown(statement, doubled=doubled)}]"


def of_driver(error: BaseException, statement: str | None = None, parameters: Any = None) -> str:
    """Return the text of a driver's error, without values.

    Args:
        error: The error, or SQLAlchemy's wrapper for an async driver's.
        statement: The statement's text, if it is known.
        parameters: The values bound to it.
    """
    return struck(_told(_drivers_own(error), statement, parameters))


def _told(error: BaseException, statement: str | None, parameters: Any) -> str:
    values = bound(parameters)
    if (args := _mysqls(error)) is not None:
        return _of_mysql(*args, code_of(statement, doubled=True), values)
    if _is_postgresqls(error):
        fields = getattr(error, "diag", None)
        state = getattr(error, "sqlstate", None) or getattr(error, "pgcode", None)
        return _of_postgresql(error, error if fields is None else fields, state, statement, values)
    if any("sqlite" in str(cls.__module__) for cls in type(error).__mro__):
        return _of_sqlite(error, code_of(statement, doubled=True), values)
    return f"{type(error).__name__}, whose text may hold values of the statement"


def _drivers_own(error: BaseException) -> BaseException:
    cause = cause_of(error)
    return cause if not is_drivers(error) and cause is not None and is_drivers(cause) else error


def _mysqls(error: BaseException) -> tuple[int, str] | None:
    args = _args_of(error)
    return (args[0], args[1]) if len(args) > 1 and isinstance(args[0], int) and isinstance(args[1], str) else None


def _is_postgresqls(error: BaseException) -> bool:
    return any(getattr(error, field, None) for field in ("diag", "sqlstate", "pgcode"))


def _of_postgresql(
    error: BaseException, fields: Any, state: str | None, statement: str | None, values: frozenset[str] | None
) -> str:
    if state is None and getattr(fields, "message_primary", None) is None:
        # The driver's own error: about a connection, or about a value that it could not prepare.
        is_of_data = any(cls.__name__ == "DataError" for cls in type(error).__mro__)
        return type(error).__name__ if is_of_data else str(error).strip()
    found = {field: name for field in _NAMES if isinstance(name := getattr(fields, field, None), str) and name}
    if values is None or (state is not None and state.startswith("22") and state != "22001"):
        words = type(error).__name__  # for "invalid input syntax for type integer: "4111..."" the class says as much
    else:
        # For a statement inside a function: the text of that statement.
        code = code_of(statement) | code_of(getattr(fields, "internal_query", None))
        said = getattr(fields, "message_primary", None) or str(error).strip().partition("\n")[0]
        words = _sentence(said, code | code_of(" ".join(found.values())), values, own_words=state == _RAISED)
    names = [
        f"{field.removesuffix('_name')} {found[field]}"
        for field in _NAMES[:3]
        if field in found and not re.search(rf"\b{re.escape(found[field])}\b", words)
    ]
    return f"{words} ({', '.join([f'SQLSTATE {state}', *names])})" if state else words


def _of_mysql(errno: int, text: str, code: frozenset[str], values: frozenset[str] | None) -> str:
    if errno == _DUPLICATE_ENTRY:
        key = _KEY_AT_THE_END.search(text)  # in every language the value comes before it, and the name last
        return f"duplicate entry for key {key[1]} (errno {errno})" if key else f"duplicate entry (errno {errno})"
    if errno in _CLIENTS or errno == 0:
        return f"{text.strip()} (errno {errno})"
    if errno == _SIGNALLED and values is not None:
        return f"{without_numbers(without_bound(text.strip(), values, code, own_words=True))} (errno {errno})"
    if errno in _NO_SUCH_NAME and values is not None:  # EXECUTE IMMEDIATE may have made the name of a value
        text = without_bound(text, values, code)
    value = None if errno in _NAMES_ONLY else _QUOTE_OR_NUMBER.search(text)
    if value is None:
        return f"{without_numbers(text.strip())} (errno {errno})"
    column = _COLUMN_AT_THE_END.search(text) if errno in _VALUE_OF_A_COLUMN else None
    return f"{text[: value.start()].strip()} ... (errno {errno}{f', column {column[1]}' if column else ''})"


def _of_sqlite(error: BaseException, code: frozenset[str], values: frozenset[str] | None) -> str:
    text = str(error).strip()
    name = getattr(error, "sqlite_errorname", None) or ""
    if values is None:
        return name or type(error).__name__
    names = "constraint failed: " in text
    if name.startswith(_HELD):
        return f"{text} ({_HOLDER})"
    if name.startswith(_OF_A_CONSTRAINT) or names:  # tables and columns, or the text of the CHECK; or of RAISE
        return without_numbers(text if names else without_bound(text, values, code, own_words=True))
    sentence = _sentence(text, code, values)
    what, colon, rest = sentence.rpartition(": ")
    if colon and what.startswith("no such ") and not code_of(rest) <= code:  # in a full-text query, the name is a value
        return f"{what}: ..."
    return sentence


def _sentence(text: str, known: frozenset[str], values: frozenset[str], *, own_words: bool = False) -> str:
    return without_numbers(without_quoted(without_bound(text, values, known, own_words=own_words), known)).strip()
