"""A schedule is a tuple of scales, and a scale is the (height, width) of a token map."""

from __future__ import annotations

import operator
import re
from collections.abc import Iterable
from typing import Any, TypeAlias

from .errors import InvalidInput

Scales: TypeAlias = tuple[tuple[int, int], ...]
ScalesLike: TypeAlias = str | Iterable[int | tuple[int, int]]

_SCALE = re.compile(r"([0-9]{1,6})(?:x([0-9]{1,6}))?")


def as_scales(scales: ScalesLike) -> Scales:
    """The scales as (h, w) pairs.

    `"1_2_3x5"`, `[1, 2, (3, 5)]` and any other iterable of sides and pairs give ((1, 1), (2, 2), (3, 5)).
    Raises InvalidInput.
    """
    try:
        parts = scales.split("_") if isinstance(scales, str) else list(scales)
        pairs = tuple(_parse_scale(part) for part in parts)
    except (TypeError, ValueError):
        pairs = ()
    if not pairs or any(h < 1 or w < 1 for h, w in pairs):
        raise InvalidInput(
            f"The schedule is {scales!r:.200}, but its scales must be whole sides of at least 1, or (h, w) pairs.",
            expected="whole sides of at least 1, or (h, w) pairs of them",
            fix="Write it like 1_2_3x5 or [1, 2, (3, 5)].",
        )
    return pairs


def as_schedule(scales: ScalesLike) -> Scales:
    """`as_scales` for the transformer, whose first scale must be 1x1. Raises InvalidInput."""
    pairs = as_scales(scales)
    if pairs[0] != (1, 1):
        h, w = pairs[0]
        raise InvalidInput(
            f"The schedule starts with {h}x{w}, but its first scale must be 1x1.",
            expected="1x1 first",
            fix="Write it like 1_2_3x5.",
        )
    return pairs


def _parse_scale(part: Any) -> tuple[int, int]:
    if isinstance(part, str):
        match = _SCALE.fullmatch(part)
        if not match:
            raise ValueError(part)
        return int(match[1]), int(match[2] or match[1])
    try:
        side = operator.index(part)
    except TypeError:
        h, w = part
        return operator.index(h), operator.index(w)
    return side, side


def token_count(scales: Scales) -> int:
    """Number of tokens of all scales together."""
    return sum(h * w for h, w in scales)
