"""A strict codec between JSON and frozen dataclasses.

`loads` refuses duplicate keys, NaN and Infinity. `decode` refuses unknown keys, missing keys without a default, and
wrong types (`true` is not an int, but `1` is a float). Their errors name the place, such as
`manifest.json: model.depth`, and have the `fix` of the caller.
"""

from __future__ import annotations

import json
import math
import re
import types
from dataclasses import MISSING, fields, is_dataclass
from enum import StrEnum
from functools import cache
from typing import Any, NoReturn, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from ..checks import short
from ..errors import ArtifactRefused

T = TypeVar("T")

_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")


def loads(text: str | bytes, *, where: str, fix: str) -> object:
    """Parse JSON in UTF-8. where: name of the document, for errors. Raises ArtifactRefused."""

    def pairs(items: list[tuple[str, object]]) -> dict[str, object]:
        result: dict[str, object] = {}
        for key, value in items:
            if key in result:
                _refuse(f"{where} has the key {short(key)} twice.", "every key once", fix)
            result[key] = value
        return result

    def constant(token: str) -> NoReturn:
        _refuse(f"{where} has the number {token}, which is not finite.", "finite numbers", fix)

    try:
        text = text if isinstance(text, str) else text.decode("utf-8")
        return cast(object, json.loads(text, object_pairs_hook=pairs, parse_constant=constant))
    except (ValueError, RecursionError) as error:  # also bad UTF-8, huge integers, deep nesting
        raise ArtifactRefused(f"{where} is not valid JSON: {error}.", expected="valid JSON in UTF-8", fix=fix) from None


def decode(cls: type[T], data: object, *, where: str, fix: str) -> T:
    """An object of the dataclass `cls` from what `loads` returned. where: name of the document, for errors.

    Raises ArtifactRefused.
    """
    try:
        return cast(T, _decode(cls, data, where))
    except ArtifactRefused as error:
        raise ArtifactRefused(error.got, expected=error.expected, fix=fix) from None


def encode(obj: object) -> object:
    """The JSON form of a dataclass. Raises ArtifactRefused for NaN and Infinity, TypeError for unknown types."""
    if is_dataclass(obj) and not isinstance(obj, type):
        return {field.name: encode(getattr(obj, field.name)) for field in fields(obj)}
    if isinstance(obj, dict) and all(isinstance(key, str) for key in obj):
        return {key: encode(value) for key, value in obj.items()}
    if isinstance(obj, (tuple, list)):
        return [encode(item) for item in obj]
    if isinstance(obj, float):
        if not math.isfinite(obj):
            _refuse(f"The number {obj} is not finite.", "a finite number")
        return float(obj)
    if isinstance(obj, StrEnum):
        return str(obj)
    if obj is None or isinstance(obj, (str, int, bool)):
        return obj
    raise TypeError(f"{type(obj).__name__} has no JSON form")


_NAMES = {str: "a string", int: "an integer", float: "a finite number", bool: "true or false", type(None): "null"}


@cache
def _hints(kind: Any) -> dict[str, Any]:
    return get_type_hints(kind)


def _refuse(got: str, expected: str, fix: str = "Correct the document.") -> NoReturn:
    raise ArtifactRefused(got, expected=expected, fix=fix)


def _must_be(at: str, data: object, expected: str) -> NoReturn:
    _refuse(f"{at} is {short(data)}, but it must be {expected}.", expected)


def _join(at: str, tail: str) -> str:
    return f"{at}.{tail}" if ": " in at else f"{at}: {tail}"


def _decode(kind: Any, data: object, at: str) -> object:
    origin, arguments = get_origin(kind), get_args(kind)
    if is_dataclass(kind):
        return _decode_dataclass(kind, data, at)
    if origin in (types.UnionType, Union):
        return _decode_union(arguments, data, at)
    if origin is tuple and isinstance(data, list):
        if arguments[-1] is Ellipsis:
            arguments = arguments[:1] * len(data)
        if len(data) != len(arguments):
            _refuse(
                f"{at} has length {len(data)}, but it must have length {len(arguments)}.", f"length {len(arguments)}"
            )
        return tuple(_decode(arguments[i], value, f"{at}[{i}]") for i, value in enumerate(data))
    if origin is dict and isinstance(data, dict):
        item = arguments[1]
        return {_decode(str, key, f"{at}: key"): _decode(item, data[key], f"{at}[{short(key)}]") for key in data}
    if isinstance(kind, type) and issubclass(kind, StrEnum):
        if not isinstance(data, str) or data not in set(kind):
            _must_be(at, data, f"one of {', '.join(kind)}")
        return kind(data)
    if kind is float and type(data) in (int, float) and abs(cast(float, data)) <= 1.7e308:  # NaN compares false
        return float(cast(float, data))
    if kind in (str, int, bool, type(None)) and type(data) is kind:
        if isinstance(data, str) and _UNPRINTABLE.search(data):
            _must_be(at, data, "text without control characters")
        return data
    _must_be(at, data, _NAMES.get(kind) or ("a list" if origin is tuple else "an object"))


def _decode_union(kinds: tuple[Any, ...], data: object, at: str) -> object:
    if data is None and type(None) in kinds:
        return None
    some = [kind for kind in kinds if kind is not type(None)]
    exact = [kind for kind in some if type(data) is kind]
    if len(some) > 1 and not exact:
        _must_be(at, data, " or ".join(_NAMES.get(kind, "an object") for kind in kinds))
    return _decode((exact or some)[0], data, at)


def _decode_dataclass(kind: Any, data: object, at: str) -> object:
    if not isinstance(data, dict):
        _must_be(at, data, "an object")
    hints = _hints(kind)
    for key in data:
        if key not in hints:
            keys = ", ".join(hints)
            _refuse(f"{at} has the unknown key {short(key)}. Its keys are {keys}.", f"only the keys {keys}")
    for field in fields(kind):
        if field.name not in data and field.default is MISSING:
            _refuse(f"{at} has no key {field.name!r}.", f"the keys {', '.join(hints)}")
    values = {key: _decode(hint, data[key], _join(at, key)) for key, hint in hints.items() if key in data}
    try:
        return cast(object, kind(**values))
    except ArtifactRefused as error:  # the checks of the class know the field, not the place
        raise ArtifactRefused(_join(at, error.got), expected=error.expected, fix=error.fix) from None
