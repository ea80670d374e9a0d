"""The built-in scenes: small landscapes of twelve classes, drawn by this code. They need no download.

A scene depends on its seed and index only. Positions are fractions of the picture, and lengths are in units of its
shorter side. So at another size or aspect ratio the scene is drawn again to fit, not rescaled.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from ...errors import InvalidInput
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
"""Names of the labels 0, 1, …"""

MIN_SIDE, MAX_SIDE = 8, 4096  # pixels


def render(seed: int, index: int, size: tuple[int, int], label: int | None = None) -> tuple[NDArray[np.uint8], int]:
    """Scene `index` of the data set `seed`: the picture, uint8 (H, W, 3), and its label.

    size: (height, width) in pixels. label: by default index mod 12; other labels at the same index give other scenes.
    Raises InvalidInput for a size, seed, index or label out of range.
    """
    if len(size) != 2 or not all(MIN_SIDE <= side <= MAX_SIDE for side in size):
        raise InvalidInput(
            f"size is {size}, but it must be (height, width) from {MIN_SIDE} to {MAX_SIDE} pixels.",
            expected=f"(height, width) from {MIN_SIDE} to {MAX_SIDE} pixels",
            fix="Choose another size.",
        )
    for name, value in (("seed", seed), ("index", index)):
        if not 0 <= value < 2**64:
            raise InvalidInput(
                f"{name} is {value}, but it must be from 0 to 2^64 − 1.",
                expected="0 to 2^64 − 1",
                fix=f"Choose another {name}.",
            )
    label = index % len(CLASSES) if label is None else label
    if not 0 <= label < len(CLASSES):
        raise InvalidInput(
            f"label is {label}, but it must be from 0 to {len(CLASSES) - 1}.",
            expected=f"0 to {len(CLASSES) - 1}",
            fix="Choose one of scenes.CLASSES.",
        )
    canvas = Canvas((int(size[0]), int(size[1])))
    _DRAW[CLASSES[label]](canvas, Stream(seed, index, label))
    return canvas.finish(), label
