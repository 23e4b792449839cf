"""Frozen dataclasses as plain values and back, by the types of their fields.

Nothing here knows what a description consists of: a field that is added to one is read and written
as soon as it has a type. Fields that have their default are left out, and None is ``"none"``, since
TOML has no null.
"""

from __future__ import annotations

import tomllib
import types
from collections.abc import Mapping
from dataclasses import MISSING, Field, fields, is_dataclass
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from corequant._validation import need_packages
from corequant.errors import ArchitectureError
from corequant.formats import suggestion

__all__ = ["FIELDS_OF", "from_plain", "from_toml", "to_plain", "to_toml"]

T = TypeVar("T")

FIELDS_OF = "fields_of"
"""In the metadata of a mapping's field: what returns the dataclass whose fields are its keys."""

_NONE = "none"
_KIND = "kind"
"""Names the class of a table where a field takes several."""

_SCALARS: dict[Any, str] = {
    str: "a string",
    bool: "true or false",
    int: "an integer",
    float: "a number",
}


def to_plain(value: Any, *, whole: bool = False) -> dict[str, Any]:
    """Return a dataclass as plain values, as ``from_plain`` reads them.

    Parameters
    ----------
    value : dataclass
        Fields may be strings, numbers, booleans, None, tuples, mappings and dataclasses.
    whole : bool
        Whether fields that have their default are there, too.

    Returns
    -------
    dict

    Raises
    ------
    ArchitectureError
        If a field holds something else, such as a function.

    Examples
    --------
    >>> import corequant_transformers as cqhf
    >>> from corequant_transformers.architectures.serialization import to_plain
    >>> to_plain(cqhf.Architecture("starcoder2", norm="layer", gate=None))
    {'model_type': 'starcoder2', 'norm': 'layer', 'gate': 'none'}
    """
    return _table(value, type(value).__name__, whole)


def _table(value: Any, where: str, whole: bool) -> dict[str, Any]:
    hints, found = _hints(type(value)), {}
    for field in fields(value):
        held = getattr(value, field.name)
        if whole or _default(field) is MISSING or held != _default(field):
            plain = _written(held, f"{where}.{field.name}", whole)
            if is_dataclass(held) and len(_classes(hints[field.name])) > 1:
                plain = {_KIND: type(held).__name__, **plain}
            found[field.name] = plain
    return found


def _written(value: Any, where: str, whole: bool) -> Any:
    if value is None:
        return _NONE
    if value == _NONE:
        raise ArchitectureError(f"{where} must not be {_NONE!r}, which stands for None")
    if isinstance(value, str | bool | int | float):
        return value
    if isinstance(value, tuple | list):
        return [_written(each, f"{where}[{i}]", whole) for i, each in enumerate(value)]
    if isinstance(value, Mapping):
        return {str(key): _written(each, f"{where}.{key}", whole) for key, each in value.items()}
    if is_dataclass(value) and not isinstance(value, type):
        return _table(value, where, whole)
    raise ArchitectureError(
        f"{where} must be plain data (strings, numbers, lists, tables) to be written, got a "
        f"{type(value).__name__}"
    )


def from_plain(kind: type[T], values: Any, where: str = "") -> T:
    """Return a dataclass of plain values.

    Parameters
    ----------
    kind : type
        A dataclass.
    values : mapping
        As ``to_plain`` returns them. Fields that are left out have their default.
    where : str
        Place of the values in what they were read from, for messages.

    Raises
    ------
    ArchitectureError
        If a field is unknown, missing or of another type; names its place, the rule and the value.

    Examples
    --------
    >>> import corequant_transformers as cqhf
    >>> from corequant_transformers.architectures.serialization import from_plain
    >>> from_plain(cqhf.Architecture, {"model_type": "starcoder2", "gate": "none"}).gate is None
    True
    """
    if not isinstance(values, Mapping):
        raise _wrong(where or "a description", "a table", values)
    hints = _hints(kind)
    known = {field.name: field for field in fields(kind)}  # type: ignore[arg-type]
    for name in values:
        if name not in known:
            raise ArchitectureError(
                f"{_at(where, name)} must be one of {', '.join(known)}, got {str(name)[:80]!r}"
                f"{suggestion(str(name), known)}"
            )
    missing = [n for n, field in known.items() if _default(field) is MISSING and n not in values]
    if missing:
        raise ArchitectureError(f"{_at(where, missing[0])} must be given, got nothing")
    read = {
        name: _read_field(known[name], hints[name], value, _at(where, name))
        for name, value in values.items()
    }
    try:
        return kind(**read)
    except ArchitectureError as error:
        raise ArchitectureError(f"{where}: {error}" if where else str(error)) from None


def _read_field(known: Field[Any], hint: Any, value: Any, where: str) -> Any:
    if FIELDS_OF not in known.metadata or not isinstance(value, Mapping):
        return _read(hint, value, where)
    hints = _hints(known.metadata[FIELDS_OF]())
    for name in value:
        if name not in hints:
            raise ArchitectureError(
                f"{where} must name fields of Architecture, got {str(name)[:80]!r}"
                f"{suggestion(str(name), hints)}"
            )
    return {name: _read(hints[name], each, _at(where, name)) for name, each in value.items()}


def _read(hint: Any, value: Any, where: str) -> Any:
    """Return a plain value as a field of some type holds it."""
    origin, inner = get_origin(hint), get_args(hint)
    if hint is Any:
        return _frozen(value)
    if origin in (Union, types.UnionType):
        return _read_any(inner, value, where)
    if origin is Literal:
        if value not in inner:
            raise _wrong(where, f"one of {', '.join(map(repr, inner))}", value)
        return value
    if origin is tuple:
        return _read_tuple(inner, value, where)
    if origin is not None and issubclass(origin, Mapping):
        if not isinstance(value, Mapping):
            raise _wrong(where, "a table", value)
        return {key: _read(inner[1], each, _at(where, key)) for key, each in value.items()}
    if is_dataclass(hint):
        return from_plain(hint, value, where)  # type: ignore[arg-type]
    if not _is_scalar(hint, value):
        raise _wrong(where, _SCALARS[hint], value)
    return value


def _is_scalar(hint: Any, value: Any) -> bool:
    if isinstance(value, bool) or hint is bool:
        return hint is bool and isinstance(value, bool)
    return isinstance(value, int | float if hint is float else hint)


def _read_any(members: tuple[Any, ...], value: Any, where: str) -> Any:
    """Return a value that may be of several types."""
    if value == _NONE and types.NoneType in members:
        return None
    members = tuple(member for member in members if member is not types.NoneType)
    classes: tuple[Any, ...] = tuple(member for member in members if is_dataclass(member))
    if isinstance(value, Mapping) and len(classes) > 1:
        names: dict[Any, Any] = {member.__name__: member for member in classes}
        found = value.get(_KIND)
        if found not in names:
            raise _wrong(_at(where, _KIND), f"one of {', '.join(names)}", found)
        rest = {name: each for name, each in value.items() if name != _KIND}
        return from_plain(names[found], rest, where)
    if len(members) == 1:
        return _read(members[0], value, where)
    for member in members:
        if _suits(member, value):
            return _read(member, value, where)
    kinds = [_SCALARS.get(m, "a table" if is_dataclass(m) else "a list") for m in members]
    raise _wrong(where, " or ".join(dict.fromkeys(kinds)), value)


def _suits(member: Any, value: Any) -> bool:
    """Return whether a value has the outer form of a type."""
    if member in _SCALARS:
        return _is_scalar(member, value)
    if get_origin(member) is tuple:
        return isinstance(value, list | tuple)
    return isinstance(value, Mapping)


def _read_tuple(inner: tuple[Any, ...], value: Any, where: str) -> tuple[Any, ...]:
    if isinstance(value, str) or not isinstance(value, list | tuple):
        raise _wrong(where, "a list", value)
    if len(inner) == 2 and inner[1] is Ellipsis:
        inner = (inner[0],) * len(value)
    if len(inner) != len(value):
        raise _wrong(where, f"a list of {len(inner)}", value)
    pairs = zip(inner, value, strict=True)
    return tuple(_read(hint, each, f"{where}[{i}]") for i, (hint, each) in enumerate(pairs))


def _frozen(value: Any) -> Any:
    if value == _NONE:
        return None
    return tuple(map(_frozen, value)) if isinstance(value, list | tuple) else value


def _wrong(where: str, rule: str, value: Any) -> ArchitectureError:
    return ArchitectureError(f"{where} must be {rule}, got {str(value)[:80]!r}")


def _at(where: str, name: Any) -> str:
    return f"{where}.{str(name)[:80]}" if where else str(name)[:80]


def _hints(kind: Any) -> dict[str, Any]:
    return get_type_hints(kind)


def _classes(hint: Any) -> list[Any]:
    return [member for member in get_args(hint) if is_dataclass(member)]


def _default(field: Field[Any]) -> Any:
    made = field.default_factory
    return field.default if made is MISSING else made()


def to_toml(value: Any, *, whole: bool = False) -> str:
    """Return the text of ``to_plain`` as TOML (needs tomli-w, of the extra ``transformers``)."""
    need_packages("a description as TOML", "transformers", "tomli_w")
    import tomli_w

    return tomli_w.dumps(to_plain(value, whole=whole))


def from_toml(kind: type[T], text: str) -> T:
    """Return a dataclass of what ``to_toml`` writes; malformed TOML is an ArchitectureError."""
    try:
        # Some editors write a byte order mark first.
        values = tomllib.loads(text.removeprefix("\ufeff"))
    except (ValueError, RecursionError) as error:
        # Numbers of thousands of digits raise ValueError, deep nesting RecursionError.
        raise ArchitectureError(f"a description must be valid TOML: {error}") from error
    return from_plain(kind, values)
