"""Small landscapes drawn by our own code: a data set of twelve classes without a download.

A scene is a function of (seed, index) alone. Positions are shares of the picture and lengths are in units of its
shorter side, so that the same scene at another size or aspect ratio is composed anew, not rescaled.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from . import evening, fields, heights, spring, woods
from .canvas import Canvas
from .stream import Stream

_DRAW: dict[str, Callable[[Canvas, Stream], None]] = {
    "sunset over the sea": evening.sunset,
    "mountain peaks": heights.peaks,
    "moonlit night": evening.moonlit,
    "misty forest": woods.forest,
    "desert dunes": heights.dunes,
    "city skyline": evening.skyline,
    "snowfield": woods.snowfield,
    "flower meadow": fields.meadow,
    "rainbow over hills": fields.rainbow,
    "hot-air balloons": spring.balloons,
    "northern lights": evening.aurora,
    "cherry blossom": spring.blossoms,
}

CLASSES: tuple[str, ...] = tuple(_DRAW)
"""What the labels 0, 1, … show."""

SMALLEST, LARGEST = 8, 4096


def render(seed: int, index: int, size: tuple[int, int], label: int | None = None) -> tuple[NDArray[np.uint8], int]:
    """Scene `index` of the data set `seed` at `size` = (height, width): the picture, uint8 (H, W, 3), and its label.

    The label is index mod 12 unless given; another label at the same index is another scene.
    Raises ValueError for a size, seed, index or label out of range.
    """
    if len(size) != 2 or not all(SMALLEST <= side <= LARGEST for side in size):
        raise ValueError(
            f"got size {size}; expected (height, width) from {SMALLEST} to {LARGEST} pixels; fix: choose another size"
        )
    if not 0 <= seed < 2**64 or not 0 <= index < 2**64:
        raise ValueError(f"got seed {seed}, index {index}; expected 0 to 2^64 − 1; fix: choose others")
    label = index % len(CLASSES) if label is None else label
    if not 0 <= label < len(CLASSES):
        raise ValueError(f"got label {label}; expected 0 to {len(CLASSES) - 1}; fix: see scenes.CLASSES")
    canvas = Canvas((int(size[0]), int(size[1])))
    _DRAW[CLASSES[label]](canvas, Stream(seed, index, label))
    return canvas.finish(), label
