"""Scenes with fir trees: misty forest, snow."""

from __future__ import annotations

import numpy as np

from .canvas import Canvas, Region, smooth
from .colour import Colour, Palettes, mix, rgb
from .nature import (
    WHITE,
    Light,
    Noise,
    clouding,
    conifers,
    land,
    ridge,
    sky,
    streaks,
    sun,
)
from .stream import Floats, Stream

# top, glow, farthest, nearest
_FORESTS = Palettes(
    "9cc4bc f4f0d4 b4d0c4 143a34",
    "8fb4d0 eef4f4 b0c8dc 16304c",
    "e8b48c fff0cc e0b8a0 4a2430",
    "b8c8a0 fbf4cc c4d0a4 24401f",
    "a8a4cc f8e4e0 c0b8d8 2a2450",
    "7fb0b8 ffe6c4 a8c4c0 0f3a48",
    "d8b070 fff4d0 dcc088 3c3414",
)


def forest(canvas: Canvas, stream: Stream) -> None:
    top, glow, far, near = _FORESTS.draw(stream)
    light = Light(stream.between(-0.4, 0.4) * canvas.w, stream.between(0.15, 0.42) * canvas.h, mix(glow, WHITE, 0.3))
    sky(canvas, [top, mix(top, glow, 0.6), glow], 0.6 * canvas.h)
    canvas.glow(light.x, light.y, 0.5, light.colour, 0.6)
    if stream.chance(0.5):
        canvas.paint(canvas.disc(light.x, light.y, stream.between(0.05, 0.1)), mix(glow, WHITE, 0.7))
    layers = stream.whole(4, 6)
    start, slope = stream.between(0.34, 0.5), stream.between(-0.22, 0.22)
    size = stream.between(0.85, 1.35)
    if stream.chance(0.5):
        curve = ridge(canvas, Noise(stream, 3), (start + 0.02) * canvas.h, 0.3, 1.7)
        land(canvas, curve, mix(far, glow, 0.45), glow, 0.25, light, 0.3)
    for layer in range(layers):
        t = layer / (layers - 1)
        base = (start + (0.98 - start) * t) * canvas.h + 0.02
        curve = ridge(canvas, Noise(stream, 2), base, 0.16 + 0.06 * t, 1.6 - 0.5 * t)
        curve = curve + slope * (1 - 2 * (layer % 2)) * canvas.xs * 0.8
        tall = (0.08 + 0.26 * t**1.3) * size
        smoothed = curve - 0.55 * tall
        curve = conifers(canvas, stream, curve, tall, 0.34, stream.between(0.0, 0.25))
        colour = mix(far, near, t**1.15)
        land(
            canvas,
            curve,
            colour,
            mix(colour, glow, 0.75 - 0.55 * t),
            0.6 * tall + 0.14,
            light,
            0.35 * (1 - t),
            smoothed,
        )
        if layer < layers - 1:
            thick = clouding(stream, canvas.xs[0] * 1.4, canvas.ys * 4, 2)
            t_y = np.clip(1 - np.abs(canvas.y - np.float32(base + 0.04)) * np.float32(1 / 0.16), 0, 1)
            canvas.paint(canvas.all(smooth(0.25, 0.75, thick) * t_y), glow, 0.6 * (1 - 0.7 * t))
    canvas.glow(light.x, light.y, 0.55, light.colour, 0.25)


# zenith, middle, horizon, lit snow, shaded snow, far trees, near trees
_SNOWS = Palettes(
    "7fb0dc b8d8f0 fbeee8 ffffff a4c4e4 8fb0cc 2c4f6c",
    "8c8cc4 dcb4cc ffe0cc fff8f4 bcb0dc a89cc4 3c3c6c",
    "9cb8c8 c8d8dc eef2f0 fbfdfd b4c8d4 a0b8c0 34505c",
    "5a84b8 a4c8e0 ffe4b8 fffaf0 94b8dc 84a4c4 1f4468",
    "a89cc8 f0b8b8 ffe8c0 fff4ec c0b4d8 b0a4c0 4a4464",
    "6ca8b8 b4dcd8 fdf4dc ffffff a0ccd4 88b4b8 1f5058",
)


def snowfield(canvas: Canvas, stream: Stream) -> None:
    zenith, middle, horizon, lit, shade, far, near = _SNOWS.draw(stream)
    level = stream.between(0.38, 0.56) * canvas.h
    light = Light(
        stream.between(-0.4, 0.4) * canvas.w, level - stream.between(0.03, 0.3) * canvas.h, mix(horizon, WHITE, 0.3)
    )
    sky(canvas, [zenith, middle, horizon], level)
    if stream.chance(0.55):
        sun(canvas, light, stream.between(0.05, 0.1), mix(light.colour, WHITE, 0.5), 0.35)
    else:
        streaks(canvas, stream, 0, level, mix(horizon, WHITE, 0.5), stream.between(0.3, 1), 0.6)
    curve = ridge(canvas, Noise(stream, 3), level + 0.02, 0.16, 2)
    land(canvas, curve, mix(shade, middle, 0.5), mix(lit, horizon, 0.4), 0.2, light, 0.2)
    layers = stream.whole(3, 4)
    house = stream.whole(1, layers - 1) if stream.chance(0.5) else -1
    for layer in range(layers):
        t = layer / (layers - 1)
        base = level + 0.06 + (canvas.h - level) * 0.72 * t
        curve = ridge(canvas, Noise(stream, 2), base, 0.1 + 0.1 * t, 1.5 - 0.4 * t)
        if stream.chance(0.75):
            trees = conifers(canvas, stream, curve, 0.09 + 0.2 * t, 0.5, stream.between(0.35, 0.75))
            colour = mix(far, near, 0.25 + 0.65 * t)
            region = land(canvas, trees, colour, mix(colour, shade, 0.35), 0.3)
            depth = canvas.depth(region, trees)
            dusted = Noise(stream, 2)(canvas.xs[1] * 12)[None].astype(np.float32)
            white = np.clip(1.4 - depth * np.float32(1 / (0.018 + 0.03 * t)) + 0.6 * (dusted - 0.5), 0, 1)
            canvas.paint(Region(region.rows, region.columns, region.mask * white), mix(lit, shade, 0.15), 0.85)
        if layer == house:
            _cabin(canvas, stream, curve, 0.09 + 0.09 * t, lit, mix(near, rgb("6a3a2c"), 0.6))
        ground = land(canvas, curve, mix(lit, shade, 0.3 * (1 - t)), mix(lit, shade, 0.95), 0.3 + 0.1 * t, light, 0.15)
        drift = clouding(stream, canvas.xs[0] * 1.3, canvas.ys[ground.rows] * 6, 2)
        canvas.paint(Region(ground.rows, ground.columns, ground.mask * smooth(0.5, 0.8, drift)), shade, 0.35)
    if stream.chance(0.6):
        many = stream.uniform(4 * 90, 3)[: int(stream.whole(30, 90) * canvas.area)]
        x, y = (many[:, 0] - 0.5) * canvas.w, many[:, 1] * canvas.h
        colours = np.repeat(WHITE.reshape(3, 1), len(many), 1)
        canvas.dots(x, y, 0.004 + 0.009 * many[:, 2] ** 2, colours, np.full(len(many), 0.85))


def _cabin(canvas: Canvas, stream: Stream, ground: Floats, size: float, snow: Colour, wall: Colour) -> None:
    x = stream.between(-0.3, 0.3) * canvas.w
    column = int(np.clip((x + canvas.w / 2) * canvas.unit, 0, canvas.width - 1))
    floor = float(ground[1, column]) + 0.25 * size
    offset = np.abs(canvas.xs - x) / size
    low = np.full_like(offset, floor)
    walls = np.where(offset < 0.75, floor - 0.85 * size, floor)
    canvas.paint(canvas.between(walls, low), wall)
    gable = floor - size * (1.65 - offset * 0.95)
    canvas.paint(
        canvas.between(np.where(offset < 0.72, gable, floor), np.where(offset < 0.72, low - 0.8 * size, low)), wall
    )
    roof = np.where(offset < 0.98, gable - 0.12 * size, floor)
    canvas.paint(canvas.between(roof, np.where(offset < 0.98, gable + 0.13 * size, floor)), snow)
    warm = rgb("ffd27a")
    for shift in (-0.35, 0.35):
        pane = np.abs(canvas.xs - x - shift * size) < 0.17 * size
        canvas.paint(
            canvas.between(np.where(pane, floor - 0.62 * size, floor), np.where(pane, floor - 0.22 * size, floor)), warm
        )
    canvas.glow(x, floor - 0.4 * size, 1.1 * size, warm, 0.35)
