"""Colours and palettes. A palette is varied as a whole, in OKLab, so that its colours still match."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from .stream import Floats, Stream

Colour = NDArray[np.float32]
"""sRGB in 0…1: (3, 1, 1) for one colour, or any shape that broadcasts to (3, H, W)."""

# Source: Björn Ottosson, "A perceptual color space for image processing", 2020. Linear sRGB to cone responses to OKLab.
_TO_CONES = np.array(
    [
        [0.4122214708, 0.5363325363, 0.0514459929],
        [0.2119034982, 0.6806995451, 0.1073969566],
        [0.0883024619, 0.2817188376, 0.6299787005],
    ]
)
_TO_LAB = np.array(
    [
        [0.2104542553, 0.7936177850, -0.0040720468],
        [1.9779984951, -2.4285922050, 0.4505937099],
        [0.0259040371, 0.7827717662, -0.8086757660],
    ]
)
_FROM_CONES, _FROM_LAB = np.linalg.inv(_TO_CONES), np.linalg.inv(_TO_LAB)


def _multiply(rows_N3: Floats, matrix_33: Floats) -> Floats:
    """rows · matrixᵀ, without BLAS because its last bits depend on the machine."""
    return (rows_N3[:, None, :] * matrix_33).sum(-1)


def _oklab(codes: str) -> Floats:
    """OKLab colours (N, 3) of the text "rrggbb rrggbb …"."""
    srgb = np.array([[int(code[i : i + 2], 16) / 255 for i in (0, 2, 4)] for code in codes.split()])
    linear = np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
    return _multiply(np.cbrt(_multiply(linear, _TO_CONES)), _TO_LAB)


def _srgb(lab_N3: Floats) -> list[Colour]:
    linear = np.clip(_multiply(_multiply(lab_N3, _FROM_LAB) ** 3, _FROM_CONES), 0, 1)
    srgb = np.where(linear <= 0.0031308, linear * 12.92, 1.055 * linear ** (1 / 2.4) - 0.055)
    return [row.astype(np.float32).reshape(3, 1, 1) for row in srgb]


class Palettes:
    """Palettes for one class of scenes. Each is a text "rrggbb rrggbb …", with the same roles in the same order."""

    def __init__(self, *codes: str) -> None:
        self._lab_PN3 = np.stack([_oklab(text) for text in codes])

    def draw(self, stream: Stream) -> list[Colour]:
        """A random palette, mixed with a little of another one and varied in hue, chroma and lightness."""
        chosen, other = (stream.whole(0, len(self._lab_PN3) - 1) for _ in range(2))
        share = 0.22 * stream.between(0, 1) ** 2
        lab = self._lab_PN3[chosen] * (1 - share) + self._lab_PN3[other] * share
        turn, chroma = np.deg2rad(stream.between(-8, 8)), stream.between(0.86, 1.12)
        cos, sin = chroma * np.cos(turn), chroma * np.sin(turn)
        lightness = lab[:, 0] * stream.between(0.96, 1.03)
        return _srgb(np.stack([lightness, cos * lab[:, 1] - sin * lab[:, 2], sin * lab[:, 1] + cos * lab[:, 2]], 1))


def rgb(code: str) -> Colour:
    """The colour "rrggbb"."""
    return np.array([int(code[i : i + 2], 16) / 255 for i in (0, 2, 4)], np.float32).reshape(3, 1, 1)


def mix(first: Colour, second: Colour, share: float) -> Colour:
    """The blend of two colours, with the given share of `second`."""
    return first + np.float32(share) * (second - first)


def gradient(position_H: Floats, colours: Sequence[Colour]) -> Colour:
    """Colours (3, H, 1) at positions 0…1 of a gradient from the first colour to the last, smoothed at the stops."""
    stops = np.linspace(0, 1, len(colours))
    reach = 0.3 / max(1, len(colours) - 1)
    around = np.clip(position_H, 0, 1)[None] + reach * np.linspace(-1, 1, 5)[:, None]
    channels = np.concatenate([colour.reshape(3, 1) for colour in colours], 1)
    rows = [np.interp(around, stops, channel).mean(0) for channel in channels]
    return np.stack(rows).astype(np.float32)[:, :, None]
