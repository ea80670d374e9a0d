"""A schedule as the reference sees it: a tuple of (h, w) token maps."""

from __future__ import annotations

import operator
import re
from collections.abc import Iterable
from typing import Any, TypeAlias

Scales: TypeAlias = tuple[tuple[int, int], ...]
ScalesLike: TypeAlias = str | Iterable[int | tuple[int, int]]

_SCALE = re.compile(r"([0-9]{1,6})(?:x([0-9]{1,6}))?")


def as_scales(scales: ScalesLike) -> Scales:
    """`"1_2_3x5"`, `[1, 2, (3, 5)]` or any iterable of sides and pairs as ((1, 1), (2, 2), (3, 5)).

    Raises ValueError.
    """
    try:
        parts = scales.split("_") if isinstance(scales, str) else list(scales)
        pairs = tuple(_pair(part) for part in parts)
    except (TypeError, ValueError):
        pairs = ()
    if not pairs or any(h < 1 or w < 1 for h, w in pairs):
        raise ValueError(
            f"got scales {scales!r:.200}; expected whole sides of at least 1, or (h, w) pairs of them; "
            "fix: write them like 1_2_3x5 or [1, 2, (3, 5)]"
        )
    return pairs


def as_schedule(scales: ScalesLike) -> Scales:
    """`as_scales` for the transformer, whose first scale is the single token of the class. Raises ValueError."""
    pairs = as_scales(scales)
    if pairs[0] != (1, 1):
        h, w = pairs[0]
        raise ValueError(f"got a schedule starting with {h}x{w}; expected 1x1 first; fix: write it like 1_2_3x5")
    return pairs


def _pair(part: Any) -> tuple[int, int]:
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
    """Tokens of all scales together."""
    return sum(h * w for h, w in scales)
