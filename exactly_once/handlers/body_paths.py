"""Checks at the decorator that a dotted path into the JSON body can exist in the model of that body.

Names are those in the JSON: aliases, if the model has them. A path that cannot be checked (dict, Any, a model that allows extra
members or changes its input before validation) is accepted. Never reads a message. Called by the handler's plan, for the paths of
`key=`, `batch_order=` and `fingerprint=`.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from datetime import date, time, timedelta
from decimal import Decimal
from enum import Enum
from types import NoneType, UnionType
from typing import Annotated, Any, Final, Literal, NotRequired, Required, Union, get_args, get_origin, get_type_hints
from uuid import UUID

from exactly_once.errors import ConfigurationError
from exactly_once.handlers.body import shown
from exactly_once.keys import Path
from exactly_once.wording.text import listed, probably

__all__ = ["check_paths"]


class _Open:
    """Anything may stand here."""


OPEN: Final = _Open()
_MANY: Final = ". For the bodies of many messages write @eo.batch_handler and one list around them"
_SCALARS: Final = (str, int, float, bytes, Decimal, date, time, timedelta, UUID, Enum, NoneType)
_LISTS: Final = (list, tuple, set, frozenset)


def check_paths(annotation: Any, paths: Iterable[Path], *, option: str, as_key: bool) -> None:
    """Check each path against the annotation of the body parameter.

    Args:
        annotation: The resolved annotation.
        paths: Paths into the JSON.
        option: "key", "batch_order" or "fingerprint", for the error.
        as_key: The path must lead to a possible key, not to a float, a bool, a list or an object.

    Raises:
        ConfigurationError: A path leads nowhere in this model; the text names similar members.
    """
    for path in paths:
        here = [OPEN if plain in (bytes, str) else plain for plain in _alternatives(annotation)]  # raw: any JSON
        for place, step in enumerate(path.steps):
            reached = [found for candidate in here for found in _into(candidate, step)]
            if not reached:
                raise ConfigurationError(_nowhere(path, place, step, here, option))
            here = [inner for found in reached for inner in _alternatives(found)]
        ends = [end for end in here if end is not NoneType]
        if as_key and ends and all(_no_key(end) for end in ends):
            raise ConfigurationError(
                f"{option}={path.text!r} is {shown(ends[0])} in the body's model; a business key is a text or a whole number"
            )


def _nowhere(path: Path, place: int, step: str, here: list[Any], option: str) -> str:
    names = {name: field for candidate in here for name, (field, _) in _members(candidate).items()}
    what = listed(dict.fromkeys(shown(candidate) for candidate in here if candidate is not NoneType))
    text = f"{option}={path.text!r}: the JSON of {what} has no member {step!r}"
    if not names:
        many = "" if place or not any(get_origin(each) is list for each in here) else _MANY
        return f"{text}, for it is no object{many}" if place or many else text
    called = [name for name, field in names.items() if field == step]
    hint = f" In the JSON it is called {called[0]!r}." if called else probably(step, names)
    return f"{text}.{hint} It has: {listed(names)}. For anything else use keys.call(...) or a function"


def _alternatives(annotation: Any) -> Iterator[Any]:
    origin = get_origin(annotation)
    if origin in (Annotated, Required, NotRequired):
        yield from _alternatives(get_args(annotation)[0])
    elif origin in (Union, UnionType):
        for member in get_args(annotation):
            yield from _alternatives(member)
    elif hasattr(annotation, "__value__"):  # a `type X = ...` alias
        yield from _alternatives(annotation.__value__)
    elif isinstance(annotation, type) and getattr(annotation, "__pydantic_root_model__", False):
        yield from _alternatives(getattr(annotation, "__pydantic_fields__")["root"].annotation)  # noqa: B009
    else:
        yield annotation


def _into(annotation: Any, step: str) -> list[Any]:
    """Return what can stand at `step` inside. Empty: nothing can."""
    base = get_origin(annotation) or annotation
    arguments = get_args(annotation)
    if not isinstance(base, type):
        return [] if base is Literal else [OPEN]
    if _is_object(base):
        members = _members(annotation)
        if step in members:
            return [members[step][1]]
        return [OPEN] if _takes_anything(base) else []
    if issubclass(base, _SCALARS):
        return []
    if issubclass(base, _LISTS):
        return [arguments[0] if arguments else OPEN] if step.isascii() and step.isdigit() else []
    if issubclass(base, Mapping):
        return [arguments[1] if len(arguments) == 2 else OPEN]
    return [OPEN]


def _is_object(base: Any) -> bool:
    return hasattr(base, "__pydantic_fields__") or dataclasses.is_dataclass(base) or _is_typed_dict(base)


def _is_typed_dict(base: Any) -> bool:
    # by attributes: typing.is_typeddict does not know the class of typing_extensions, which pydantic needs before 3.12
    return isinstance(base, type) and hasattr(base, "__required_keys__") and hasattr(base, "__total__")


def _no_key(annotation: Any) -> bool:
    base = get_origin(annotation) or annotation
    if not isinstance(base, type) or (_is_object(base) and _takes_anything(base)):
        return False
    return base is float or base is bool or issubclass(base, (*_LISTS, Mapping)) or _is_object(base)


def _config(base: Any) -> Mapping[str, Any]:
    config: Mapping[str, Any] = getattr(base, "model_config", None) or getattr(base, "__pydantic_config__", None) or {}
    return config


def _takes_anything(base: Any) -> bool:
    """Whether the class accepts members in its JSON that it does not name."""
    if _config(base).get("extra") == "allow":
        return True
    if not hasattr(base, "__pydantic_fields__") and "alias_generator" in _config(base):
        return True
    if any("__get_pydantic_core_schema__" in vars(cls) for cls in base.__mro__ if not _is_pydantics_own(cls)):
        return True
    decorators = getattr(base, "__pydantic_decorators__", None)
    validators = decorators.model_validators.values() if decorators is not None else ()
    return any(validator.info.mode in ("before", "wrap") for validator in validators)


def _is_pydantics_own(cls: type) -> bool:
    return str(cls.__module__).partition(".")[0] == "pydantic"


def _members(annotation: Any) -> dict[str, tuple[str, Any]]:
    """Return each name in the JSON, with the field's name in Python and its annotation."""
    base = get_origin(annotation) or annotation
    if not isinstance(base, type) or not _is_object(base):
        return {}
    found: dict[str, tuple[str, Any]] = {}
    for name, inner, information in _fields(base):
        for alias, deeper in _json_names(base, name, information):
            found[alias] = (name, OPEN if deeper else inner)
    return found


def _fields(base: Any) -> Iterator[tuple[str, Any, tuple[Any, ...]]]:
    if (fields := getattr(base, "__pydantic_fields__", None)) is not None:
        for name, field in fields.items():
            yield name, field.annotation, (field,)
        return
    try:
        hints: Mapping[str, Any] = get_type_hints(base, include_extras=True)
    except (NameError, TypeError, AttributeError):  # pydantic resolves them in another way, or reports it
        hints = {}
    if dataclasses.is_dataclass(base):
        for part in dataclasses.fields(base):
            if part.init:
                hint = hints.get(part.name, OPEN)
                yield part.name, hint, (*_metadata(hint), part.default, *part.metadata.values())
    else:
        for name in base.__annotations__:
            hint = hints.get(name, OPEN)
            yield name, hint, _metadata(hint)


def _metadata(hint: Any) -> tuple[Any, ...]:
    while get_origin(hint) in (Required, NotRequired):
        (hint,) = get_args(hint)
    return get_args(hint)[1:] if get_origin(hint) is Annotated else ()


def _json_names(base: Any, name: str, information: tuple[Any, ...]) -> Iterator[tuple[str, bool]]:
    """Return the names of a field in the JSON. True: an alias path with more than one step."""
    aliases = [
        alias
        for told in information
        if (alias := getattr(told, "validation_alias", None) or getattr(told, "alias", None)) is not None
    ]
    config = _config(base)
    by_alias = config.get("validate_by_alias", True)
    if not aliases or not by_alias or config.get("validate_by_name") or config.get("populate_by_name"):
        yield name, False
    for alias in aliases if by_alias else ():
        for choice in getattr(alias, "choices", (alias,)):  # AliasChoices
            steps = getattr(choice, "path", (choice,))  # AliasPath
            if isinstance(steps[0], str):
                yield steps[0], len(steps) > 1
