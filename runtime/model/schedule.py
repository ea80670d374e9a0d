"""Schedules: which (h, w) token maps are predicted, in order."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TypeAlias

from ..checks import check_whole, shown
from ..errors import InvalidInput

MAX_SIDE = 128  # tokens; the model has no limit, but a larger side is surely a mistake
MAX_SCALES = 64
_FORM = "Write the schedule like 1_2_4_8_16 or 1_2_3x5_12x20."
_SCALE = re.compile(r"([0-9]{1,6})(?:x([0-9]{1,6}))?")

PUBLISHED = {
    "6": "1_2_4_6_10_16",
    "8": "1_2_3_5_7_10_13_16",
    "9": "1_2_3_4_5_7_10_13_16",
    "10": "1_2_3_4_5_6_8_10_13_16",
    "11": "1_2_3_4_5_6_7_9_11_13_16",
    "12": "1_2_3_4_5_6_7_8_10_12_14_16",
    "13": "1_2_3_4_5_6_7_8_9_10_12_14_16",
    "14": "1_2_3_4_5_6_7_8_9_10_11_12_14_16",
    "512px": "1_2_3_4_5_6_7_8_9_10_12_14_16_23_32",
}
"""The schedules of the published evaluation: by number of steps for 256 px, and the one for 512 px."""

ScheduleLike: TypeAlias = "ScaleSchedule | str | Iterable[int | tuple[int, int]]"


@dataclass(frozen=True)
class ScaleSchedule:
    """(h, w) of every scale, in tokens. The first is 1 × 1, the last is the image. Raises InvalidInput."""

    scales: tuple[tuple[int, int], ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "scales", _pairs(self.scales))
        if not 1 <= len(self.scales) <= MAX_SCALES:
            count = f"more than {MAX_SCALES}" if self.scales else "no"
            raise _refusal(f"has {count} scales, but it must have", f"1 to {MAX_SCALES} scales")
        for h, w in self.scales:
            if not (1 <= h <= MAX_SIDE and 1 <= w <= MAX_SIDE):
                raise _refusal(f"has a scale of {h}x{w}, but it must have", f"sides from 1 to {MAX_SIDE} tokens")
        if self.scales[0] != (1, 1):
            raise _refusal(f"begins with {scale_text(*self.scales[0])}, but it must have", "1 as the first scale")

    @classmethod
    def parse(cls, value: ScheduleLike) -> ScaleSchedule:
        """A schedule from text ("1_2_3x5_12x20"), sides and pairs ([1, 2, (3, 5)]), a published name ("512px") or a
        schedule. Raises InvalidInput."""
        if isinstance(value, ScaleSchedule):
            return value
        if isinstance(value, str):
            value = PUBLISHED.get(value, value) if value.endswith("px") else value
            matches = [_SCALE.fullmatch(part) for part in value.split("_")]
            if not all(matches):
                raise _refusal(f"is {shown(value)}, but it must be", "scales joined by _, or 512px")
            return cls(tuple((int(m[1]), int(m[2] or m[1])) for m in matches if m))
        return cls(_pairs(value))

    def __str__(self) -> str:
        return "_".join(scale_text(*scale) for scale in self.scales)

    def __len__(self) -> int:
        return len(self.scales)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return iter(self.scales)

    def __getitem__(self, index: int) -> tuple[int, int]:
        return self.scales[index]

    @classmethod
    def for_size(cls, size: tuple[int, int], steps: int, trained_side: int = 16) -> ScaleSchedule:
        """A schedule of at most `steps` scales up to `size`, (h, w) in tokens. Raises InvalidInput.

        Let the side of a scale be the square root of h · w. Up to `trained_side` the scales are those of the published
        schedule with that number of steps. If there is none, they grow geometrically. All have the proportions of the
        target. Beyond `trained_side` each scale is √2 times the one before, with as many scales as that needs. So 15
        steps to 32×32 are the published 512 px schedule: 13 steps to 16, then 23 and 32. Small targets have fewer
        scales, because all scales differ.
        """
        h, w = last = cls(((1, 1), size))[-1]
        trained_side = check_whole("trained_side", trained_side, 1, MAX_SIDE)
        steps = check_whole("steps", steps, 1 if last == (1, 1) else 2, MAX_SCALES)
        side = math.sqrt(h * w)
        beyond = max(0, math.ceil(2 * math.log2(side / trained_side) - 1e-9))
        if steps <= beyond:
            got = f"steps is {steps}, but {h}x{w} tokens need at least {beyond + 1} steps."
            raise InvalidInput(got, expected=f"at least {beyond + 1}", fix="Use more steps, or a smaller size.")
        reached = min(side, trained_side)
        sides = [base * reached / 16 for base in _base(steps - beyond)]
        sides += [reached * (side / reached) ** (i / beyond) for i in range(1, beyond + 1)]
        scales = [(max(1, round(one * h / side)), max(1, round(one * w / side))) for one in sides]
        return cls(tuple(dict.fromkeys([(1, 1), *(scale for scale in scales[1:] if scale != last), last])))

    @property
    def tokens(self) -> int:
        """Number of tokens of all scales."""
        return sum(h * w for h, w in self.scales)

    @property
    def largest(self) -> int:
        """Number of tokens of the largest scale."""
        return max(h * w for h, w in self.scales)


def _base(steps: int) -> list[int]:
    """Sides of a square schedule up to 16: the published one with that number of steps, or a geometric one."""
    published = PUBLISHED.get(str(steps))
    if published is not None:
        return [int(side) for side in published.split("_")]
    if steps == 1:
        return [16]
    if steps > 16:
        got = f"steps gives {steps} scales up to the trained size, but there can be at most 16."
        raise InvalidInput(got, expected="at most 16", fix="Use fewer steps.")
    sides = [1]
    for i in range(1, steps):
        left = steps - 1 - i  # scales still to come, each with a side of its own
        sides.append(min(16 - left, max(sides[-1] + 1, round(16 ** (i / (steps - 1))))))
    return sides


def _refusal(problem: str, expected: str) -> InvalidInput:
    return InvalidInput(f"schedule {problem} {expected}.", expected=expected, fix=_FORM)


def _pairs(value: Iterable[int | tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """(h, w) pairs of sides and pairs. Raises InvalidInput for anything else."""
    try:
        sides = itertools.islice(value, MAX_SCALES + 1)  # one too many is refused later
        pairs = [side if isinstance(side, tuple | list) else (side, side) for side in sides]
        return tuple((_whole(h), _whole(w)) for h, w in pairs)
    except Exception as error:  # an object of the caller may raise anything
        raise _refusal(f"is {shown(value)}, but it must be", "text, or sides and (h, w) pairs") from error


def _whole(value: object) -> int:
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError("not a whole number")
    number: int = value.__index__()
    if abs(number) >= 10**9:
        raise ValueError("no side of a scale")
    return number


def scale_text(h: int, w: int) -> str:
    """A scale as text: "4" if it is square, else such as "3x5"."""
    return str(h) if h == w else f"{h}x{w}"
