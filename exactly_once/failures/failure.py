"""A failure, and what is written of it: everything, or what the database takes of it. Decides nothing."""

import json
from dataclasses import dataclass
from enum import Enum
from hashlib import sha256
from typing import Any, Final

from sqlalchemy import Column, Connection, Table

from exactly_once.database.schema import KEY_BYTES
from exactly_once.database.server_clock import utcnow
from exactly_once.exceptions.words import place_of, words_of
from exactly_once.failures.large import parts_of
from exactly_once.message import Message
from exactly_once.wording.text import EVERY, storable

__all__ = [
    "MESSAGE_ID_BYTES",
    "NO_PROPERTIES",
    "WITHOUT_BODY",
    "Failure",
    "Form",
    "content_of",
    "kept_text",
    "known_by",
    "new_row",
    "order_of",
    "text_of",
]

MESSAGE_ID_BYTES: Final = 255
_ERROR_TEXT_CHARACTERS: Final = 4000  # enough for a person; a validation error of a large body can be megabytes
_SHORT_CHARACTERS: Final = 500
_DIGEST_CHARACTERS: Final = 32
NO_PROPERTIES: Final = "null"
WITHOUT_BODY: Final = (
    "[The body of {size} bytes and the properties are not in this row: the database did not take them. On MySQL and MariaDB look"
    " at max_allowed_packet. The message is not acknowledged: its broker has it, and brings it again, or moves it to its dead"
    " letters.] "
)


class Form(Enum):
    """How much of a failure is written: from everything to what any database takes. The body is written whole or not at all."""

    WHOLE = "everything; what the database's character set lacks is escaped"
    SHORT = "texts in ASCII, the error cut short, no time of birth; the key as it is, so that the row is found again"
    ASCII = "the key in ASCII, too"
    WITHOUT_BODY = "no body and no properties, which the server did not take: the message stays with its broker"

    @property
    def shorter(self) -> "Form | None":
        """The form to try if the database refused this one."""
        return {Form.WHOLE: Form.SHORT, Form.SHORT: Form.ASCII, Form.ASCII: Form.WITHOUT_BODY}.get(self)


@dataclass(frozen=True, slots=True)
class Failure:
    """One message of one handler that was not processed.

    `key` is None if the message has no usable business key; then its message id identifies it.
    """

    group: str
    handler: str
    key: str | None
    fingerprint: bytes
    message: Message
    error: BaseException
    counted: bool = True
    claim_owner: str | None = None
    """For a broken message: the attempt that owns the claim that stands, or is to be written."""
    block: bool = False
    """Write that claim if none stands."""
    form: Form = Form.WHOLE
    """How much is written. The shorter forms are for a failure that the database refused to take whole."""

    @property
    def failure_key(self) -> str:
        """The key by which this failure is found to be the same as an earlier one."""
        return self.failure_key_in(EVERY)

    def failure_key_in(self, characters: str) -> str:
        """The same key, as a database with this character set stores it."""
        if self.key is not None:
            return "k:" + known_by(self.key, characters)
        return "m:" + known_by(self.message.message_id or "", characters)


def known_by(text: str, characters: str, most: int = KEY_BYTES) -> str:
    """Return a text of at most `most` bytes by which rows are found again. Idempotent."""
    kept = storable(text, None, characters) or ""
    if len(kept.encode()) <= most:
        return kept
    # two long texts with the same beginning must stay different. If two messages were taken for one, a requeue would lose one
    # of them; if two ordering keys were, the messages of one would wait for the other
    digest = sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:_DIGEST_CHARACTERS]
    return f"{storable(kept, most - _DIGEST_CHARACTERS - 1)}~{digest}"


def order_of(message: Message, t: Table, characters: str) -> str | None:
    """Return what the column stores for a message's ordering key."""
    most: int = t.c.ordering_key.type.bytes  # type: ignore[attr-defined]
    return None if message.ordering_key is None else known_by(message.ordering_key, characters, most)


def content_of(connection: Connection, failure: Failure, characters: str) -> tuple[Any, ...]:
    """Return the columns of a message's content, then the parts of its body that must be appended."""
    if failure.form is Form.WITHOUT_BODY:
        # a value that no message's properties have, so that the row is never taken for a message with an empty body, and run
        return ({"properties": NO_PROPERTIES},)
    properties = _properties_of(failure.message, characters)
    first, *more = parts_of(connection, failure.message.body, beside=len(properties))
    return {"body": first, "properties": properties}, *more


def new_row(table: Table, failure: Failure, key: str, characters: str, form: Form) -> dict[str, Any]:
    """Return the columns that are written once, with the row."""
    m, t = failure.message, table.c
    return {
        "consumer_group": failure.group,
        "handler": failure.handler,
        "failure_key": key,
        "fingerprint": failure.fingerprint,
        "business_key": None if failure.key is None else key[2:],
        "topic": _fitting(m.topic, t.topic, characters),
        "tag": _fitting(m.tag, t.tag, characters),
        "message_key": _fitting(m.key, t.message_key, characters),
        "ordering_key": order_of(m, table, characters),
        "message_id": storable(m.message_id, MESSAGE_ID_BYTES, characters),
        # a time that no server takes (year 1, no time zone) is no reason to lose the message
        "born_at": m.born_at if form is Form.WHOLE else None,
        "first_failed_at": utcnow(),
    }


def _fitting(text: str | None, column: Column[str], characters: str) -> str | None:
    return storable(text, column.type.bytes, characters)  # type: ignore[attr-defined]


def _properties_of(message: Message, characters: str) -> str:
    """Return the properties as a JSON object. For an unread body: a list of the reason and that object, as no sender can make."""
    properties: Any = dict(message.properties)
    if message.unread is not None:
        properties = [message.unread, properties]
    if characters == EVERY:
        text = json.dumps(properties, ensure_ascii=False, default=repr)
        try:
            text.encode()
        except UnicodeEncodeError:  # half of a surrogate pair, which no server takes
            pass
        else:
            return text
    return json.dumps(properties, default=repr)  # less readable, but complete in any character set


def text_of(error: BaseException) -> str:
    """Return an error's text and where it was raised. Never raises, whatever the error's own code does."""
    return f"{words_of(error)}{place_of(error)}"


def kept_text(error: BaseException, characters: str, *, short: bool) -> str:
    most = _SHORT_CHARACTERS if short else _ERROR_TEXT_CHARACTERS
    given = text_of(error)
    text = storable(given, None, characters, limit=most) or ""
    return f"{text} [cut]" if len(given) > most else text
