"""Business keys: what may be a key, and where it is in a message.

`check_key` and `canonical` say what a key is. The parts (`path`, `tag`, `message_key`, `property`, `call`) say where to
find it. `extractor` decides once, when a handler is decorated, how to read it from every message. Nothing here opens,
waits or logs, and nothing decides what happens to a message without a key: it raises `BadKey` with a sentence.
Called by the handler's plan, and by `eo.claim` for a key that the caller already has.

A key is compared byte by byte on every server: case, accents, trailing spaces count, and it is never cut to fit.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from inspect import signature
from json import dumps, loads
from typing import Any, Final, TypeAlias
from uuid import UUID

from exactly_once.clients.values import keys_of
from exactly_once.database.schema import KEY_BYTES
from exactly_once.errors import BadKey, ConfigurationError
from exactly_once.exceptions.stops import asked_from_outside
from exactly_once.exceptions.words import words_of
from exactly_once.message import Message
from exactly_once.wording.text import escaped

__all__ = [
    "KeyPart",
    "KeyRule",
    "KeySpec",
    "call",
    "canonical",
    "check_key",
    "check_name",
    "extractor",
    "is_former",
    "message_key",
    "path",
    "property",
    "tag",
]


@dataclass(frozen=True, slots=True)
class Path:
    """A member of the JSON body; `steps` are member names, and numbers for indexes in lists."""

    text: str
    steps: tuple[str, ...]

    def find(self, parsed: object) -> object:
        """Return the value there, or `MISSING`."""
        return walk(parsed, self.steps)

    def read(self, message: Message, parsed: object) -> object:
        """Return the value there.

        Raises:
            BadKey: The body has no such member.
        """
        found = walk(parsed, self.steps)
        if found is not MISSING:
            return found
        if message.body is None:
            raise BadKey(f"the message has no body, so there is no {self.text!r} to take its key from")
        raise BadKey(f"the body has no {self.text!r}, which is the message's business key")


@dataclass(frozen=True, slots=True)
class _Tag:
    def read(self, message: Message, parsed: object) -> object:
        if message.tag is None:
            raise BadKey("the message has no tag, and its business key contains one")
        return message.tag


@dataclass(frozen=True, slots=True)
class _MessageKey:
    def read(self, message: Message, parsed: object) -> object:
        if message.key is None:
            raise BadKey("the message carries no message key, which is its business key")
        return message.key


@dataclass(frozen=True, slots=True)
class _Property:
    name: str

    def read(self, message: Message, parsed: object) -> object:
        if self.name not in message.properties:
            raise BadKey(f"the message has no property {self.name!r}, which is its business key")
        return message.properties[self.name]


@dataclass(frozen=True, slots=True)
class _Call:
    function: Callable[[Message], str | int | UUID]

    def read(self, message: Message, parsed: object) -> object:
        try:
            return self.function(message)
        except BadKey:
            raise
        except BaseException as error:
            if asked_from_outside(error):
                raise
            name = getattr(self.function, "__name__", type(self.function).__name__)
            text = f"{type(error).__name__}: {words_of(error)}"
            mend = _OF_THE_BODY if _takes_it_for_the_body(error, message) else ""
            raise BadKey(f"the key function {name} failed on this message: {escaped(text, 200)}{mend}") from error


def _takes_it_for_the_body(error: BaseException, message: Message) -> bool:
    """Say whether a function used the Message as if it were its body.

    The message is parked all the same: a branch of the function that few messages reach must not hold all others. It is
    whole in the failure store, and a requeue runs it when the function is repaired.
    """
    if isinstance(error, AttributeError):
        return error.obj is message
    # Python's own text, which is never translated: for `message["order_no"]` nothing else identifies the error.
    return type(error) is TypeError and "'Message' object is not subscriptable" in str(error)


_OF_THE_BODY: Final = (
    '. A key function gets the Message, not the body; for a member of the body write key="order_no", without a function'
)


KeyPart: TypeAlias = Path | _Tag | _MessageKey | _Property | _Call
KeySpec: TypeAlias = (
    str
    | KeyPart
    | Callable[[Message], str | int | UUID]
    | Sequence[str | KeyPart | Callable[[Message], str | int | UUID]]
)


class _Missing:
    def __repr__(self) -> str:
        return "MISSING"


MISSING: Final = _Missing()
_TOO_LONG: Final = 10**KEY_BYTES


def walk(value: Any, steps: Sequence[str]) -> Any:
    """Follow `steps` into parsed JSON; `MISSING` if they lead nowhere."""
    for step in steps:
        if isinstance(value, dict):
            value = value.get(step, MISSING)
        elif isinstance(value, list) and step.isascii() and step.isdigit():
            place = int(step) if len(step) < 10 else len(value)
            value = value[place] if place < len(value) else MISSING
        else:
            return MISSING
    return value


def path(text: str) -> Path:
    """Name a member of the JSON body by its dotted path; a plain string does the same.

    Args:
        text: Names as in the JSON, joined by dots; indexes in lists are numbers: `"lines.0.sku"`.

    Raises:
        ConfigurationError: The path is empty or has an empty step.

    Example:
        >>> path("order.no").steps
        ('order', 'no')
    """
    if not text or not isinstance(text, str):
        raise ConfigurationError(
            f"a path into the JSON body is its members' names joined by dots, such as 'order.no', not {text!r}"
        )
    steps = tuple(text.split("."))
    if not all(steps):
        raise ConfigurationError(
            f"the path {text!r} has an empty step. For a member whose name holds a dot use keys.call(...)"
        )
    return Path(text, steps)


def tag() -> KeyPart:
    """The message's tag, as a part of the key: one of several events about the same thing."""
    return _Tag()


def message_key() -> KeyPart:
    """The broker's message key; right if the producer sets it to a name of the event."""
    return _MessageKey()


def property(name: str) -> KeyPart:  # noqa: A001  (read as keys.property("name"))
    """A string property (Kafka: header) of the message.

    Raises:
        ConfigurationError: The name is empty.
    """
    if not name or not isinstance(name, str):
        raise ConfigurationError(f"keys.property() wants the property's name, not {name!r}")
    return _Property(name)


def call(function: Callable[[Message], str | int | UUID]) -> KeyPart:
    """The result of a function of the message. It must be pure, because a redelivery calls it again.

    Example:
        >>> extractor(call(lambda m: m.topic)).of(Message("orders", b""), None)
        'orders'
    """
    if not callable(function):
        raise ConfigurationError(f"keys.call() wants a function of one Message, not {function!r}")
    try:
        takes = signature(function)
    except (TypeError, ValueError):  # a callable written in C may have no signature
        return _Call(function)
    try:
        takes.bind(None)
    except TypeError:
        name = getattr(function, "__name__", type(function).__name__)
        raise ConfigurationError(
            f"the key function {name}{takes} must be a function of one parameter, the Message: it is called with nothing"
            ' else. For a member of the body write key="order_no", without a function'
        ) from None
    return _Call(function)


def check_key(value: object) -> str:
    """Return the key as text: 12 and "12" are one key, and so are a UUID and its text in the usual form.

    Args:
        value: A str, an int or a UUID.

    Returns:
        At least one and at most 255 bytes of UTF-8.

    Raises:
        BadKey: Anything else. PostgreSQL cannot store NUL, and no server can store lone surrogates; a longer key would have to be
            cut, and two keys would become one.
    """
    if type(value) is str and value.isascii():  # nearly every key
        if 0 < len(value) <= KEY_BYTES and "\0" not in value:
            return value
    elif isinstance(value, int) and not isinstance(value, bool):
        if abs(value) >= _TOO_LONG:  # before it becomes text: Python refuses numbers of over 4,300 digits
            raise BadKey(f"the business key is a number of more than {KEY_BYTES} digits, and it is never cut")
        return check_key(int.__repr__(value))
    elif isinstance(value, UUID):  # from the caller's own code: JSON has none
        return UUID.__str__(value)
    if not isinstance(value, str):
        raise BadKey(
            "the business key is null; it must be a text, a whole number or a UUID"
            if value is None
            else f"the business key is a {type(value).__name__}; it must be a text, a whole number or a UUID"
        )
    text = str.__str__(value)
    if not text:
        raise BadKey("the business key is an empty text")
    if "\0" in text:
        raise BadKey(f"the business key '{escaped(text)}' contains a NUL character, which PostgreSQL cannot store")
    try:
        size = len(text.encode())
    except UnicodeEncodeError:
        raise BadKey(
            f"the business key '{escaped(text)}' is not valid Unicode (it has half of a surrogate pair)"
        ) from None
    if size > KEY_BYTES:
        raise BadKey(
            f"the business key '{escaped(text)}' is {size} bytes of UTF-8 long; "
            f"at most {KEY_BYTES} fit, and it is never cut"
        )
    return text


def canonical(parts: Sequence[object]) -> str:
    """Return one key for one or several parts: one part is the key itself; several become a compact JSON array of texts.

    Raises:
        BadKey: A part is not usable, or the whole is over 255 bytes.

    Example:
        >>> canonical(["created", 12])
        '["created","12"]'
    """
    if len(parts) == 1:
        return check_key(parts[0])
    if not parts:
        raise BadKey("the business key has no parts")
    return check_key(dumps([check_key(part) for part in parts], separators=(",", ":"), ensure_ascii=False))


def check_name(value: object, limit_bytes: int, what: str) -> str:
    """Return a group's or handler's name if it can be stored whole.

    Args:
        value: The name.
        limit_bytes: The size of its column in bytes of UTF-8.
        what: "group" or "handler", for the error.

    Raises:
        ConfigurationError: It is not a text, empty, too long, or has characters that a server cannot store.
    """
    if not isinstance(value, str) or not value:
        raise ConfigurationError(f"the {what}'s name must be a text of at least one character, not {value!r}")
    try:
        size = len(value.encode())
    except UnicodeEncodeError:
        raise ConfigurationError(f"the {what}'s name '{escaped(value)}' is not valid Unicode") from None
    if "\0" in value:
        raise ConfigurationError(f"the {what}'s name '{escaped(value)}' contains a NUL character")
    if size > limit_bytes:
        raise ConfigurationError(
            f"the {what}'s name '{escaped(value)}' is {size} bytes of UTF-8 long; at most {limit_bytes} fit. "
            "Give it a shorter name"
        )
    return value


@dataclass(frozen=True, slots=True)
class KeyRule:
    """How one handler reads its key from a message, decided once."""

    parts: tuple[KeyPart, ...]
    of: Callable[[Message, object], str]
    """Called with the message and its parsed JSON; raises `BadKey`."""
    has_tag: bool
    """A part is the tag."""
    opaque: bool
    """A part is a function, which may use anything, the tag too."""
    needs_json: bool
    """A part is in the JSON body."""


def extractor(key: KeySpec, option: str = "key") -> KeyRule:
    """Decide how a handler's key is read.

    Args:
        key: One part or a list or tuple of parts: a text is a dotted path into the JSON body; the others are what `path`,
            `tag`, `message_key`, `property` and `call` return. A plain function is taken as `call(function)`.
        option: The name of the option, for the error.

    Raises:
        ConfigurationError: A part is none of these.

    Example:
        >>> rule = extractor((tag(), "order.no"))
        >>> rule.of(Message("orders", b"...", tag="created"), {"order": {"no": 12}})
        '["created","12"]'
    """
    given = key if isinstance(key, (list, tuple)) else (key,)
    if not given:
        raise ConfigurationError(f"{option}= has no parts; name at least one, such as {option}='order_no'")
    parts = tuple(_part(part, option) for part in given)
    paths = [part for part in parts if isinstance(part, Path)]
    return KeyRule(
        parts,
        _reader(parts),
        has_tag=any(isinstance(part, _Tag) for part in parts),
        opaque=any(isinstance(part, _Call) for part in parts),
        needs_json=bool(paths),
    )


def is_former(rule: KeyRule, key: str) -> bool:
    """Say whether a key is spelled as only the previous release spells it: several keys in another order, or bytes replaced.

    Example:
        >>> is_former(extractor(message_key()), "order-7 buyer-3"), is_former(extractor("no"), "order-7 buyer-3")
        (True, False)
    """
    try:
        texts = [key] if len(rule.parts) == 1 else loads(key)
    except ValueError:  # claimed before its handler's key had several parts
        return False
    for part, text in zip(rule.parts, texts, strict=False):
        if isinstance(part, _MessageKey) and " " in text and keys_of(text) != text:
            return True
        if isinstance(part, (_MessageKey, _Property, _Tag)) and "\ufffd" in text:
            return True
    return False


def _part(given: object, option: str) -> KeyPart:
    if isinstance(given, str):
        return path(given)
    if isinstance(given, (Path, _Tag, _MessageKey, _Property, _Call)):
        return given
    if given in (path, tag, message_key, property, call):
        name = getattr(given, "__name__", "")
        raise ConfigurationError(f"{option}= was given keys.{name} itself; call it: keys.{name}(...)")
    if callable(given) and not isinstance(given, type):
        return call(given)
    raise ConfigurationError(
        f"{option}= was given {given!r}; a part is a dotted path into the JSON body ('order.no'), keys.tag(), "
        "keys.message_key(), keys.property('name') or keys.call(function)"
    )


def _reader(parts: tuple[KeyPart, ...]) -> Callable[[Message, object], str]:
    if len(parts) > 1:
        return lambda message, parsed: canonical([part.read(message, parsed) for part in parts])
    (part,) = parts
    if isinstance(part, Path) and len(part.steps) == 1:
        (name,) = part.steps

        def of_a_member(message: Message, parsed: object) -> str:
            if type(parsed) is dict and name in parsed:  # nearly every message
                return check_key(parsed[name])
            return check_key(part.read(message, parsed))

        return of_a_member
    return lambda message, parsed: check_key(part.read(message, parsed))
