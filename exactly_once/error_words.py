"""What an error says, for logs, rows, alerts and reasons: never a value that a statement carried, for that is a customer's. Pure.

SQLAlchemy writes the values of a statement into its errors, and so do the servers: PostgreSQL in a line of details, MySQL in
the sentence itself ("Duplicate entry '4111...'"). What is told here is known by the driver's fields (primary message, SQLSTATE,
errno, names), never by a sentence, which comes in many languages. A text that an application has made of such an error has
nothing but the text: it is cut where that begins.

Never raises, whatever the error's own methods do. Called by everything that writes an error down. A traceback is logged with
`trace_of`, never with `exc_info`, whose last lines are the texts themselves.
"""

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from traceback import format_tb
from types import TracebackType
from typing import Any, Final

from sqlalchemy.exc import DBAPIError, SQLAlchemyError, StatementError

from exactly_once.errors import Reject

__all__ = ["place_of", "trace_of", "words_of"]

_NOT_THE_USERS: Final = tuple(f"{folder}{os.sep}" for folder in (Path(__file__).parent, Path(json.__file__).parents[1]))
_STATEMENT_CHARACTERS: Final = 500
_MOST_ERRORS: Final = 50  # of one chain; a cycle must not hang
_DRIVERS: Final = frozenset(
    ("psycopg", "psycopg2", "asyncpg", "pymysql", "asyncmy", "aiomysql", "MySQLdb", "mysql", "sqlite3", "aiosqlite")
)

_DUPLICATE_ENTRY: Final = 1062
_VALUE_OF_A_COLUMN: Final = (1265, 1292, 1366)  # the sentence ends with the column and the row, in every language
_CLIENTS: Final = range(2000, 3000)  # the client library's own, of connections
_NAMES_ONLY: Final = frozenset(
    # locks, names, columns, constraints, and SIGNAL with the application's own words: no value stands in these sentences
    (
        *(1020, 1040, 1044, 1045, 1048, 1049, 1054, 1142, 1146, 1205, 1213, 1264, 1305, 1317, 1364, 1406, 1451, 1452),
        *(1614, 1637, 1644, 1792, 1836, 1927, 1969, 3024, 3572, 3819, 4025),
    )
)
_COLUMN_AT_THE_END: Final = re.compile(r"[`']([A-Za-z_]\w*)[`'] [^`'0-9]+ [0-9]+$")
_KEY_AT_THE_END: Final = re.compile(r"'([A-Za-z_][\w.$-]*)'[^']*$")

# how SQLAlchemy and the drivers write their errors into a text; the same in every language
_CLASS_IN_TEXT: Final = re.compile(r"(\((?:[A-Za-z_]\w*\.)+[A-Za-z_]\w*\)) .*", re.DOTALL)
_MARK_IN_TEXT: Final = re.compile(r"\[(?:SQL|parameters): |(?:\n|\\n)(?:DETAIL|CONTEXT|QUERY|HINT): ")
_ERRNO_IN_TEXT: Final = re.compile(r"""\((\d{4}), ?['"].*""", re.DOTALL)
_IDENTITY_IN_TEXT: Final = re.compile(r"identity key \(.*", re.DOTALL)
_CUT: Final = "[cut: here stand values of a statement]"

# asked of the base class, for a class of the application may have a property of that name, which raises
_cause_of, _context_of, _hides_context, _trace_of, _args_of = (
    BaseException.__dict__[name].__get__
    for name in ("__cause__", "__context__", "__suppress_context__", "__traceback__", "args")
)
_in_group = BaseExceptionGroup.__dict__["exceptions"].__get__


def words_of(error: BaseException) -> str:
    """Return what an error says, without the values of a statement, also where it quotes another error.

    Example:
        >>> words_of(ValueError("no such sku"))
        'no such sku'
    """
    try:
        if isinstance(error, StatementError):
            return _of_statement(error)
        if _is_drivers(error):
            return _of_driver(error)
        return _without_values(str(error), error)
    except KeyboardInterrupt:
        raise
    except BaseException as problem:  # noqa: BLE001, RUF100  (its own __str__, which may raise anything)
        return f"(its text cannot be read: {type(problem).__name__})"


def place_of(error: BaseException) -> str:
    """Return the line an error was raised in, the last that is neither a library's nor ours; "" where there is none.

    Not of a `Reject`: that is no mistake in the program, and its reason is for a person to read.
    """
    if isinstance(error, Reject):
        return ""
    found = ""
    trace: TracebackType | None = _trace_of(error)
    while trace is not None:
        code = trace.tb_frame.f_code
        if _is_the_users(code.co_filename):
            found = f" (at {'/'.join(Path(code.co_filename).parts[-2:])}:{trace.tb_lineno} in {code.co_name})"
        trace = trace.tb_next
    return found


def _is_the_users(file: str) -> bool:
    # "<...": made at run time, as SQLAlchemy makes its wrappers; "asyncmy/errors.pyx": a compiled one has no folder before it
    ours = file.startswith((*_NOT_THE_USERS, "<")) or "site-packages" in file
    return not ours and file.partition("/")[0] not in _DRIVERS


def trace_of(error: BaseException) -> str:
    """Return an error's traceback, and those of the errors it came from, as Python writes them, with `words_of` for the texts.

    Example:
        >>> print(trace_of(ValueError("no such sku")))
        ValueError: no such sku
    """
    told: list[str] = []
    at: BaseException | None = error
    seen: set[int] = set()
    while at is not None and id(at) not in seen and len(seen) < _MOST_ERRORS:
        seen.add(id(at))
        frames = _trace_of(at)
        above = "Traceback (most recent call last):\n" + "".join(format_tb(frames)) if frames is not None else ""
        told.append(f"{above}{type(at).__qualname__}: {words_of(at)}{_members_of(at)}")
        at = _cause_of(at) or (None if _hides_context(at) else _context_of(at))
    return "\n\nThen, because of it:\n\n".join(reversed(told))


def _members_of(error: BaseException) -> str:
    if not isinstance(error, BaseExceptionGroup):
        return ""
    return "".join(
        f"\n  | {type(each).__qualname__}: {words_of(each)}{place_of(each)}" for each in _in_group(error)[:_MOST_ERRORS]
    )


# -- errors of a database --------------------------------------------------------------------------------------------


def _of_statement(error: StatementError) -> str:
    orig = error.orig
    if orig is not None and (isinstance(error, DBAPIError) or _is_drivers(orig)):
        words = _of_driver(orig)
    elif orig is None or isinstance(orig, SQLAlchemyError):
        words = _without_values(str(error.args[0]) if orig is None else str(orig), error)
    else:  # a value that could not be made ready for the driver, and its text says which
        words = f"{type(orig).__name__} for a value of the statement"
    return f"{words}{_in(error.statement)}" if error.statement else words


def _in(statement: str) -> str:
    text = " ".join(statement.split())[:_STATEMENT_CHARACTERS]
    literal = text.find("'")  # an application may have written a value into it
    return f" [in: {re.sub(r'[0-9]{5,}', '#', text if literal < 0 else text[:literal] + '...')}]"


def _is_drivers(error: BaseException) -> bool:
    return any(cls.__module__.partition(".")[0] in _DRIVERS for cls in type(error).__mro__)


def _of_driver(error: BaseException) -> str:
    if not _is_drivers(error) and (cause := _cause_of(error)) is not None and _is_drivers(cause):
        error = cause  # SQLAlchemy's own, around that of an async driver
    args = _args_of(error)
    if len(args) > 1 and isinstance(args[0], int) and isinstance(args[1], str):
        return _of_mysql(args[0], args[1])
    diag, state = getattr(error, "diag", None), getattr(error, "sqlstate", None) or getattr(error, "pgcode", None)
    if diag is not None or state:
        return _of_postgresql(error, diag, state)
    if any("sqlite" in cls.__module__ for cls in type(error).__mro__):
        return str(error).strip()  # SQLite names tables and columns, and quotes no value
    return f"{type(error).__name__}, whose text may hold values of the statement"


def _of_postgresql(error: BaseException, diag: Any, state: str | None) -> str:
    if state is None and getattr(diag, "message_primary", None) is None:
        # the driver's own: of a connection, or of a value it could not make ready
        is_of_data = any(cls.__name__ == "DataError" for cls in type(error).__mro__)
        return type(error).__name__ if is_of_data else str(error).strip()
    if state is not None and state.startswith("22") and state != "22001":
        words = type(error).__name__  # "invalid input syntax for type integer: "4111..."": the class says as much
    else:
        words = getattr(diag, "message_primary", None) or str(error).strip().partition("\n")[0]
    fields = [("table", "table_name"), ("column", "column_name"), ("constraint", "constraint_name")]
    found = ((what, getattr(diag, field, None)) for what, field in fields)
    names = [f"{what} {name}" for what, name in found if name and not re.search(rf"\b{re.escape(name)}\b", words)]
    return f"{words} ({', '.join([f'SQLSTATE {state}', *names])})" if state else words


def _of_mysql(errno: int, text: str) -> str:
    if errno == _DUPLICATE_ENTRY:
        key = _KEY_AT_THE_END.search(text)  # the value stands before it in every language, and the name last
        return f"duplicate entry for key {key[1]} (errno {errno})" if key else f"duplicate entry (errno {errno})"
    quote = min((at for mark in "'\"" if (at := text.find(mark)) >= 0), default=-1)
    if quote < 0 or errno in _NAMES_ONLY or errno in _CLIENTS or errno == 0:
        return f"{text.strip()} (errno {errno})"
    column = _COLUMN_AT_THE_END.search(text) if errno in _VALUE_OF_A_COLUMN else None
    return f"{text[:quote].strip()} ... (errno {errno}{f', column {column[1]}' if column else ''})"


# -- errors that quote others ----------------------------------------------------------------------------------------


def _without_values(text: str, error: BaseException) -> str:
    """Put into an application's text, for each database error it was made of, what may be told of that."""
    if not text:
        return text
    for quoted in _behind(error):
        for form in sorted(_forms(quoted), key=len, reverse=True):
            if len(form) > 3 and form in text:
                text = text.replace(form, words_of(quoted))
    found = _CLASS_IN_TEXT.search(text)
    mark = _MARK_IN_TEXT.search(text)
    if found and (mark or found[1][1:].partition(".")[0] in _DRIVERS):
        text = f"{text[: found.end(1)]} {_CUT}"
    elif mark:
        text = f"{text[: mark.start()].rstrip()} {_CUT}"
    text = _ERRNO_IN_TEXT.sub(rf"(errno \1) {_CUT}", text)
    if isinstance(error, SQLAlchemyError):
        text = _IDENTITY_IN_TEXT.sub(f"an identity key {_CUT}", text)
    return text


def _behind(error: BaseException) -> Iterator[BaseException]:
    """The database errors that an error came from, or was given."""
    waiting: list[object] = [error]
    seen: set[int] = set()
    while waiting and len(seen) < _MOST_ERRORS:
        at = waiting.pop()
        if not isinstance(at, BaseException) or id(at) in seen:
            continue
        seen.add(id(at))
        if at is not error and (isinstance(at, StatementError) or _is_drivers(at)):
            yield at
        waiting += [_context_of(at), _cause_of(at), *_args_of(at)]
        if isinstance(at, BaseExceptionGroup):
            waiting += _in_group(at)


def _forms(error: BaseException) -> set[str]:
    forms = {str(error), repr(error)}
    if isinstance(error, StatementError) and error.orig is not None:
        forms |= {str(error.orig), repr(error.orig)}
    return forms
