"""Checks of values that come from outside: arguments of the caller, and fields of files."""

from __future__ import annotations

import os
import re
import reprlib
from collections.abc import Collection
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import ArtifactRefused, InvalidInput

_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*(/[A-Za-z0-9_][A-Za-z0-9._-]*)*")
_REMAKE = "Make the file again with the command that wrote it."


def short(value: object) -> str:
    """A value as messages show it: printable, and cut after 80 characters."""
    try:
        text = reprlib.repr(value) if isinstance(value, (dict, list, tuple)) else ascii(value)
    except Exception:  # see `shown`
        text = f"an object of type {type(value).__name__}"
    return text if len(text) <= 80 else f"{text[:77]}..."


def shown(value: object) -> str:
    """A value of the caller as messages show it, cut after 100 characters. It works for every object."""
    try:
        text = reprlib.repr(value) if isinstance(value, (dict, list, tuple, set, frozenset, bytes)) else repr(value)
    except Exception:  # `__repr__` may do anything, and ints of many digits have none
        text = f"an object of type {type(value).__name__}"
    return text if len(text) <= 100 else f"{text[:97]}..."


def invalid(problem: str, expected: str, fix: str) -> InvalidInput:
    """The error for an argument that must be something else. problem: begins with the argument, as in "top_k is -1"."""
    return InvalidInput(f"{problem}, but it must be {expected}.", expected=expected, fix=fix)


def conflict(option: str, others: str, fix: str = "Use one of them.") -> InvalidInput:
    """The error for arguments that exclude each other. others: may go on with the reason."""
    return InvalidInput(f"{option} cannot be combined with {others}.", expected="one of them", fix=fix)


def check_whole(name: str, value: Any, low: int, high: int | None = None) -> int:
    """The value as an int, if it is a Python or NumPy integer (not a bool) from `low` to `high`, both included.

    high None means that there is no upper limit. Raises InvalidInput.
    """
    whole = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    if whole and low <= int(value) and (high is None or int(value) <= high):
        return int(value)
    expected = f"a whole number, {low} or more" if high is None else f"a whole number from {low} to {high}"
    kind = "" if whole else f" ({type(value).__name__})"
    raise invalid(f"{name} is {shown(value)}{kind}", expected, "Pass a whole number in that range.")


def check_number(name: str, value: Any, low: float, high: float, fix: str) -> float:
    """The value as a float, if it is a number (not a bool, not NaN) from `low` to `high`, both included.

    Raises InvalidInput with `fix`.
    """
    number = isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)
    if number and low <= value <= high:  # NaN compares false
        return float(value)
    kind = "" if number else f" ({type(value).__name__})"
    raise invalid(f"{name} is {shown(value)}{kind}", f"a number from {low:g} to {high:g}", fix)


def check_keys(name: str, values: Any, known: Collection[str]) -> dict[str, Any]:
    """The values, if they are a dict with no other keys than `known`. Raises InvalidInput."""
    if isinstance(values, dict) and values.keys() <= set(known):
        return values
    expected = f"an object with no other keys than {', '.join(known)}"
    raise invalid(f"{name} is {short(values)}", expected, "Remove the other keys.")


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> str:
    """The value, if it is one of `choices`. Raises InvalidInput."""
    if isinstance(value, str) and value in choices:
        return value
    raise invalid(f"{name} is {shown(value)}", f"one of {', '.join(choices)}", "Pass one of them.")


def check_flag(name: str, value: Any) -> bool:
    """The value as a bool, if it is a Python or NumPy bool. Raises InvalidInput."""
    if isinstance(value, bool | np.bool_):
        return bool(value)
    raise invalid(f"{name} is {shown(value)}", "True or False", "Pass one of them.")


def check_text(name: str, value: Any) -> str:
    """The value, if it is a text. Raises InvalidInput."""
    if isinstance(value, str):
        return value
    raise invalid(f"{name} is {shown(value)}", "a text", "Pass a text.")


def check_callback(name: str, value: Any, *, optional: bool = True) -> None:
    """Raise InvalidInput unless the value can be called, or is None and `optional`."""
    if not callable(value) and not (optional and value is None):
        raise invalid(f"{name} is {shown(value)}", "a function", "Pass a function.")


def check_path(name: str, value: Any) -> str:
    """A path, given as text or as a Path, as text. Raises InvalidInput."""
    try:
        text = os.fspath(value)
        if isinstance(text, str) and b"\0" not in os.fsencode(text):
            return text
    except Exception as error:  # an object of the caller may raise anything
        got = f"{name} is {shown(value)}, which is no path."
        raise InvalidInput(got, expected="a path", fix="Pass a text or a pathlib.Path.") from error
    raise invalid(f"{name} is {shown(value)}", "a path", "Pass a text without NUL, or a pathlib.Path.")


def check_entries(name: str, values: Any, most: int) -> list[Any]:
    """The entries of a list, tuple, range or other collection, at most `most`. Raises InvalidInput."""
    expected = f"a list of at most {most} entries"
    try:
        if len(values) <= most:
            return list(values)
        got = f"{name} has {shown(len(values))} entries"
    except Exception:  # an object of the caller may raise anything
        got = f"{name} is {shown(values)}"
    raise invalid(got, expected, "Pass such a list.")


def check_array(name: str, value: Any, dtype: Any = None) -> NDArray[Any]:
    """The value as an array, of `dtype` if given. Raises InvalidInput if NumPy cannot make one of it."""
    try:
        return np.asarray(value, dtype)
    except Exception as error:  # an object of the caller may raise anything
        got, fix = f"{name} is {shown(value)}, of which NumPy makes no array.", "Pass an array, or lists of numbers."
        raise InvalidInput(got, expected="an array", fix=fix) from error


def check_seed(seed: Any) -> int:
    """A seed as an int from 0 to 2**64 - 1. Raises InvalidInput."""
    return check_whole("seed", seed, 0, 2**64 - 1)


def check_index(image_index: Any) -> int:
    """The index of an image in the stream of its seed, as an int from 0 to 2**64 - 1. Raises InvalidInput."""
    return check_whole("first_index", image_index, 0, 2**64 - 1)


def require(ok: bool, field: str, value: object, expected: str) -> None:
    """Raise ArtifactRefused unless `ok`. For fields of files: `strict_json.decode` adds the place and its own `fix`."""
    if not ok:
        got = f"{field} is {short(value)}, but it must be {expected}."
        raise ArtifactRefused(got, expected=expected, fix=_REMAKE)


def require_range(field: str, value: float, low: float, high: float) -> None:
    """Raise ArtifactRefused unless a field is from `low` to `high`, both included."""
    require(low <= value <= high, field, value, f"from {low} to {high}")


def require_match(pattern: re.Pattern[str], field: str, value: str, expected: str) -> None:
    """Raise ArtifactRefused unless a field of at most 1000 characters matches a pattern as a whole."""
    require(len(value) <= 1000 and pattern.fullmatch(value) is not None, field, value, expected)


def require_file_name(field: str, name: str) -> None:
    """Raise ArtifactRefused unless a field is a plain relative name of at most 200 characters, without `..`."""
    require_match(_FILE_NAME, field, name, "a relative name whose parts are made of letters, digits and _ - .")
    require(len(name) <= 200, field, name, "a name of at most 200 characters")


def version_numbers(version: str) -> tuple[int, ...]:
    """The numbers of a version, for comparisons: (1, 31, 1) for "1.31.1"."""
    return tuple(map(int, re.findall("[0-9]+", version)))
