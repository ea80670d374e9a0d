"""Schedules: which (h, w) token maps are predicted, in order."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TypeAlias

from .errors import InvalidInput

MAX_SIDE = 128  # tokens; position tables are defined for any side, beyond this a request is surely a mistake
MAX_SCALES = 64
_SCALE = re.compile(r"([0-9]{1,6})(?:x([0-9]{1,6}))?")

PUBLISHED = {
    "6": "1_2_4_6_10_16",
    "8": "1_2_3_5_7_10_13_16",
    "9": "1_2_3_4_5_7_10_13_16",
    "10": "1_2_3_4_5_6_8_10_13_16",
    "13": "1_2_3_4_5_6_7_8_9_10_12_14_16",
    "512px": "1_2_3_4_5_6_7_8_9_10_12_14_16_23_32",
}
"""The schedules of the published evaluation, by number of steps at 256 px, and the one for 512 px."""

ScheduleLike: TypeAlias = "ScaleSchedule | str | Iterable[int | tuple[int, int]]"


@dataclass(frozen=True)
class ScaleSchedule:
    """(h, w) of every scale, in tokens. The first is 1 × 1; the last is the image.

    Raises InvalidInput.
    """

    scales: tuple[tuple[int, int], ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "scales", _pairs(self.scales))
        if not 1 <= len(self.scales) <= MAX_SCALES:
            raise self._refusal(f"{len(self.scales)} scales", f"1 to {MAX_SCALES} scales")
        for h, w in self.scales:
            if not (1 <= h <= MAX_SIDE and 1 <= w <= MAX_SIDE):
                raise self._refusal(f"a scale of {h}x{w}", f"sides from 1 to {MAX_SIDE} tokens")
        if self.scales[0] != (1, 1):
            raise self._refusal(f"first scale {_text(self.scales[0])}", "1 as the first scale")

    def _refusal(self, got: str, expected: str) -> InvalidInput:
        return InvalidInput(
            f"a schedule with {got}", expected=expected, fix="write it like 1_2_4_8_16 or 1_2_3x5_12x20"
        )

    @classmethod
    def parse(cls, value: ScheduleLike) -> ScaleSchedule:
        """From text ("1_2_3x5_12x20"), sides and pairs ([1, 2, (3, 5)]), a published name ("512px"), or itself."""
        if isinstance(value, ScaleSchedule):
            return value
        if isinstance(value, str):
            value = PUBLISHED.get(value, value) if value.endswith("px") else value
            matches = [_SCALE.fullmatch(part) for part in value.split("_")]
            if not all(matches):
                raise InvalidInput(
                    f"schedule {value[:100]!r}",
                    expected="sides joined by _",
                    fix="write it like 1_2_4_8_16 or 1_2_3x5_12x20",
                )
            return cls(tuple((int(m[1]), int(m[2] or m[1])) for m in matches if m))
        return cls(_pairs(value))

    def __str__(self) -> str:
        return "_".join(_text(scale) for scale in self.scales)

    def __len__(self) -> int:
        return len(self.scales)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return iter(self.scales)

    def __getitem__(self, index: int) -> tuple[int, int]:
        return self.scales[index]

    @property
    def tokens(self) -> int:
        """Tokens of all scales together."""
        return sum(h * w for h, w in self.scales)

    @property
    def largest(self) -> int:
        """Tokens of the largest scale."""
        return max(h * w for h, w in self.scales)


def _pairs(value: Iterable[int | tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """Sides and pairs to (h, w) pairs. Raises InvalidInput for anything else."""
    try:
        pairs = [side if isinstance(side, tuple | list) else (side, side) for side in value]
        return tuple((_whole(h), _whole(w)) for h, w in pairs)
    except (TypeError, ValueError) as error:
        raise InvalidInput(
            f"schedule {value!r:.100}", expected="text, or sides and (h, w) pairs", fix="write it like [1, 2, (3, 5)]"
        ) from error


def _whole(value: object) -> int:
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{value!r} is not a whole number")
    return value.__index__()  # type: ignore[no-any-return]


def _text(scale: tuple[int, int]) -> str:
    h, w = scale
    return str(h) if h == w else f"{h}x{w}"
