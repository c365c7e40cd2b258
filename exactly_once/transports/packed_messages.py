"""Marks messages with a packed or damaged body, keeps the body as it came, and reads it if that is possible. Pure."""

from dataclasses import replace

from exactly_once.clients.packed import READERS, UNREADABLE, unpacked
from exactly_once.errors import BadBody
from exactly_once.message import Message

__all__ = ["mark_unread", "unpack"]


def mark_unread(message: Message, name: str) -> Message:
    """Return the message, marked as one whose body is not read.

    Args:
        message: With its body as it came.
        name: The compression, or another word for what is wrong.
    """
    return replace(message, unread=name)


def unpack(message: Message) -> tuple[Message, BadBody | None]:
    """Return a kept message with its body read; or unchanged, with the reason why it cannot be read.

    Args:
        message: As the failure store keeps it.
    """
    name = message.unread
    if name is None:
        return message, None
    if name not in READERS or message.body is None:
        return message, BadBody(UNREADABLE.format(why=name))
    try:
        body = unpacked(name, message.body)
    except BadBody as error:
        return message, error
    return replace(message, body=body, unread=None), None
