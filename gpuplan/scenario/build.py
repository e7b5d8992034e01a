"""Plain data into structs, by their types, with errors that say which key is wrong and what would be right.

`build(data, kind)` fills msgspec structs, nested and tagged ones included. It exists beside `msgspec.convert` for its
errors: the dotted key with names of mappings in it, the value, and what is allowed.
"""

from __future__ import annotations

import math
import re
import types
import typing
from typing import Any, TypeVar

import msgspec

from gpuplan.errors import InputError

T = TypeVar("T")


def build(data: Any, kind: type[T], key: str = "") -> T:
    """`data` (plain dicts, lists, scalars) as a `kind`. Raises InputError with the dotted key of what is wrong."""
    filled: T = _build(data, kind, key)
    return filled


def _build(data: Any, kind: Any, key: str) -> Any:
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
        return _build_struct(data, kind, key)
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is dict:
        _expect_mapping(data, key)
        return {
            _leaf(name, arguments[0], f"{key}.{name}"): _build(value, arguments[1], f"{key}.{name}")
            for name, value in data.items()
        }
    if origin is list:
        if not isinstance(data, list):
            raise InputError("needs a list", key=key, value=data)
        return [_build(item, arguments[0], f"{key}[{i}]") for i, item in enumerate(data)]
    if origin in (typing.Union, types.UnionType):
        return _build_union(data, arguments, key)
    return _leaf(data, kind, key)


def _build_struct(data: Any, kind: type[msgspec.Struct], key: str) -> Any:
    _expect_mapping(data, key)
    hints = typing.get_type_hints(kind, include_extras=True)
    fields = {field.encode_name: field for field in msgspec.structs.fields(kind)}
    tag_field = kind.__struct_config__.tag_field
    for name in data:
        if name not in fields and name != tag_field:
            raise InputError("unknown key", key=join(key, str(name)), allowed=", ".join(sorted(fields)))
    values = {}
    for name, field in fields.items():
        if name in data:
            values[field.name] = _build(data[name], hints[field.name], join(key, name))
        elif field.required:
            raise InputError("missing", key=join(key, name))
    return kind(**values)


def _build_union(data: Any, options: tuple[Any, ...], key: str) -> Any:
    structs = [o for o in options if isinstance(o, type) and issubclass(o, msgspec.Struct)]
    tagged = {str(o.__struct_config__.tag): o for o in structs if o.__struct_config__.tag is not None}
    if tagged:
        _expect_mapping(data, key)
        tag_field = next(iter(tagged.values())).__struct_config__.tag_field or ""
        chosen = tagged.get(str(data.get(tag_field)))
        if chosen is None:
            raise InputError(
                "missing or unknown", key=join(key, tag_field), value=data.get(tag_field), allowed=", ".join(tagged)
            )
        return _build_struct(data, chosen, key)
    if data is None and type(None) in options:
        return None
    if structs and isinstance(data, dict):
        return _build_struct(data, structs[0], key)
    scalars = [o for o in options if o not in structs and o is not type(None)]
    if not scalars:
        _expect_mapping(data, key)
    return _build(data, scalars[0], key)


_DURATION = re.compile(r"^\s*([0-9]*\.?[0-9]+)\s*(ms|s|m|h)\s*$")
_SECONDS = {"ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}


def duration_s(text: str) -> float:
    """Seconds in `250ms`, `60s`, `5m`, `1h` or a bare number of seconds. Raises ValueError for anything else."""
    match = _DURATION.match(text)
    return float(match[1]) * _SECONDS[match[2]] if match else float(text)


def _leaf(data: Any, kind: Any, key: str) -> Any:
    constraints = [m for m in typing.get_args(kind)[1:] if isinstance(m, msgspec.Meta)] if typing.get_args(kind) else []
    if any((meta.extra or {}).get("duration") for meta in constraints) and isinstance(data, str):
        try:
            data = duration_s(data)
        except ValueError:
            raise InputError("not a duration", key=key, value=data, allowed="e.g. 250ms, 60s, 5m, 1h") from None
    if typing.get_origin(kind) is typing.Literal and data not in typing.get_args(kind):
        raise InputError("invalid value", key=key, value=data, allowed=", ".join(typing.get_args(kind)))
    try:
        value = msgspec.convert(data, kind)
    except msgspec.ValidationError as error:
        wanted = str(error).split(" - at ")[0].replace("`", "")
        raise InputError("invalid value", key=key, value=data, allowed=wanted.removeprefix("Expected ")) from None
    if isinstance(value, float) and not math.isfinite(value):
        raise InputError("invalid value", key=key, value=data, allowed="a finite number")
    return value


def _expect_mapping(data: Any, key: str) -> None:
    if not isinstance(data, dict):
        raise InputError("needs a mapping", key=key, value=data)


def join(key: str, name: str) -> str:
    """The dotted key of `name` under `key`."""
    return f"{key}.{name}" if key else name
