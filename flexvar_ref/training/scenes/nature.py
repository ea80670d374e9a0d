"""Elements that several classes of scenes share: noise, sky, sun, clouds, ridges, trees, water."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .canvas import Canvas, Plane, Region, chosen_colours, smooth
from .colour import Colour, gradient, mix, rgb
from .stream import Floats, Stream

CELLS = 64  # length of a one-dimensional noise before it repeats
WHITE = rgb("ffffff")


class Noise:
    """One-dimensional noise in 0…1 with mean 0.5: a sum of `octaves` lattices, each finer and weaker than the last."""

    def __init__(self, stream: Stream, octaves: int = 2, gain: float = 0.4, sharp: bool = False) -> None:
        self._lattices, self._gain, self._sharp = stream.uniform(octaves, CELLS), gain, sharp

    def __call__(self, position: Floats) -> Floats:
        total, weight, frequency = np.zeros_like(position), 0.0, 1.0
        for octave, lattice in enumerate(self._lattices):
            amplitude = self._gain**octave
            at = position * frequency + 7.3 * octave
            cell = np.floor(at)
            t = at - cell
            if not self._sharp:
                t = t * t * (3 - 2 * t)
            left = cell.astype(np.int64) % CELLS
            total += amplitude * (lattice[left] * (1 - t) + lattice[(left + 1) % CELLS] * t)
            weight, frequency = weight + amplitude, frequency * 2.03
        return total / weight


def _between_cells(lattice: NDArray[np.float64], position: Floats) -> Floats:
    cell = np.floor(position)
    t = (position - cell)[:, None]
    t = t * t * (3 - 2 * t)
    first = cell.astype(np.int64) % len(lattice)
    return lattice[first] * (1 - t) + lattice[(first + 1) % len(lattice)] * t


def clouding(stream: Stream, x_W: Floats, y_H: Floats, octaves: int = 3, gain: float = 0.5) -> Plane:
    """Two-dimensional noise (H, W) in 0…1 on the grid of x and y. Their unit is a cell of the first octave."""
    total, weight = np.zeros((len(y_H), len(x_W)), np.float32), 0.0
    for octave in range(octaves):
        amplitude, frequency = gain**octave, 2.03**octave
        rows = _between_cells(stream.uniform(32, 32), y_H * frequency + 3.7 * octave)
        columns = _between_cells(np.ascontiguousarray(rows.T) * amplitude, x_W * frequency + 5.1 * octave)
        total += columns.T.astype(np.float32)
        weight += amplitude
    return total / np.float32(weight)


@dataclass(frozen=True)
class Light:
    """The position and colour of a scene's light."""

    x: float
    y: float
    colour: Colour


def sky(canvas: Canvas, colours: Sequence[Colour], bottom: float) -> None:
    """Paint a gradient from the top of the picture to the horizon at `bottom`."""
    canvas.rgb[:] = gradient(canvas.ys / bottom, colours)


def sun(canvas: Canvas, light: Light, radius: float, disc: Colour, halo: float = 0.5) -> None:
    """Paint a sun or moon with a wide and a narrow halo."""
    canvas.glow(light.x, light.y, 0.6, light.colour, halo)
    canvas.glow(light.x, light.y, 2.2 * radius, light.colour, 0.7 * halo)
    canvas.paint(canvas.disc(light.x, light.y, radius), disc)


def stars(canvas: Canvas, stream: Stream, count: int, bottom: float, colour: Colour, strength: float = 1.0) -> None:
    """Paint stars between the top and `bottom`, `count` for each unit of the canvas's area."""
    many = stream.uniform(4 * count, 4)[: int(count * canvas.area)]
    x, y = (many[:, 0] - 0.5) * canvas.w, many[:, 1] * bottom
    size = many[:, 2] ** 4
    fade = np.clip((bottom - y) / (0.5 * bottom), 0, 1)
    tints = chosen_colours([colour, mix(colour, WHITE, 0.7)], (many[:, 3] > 0.5).astype(np.int64))
    canvas.dots(x, y, 0.0028 + 0.005 * size, tints, strength * (0.35 + 0.65 * size) * fade)


def streaks(
    canvas: Canvas, stream: Stream, top: float, bottom: float, colour: Colour, amount: float, strength: float = 0.7
) -> None:
    """Paint thin layered clouds between two heights. amount: the share of the sky that they cover, 0…1."""
    stretch = stream.between(4.5, 8)
    noise = clouding(stream, canvas.xs[0] * 1.3, canvas.ys * stretch, 3, 0.42)
    middle, half = (top + bottom) / 2, (bottom - top) / 2
    reach = np.clip(1 - ((canvas.ys - middle) / half) ** 2, 0, 1).astype(np.float32)[:, None]
    level = 0.74 - 0.34 * amount
    canvas.paint(canvas.all(smooth(level, level + 0.22, noise) * reach), colour, strength)


def puffs(
    canvas: Canvas, stream: Stream, count: int, top: float, bottom: float, lit: Colour, shade: Colour, size: float = 1.0
) -> None:
    """Paint cumulus clouds: round above, flat and fading below, smaller towards the horizon."""
    for rank in range(count):
        near = 1 - (rank + stream.between(0, 1)) / count
        base = bottom - (bottom - top) * near
        wide = size * (0.1 + 0.16 * near) * stream.between(0.75, 1.25)
        middle = stream.between(-0.55, 0.55) * canvas.w
        lobes = stream.uniform(6, 3)
        upper = np.full_like(canvas.xs, base)
        for lobe, (jitter, lift, grow) in enumerate(lobes):
            place = (lobe + 0.2 + 0.6 * jitter) / 3 - 1
            offset = place * wide
            radius = wide * (0.22 + 0.2 * grow) * (1.2 - 0.65 * abs(place))
            inside = radius**2 - (canvas.xs - middle - offset) ** 2
            upper = np.minimum(upper, base - np.sqrt(np.maximum(inside, 0)) * (0.9 + 0.3 * lift))
        region = canvas.between(upper, np.full_like(upper, base))
        tall = max(float(base - upper.min()), 1e-6)
        level = np.clip((canvas.y[region.rows] - np.float32(base - tall)) * np.float32(1 / tall), 0, 1)
        fade = 1 - 0.85 * smooth(0.4, 1.0, level)
        canvas.paint(region, lit + level * (shade - lit), fade * np.float32(0.92))


def ridge(canvas: Canvas, noise: Noise, base: float, height: float, frequency: float) -> Floats:
    """A curve of noise between `base` and `height` above it."""
    return base - height * noise(canvas.xs * frequency)


def land(
    canvas: Canvas,
    curve: Floats,
    crest: Colour,
    foot: Colour,
    fade: float = 0.3,
    light: Light | None = None,
    rim: float = 0.0,
    start: Floats | None = None,
) -> Region:
    """Paint ground below a curve, with a bright rim near the light. Returns its region.

    The colour changes from `crest` at the height `start` (by default the curve) to `foot` at the distance `fade` below.
    """
    region = canvas.below(curve)
    depth = canvas.depth(region, curve)
    fallen = depth if start is None else canvas.depth(region, start)
    t = smooth(0, 1, fallen * np.float32(1 / fade))
    canvas.paint(region, crest + t * (foot - crest))
    if light is not None and rim > 0:
        away = (canvas.x - np.float32(light.x)) * np.float32(2.2)
        near = 1 / (1 + away * away)
        edge = np.clip(1 - depth * np.float32(1 / 0.045), 0, 1)
        canvas.shine(region, light.colour, edge * edge * near * np.float32(rim))
    return region


def mist(canvas: Canvas, y: float, reach: float, colour: Colour, strength: float) -> None:
    """Paint a band of haze around a height."""
    t = np.clip(1 - np.abs(canvas.y - np.float32(y)) * np.float32(1 / reach), 0, 1)
    canvas.paint(canvas.all(t * t * (3 - 2 * t)), colour, strength)


@dataclass(frozen=True)
class Cells:
    """An endless row of objects along x with jittered spacing. values: uniform draws (CELLS, 4) for each object."""

    spacing: float
    values: Floats

    @classmethod
    def draw(cls, stream: Stream, spacing: float) -> Cells:
        return cls(spacing, stream.uniform(CELLS, 4))

    def near(self, x: Floats, reach: int = 1) -> list[tuple[Floats, Floats]]:
        """For each x the objects in its own cell and `reach` cells to each side: (x − centre, values (..., 4))."""
        own = np.floor(x / self.spacing)
        found = []
        for step in range(-reach, reach + 1):
            values = self.values[(own + step).astype(np.int64) % CELLS]
            found.append((x - (own + step + 0.2 + 0.6 * values[..., 0]) * self.spacing, values))
        return found


def conifers(
    canvas: Canvas, stream: Stream, ground: Floats, height: float, spacing: float = 0.34, bare: float = 0.0
) -> Floats:
    """The outline of fir trees that stand on the curve `ground`.

    spacing: in units of their height. bare: share of places without a tree.
    """
    cells, tops = Cells.draw(stream, spacing * height), ground
    for distance, values in cells.near(canvas.xs):
        tall = height * (0.4 + 0.8 * values[..., 1]) * (values[..., 3] >= bare)
        half = tall * (0.2 + 0.08 * values[..., 2])
        out = np.abs(distance) / np.maximum(half, 1e-9)
        tiers = out * 4
        step = np.floor(tiers)
        tops = np.minimum(tops, ground - tall * np.maximum(1 - (step + 0.6 * (tiers - step)) / 4, 0) * (out < 1))
    return tops


def round_trees(canvas: Canvas, stream: Stream, ground: Floats, radius: float, spacing: float, bare: float) -> Floats:
    """The outline of round tree crowns that stand on the curve `ground`. bare: share of places without a tree."""
    cells, tops = Cells.draw(stream, spacing), ground
    for distance, values in cells.near(canvas.xs):
        size = radius * (0.6 + 0.7 * values[..., 1])
        dome = np.sqrt(np.maximum(size**2 - distance**2, 0)) * (values[..., 3] >= bare)
        tops = np.minimum(tops, ground - dome * (0.85 + 0.5 * values[..., 2]))
    return tops


def water(
    canvas: Canvas,
    stream: Stream,
    level: float,
    far: Colour,
    near: Colour,
    mirror: float = 0.55,
    light: Light | None = None,
    glint: float = 0.8,
) -> None:
    """Paint water below `level`: the mirrored picture with ripples, tinted with the water's colours, with glints."""
    start = int(np.clip(round(level * canvas.unit), 0, canvas.height))
    if start >= canvas.height:
        return
    y = canvas.ys[start:] - level
    deep = max(canvas.h - level, 1e-6)
    ripples = Noise(stream, 2, 0.5)
    waves = np.log1p(14 * np.maximum(y, 0) / deep)
    shift = (ripples(waves * 11) - 0.5) * (0.03 + 0.3 * y)
    reflected = np.zeros((3, canvas.height - start, canvas.width), np.float32)
    for smear in (0.0, 0.12, 0.24, 0.36):  # waves stretch the reflection
        source = (level - (0.7 + smear) * y - np.abs(shift)) * canvas.unit
        reflected += canvas.rgb[:, np.clip(source.astype(np.int64), 0, max(start - 1, 0))] * np.float32(0.25)
    tint = gradient(y / deep, [far, mix(far, near, 0.6), near])
    canvas.rgb[:, start:] = tint + np.float32(mirror) * (reflected - tint)
    noise = clouding(stream, canvas.xs[0] * 4, waves * 6, 2, 0.6)
    strip = slice(start, canvas.height)
    everywhere = slice(0, canvas.width)
    dark = smooth(0.5, 0.75, noise)
    canvas.paint(Region(strip, everywhere, dark), near, 0.22)
    if light is not None:
        spread: Plane = (1 / (0.05 + 0.28 * y)).astype(np.float32)[:, None]
        away: Plane = (canvas.x - np.float32(light.x)) * spread
        path = np.float32(1) / (1 + away * away)
        shine = path * path * smooth(0.42, 0.62, 1 - noise) * np.float32(glint)
        canvas.shine(Region(strip, everywhere, shine), light.colour)
