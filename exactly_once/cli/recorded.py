"""Messages as lines of JSON, one object in each line, which `process` and `send` read. Streams; never holds a whole file."""

import base64
import binascii
import json
from codecs import BOM_UTF8
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import datetime
from pathlib import Path
from shlex import quote
from typing import IO, Any, Final

import typer

from exactly_once.errors import ConfigurationError
from exactly_once.message import Message
from exactly_once.wording.text import escaped, listed, probably

__all__ = ["BadLine", "Progressing", "messages", "open_input", "size_of"]

NAMES: Final = (
    "topic", "body", "body_base64", "tag", "key", "ordering_key", "properties", "message_id", "born_at",
)  # fmt: skip


class BadLine(Exception):
    """A line that is not a message."""


@contextmanager
def open_input(file: str) -> Iterator[IO[bytes]]:
    """Open a file, or standard input for "-"."""
    if file == "-":
        yield typer.get_binary_stream("stdin")
        return
    with ExitStack() as closing:
        try:
            stream = closing.enter_context(Path(file).open("rb"))
        except OSError as error:
            raise ConfigurationError(f"{file} cannot be read: {error.strerror}.") from error
        yield stream


def size_of(file: str) -> int | None:
    """Return how many bytes there are to read; None for standard input."""
    return None if file == "-" else Path(file).stat().st_size


def messages(
    stream: IO[bytes], topic: str | None, *, file: str, verb: str, done: str
) -> Iterator[tuple[int, int, Message | BadLine]]:
    """Yield line number, bytes read so far, and the message or what is wrong with the line. Empty lines are left out.

    Args:
        stream: What is read.
        topic: For lines that name no topic.
        file: As it was typed.
        verb: The command.
        done: What the command does to a message, such as "sent".

    Raises:
        ConfigurationError: It is one array, or one object over several lines: some of their lines may look like a message.
    """
    read = 0
    first = True
    for number, line in enumerate(stream, 1):
        read += len(line)
        bare = (line.removeprefix(BOM_UTF8) if first else line).strip()
        if not bare:
            continue
        if first:
            first = False
            if bare.startswith(b"[") or bare == b"{":
                raise ConfigurationError(_no_lines(file, verb, done, array=bare != b"{"))
        try:
            yield number, read, _message(line, topic)
        except BadLine as bad:
            yield number, read, bad


def _no_lines(file: str, verb: str, done: str, *, array: bool) -> str:
    whose, named = ("Standard input", "FILE") if file == "-" else (file, quote(file))
    what = "is one JSON array" if array else "has one JSON object over several lines"
    return (
        f"{whose} {what}; nothing was {done}. Give each message a line of its own:"
        f" jq -c {quote('.[]') if array else '.'} {named} | exactly-once {verb} - ..."
    )


def _message(line: bytes, topic: str | None) -> Message:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise BadLine(f"not JSON ({error})") from error
    if not isinstance(found, dict):
        raise BadLine("not a JSON object")
    for name in found:
        if name not in NAMES:
            raise BadLine(f"unknown member {escaped(name)!r}.{probably(name, NAMES)} Known: {listed(NAMES)}")
    chosen = found.get("topic", topic)
    if not isinstance(chosen, str) or not chosen:
        raise BadLine('no "topic", and no --topic was given')
    properties = found.get("properties") or {}
    if not isinstance(properties, dict) or not all(isinstance(value, str) for value in properties.values()):
        raise BadLine('"properties" is an object of texts')
    for name in ("tag", "key", "ordering_key", "message_id"):
        if not isinstance(found.get(name), (str, type(None))):
            raise BadLine(f'"{name}" is a text')
    return Message(
        chosen,
        _body(found),
        tag=found.get("tag"),
        key=found.get("key"),
        ordering_key=found.get("ordering_key"),
        properties=properties,
        message_id=found.get("message_id"),
        born_at=_moment(found.get("born_at")),
    )


def _body(found: dict[str, Any]) -> bytes | None:
    if "body_base64" in found:
        try:
            return base64.b64decode(found["body_base64"], validate=True)
        except (TypeError, ValueError, binascii.Error) as error:
            raise BadLine('"body_base64" is not base64') from error
    body = found.get("body")
    if body is None:
        return None
    # A text is the body itself; any other value is a JSON body.
    return (
        body.encode("utf-8", "surrogatepass")
        if isinstance(body, str)
        else json.dumps(body, ensure_ascii=False).encode()
    )


def _moment(text: object) -> datetime | None:
    if text is None:
        return None
    try:
        moment = datetime.fromisoformat(str(text))
    except ValueError as error:
        raise BadLine('"born_at" is a time such as 2026-01-31T12:00:00+00:00') from error
    if moment.tzinfo is None:
        raise BadLine('"born_at" has no time zone')
    return moment


class Progressing:
    """A progress bar, on a terminal; silent elsewhere.

    Args:
        total: The size of the whole; None if it is unknown.
        about: What is done.
        of: What is counted beside it.
    """

    def __init__(self, total: int | None, about: str, of: str = "messages") -> None:
        import sys

        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn(f"{{task.fields[done]}} {of}"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            disable=not sys.stderr.isatty(),
        )
        self._task = self._bar.add_task(about, total=total, done=0)

    def __enter__(self) -> "Progressing":
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def show(self, read: int, done: int) -> None:
        """Advance to `read` of the total, and to `done` of what is counted."""
        self._bar.update(self._task, completed=read, done=done)
