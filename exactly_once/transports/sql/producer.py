"""Sends to the `sql://` broker, in transactions of its own. Refuses before that what no column can hold.

Called by `exactly_once.transports.sql` alone. It tries once; `transports.producer` decides on another try.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any, Final
from uuid import uuid4

from sqlalchemy.exc import SQLAlchemyError

from exactly_once.database.connections.one_writer import refuse_inside
from exactly_once.database.errors.drivers_own import is_of_a_database, original
from exactly_once.database.errors.not_made import not_made
from exactly_once.database.errors.unusable import denied, is_denied, is_read_only, read_only
from exactly_once.database.schema import GROUP_BYTES
from exactly_once.errors import ConfigurationError, SchemaError, TransportError
from exactly_once.exceptions.words import words_of
from exactly_once.message import Message
from exactly_once.transports.contract import Receipt
from exactly_once.transports.sql.database import Database, missing_tables

__all__ = ["SqlProducer", "gone", "reason", "refused", "refused_group"]

# Bytes of UTF-8; the limits of the columns.
_LIMITS: Final = {"topic": 255, "tag": 255, "key": 1024, "ordering_key": 255}


class SqlProducer:
    """Thread-safe: its only state is whether it is closed."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._closed = False

    def send(self, messages: Sequence[Message], *, delay: timedelta | None = None) -> Sequence[Receipt | Exception]:
        """Store all messages in one transaction. Messages that cannot be stored are separated before."""
        answers: list[Receipt | Exception] = []
        rows: list[dict[str, Any]] = []
        broken: set[tuple[str, str]] = set()
        for message in messages:
            key = (message.topic, message.ordering_key) if message.ordering_key is not None else None
            if error := _refused_message(message) or self._lacked(message):
                answers.append(error)
                if key:
                    broken.add(key)
            elif key in broken:
                answers.append(TransportError("not sent: an earlier message of its ordering key was refused"))
            else:
                row = _row(message)
                rows.append(row)
                answers.append(Receipt(message.topic, row["message_id"]))
        failure = self._stored(rows, delay or timedelta(0)) if rows else None
        return [failure if failure and isinstance(answer, Receipt) else answer for answer in answers]

    def _lacked(self, message: Message) -> ValueError | None:
        """Refuse a text that would come back changed: in the same transaction, the other rows would not be stored either."""
        texts = {"topic": message.topic, "tag": message.tag, "key": message.key, "ordering key": message.ordering_key}
        try:
            lacked = [name for name, text in texts.items() if text is not None and self._database.lacks(text)]
        except Exception as error:
            if not _is_of_the_database(error):
                raise
            return None  # the database is away: storing reports that
        return ValueError(f"the database's character set lacks a character of the {lacked[0]}") if lacked else None

    def _stored(
        self, rows: Sequence[Mapping[str, Any]], delay: timedelta
    ) -> TransportError | ConfigurationError | None:
        if self._closed:
            return TransportError("this producer is closed; make another one")
        refuse_inside(self._database.engine, "send() to sql://")
        try:
            # After an error of COMMIT we do not know whether the rows are stored. A second try may double them; the
            # consumer's guard handles that, as with any broker.
            self._database.put(rows, delay)
        except SchemaError as error:
            return error
        except Exception as error:
            if not _is_of_the_database(error):
                raise
            failure = self._lacking(error) or TransportError(f"the database did not store it ({reason(error)})")
            failure.__cause__ = error
            return failure
        for topic in {row["topic"] for row in rows}:
            self._database.bell(topic).ring()
        return None

    def _lacking(self, error: Exception) -> TransportError | ConfigurationError | None:
        """Say what to do if the tables do not exist, a right is missing, or nothing can be written."""
        url = self._database.engine.url
        if is_denied(error):
            return ConfigurationError(denied(error, url, schema=self._database.schema))
        if is_read_only(error):
            return TransportError(read_only(url))
        return gone(self._database)

    def close(self) -> None:
        """Send nothing more. Idempotent."""
        self._closed = True


def _is_of_the_database(error: Exception) -> bool:
    return isinstance(error, (SQLAlchemyError, LookupError)) or is_of_a_database(error)


def _row(message: Message) -> dict[str, Any]:
    return {
        "topic": message.topic,
        "tag": message.tag,
        "message_key": message.key,
        "ordering_key": message.ordering_key,
        "body": message.body,
        "properties": json.dumps(dict(message.properties)),  # ASCII: no character set on the way can damage it
        "message_id": uuid4().hex,
        "born_at": message.born_at or datetime.now(UTC),
    }


def _refused_message(message: Message) -> ValueError | None:
    if error := refused(topic=message.topic, tag=message.tag, key=message.key, ordering_key=message.ordering_key):
        return error
    if not (message.body is None or isinstance(message.body, bytes)):
        return ValueError(f"the body must be bytes or None, not {type(message.body).__name__}")
    if not all(isinstance(part, str) for item in message.properties.items() for part in item):
        return ValueError("the names and values of properties must be str")
    if message.born_at is not None and message.born_at.tzinfo is None:
        return ValueError("born_at must have a time zone")
    return None


def refused(**texts: str | None) -> ValueError | None:
    """Say why the column of that name cannot hold the text."""
    for name, text in texts.items():
        if text is None:
            continue
        if name == "topic" and not text:
            return ValueError("the topic is empty")
        if error := _unfit(f"the {name.replace('_', ' ')}", text, _LIMITS[name]):
            return error
    return None


def refused_group(group: str) -> ValueError | None:
    """Say why a group cannot have that name."""
    return _unfit("the group", group, GROUP_BYTES) if group else ValueError("the group is empty; name one")


def _unfit(what: str, text: str, limit: int) -> ValueError | None:
    if "\x00" in text:
        return ValueError(f"{what} contains a NUL character, which no database takes")
    try:
        size = len(text.encode())
    except UnicodeEncodeError:
        return ValueError(f"{what} contains half of a surrogate pair and is no text")
    return ValueError(f"{what} has {size} bytes of UTF-8; {limit} is the most") if size > limit else None


def gone(database: Database) -> SchemaError | None:
    """Ask whether our tables exist. None if they do, and also if the database does not answer."""
    with suppress(Exception):
        if database.read(partial(missing_tables, database.sql)):
            return SchemaError(not_made(database.engine, schema=database.schema))
    return None


def reason(error: BaseException) -> str:
    """Return the driver's own words in one line, without the statement's parameters (which are message bodies)."""
    origin = original(error)
    words = words_of(origin).strip()
    return f"{type(origin).__name__}: {words.splitlines()[0] if words else 'no text'}"
