"""A canvas whose unit is its shorter side. Edges are antialiased exactly, so a drawing is the same at any resolution.

Curves are float64 (SUB, W): the height y at SUB positions within every column. Planes are float32 and are only added,
multiplied, divided and compared, because all machines round these operations alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .colour import Colour
from .stream import Floats

Plane = NDArray[np.float32]
SUB = 4
"""Number of positions in each column at which a curve is sampled."""


@dataclass(frozen=True)
class Region:
    """A part of the canvas: a rectangle, and the covered share of each pixel in it, float32 (rows, columns)."""

    rows: slice
    columns: slice
    mask: Plane


def smooth(low: float, high: float, value: Plane) -> Plane:
    """A smooth step: 0 below `low`, 1 above `high`."""
    t = np.clip((value - np.float32(low)) * np.float32(1 / (high - low)), 0, 1)
    return t * t * (3 - 2 * t)


class Canvas:
    """A picture, float32 sRGB (3, H, W) in 0…1. x runs from −w/2 to w/2 and y from 0 (top) to h; min(w, h) is 1."""

    def __init__(self, size: tuple[int, int]) -> None:
        self.height, self.width = size
        self.unit = min(size)
        self.px = 1 / self.unit
        self.w, self.h = self.width / self.unit, self.height / self.unit
        self.area = self.w * self.h
        self.rgb: Plane = np.zeros((3, *size), np.float32)
        offsets = (np.arange(SUB)[:, None] + 0.5) / SUB
        self.xs: Floats = (np.arange(self.width)[None] + offsets) / self.unit - self.w / 2
        self.ys: Floats = (np.arange(self.height) + 0.5) / self.unit
        self.x: Plane = ((np.arange(self.width) + 0.5) / self.unit - self.w / 2).astype(np.float32)[None]
        self.y: Plane = self.ys.astype(np.float32)[:, None]

    def below(self, curve: Floats) -> Region:
        """The region below a curve (SUB, W)."""
        edge = (curve * self.unit).astype(np.float32)
        top = int(np.clip(np.floor(edge.min()), 0, self.height))
        full = int(np.clip(np.ceil(edge.max()), top, self.height))
        ends = np.arange(top + 1, full + 1, dtype=np.float32)[:, None]
        mask = np.ones((self.height - top, self.width), np.float32)
        part = np.zeros((full - top, self.width), np.float32)
        for row in edge:
            part += np.clip(ends - row, 0, 1)
        mask[: full - top] = part * np.float32(1 / SUB)
        return Region(slice(top, self.height), slice(0, self.width), mask)

    def between(self, upper: Floats, lower: Floats) -> Region:
        """The region between two curves (SUB, W)."""
        region, rest = self.below(upper), self.below(np.maximum(upper, lower))
        mask = region.mask.copy()
        mask[rest.rows.start - region.rows.start :] -= rest.mask
        last = min(self.height, int(np.ceil(lower.max() * self.unit)) + 1)
        rows = slice(region.rows.start, max(region.rows.start, last))
        return Region(rows, region.columns, mask[: rows.stop - rows.start])

    def depth(self, region: Region, curve: Floats) -> Plane:
        """The distance of each pixel of a region below a curve, (rows, columns)."""
        return self.y[region.rows] - curve.mean(0).astype(np.float32)[None, region.columns]

    def box(self, left: float, top: float, right: float, bottom: float) -> tuple[slice, slice]:
        """The rows and columns that a rectangle touches."""
        rows = [int(np.clip(f(v * self.unit), 0, self.height)) for f, v in ((np.floor, top), (np.ceil, bottom))]
        shift = self.w / 2
        columns = [
            int(np.clip(f((v + shift) * self.unit), 0, self.width)) for f, v in ((np.floor, left), (np.ceil, right))
        ]
        return slice(*rows), slice(*columns)

    def disc(self, x: float, y: float, radius: float, soft: float = 0.0) -> Region:
        """A disc. soft: width of its edge, at least one pixel."""
        width = max(soft, self.px)
        reach = radius + width
        rows, columns = self.box(x - reach, y - reach, x + reach, y + reach)
        dx, dy = self.x[:, columns] - np.float32(x), self.y[rows] - np.float32(y)
        distance = np.sqrt(dx * dx + dy * dy)
        mask = np.clip((np.float32(radius + width / 2) - distance) * np.float32(1 / width), 0, 1)
        return Region(rows, columns, mask * mask * (3 - 2 * mask) if soft else mask)

    def stroke(self, start: tuple[float, float, float], end: tuple[float, float, float]) -> Region:
        """A line between two points (x, y, radius), which tapers from the first radius to the second."""
        (x0, y0, r0), (x1, y1, r1) = start, end
        reach = max(r0, r1) + self.px
        rows, columns = self.box(min(x0, x1) - reach, min(y0, y1) - reach, max(x0, x1) + reach, max(y0, y1) + reach)
        dx, dy = self.x[:, columns] - np.float32(x0), self.y[rows] - np.float32(y0)
        ax, ay = x1 - x0, y1 - y0
        length2 = max(ax * ax + ay * ay, 1e-9)
        t = np.clip(dx * np.float32(ax / length2) + dy * np.float32(ay / length2), 0, 1)
        dx, dy = dx - t * np.float32(ax), dy - t * np.float32(ay)
        radius = np.float32(r0) + t * np.float32(r1 - r0)
        mask = np.clip((radius - np.sqrt(dx * dx + dy * dy)) * np.float32(self.unit) + np.float32(0.5), 0, 1)
        return Region(rows, columns, mask)

    def paint(self, region: Region, colour: Colour, strength: float | Plane = 1.0) -> None:
        """Cover a region with a colour that broadcasts to (3, rows, columns)."""
        view = self.rgb[:, region.rows, region.columns]
        view += (region.mask * np.asarray(strength, np.float32)) * (colour - view)

    def shine(self, region: Region, colour: Colour, strength: float | Plane = 1.0) -> None:
        """Add light with the blend mode "screen", which never darkens and never exceeds white."""
        view = self.rgb[:, region.rows, region.columns]
        view += (region.mask * np.asarray(strength, np.float32)) * colour * (1 - view)

    def all(self, mask: Plane) -> Region:
        """The whole canvas with a mask (H, W)."""
        return Region(slice(0, self.height), slice(0, self.width), mask)

    def glow(self, x: float, y: float, radius: float, colour: Colour, strength: float) -> None:
        """Add soft light around a point. It has half its strength at about 0.6 of the radius."""
        dx, dy = self.x - np.float32(x), self.y - np.float32(y)
        falloff = np.float32(radius * radius) / (dx * dx + dy * dy + np.float32(radius * radius))
        self.shine(self.all(falloff * falloff), colour, strength)

    def dots(self, x: Floats, y: Floats, radius: Floats, colour_3N: NDArray[np.float32], strength: Floats) -> None:
        """Paint N small discs. Discs smaller than a pixel are painted larger and fainter."""
        wide = np.maximum(radius, 0.6 * self.px)
        strength = strength * np.minimum(1, (radius / wide) ** 2 + 0.15)
        column, row, reach = (x + self.w / 2) * self.unit, y * self.unit, wide * self.unit
        span = int(np.ceil(reach.max() + 0.5)) if len(reach) else 0
        offsets = np.arange(-span, span + 1)
        columns = np.floor(column).astype(np.int64)[:, None] + offsets
        rows = np.floor(row).astype(np.int64)[:, None] + offsets
        dx, dy = columns + 0.5 - column[:, None], rows + 0.5 - row[:, None]
        distance = np.sqrt(dx[:, None, :] ** 2 + dy[:, :, None] ** 2)
        cover = np.clip(reach[:, None, None] + 0.5 - distance, 0, 1) * strength[:, None, None]
        inside = ((rows >= 0) & (rows < self.height))[:, :, None] & ((columns >= 0) & (columns < self.width))[:, None]
        dot, i, j = np.nonzero(inside & (cover > 0))
        cover_K = cover[dot, i, j]
        flat = rows[dot, i] * self.width + columns[dot, j]
        total = np.bincount(flat, cover_K, self.height * self.width)
        hit = np.nonzero(total)[0]
        alpha = np.minimum(total[hit], 1).astype(np.float32)
        planes = self.rgb.reshape(3, -1)
        for plane, channel in zip(planes, colour_3N, strict=True):
            light = np.bincount(flat, cover_K * channel[dot], self.height * self.width)[hit] / total[hit]
            plane[hit] += alpha * (light.astype(np.float32) - plane[hit])

    def finish(self) -> NDArray[np.uint8]:
        """The picture, uint8 (H, W, 3)."""
        levels = np.clip(self.rgb, 0, 1) * np.float32(255) + np.float32(0.5)
        return np.ascontiguousarray(levels.astype(np.uint8).transpose(1, 2, 0))


def chosen_colours(colours: Sequence[Colour], choice: NDArray[np.int64]) -> NDArray[np.float32]:
    """The colours at the indices `choice` (N,), as (3, N)."""
    return np.concatenate([colour.reshape(3, 1) for colour in colours], 1)[:, choice]
