"""The text of an error for logs, rows, alerts and reasons, without the values of a statement, which are a customer's. Pure.

SQLAlchemy writes the values of a statement into its errors, and so do the servers: PostgreSQL in a line of details, MySQL in
the sentence itself ("Duplicate entry '4111...'"). `drivers` decides what of a driver's error may be shown. An application's own
text is shown unchanged; but a text that repeats a database error is cut where the repetition begins.

Never raises, whatever the error's own methods do. Called by all code that writes an error down. A traceback is logged with
`trace_of`, never with `exc_info`, whose last lines are the raw texts.
"""

import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from difflib import SequenceMatcher
from functools import partial
from itertools import islice
from pathlib import Path
from traceback import format_tb
from types import CodeType, FrameType, TracebackType
from typing import Any, Final

from sqlalchemy.exc import ArgumentError, CompileError, DBAPIError, SQLAlchemyError, StatementError

from exactly_once.errors import Misuse, Reject
from exactly_once.exceptions.drivers import DRIVERS, in_statement, is_drivers, of_driver
from exactly_once.exceptions.leaves import leaves
from exactly_once.exceptions.other_queues import advice_on
from exactly_once.exceptions.struck import (
    TOO_MUCH,
    WORD,
    Sought,
    sought,
    without_numbers,
    without_parameters,
    without_quoted,
)
from exactly_once.wording.redaction import struck

__all__ = ["place_here", "place_of", "trace_of", "words_of"]

_NOT_THE_USERS: Final = tuple(
    f"{folder}{os.sep}" for folder in (Path(__file__).parents[1], Path(json.__file__).parents[1])
)
_MOST_ERRORS: Final = 50  # in one chain; a cycle must not hang
_MOST_MEMBERS: Final = 10  # of a group, in one text
_MEMBER_CHARACTERS: Final = 300
_MOST_CHARACTERS: Final = 65_536  # of a text that is looked through; a row keeps far fewer

# The form in which SQLAlchemy and the drivers write their errors into a text; the same in every language.
_CLASS_IN_TEXT: Final = re.compile(r"(\((?:[A-Za-z_]\w*\.)+[A-Za-z_]\w*\)) .*", re.DOTALL)
_MARK_IN_TEXT: Final = re.compile(
    r"\[(?:SQL|parameters): |(?:\s|\\n)(?:DETAIL|DETALLE|DETALHE|DETTAGLI|ПОДРОБНОСТИ|CONTEXT|QUERY|HINT): "
)
_ERRNO_IN_TEXT: Final = re.compile(r"""\((\d{4}), ?\\*['"].*""", re.DOTALL)
_IDENTITY_IN_TEXT: Final = re.compile(r"identity key \(.*", re.DOTALL)
_CLASS: Final = re.compile(r"<class '([\w.]+)'>")
_HERE: Final = "\ufdd1"  # marks the place of a text of ours; no real text has this character
_REPEATED_WORDS: Final = 3
_MOST_WORDS: Final = 1000
_LIBRARIES: Final = DRIVERS | {"sqlalchemy"}
_SPEAK_OF_NAMES: Final = (SQLAlchemyError, AttributeError, NameError, ImportError, TypeError)
_OURS: Final = __name__.partition(".")[0]
_GOT: Final = re.compile(r"\bgot (?!<class ).*", re.DOTALL)
_CUT: Final = "[cut: here stand values of a statement]"

# Taken from the base class: a class of the application may have a property of that name, which raises.
_cause_of, _context_of, _hides_context, _trace_of, _args_of = (
    BaseException.__dict__[name].__get__
    for name in ("__cause__", "__context__", "__suppress_context__", "__traceback__", "args")
)
_in_group = BaseExceptionGroup.__dict__["exceptions"].__get__


def words_of(error: BaseException) -> str:
    """Return the text of an error without the values of a statement, also if it quotes another error.

    Example:
        >>> words_of(ValueError("no such sku"))
        'no such sku'
        >>> words_of(ExceptionGroup("tasks", [ValueError("no such sku")]))
        'tasks (1 sub-exception): ValueError: no such sku'
    """
    if not isinstance(error, BaseExceptionGroup):
        return _own_words(error)
    found, beside = leaves(error), _bound_behind(error)
    told = [_cut(f"{_named(each, beside)}{place_of(each)}") for each in found[:_MOST_MEMBERS]]
    more = f"; and {len(found) - _MOST_MEMBERS} more" if len(found) > _MOST_MEMBERS else ""
    return f"{_cut(_own_words(error, beside))}: {'; '.join(told)}{more}"


def _named(error: BaseException, beside: Sought | None) -> str:
    words = _own_words(error, beside)
    return f"{type(error).__name__}: {words}" if words else type(error).__name__


def _cut(text: str) -> str:
    return text if len(text) <= _MEMBER_CHARACTERS else f"{text[:_MEMBER_CHARACTERS]}..."


def _own_words(error: BaseException, beside: Sought | None = None) -> str:
    """The text of a single error. Also without the values bound by other errors of its group, which it may repeat.

    The bound values of a group are collected once for all its members: `beside` includes those of `error`, too.
    """
    try:
        if isinstance(error, StatementError):
            return _of_statement(error, _is_too_much(beside))
        if is_drivers(error):
            return of_driver(error)
        words = struck(_without_values(_looked_through(str(error), error, beside), error, beside))
        advice = advice_on(error)
        return f"{words} ({advice})".strip() if advice else words
    except KeyboardInterrupt:
        raise
    except BaseException as problem:  # noqa: BLE001, RUF100  (its own __str__, which may raise anything)
        return f"(its text cannot be read: {type(problem).__name__})"


def _looked_through(text: str, error: BaseException, beside: Sought | None) -> str:
    """Return the part of a very long text that is looked through: none if it may repeat a value, whose end would be missed."""
    if len(text) <= _MOST_CHARACTERS:
        return text
    # not up to within a word: it may be a URL
    part = _CUT if beside is not None or any(_behind(error)) else text[:_MOST_CHARACTERS].rpartition(" ")[0]
    return f"{part} [cut: the text has {len(text):,} characters]"


def _is_too_much(values: Sought | None) -> bool:
    return values is not None and values.words is None


def place_of(error: BaseException) -> str:
    """Return the line that raised an error, the last line that is neither a library's nor ours; "" if there is none.

    Not for a `Reject`: that is no mistake in the program, and its reason is for a person to read.
    """
    if isinstance(error, Reject):
        return ""
    if isinstance(error, Misuse) and error.place:
        return error.place
    found = ""
    trace: TracebackType | None = _trace_of(error)
    while trace is not None:
        code = trace.tb_frame.f_code
        if _module_of(trace.tb_frame) not in _LIBRARIES and _is_the_users(code.co_filename):
            found = _place(code, trace.tb_lineno)
        trace = trace.tb_next
    return found


def place_here() -> str:
    """The same for the present call stack: the line that called SQLAlchemy, which called us; "" if that was not the user's.

    For an error that is noticed here and raised elsewhere. It walks the stack, so it is for the end of an attempt,
    not for each message.
    """
    within = False  # whether the frame is in SQLAlchemy, or a driver
    for frame in _stack(sys._getframe(1)):  # noqa: SLF001
        name = _module_of(frame)
        if name in _LIBRARIES:
            within = True
        elif name == _OURS:
            if within:
                return ""  # we called it
        elif _is_the_users(frame.f_code.co_filename):
            return _place(frame.f_code, frame.f_lineno)
    return ""


def _stack(frame: FrameType | None) -> Iterator[FrameType]:
    """Yield frames outwards. An async session runs SQLAlchemy in a greenlet, whose own stack ends where the greenlet begins."""
    greenlet: Any = sys.modules.get("greenlet")
    at = None if greenlet is None else greenlet.getcurrent()
    while frame is not None:
        yield frame
        frame = frame.f_back
        if frame is None and at is not None:
            at = at.parent
            frame = None if at is None else at.gr_frame


def _place(code: CodeType, line: int) -> str:
    return f" (at {'/'.join(Path(code.co_filename).parts[-2:])}:{line} in {code.co_name})"


def _last_frame(error: BaseException) -> FrameType | None:
    trace: TracebackType | None = _trace_of(error)
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return None if trace is None else trace.tb_frame


def _module_of(frame: FrameType | None) -> str:
    """Return the package of a frame by its module's name: for a compiled module the file says nothing."""
    return "" if frame is None else str(frame.f_globals.get("__name__")).partition(".")[0]


def _is_the_users(file: str) -> bool:
    # "<...": made at run time, like SQLAlchemy's wrappers. "asyncmy/errors.pyx": a compiled module has no folder before it.
    ours = file.startswith((*_NOT_THE_USERS, "<")) or "site-packages" in file
    return not ours and file.partition("/")[0] not in DRIVERS


def trace_of(error: BaseException) -> str:
    """Return the traceback of an error and of its causes in Python's format, with `words_of` for the texts.

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
        above = "" if frames is None else f"Traceback (most recent call last):\n{_lines_of(frames)}"
        beside = _bound_behind(at) if isinstance(at, BaseExceptionGroup) else None
        told.append(f"{above}{type(at).__qualname__}: {_own_words(at, beside)}{_members_of(at, beside)}")
        at = _cause_of(at) or (None if _hides_context(at) else _context_of(at))
    return "\n\nThen, because of it:\n\n".join(reversed(told))


def _lines_of(frames: TracebackType) -> str:
    try:
        return "".join(format_tb(frames))
    except Exception:  # the loader of code that was made at run time, when asked for its source
        return "  (lines that cannot be read)\n"


def _members_of(error: BaseException, beside: Sought | None) -> str:
    if not isinstance(error, BaseExceptionGroup):
        return ""
    return "".join(
        f"\n  | {type(each).__qualname__}: {_own_words(each, beside)}{place_of(each)}"
        for each in leaves(error)[:_MOST_ERRORS]
    )


# -- errors of a database --------------------------------------------------------------------------------------------


def _of_statement(error: StatementError, too_much: bool = False) -> str:
    orig = error.orig
    if orig is not None and (isinstance(error, DBAPIError) or is_drivers(orig)):
        words = of_driver(orig, error.statement, TOO_MUCH if too_much else error.params)
    elif orig is None or isinstance(orig, SQLAlchemyError):
        words = _of_sqlalchemy(str(error.args[0]) if orig is None else str(orig), orig or error)
    else:  # a value could not be prepared for the driver, and the error's text contains it
        words = f"{type(orig).__name__} for a value of the statement"
    return f"{words}{in_statement(orig, error.statement)}" if error.statement else words


def _of_sqlalchemy(text: str, error: BaseException) -> str:
    """The text of SQLAlchemy's, or Python's, own error. Quoted names may stay, unless the error is about an argument."""
    text = _CLASS.sub(r"<class \1>", _without_errors(text, error))
    if isinstance(error, ArgumentError):
        text = _GOT.sub(f"got {_CUT}", text)  # the repr of an object of the application, in any form
    names: list[str] = []
    if isinstance(error, _SPEAK_OF_NAMES) and not isinstance(error, (ArgumentError, CompileError)):
        names = [word.lower() for word in WORD.findall(text) if not word[0].isdigit()]
    text = without_numbers(without_quoted(text, names))
    return _IDENTITY_IN_TEXT.sub(f"an identity key {_CUT}", text)


# -- errors that quote others ----------------------------------------------------------------------------------------


def _without_values(text: str, error: BaseException, beside: Sought | None) -> str:
    """Keep an application's own text, except for what it quotes of a database error."""
    if text and (isinstance(error, SQLAlchemyError) or _module_of(_last_frame(error)) in _LIBRARIES):
        return _of_sqlalchemy(text, error)
    return _without_errors(text, error, beside)


def _without_errors(text: str, error: BaseException, beside: Sought | None = None) -> str:
    """In a text, replace each database error from which it was made by what may be shown of that error."""
    if not text:
        return text
    if _is_too_much(beside):
        return _CUT
    told: list[Callable[[], str]] = []
    for quoted in _behind(error):
        here = f"{_HERE}{len(told)}{_HERE}"
        told.append(partial(words_of, quoted))
        for form in sorted(_forms(quoted), key=len, reverse=True):
            if len(form) > 3 and form in text:
                text = text.replace(form, here)
        if (
            start := _quotes_from(text, quoted)
        ) >= 0:  # in other spacing, cut short, a field of it: how it ends is not known
            text = f"{text[:start]}{here}"
        if isinstance(quoted, StatementError) and quoted.statement and quoted.statement in text:
            told.append(partial(_statement_of, quoted.orig, quoted.statement))
            text = text.replace(quoted.statement, f"{_HERE}{len(told) - 1}{_HERE}")
    values = _bound_behind(error) if beside is None else beside
    if values is not None:
        left = without_parameters(text, values)
        text = _CUT if left is None else left
    found = _CLASS_IN_TEXT.search(text)
    mark = _MARK_IN_TEXT.search(text)
    if found and (mark or found[1][1:].partition(".")[0] in DRIVERS):
        text = f"{text[: found.end(1)]} {_CUT}"
    elif mark:
        text = f"{text[: mark.start()].rstrip()} {_CUT}"
    text = _ERRNO_IN_TEXT.sub(rf"(errno \1) {_CUT}", text)
    entry, key = text.find("Duplicate entry '"), text.rfind("' for key")
    if 0 <= entry < key:
        text = f"{text[:entry]}duplicate entry{text[key + 1 :]}"
    for number, words in enumerate(told):
        if (here := f"{_HERE}{number}{_HERE}") in text:
            text = text.replace(here, words())
    return text.replace(_HERE, "")  # inside a place that was cut


def _statement_of(orig: BaseException | None, statement: str) -> str:
    return in_statement(orig, statement).strip()


def _quotes_from(text: str, error: BaseException) -> int:
    """Return where a text begins to repeat a driver's error, by a sequence of the same words; -1 if it does not."""
    said = error.orig if isinstance(error, StatementError) and error.orig is not None else error
    mine = list(islice(WORD.finditer(text), _MOST_WORDS))
    theirs = [found[0] for found in islice(WORD.finditer(str(said)), _MOST_WORDS)]
    same = SequenceMatcher(None, [found[0] for found in mine], theirs, autojunk=False).find_longest_match()
    return mine[same.a].start() if same.size >= _REPEATED_WORDS else -1


def _behind(error: BaseException) -> Iterator[BaseException]:
    """The database errors that caused an error, or that were passed to it."""
    waiting: list[object] = [error]
    seen: set[int] = set()
    while waiting and len(seen) < _MOST_ERRORS:
        at = waiting.pop()
        if not isinstance(at, BaseException) or id(at) in seen:
            continue
        seen.add(id(at))
        if at is not error and (isinstance(at, StatementError) or is_drivers(at)):
            yield at
        waiting += [_context_of(at), _cause_of(at), *_args_of(at)]
        if isinstance(at, BaseExceptionGroup):
            waiting += _in_group(at)


def _bound_behind(error: BaseException) -> Sought | None:
    """The values bound to the statements that failed behind an error."""
    try:
        # Starts anew for each member of a group: one with an endless chain hides none of the others.
        starts = (error, *leaves(error)) if isinstance(error, BaseExceptionGroup) else (error,)
        behind = {
            id(each): each.params
            for start in starts
            for each in (*_behind(start), *((start,) if start is not error else ()))
            if isinstance(each, StatementError) and each.params
        }
        return sought(list(behind.values())) if behind else None
    except Exception:  # a value's own repr may raise
        return Sought(None, None)


def _forms(error: BaseException) -> set[str]:
    forms = {str(error), repr(error)}
    if isinstance(error, StatementError) and error.orig is not None:
        forms |= {str(error.orig), repr(error.orig)}
    return forms
