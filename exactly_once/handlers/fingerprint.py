"""Fingerprints: they show whether a second message with a known key has the same payload or another.

    tag (4 bytes)                        digest (16 bytes)         sketch (0 to 100 bytes)
    format, 3 bytes of what is chosen    BLAKE2b of the canonical  2 bytes that stand for the set of member names, then
                                         form of what is chosen    2 bytes a member: a checksum of its name and value

The digest alone decides. Fingerprints with different tags (the handler's `fingerprint=` was changed, or this format) are *not
compared*: late duplicates of messages consumed before the change must not become thousands of dead letters. The sketch is only
for the person who reads the dead letter: it shows which members of the JSON object differ, although the old body is not kept. If
both objects have the same names, each checksum belongs to one name. Else a member whose checksum is not among the stored ones is
new or changed. A member that is gone cannot be named, because its name was not kept. Checksums of 2 bytes may be equal by chance:
the digest still shows that something differs, but the name is missing from the list.

The canonical form is JSON with sorted names and no white space: the order of members and spaces do not matter; 1 and 1.0 differ.
Of a body that is not JSON the bytes count. Never opens, waits or decides. The handler's plan makes fingerprints, and the guards
compare them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from hashlib import blake2b
from json import JSONEncoder
from json.encoder import encode_basestring_ascii
from math import isfinite
from struct import Struct
from typing import Any, Final, TypeAlias
from zlib import crc32

from exactly_once.database.schema import FINGERPRINT_BYTES
from exactly_once.errors import BadBody, ConfigurationError
from exactly_once.exceptions.stops import asked_from_outside
from exactly_once.exceptions.words import words_of
from exactly_once.handlers.body import NOT_JSON
from exactly_once.keys import MISSING, Path, path
from exactly_once.message import Message
from exactly_once.wording.text import escaped

__all__ = [
    "Differs",
    "FingerprintRule",
    "FingerprintSpec",
    "NotCompared",
    "Same",
    "compare",
    "differing_paths",
    "maker",
]

FORMAT: Final = 1
TAG_BYTES: Final = 4
DIGEST_BYTES: Final = 16
HEAD_BYTES: Final = TAG_BYTES + DIGEST_BYTES
MEMBERS: Final = (FINGERPRINT_BYTES - HEAD_BYTES) // 2 - 1  # 49; the first two bytes are for the set of names

GONE: Final = "(a member that is no longer there)"
BEYOND: Final = f"(a member after the first {MEMBERS}, which are remembered)"
OTHER_SET: Final = "(the set of members)"

FingerprintSpec: TypeAlias = str | Sequence[str] | Callable[[Message], bytes | str] | None


@dataclass(frozen=True, slots=True)
class Same:
    """The payloads are equal."""


@dataclass(frozen=True, slots=True)
class NotCompared:
    """The payloads cannot be compared: another selection or format, or fingerprints are off. Treat them as the same."""


@dataclass(frozen=True, slots=True)
class Differs:
    """The payloads differ."""


Comparison: TypeAlias = Same | NotCompared | Differs


@dataclass(frozen=True, slots=True)
class FingerprintRule:
    """How one handler's fingerprints are made, decided once."""

    tag: bytes
    """Empty when fingerprints are off."""
    of: Callable[[Message, object], bytes]
    """Called with the message and its parsed JSON (or `NOT_JSON`). Raises `BadBody` if the user's function fails."""
    needs_json: bool
    paths: tuple[Path, ...]
    """The chosen members. Empty: all."""


def maker(spec: FingerprintSpec = "body") -> FingerprintRule:
    """Decide how a handler's fingerprints are made.

    Args:
        spec: "body", a list or tuple of dotted paths into the JSON body, a function of the message that returns bytes or text,
            or None for no comparison at all.

    Raises:
        ConfigurationError: It is none of these.

    Example:
        >>> rule = maker(["amount"])
        >>> one = rule.of(Message("orders", b""), {"amount": 5, "sent_at": "10:00"})
        >>> compare(one, rule.of(Message("orders", b""), {"amount": 5, "sent_at": "10:07"}))
        Same()
    """
    if spec is None:
        return FingerprintRule(b"", lambda message, parsed: b"", False, ())
    if isinstance(spec, str):
        if spec != "body":
            raise ConfigurationError(
                f"fingerprint={spec!r} is not known: use 'body', a list of paths ([{spec!r}]), a function, or None"
            )
        tag = _tag(b"body")
        return FingerprintRule(tag, partial(_of_body, tag), True, ())
    if isinstance(spec, (list, tuple)):
        return _of_paths(spec)
    if callable(spec) and not isinstance(spec, type):
        return _of_function(spec)
    raise ConfigurationError(
        f"fingerprint= was given {spec!r}; use 'body', a list of dotted paths, a function of the message, or None"
    )


def _tag(selection: bytes) -> bytes:
    return bytes([FORMAT]) + blake2b(selection, digest_size=TAG_BYTES - 1).digest()


def _of_body(tag: bytes, message: Message, parsed: Any) -> bytes:
    if type(parsed) is dict:
        return tag + _of_object(parsed)
    if parsed is not NOT_JSON:
        return tag + _digest(_canonical(parsed))
    if message.body is None:  # a tombstone is not an empty body
        return tag + blake2b(b"", digest_size=DIGEST_BYTES, person=b"no body").digest()
    return tag + _digest(message.body)


def _of_paths(spec: Sequence[str]) -> FingerprintRule:
    if not spec:
        raise ConfigurationError("fingerprint= is an empty list; use None to compare nothing")
    paths = tuple(path(text) for text in sorted(set(spec)))
    tag = _tag(b"paths " + _canonical([part.text for part in paths]))

    def of(message: Message, parsed: object) -> bytes:
        if parsed is NOT_JSON:
            return _of_body(tag, message, parsed)
        return tag + _of_object(_chosen(paths, parsed))

    return FingerprintRule(tag, of, True, paths)


def _chosen(paths: tuple[Path, ...], parsed: object) -> dict[str, Any]:
    found = ((part.text, part.find(parsed)) for part in paths)
    return {text: value for text, value in found if value is not MISSING}  # absent and null are not the same


def _of_function(function: Callable[[Message], bytes | str]) -> FingerprintRule:
    # the bare name: it must be the same when the file is a script and when it is imported. What it does cannot be known anyway
    name = getattr(function, "__name__", type(function).__name__)
    tag = _tag(b"function " + name.encode())

    def of(message: Message, parsed: object) -> bytes:
        try:
            made = function(message)
            material = made.encode("utf-8", "surrogatepass") if isinstance(made, str) else bytes(memoryview(made))
        except BaseException as error:
            if asked_from_outside(error):
                raise
            told = escaped(f"{type(error).__name__}: {words_of(error)}", 200)
            raise BadBody(f"the fingerprint function {name} gave no bytes or text for this message: {told}") from error
        return tag + _digest(material)

    return FingerprintRule(tag, of, False, ())


def _digest(material: bytes) -> bytes:
    return blake2b(material, digest_size=DIGEST_BYTES).digest()


# ensure_ascii, because half of a surrogate pair cannot be encoded in UTF-8. The C encoder is fast
_encode = JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=True, check_circular=False).encode


def _canonical(value: Any) -> bytes:
    return _encode(value).encode("ascii")


def _value(value: Any) -> str:
    kind = type(value)
    if kind is str:
        return encode_basestring_ascii(value)
    if kind is int:
        return int.__repr__(value)
    if kind is float and isfinite(value):
        return float.__repr__(value)
    return _encode(value)


_SLOTS: Final = tuple(Struct(f"<{count}H").pack for count in range(MEMBERS + 2))


_shapes: dict[tuple[str, ...], tuple[tuple[tuple[str, str], ...], int]] = {}
"""For the names of objects seen: the sorted names, each with the beginning of its text, and the checksum of all names."""
_SHAPES: Final = 256
_SHAPE_CHARACTERS: Final = 2_000


def _of_object(value: dict[str, Any]) -> bytes:
    """Return digest and sketch of a JSON object. Both are made from the texts of its members."""
    names = tuple(value)
    shape = _shapes.get(names) or _shape(names)
    if shape is None:
        return _of_any_object(value)
    members, checksum = shape
    quote = encode_basestring_ascii
    try:
        texts = [
            (begins + (quote(member) if type(member := value[name]) is str else _flat(member))).encode()
            for name, begins in members
        ]
    except _NotFlat:
        return _of_any_object(value)
    sketch = _SLOTS[len(texts) + 1](checksum, *[crc32(text) & 0xFFFF for text in texts])
    return _digest(b"{%s}" % b",".join(texts)) + sketch


class _NotFlat(Exception):
    """A member is an object."""


def _flat(value: Any) -> str:
    if type(value) is dict:
        raise _NotFlat
    return _value(value)


def _shape(names: tuple[str, ...]) -> tuple[tuple[tuple[str, str], ...], int] | None:
    """Compute once what objects with the same names have in common, and cache it. None: the names are too many or too long."""
    if len(names) > MEMBERS or sum(map(len, names)) > _SHAPE_CHARACTERS:
        return None
    quoted = [(name, encode_basestring_ascii(name)) for name in sorted(names)]
    checksum = 0
    for _, text in quoted:
        checksum = crc32(text.encode("ascii"), checksum)
    if len(_shapes) >= _SHAPES:  # the names may be data, such as order numbers
        _shapes.clear()
    found = _shapes[names] = tuple((name, text + ":") for name, text in quoted), checksum & 0xFFFF
    return found


def _of_any_object(value: dict[str, Any]) -> bytes:
    """The same for an object whose members may be objects, in one pass."""
    texts: list[bytes] = []
    slots: list[int] = [0]
    names = 0
    room = MEMBERS - len(value)  # slots left for members one level deeper
    for name in sorted(value):
        member = value[name]
        quoted = encode_basestring_ascii(name)
        if type(member) is dict and 0 < len(member) <= room + 1:
            room -= len(member) - 1
            inner = []
            outer = crc32(quoted.encode("ascii"))
            for inner_name in sorted(member):
                inner_quoted = encode_basestring_ascii(inner_name)
                text = f"{inner_quoted}:{_value(member[inner_name])}".encode("ascii")
                inner.append(text)
                slots.append(crc32(text, outer) & 0xFFFF)
                names = crc32(inner_quoted.encode("ascii"), crc32(b".", names ^ outer))
            texts.append(quoted.encode("ascii") + b":{" + b",".join(inner) + b"}")
        else:
            text = f"{quoted}:{_value(member)}".encode("ascii")
            texts.append(text)
            if len(slots) <= MEMBERS:
                slots.append(crc32(text) & 0xFFFF)
                names = crc32(quoted.encode("ascii"), names)
    slots[0] = names & 0xFFFF
    return _digest(b"{" + b",".join(texts) + b"}") + _SLOTS[len(slots)](*slots)


def compare(stored: bytes, now: bytes) -> Comparison:
    """Compare two fingerprints of one handler: are they of the same payload?

    Args:
        stored: The fingerprint stored with the consumed key.
        now: The fingerprint of the present message.

    Example:
        >>> compare(b"", maker("body").of(Message("orders", b"x"), NOT_JSON))
        NotCompared()
    """
    if not stored or not now or stored[:TAG_BYTES] != now[:TAG_BYTES]:
        return NotCompared()
    return Same() if stored[TAG_BYTES:HEAD_BYTES] == now[TAG_BYTES:HEAD_BYTES] else Differs()


def differing_paths(
    stored: bytes, now_rule: FingerprintRule, message: Message, parsed: object
) -> tuple[str, ...] | None:
    """Name the members of the JSON body that differ from the payload whose fingerprint was stored.

    Args:
        stored: The fingerprint stored with the consumed key.
        now_rule: The handler's rule.
        message: The present message; `parsed` is its JSON.

    Returns:
        Dotted paths that were added or changed, then at most one entry in brackets for what cannot be named. None: nothing can
        be named, because one of the two is not a JSON object, or they cannot be compared.
    """
    if stored[:TAG_BYTES] != now_rule.tag or len(stored) <= HEAD_BYTES or parsed is NOT_JSON:
        return None
    chosen = _chosen(now_rule.paths, parsed) if now_rule.paths else parsed
    if not isinstance(chosen, dict):
        return None
    now = _of_object(chosen)[DIGEST_BYTES:]
    before, after = _slots(stored[HEAD_BYTES:]), _slots(now)
    if len(before) == len(after) and before[0] == after[0]:  # the same names: each slot has its name
        named = zip(_sketched(chosen), before[1:], after[1:], strict=True)
        changed = tuple(name for name, old, new in named if old != new)
        return changed or ((BEYOND,) if len(before) > MEMBERS else None)
    if len(before) > MEMBERS:
        return (OTHER_SET,)  # a member that was not remembered may have been there all the same
    return _added_or_changed(chosen, set(before[1:]))


def _slots(sketch: bytes) -> tuple[int, ...]:
    return Struct(f"<{len(sketch) // 2}H").unpack(sketch)


def _sketched(value: dict[str, Any]) -> list[str]:
    """Return the paths to which `_of_object` gives a slot, in its order. The arithmetic of `room` must be the same."""
    paths: list[str] = []
    room = MEMBERS - len(value)
    for name in sorted(value):
        member = value[name]
        if type(member) is dict and 0 < len(member) <= room + 1:
            room -= len(member) - 1
            paths += [f"{name}.{inner}" for inner in sorted(member)]
        elif len(paths) < MEMBERS:
            paths.append(name)
    return paths


def _added_or_changed(value: dict[str, Any], before: set[int]) -> tuple[str, ...]:
    """Name the members without a stored checksum. An object may be stored whole or by its members, so both are tried."""
    unknown: list[str] = []
    slots = 0  # how many slots the unknown members may have had before
    for name in sorted(value):
        member = value[name]
        quoted = encode_basestring_ascii(name)
        if crc32(f"{quoted}:{_value(member)}".encode("ascii")) & 0xFFFF in before:
            continue
        if type(member) is dict and member:
            outer = crc32(quoted.encode("ascii"))
            texts = {inner: f"{encode_basestring_ascii(inner)}:{_value(member[inner])}" for inner in sorted(member)}
            missing = [
                inner for inner, text in texts.items() if crc32(text.encode("ascii"), outer) & 0xFFFF not in before
            ]
            slots += len(missing)
            if len(missing) < len(texts):
                unknown += [f"{name}.{inner}" for inner in missing]
                continue
        else:
            slots += 1
        unknown.append(name)
    known = sum(len(member) if type(member) is dict and member else 1 for member in value.values()) - slots
    gone = not unknown or len(before) > known + slots
    return (*unknown, GONE) if gone else tuple(unknown)
