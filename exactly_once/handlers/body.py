"""The body of a message: parsed once for key, fingerprint and handler, then read as the handler's annotation says.

pydantic is imported only here and in `steps`, and only when a handler needs it. Never runs a handler, and never decides what
becomes of a bad body: it raises a `BadBody`. Its text never has the body's values, because it goes to logs and into the reason in
the failure store. Called by the handler's plan.
"""

from collections.abc import Callable, Iterable, Mapping
from json import JSONDecodeError, JSONDecoder, loads
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Annotated, Any, Final, NamedTuple, Union, get_args, get_origin

from exactly_once.errors import BadBody, ConfigurationError
from exactly_once.wording.text import escaped

if TYPE_CHECKING:
    from pydantic import TypeAdapter, ValidationError

__all__ = ["NOT_JSON", "Decoder", "decoder", "parse_json", "why_not_json"]


class _NotJson:
    def __repr__(self) -> str:
        return "NOT_JSON"


NOT_JSON: Final = _NotJson()
"""The result of `parse_json` for a body that is not JSON. (None is JSON's null.)"""

_DEEPEST: Final = 200
_read_value: Final = JSONDecoder().raw_decode
"""The inner function of `loads`, without its search for white space, which would double the cost."""


def parse_json(body: bytes | None) -> Any:
    """Return the body as JSON (UTF-8), or `NOT_JSON`. Never raises.

    Numbers become Python's int and float, as in pydantic: two numbers that differ only beyond the 15 to 17 digits of a double are
    equal. Amounts that need more digits belong in JSON strings. A body nested deeper than 200 levels is not JSON here, as in
    pydantic: how deep Python can read depends on the depth of the call stack, and all copies of a message must be read alike.
    """
    if body is None:
        return NOT_JSON
    try:
        text = body.decode()
        try:
            value, end = _read_value(text)
        except JSONDecodeError:
            end = -1
        if end != len(text):  # there is white space around it, or it is not JSON
            value = loads(text)
    except (ValueError, RecursionError):
        return NOT_JSON
    return NOT_JSON if len(text) > 2 * _DEEPEST and _too_deep(text, value) else value


def _too_deep(text: str, value: Any) -> bool:
    if text.count("{") + text.count("[") <= _DEEPEST:
        return False  # true for nearly every body, and cheap: the value is not walked through
    level = [value]
    for _ in range(_DEEPEST + 1):
        level = [inner for outer in level if isinstance(outer, (dict, list)) for inner in _inside(outer)]
        if not level:
            return False
    return True


def _inside(outer: Any) -> Iterable[Any]:
    return outer.values() if isinstance(outer, dict) else outer


def why_not_json(body: bytes | None) -> BadBody:
    """Return the error that says why a body is not JSON, without quoting it."""
    if body is None:
        return BadBody("the message has no body; JSON was expected")
    try:
        loads(body.decode())
    except UnicodeDecodeError as error:
        return BadBody(f"the body is not JSON: byte {error.start} is not UTF-8")
    except JSONDecodeError as error:
        return BadBody(f"the body is not JSON: {error.msg} at line {error.lineno}, column {error.colno}")
    except ValueError:
        return BadBody("the body is not JSON: a number in it has too many digits")
    except RecursionError:
        pass
    return BadBody(f"the body is not JSON that can be read: it is nested deeper than {_DEEPEST} levels")


class Decoder(NamedTuple):
    """Reads a message's body into what the handler gets."""

    read: Callable[[bytes | None, Any], Any]
    """Called with the raw body and, if `needs_json`, its parsed form. Raises `BadBody`."""
    needs_json: bool


def decoder(annotation: Any, names: Callable[[], Mapping[str, Any]]) -> Decoder:
    """Return how a body is read for a parameter with this annotation.

    Args:
        annotation: bytes (raw), str (UTF-8 text, raw), dict or Any (parsed JSON), or anything that pydantic can build from JSON:
            models, dataclasses, TypedDicts, lists, numbers. For `X | None` a message without a body gives None.
        names: Returns the names for forward references inside local models. Called only if pydantic could not resolve one.

    Raises:
        ConfigurationError: pydantic cannot read this annotation.

    Source:
        https://docs.pydantic.dev/latest/concepts/type_adapter/ ; pydantic validates the raw bytes by its rules for JSON: there a
        date is a string, and a tuple a list.
    """
    plain, optional = without_none(annotation)
    read, needs_json = _read(plain, annotation, names)
    if optional:
        return Decoder(lambda body, parsed: None if body is None else read(body, parsed), needs_json)
    return Decoder(read, needs_json)


def without_none(annotation: Any) -> tuple[Any, bool]:
    """Split `X | None` into X and True, and anything else into itself and False. `Annotated` is ignored."""
    inner = annotation
    while get_origin(inner) is Annotated:
        inner = get_args(inner)[0]
    if get_origin(inner) in (Union, UnionType) and NoneType in get_args(inner):
        rest = tuple(member for member in get_args(inner) if member is not NoneType)
        return (rest[0] if len(rest) == 1 else Union[rest]), True  # noqa: UP007  (built at run time)
    return inner, False


def _read(
    plain: Any, annotation: Any, names: Callable[[], Mapping[str, Any]]
) -> tuple[Callable[[Any, Any], Any], bool]:
    if plain is bytes:
        return _bytes, False
    if plain is str:
        return _text, False
    if plain is dict or plain == dict[str, Any]:  # JSON has no other keys
        return _object, True
    if plain is Any or plain is object:
        return _anything, True
    adapter = _adapter(annotation, names)
    validate = adapter.validate_json
    from pydantic import ValidationError

    def read(body: bytes | None, parsed: Any) -> Any:
        if body is None:
            raise BadBody("the message has no body. A handler that wants such messages says so: `body: Order | None`")
        try:
            return validate(body)
        except ValidationError as error:
            raise BadBody(_without_values(error)) from None  # the cause would put the body's values into logs

    return read, False


def _bytes(body: bytes | None, parsed: Any) -> bytes:
    if body is None:
        raise BadBody("the message has no body. A handler that wants such messages says so: `body: bytes | None`")
    return body


def _text(body: bytes | None, parsed: Any) -> str:
    if body is None:
        raise BadBody("the message has no body. A handler that wants such messages says so: `body: str | None`")
    try:
        return body.decode()
    except UnicodeDecodeError as error:
        raise BadBody(f"the body is not text: byte {error.start} is not UTF-8") from None


def _anything(body: bytes | None, parsed: Any) -> Any:
    if parsed is NOT_JSON:
        raise why_not_json(body)
    return parsed


def _object(body: bytes | None, parsed: Any) -> Any:
    if isinstance(parsed, dict):
        return parsed
    if parsed is NOT_JSON:
        raise why_not_json(body)
    raise BadBody(f"the body is JSON, but not an object: it is {_kind(parsed)}")


def _kind(parsed: Any) -> str:
    if parsed is None:
        return "null"
    return {bool: "a boolean", int: "a number", float: "a number", str: "a text", list: "a list"}.get(
        type(parsed), "a value"
    )


def _adapter(annotation: Any, names: Callable[[], Mapping[str, Any]]) -> "TypeAdapter[Any]":
    from pydantic import TypeAdapter
    from pydantic.errors import PydanticUserError

    # PydanticUndefinedAnnotation, SchemaError and TypeError all mean the same here: pydantic cannot read this annotation
    try:
        adapter: TypeAdapter[Any] = TypeAdapter(annotation)
        if not adapter.pydantic_complete:  # it refers to a class that is known only where the handler is defined
            adapter.rebuild(raise_errors=True, _types_namespace=dict(names()))
    except (PydanticUserError, NameError, TypeError, AttributeError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigurationError(f"pydantic cannot read a body as {shown(annotation)}: {first.rstrip('.')}") from error
    return adapter


def shown(annotation: Any) -> str:
    """Return an annotation nearly as its author wrote it."""
    return annotation.__qualname__ if isinstance(annotation, type) and not get_args(annotation) else str(annotation)


def _without_values(error: "ValidationError") -> str:
    problems = error.errors(include_url=False, include_context=False, include_input=False)
    if len(problems) == 1 and problems[0]["type"] == "json_invalid":
        return f"the body is not JSON: {escaped(problems[0]['msg'].removeprefix('Invalid JSON: '), 200)}"
    told = "; ".join(_told(problem) for problem in problems[:_PROBLEMS_TOLD])
    more = f"; and {len(problems) - _PROBLEMS_TOLD} more" if len(problems) > _PROBLEMS_TOLD else ""
    return f"the body is not a valid {escaped(error.title, 60)}: {told}{more}"


_PROBLEMS_TOLD: Final = 5  # a list of a thousand wrong items must not become a thousand log lines


def _told(problem: Mapping[str, Any]) -> str:
    where = ".".join(str(step) for step in problem["loc"])
    text = escaped(problem["msg"], 200)
    return f"{escaped(where, 100)}: {text}" if where else text
