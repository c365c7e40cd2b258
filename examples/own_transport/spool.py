"""A message as a file: TOPIC@GROUP/ATTEMPTS-ID, due at the file's time of modification. Knows no transport.

To take a message is to rename it, with one attempt more: one process alone can. Whoever acts under a name that is gone changes
nothing, for another delivery has the message, or it is settled. What is put is on the disk when `put` returns. What was
acknowledged may come back after a crash of the machine.
"""

import json
import os
import time
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from urllib.parse import quote

from exactly_once import Message


def box(root: Path, topic: str, group: str) -> Path:
    return root / f"{quote(topic, safe='')}@{quote(group, safe='')}"


def boxes(root: Path, topic: str) -> list[Path]:
    return list(root.glob(f"{quote(topic, safe='')}@*"))


def put(box: Path, message: Message, message_id: str, after: timedelta) -> None:
    fields = {
        "body": None if message.body is None else message.body.hex(),
        "tag": message.tag,
        "key": message.key,
        "ordering_key": message.ordering_key,
        "properties": dict(message.properties),
        "born_at": (message.born_at or datetime.now(UTC)).isoformat(),
    }
    draft = box / f".{message_id}"  # nobody takes it under this name
    draft.write_text(json.dumps(fields))
    later(draft, after)
    _sync(draft)
    draft.rename(box / f"0-{message_id}")
    _sync(box)


def take(file: Path, topic: str, invisible: timedelta) -> tuple[Message, Path] | None:
    """Return the message and its new name; None where it is not due, or another process was quicker."""
    attempts, message_id = file.name.split("-")
    with suppress(FileNotFoundError):
        if file.stat().st_mtime > time.time():
            return None
        later(file, invisible)
        held = file.rename(file.with_name(f"{int(attempts) + 1}-{message_id}"))
        fields = json.loads(held.read_text())
        body, born_at = fields.pop("body"), datetime.fromisoformat(fields.pop("born_at"))
        raw = None if body is None else bytes.fromhex(body)
        return Message(topic, raw, message_id=message_id, attempt=int(attempts) + 1, born_at=born_at, **fields), held
    return None


def later(file: Path, after: timedelta) -> None:
    """Make it due so long from now, where it is still there."""
    due = time.time() + after.total_seconds()
    with suppress(FileNotFoundError):
        os.utime(file, (due, due))


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
