"""Reads JSON and TOML strictly, and turns every exception of a parser into an error of this package."""

from __future__ import annotations

import json
import reprlib
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from .errors import FlexVARRefError

MAX_CONFIG_BYTES = 1 << 20
MAX_TOML_BYTES = 32 << 10  # tomllib takes time in proportion to the square of a dotted key: seconds at this size
_SHOWN = 100  # characters of a foreign text in a message


@contextmanager
def refuse_failures(kind: type[FlexVARRefError], problem: str, *, expected: str, fix: str) -> Iterator[None]:
    """Turn every exception of a parser into an error of type `kind`.

    problem: a clause that names the file, such as "x.pth cannot be read". Errors of type `kind` and MemoryError pass
    unchanged.
    """
    try:
        yield
    except (kind, MemoryError):
        raise
    except Exception as error:  # parsers raise exceptions of any type
        raise kind(f"{problem}: {first_sentence(error)}", expected=expected, fix=fix) from error


def first_sentence(error: Exception) -> str:
    """The first sentence of an exception's text, with a full stop. Of an error of this package it is `got`."""
    if isinstance(error, FlexVARRefError):
        return error.got
    if isinstance(error, RecursionError):
        return "it is nested too deeply."
    line = (str(error).strip() or type(error).__name__).splitlines()[0]
    return f"{shown(line.partition('. ')[0].rstrip('.'), 300)}."


def shown(text: str, limit: int = _SHOWN) -> str:
    """A foreign text as messages show it: printable, and cut after `limit` characters."""
    text = text[: limit + 1]
    text = text if text.isprintable() else ascii(text)[1:-1]
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def shown_value(value: object) -> str:
    """A foreign value as messages show it. Values that are long or deeply nested are abbreviated."""
    try:
        text = reprlib.repr(value) if isinstance(value, (dict, list, tuple)) else repr(value)
    except (ValueError, RecursionError):  # an integer of thousands of digits
        text = f"a huge {type(value).__name__}"
    return shown(text)


def read_bytes(path: Path, limit: int) -> bytes:
    """The content of a file. Raises OSError, and ValueError if it has more than `limit` bytes."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path.name}")
    with path.open("rb") as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise ValueError(f"it has more than {limit} bytes")
    return content


def read_json(path: Path, limit: int = MAX_CONFIG_BYTES) -> Any:
    """The value in a JSON file. Use it inside `refuse_failures`: it raises exceptions of many types.

    Duplicate keys, NaN, Infinity and files of more than `limit` bytes are errors.
    """
    return json.loads(read_bytes(path, limit), object_pairs_hook=_unique, parse_constant=_refuse_constant)


def read_toml(path: Path, limit: int = MAX_TOML_BYTES) -> dict[str, Any]:
    """The tables of a TOML file. Use it inside `refuse_failures`, as `read_json`."""
    return tomllib.loads(read_bytes(path, limit).decode("utf-8"))


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in result if names.count(name) > 1)
        raise ValueError(f"it has the key {shown(twice)} twice")
    return result


def _refuse_constant(token: str) -> NoReturn:
    raise ValueError(f"it has the number {token}, which is not finite")
