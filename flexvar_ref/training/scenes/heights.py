"""Scenes of rock and sand: peaks, dunes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .canvas import Canvas, smooth
from .colour import Colour, Palettes, mix
from .nature import (
    CELLS,
    WHITE,
    Cells,
    Light,
    Noise,
    conifers,
    land,
    mist,
    puffs,
    ridge,
    sky,
    streaks,
    sun,
    water,
)
from .stream import Stream

# zenith, middle, horizon, lit rock, shaded rock, lit snow, shaded snow, foothill, lake
_PEAKS = Palettes(
    "3f7fc0 8fc1e6 e6f2f4 8f9db0 53698c ffffff b4cbe4 2f5a4c 3a78a0",
    "5a6aa8 b8a0c8 ffd8c0 b98a92 64587f ffe4d4 b3a4cc 3a4a5c 6a78a8",
    "2f6f8c 79b8c0 f4ecd0 8fa39a 4a6a76 fdfcf0 a8c8cc 2c5a4a 2f7a88",
    "4a4f8c 9a7fb4 ffbfa0 a87a88 554a7c ffd0b8 a08cc0 2c2f55 5a5a94",
    "5a9ad0 b0d8f0 fff4dc a89a8c 6a6a80 fffdf4 bccce0 4f7a4a 4f94b0",
    "26456e 5a86a8 cfe0e0 7a8ea4 3c5474 eef6fa 93b0cc 1f3f48 2c5c80",
)


@dataclass(frozen=True)
class _Rock:
    """Colours of a mountain range. fog: share of haze in them, 0…1. snow_line: height down to which there is snow."""

    lit: Colour
    shade: Colour
    lit_snow: Colour
    shade_snow: Colour
    haze: Colour
    fog: float
    snow_line: float

    def seen(self, colour: Colour) -> Colour:
        """A colour through the haze."""
        return mix(colour, self.haze, self.fog)


def _range(
    canvas: Canvas,
    stream: Stream,
    base: float,
    tall: float,
    spacing: float,
    rock: _Rock,
    facing: float,
    hero: float | None = None,
) -> None:
    """Paint peaks side by side, lower ones in front of higher ones. hero: x of the highest peak."""
    cells = Cells.draw(stream, spacing)
    first, last = (int(np.floor(edge / spacing)) for edge in (-0.5 * canvas.w - 0.5, 0.5 * canvas.w + 0.5))
    summits = []
    for cell in range(first, last + 1):
        jitter, height, steep, _ = cells.values[cell % CELLS]
        x = (cell + 0.2 + 0.6 * jitter) * spacing
        if hero is None or abs(x - hero) > 0.45 * spacing:
            summits.append((tall * (0.35 + 0.5 * height), x, 0.75 + 0.5 * steep))
    if hero is not None:
        summits.append((1.08 * tall, hero, 0.85))
    craggy, jag, zigzag = Noise(stream, 3, 0.55, True), Noise(stream, 2, 0.5, True), Noise(stream, 3, 0.55, True)
    for height, x, steep in sorted(summits, reverse=True):
        _peak(canvas, (x, base - height, steep), tall, rock, facing, (craggy, jag, zigzag))


def _peak(
    canvas: Canvas,
    summit: tuple[float, float, float],
    tall: float,
    rock: _Rock,
    facing: float,
    noises: tuple[Noise, Noise, Noise],
) -> None:
    """Paint a peak (x, y, steepness): a lit and a shaded side with a winding border, and a ragged snow cap."""
    (x, y, steep), (craggy, jag, zigzag) = summit, noises
    away = np.abs(canvas.xs - x)
    curve = y + away * steep + (craggy(canvas.xs * 6 + 11 * x) - 0.5) * 0.2 * tall * np.clip(2.5 * away, 0.12, 1)
    region = canvas.below(curve)
    fallen = canvas.y[region.rows] - np.float32(y)
    bend = ((zigzag(canvas.ys[region.rows] * 8 + 5 * x) - 0.45) * 0.36).astype(np.float32)[:, None]
    line = canvas.x - np.float32(x) - bend * np.clip(fallen * 2.2, 0, 0.6)
    shaded = np.clip(line * np.float32(-facing * canvas.unit * 0.6) + 0.5, 0, 1)
    faded = 0.5 * smooth(0.0, 1.1, fallen * np.float32(1 / tall))
    lit, dark = rock.seen(rock.lit), rock.seen(rock.shade)
    colour = lit + shaded * (dark - lit)
    bare = canvas.below(np.maximum(rock.snow_line + (jag(canvas.xs * 10) - 0.5) * 0.34 * tall, y))
    above = bare.rows.start - region.rows.start
    if above > 0:  # snow and rock are painted together: painted one after the other, rock would show along the snow
        snow = np.ones_like(region.mask)
        snow[above:] -= bare.mask
        lit, dark = rock.seen(rock.lit_snow), rock.seen(rock.shade_snow)
        white = lit + shaded * (dark - lit)
        colour = colour + snow * (white - colour)
    canvas.paint(region, colour + faded * (rock.haze - colour))


def peaks(canvas: Canvas, stream: Stream) -> None:
    zenith, middle, horizon, lit, shade, lit_snow, shade_snow, hill, lake = _PEAKS.draw(stream)
    level = stream.between(0.68, 0.84) * canvas.h
    facing = stream.side()  # side of the light
    light = Light(facing * stream.between(0.15, 0.45) * canvas.w, stream.between(0.12, 0.35) * canvas.h, horizon)
    sky(canvas, [zenith, middle, horizon], level)
    canvas.glow(light.x, light.y, 0.7, light.colour, 0.35)
    if stream.chance(0.4):
        sun(canvas, light, stream.between(0.05, 0.09), mix(horizon, WHITE, 0.6), 0.2)
    if stream.chance(0.5):
        puffs(
            canvas,
            stream,
            stream.whole(2, 4),
            0.12 * level,
            0.6 * level,
            mix(horizon, WHITE, 0.6),
            mix(middle, horizon, 0.5),
        )
    elif stream.chance(0.7):
        streaks(canvas, stream, 0, 0.7 * level, mix(horizon, WHITE, 0.4), stream.between(0.1, 0.7), 0.6)
    tall = stream.between(0.42, 0.58) * canvas.h**0.7
    snow_line = level - stream.between(0.1, 0.75) * tall
    hero = stream.between(-0.3, 0.3) * canvas.w
    haze = mix(horizon, middle, 0.4)
    if stream.chance(0.75):
        rock = _Rock(lit, shade, lit_snow, shade_snow, haze, 0.62, snow_line)
        _range(canvas, stream, level, 0.85 * tall, 0.36, rock, facing)
        mist(canvas, level, 0.3, haze, 0.35)
    rock = _Rock(lit, shade, lit_snow, shade_snow, haze, 0.08, snow_line)
    _range(canvas, stream, level + 0.02, tall, stream.between(0.4, 0.6), rock, facing, hero)
    mist(canvas, level + 0.02, 0.22, haze, stream.between(0.3, 0.75))
    ending = stream.whole(0, 2)
    if ending != 1:
        curve = ridge(canvas, Noise(stream, 3), level + 0.06, 0.14, 2.2)
        if stream.chance(0.6):
            curve = conifers(canvas, stream, curve, 0.06, 0.45, 0.15)
        land(canvas, curve, mix(hill, haze, 0.35), mix(hill, haze, 0.6), 0.18, light, 0.25)
    if ending == 0:
        ground = ridge(canvas, Noise(stream, 2), canvas.h - 0.03, stream.between(0.08, 0.2), 1.5)
        ground = conifers(canvas, stream, ground, stream.between(0.1, 0.2), 0.45, stream.between(0.1, 0.5))
        land(canvas, ground, hill, mix(hill, shade, 0.3), 0.35, light, 0.2)
    else:
        water(canvas, stream, level + 0.04, mix(lake, haze, 0.5), lake, 0.7, light, 0.35)
        if stream.chance(0.5):
            ground = ridge(canvas, Noise(stream, 2), canvas.h + 0.03, stream.between(0.08, 0.16), 1.5)
            ground = conifers(canvas, stream, ground, stream.between(0.1, 0.24), 0.45, stream.between(0.2, 0.6))
            land(canvas, ground, mix(hill, shade, 0.4), hill, 0.35)


# zenith, middle, horizon, disc, far, lit sand, shaded sand, deep shade
_DUNES = Palettes(
    "5aa0b8 b4d4cc ffe8c0 fff8e4 d8b898 f4b870 b8703c 8a4c2c",
    "6a5a9c d88aa0 ffc89c fff0d4 c08890 f0986c 8c4660 5a2c50",
    "3f7fb4 a4cfe4 fff0d0 fffbe8 dcc09c f8d08c c88c50 9c6438",
    "d86a4c f4a468 ffdca0 fff4d0 d08c64 f0a050 a04a30 702c28",
    "283a6c 7a6494 f0a890 ffe8c8 8c6c88 d88c78 6c3c5c 40264c",
    "e09ca0 f8c8b4 fff0d8 ffffff dcaca0 f8ccac c88478 9c5c60",
)


def dunes(canvas: Canvas, stream: Stream) -> None:
    zenith, middle, horizon, disc, far, lit, shade, deep = _DUNES.draw(stream)
    level = stream.between(0.4, 0.58) * canvas.h
    facing = stream.side()
    light = Light(facing * stream.between(0.1, 0.36) * canvas.w, level - stream.between(0.05, 0.3) * canvas.h, horizon)
    sky(canvas, [zenith, middle, horizon], level)
    sun(canvas, light, stream.between(0.05, 0.15), disc, 0.4)
    if stream.chance(0.4):
        streaks(canvas, stream, 0, 0.9 * level, mix(horizon, WHITE, 0.3), stream.between(0, 0.5), 0.5)
    if stream.chance(0.6):  # table mountains
        steps = Noise(stream, 2, 0.45)(canvas.xs * 3.4)
        mesa = (
            level
            + 0.03
            - 0.1 * np.clip((steps - 0.56) * 14, 0, 1)
            - 0.06 * np.clip((steps - 0.7) * 14, 0, 1)
            - 0.02 * steps
        )
        land(canvas, mesa, mix(far, horizon, 0.2), mix(far, horizon, 0.6), 0.15, light, 0.3)
    layers = stream.whole(3, 4)
    for layer in range(layers):
        t = layer / (layers - 1)
        base = level + 0.06 + (canvas.h - level) * 0.85 * t**1.15
        seen = tuple(mix(colour, mix(horizon, far, 0.5), 0.55 * (1 - t)) for colour in (lit, shade, deep))
        _dunes(canvas, stream, base, 0.12 + 0.2 * t, (seen[0], seen[1], seen[2]), facing, t)


def _dunes(
    canvas: Canvas,
    stream: Stream,
    base: float,
    tall: float,
    colours: tuple[Colour, Colour, Colour],
    facing: float,
    nearness: float,
) -> None:
    """Paint dunes side by side, lower ones in front of higher ones."""
    spacing = 0.5 + 0.45 * nearness
    cells, winding = Cells.draw(stream, spacing), Noise(stream, 2, 0.3)
    first, last = (int(np.floor(edge / spacing)) for edge in (-0.5 * canvas.w - 0.7, 0.5 * canvas.w + 0.7))
    crests = []
    for cell in range(first, last + 1):
        jitter, height, length, bend = cells.values[cell % CELLS]
        crests.append((tall * (0.35 + 0.65 * height), (cell + 0.15 + 0.7 * jitter) * spacing, length, bend))
    for height, x, length, bend in sorted(crests, reverse=True):
        _dune(canvas, (x, base - height), spacing * (0.8 + 0.4 * length), height, colours, facing, winding, bend)


def _dune(
    canvas: Canvas,
    crest: tuple[float, float],
    reach: float,
    tall: float,
    colours: tuple[Colour, Colour, Colour],
    facing: float,
    winding: Noise,
    bend: float,
) -> None:
    """Paint a dune: round and bright on the side of the light, hollow and dark behind a winding crest."""
    (x, y), (lit, shade, deep) = crest, colours
    away = (canvas.xs - x) / reach
    out = np.abs(away)
    windward = 1 - np.maximum(1 - out, 0) ** 1.4
    lee = 1 - np.maximum(1 - 1.25 * out, 0) ** 2
    curve = y + tall * np.where(away * facing > 0, windward, lee) + 0.3 * tall * np.maximum(out - 0.6, 0)
    region = canvas.below(curve)
    rows = region.rows
    fall = np.maximum(canvas.y[rows] - np.float32(y), 0)
    turn = ((winding(canvas.ys[rows] * 3.2 + 7 * x) - 0.5) * (0.4 + 0.5 * bend)).astype(np.float32)[:, None]
    line = canvas.x - np.float32(x) - turn * smooth(0, 0.25, fall) + np.float32(0.45 * facing) * fall
    soft = np.float32(-facing) / (np.float32(1.2 * canvas.px) + np.float32(0.3) * fall)
    shaded = np.clip(line * soft + 0.5, 0, 1)
    down = smooth(0, 1, fall * np.float32(1 / (tall + 0.2)))
    bright = lit + down * (0.45 * (shade - lit))
    dark = shade + down * (0.7 * (deep - shade))
    canvas.paint(region, bright + shaded * (dark - bright))
