"""Scenes of low light: the sea at sunset, the moon, a city, northern lights."""

from __future__ import annotations

import numpy as np

from .canvas import Canvas, Plane, Region, smooth
from .colour import Colour, Palettes, mix, rgb
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
    stars,
    streaks,
    sun,
    water,
)
from .stream import Floats, Stream

# zenith, upper, lower, horizon, disc, far sea, near sea, land
_SUNSETS = Palettes(
    "2b2a5c 8a3f6d f2784b ffd27a fff3cf e08a5c 2a2350 231a3d",
    "47408a b06aa6 f7a1a0 ffe0b8 fff6e0 e2a0a8 3f3a78 352a5a",
    "3f5f8c b98a86 ffb25a ffe9a6 fffbe0 e6b070 3c4a6c 2c3350",
    "12344f 2f7183 e8a070 ffdca4 fff4d6 c9a080 123a50 0d2638",
    "2a1238 7b1f4a dc4a3f ffa552 ffe9b0 c4553f 2a1236 1c0c26",
    "6a4a8f e06a8a ff9a76 ffd9a0 fff0d0 f09a80 5a3a78 3c2858",
)


def sunset(canvas: Canvas, stream: Stream) -> None:
    zenith, upper, lower, horizon, disc, far, near, shore = _SUNSETS.draw(stream)
    level = stream.between(0.52, 0.7) * canvas.h
    radius = stream.between(0.06, 0.13)
    light = Light(
        stream.between(-0.34, 0.34) * canvas.w, level - stream.between(-0.3, 2.2) * radius, mix(horizon, lower, 0.45)
    )
    sky(canvas, [zenith, upper, lower, horizon], level)
    sun(canvas, light, radius, disc, stream.between(0.4, 0.7))
    streaks(canvas, stream, 0, 0.95 * level, mix(lower, upper, stream.between(0, 0.9)), stream.between(0.1, 1), 0.75)
    if stream.chance(0.5):
        puffs(canvas, stream, stream.whole(2, 4), 0.25 * level, level, mix(horizon, lower, 0.4), mix(lower, upper, 0.6))
    if stream.chance(0.7):  # a distant coast on one side
        side, reach = stream.side(), stream.between(0.25, 0.8)
        rise = np.clip((side * canvas.xs / canvas.w + 0.5 - (1 - reach)) / reach, 0, 1)
        height = stream.between(0.06, 0.17)
        coast = level - height * rise * (0.5 + Noise(stream, 3)(canvas.xs * 4)) + 0.004
        land(canvas, coast, mix(shore, lower, 0.5), mix(shore, horizon, 0.5), 0.15, light, 0.5)
    water(canvas, stream, level, far, near, stream.between(0.35, 0.6), light, 0.95)
    if stream.chance(0.55):
        _boat(canvas, stream, level, shore)
    if stream.chance(0.45):  # dark land in front
        side, height = stream.side(), stream.between(0.12, 0.3)
        rise = np.clip(0.15 + 1.5 * side * canvas.xs / canvas.w, 0, 1)
        ground = canvas.h + 0.01 - height * rise * rise * (0.6 + 0.6 * Noise(stream, 3)(canvas.xs * 3))
        if stream.chance(0.5):
            ground = conifers(canvas, stream, ground, stream.between(0.1, 0.18), 0.5, 0.3)
        land(canvas, ground, shore, mix(shore, zenith, 0.2), 0.3, light, 0.25)


def _boat(canvas: Canvas, stream: Stream, level: float, colour: Colour) -> None:
    size, x = stream.between(0.05, 0.13), stream.between(-0.4, 0.4) * canvas.w
    y, facing = level + size * stream.between(0.15, 0.6), stream.side()
    offset = facing * (canvas.xs - x) / size
    sail = np.where((offset > -0.05) & (offset < 0.42), y - size * (1.25 - 2.6 * np.abs(offset)), y)
    jib = np.where((offset < -0.09) & (offset > -0.4), y - size * (1.1 + 2.7 * offset), y)
    low = np.full_like(offset, y - 0.1 * size)
    pale = mix(colour, rgb("fff4e0"), stream.pick((0.0, 0.75)))
    canvas.paint(canvas.between(np.minimum(np.minimum(sail, jib), low), low), pale)
    inside = np.abs(offset) < 0.5
    hull = np.where(inside, y + size * 0.18 * np.sqrt(np.maximum(1 - (offset / 0.5) ** 2, 0)), y)
    canvas.paint(canvas.between(np.full_like(offset, y), hull), colour)


# zenith, middle, horizon, moon, far hill, near hill, water, mist
_NIGHTS = Palettes(
    "0b1030 1d2a5e 4a5c94 fdf3d8 33437a 0a1028 16234c 5d70a6",
    "071a2c 12405c 3f8290 f4f6e0 265c70 061722 0e3346 5b9aa4",
    "150f33 392a6b 7a5fa0 ffeed6 51417f 120b2b 2a2058 8a74b0",
    "080d24 16264e 35508a fff1c4 243a68 060a1a 10203f 4a6498",
    "101a3f 2a4a8a 7a9ac8 fffbe8 4a6aa4 0d1633 213c74 88a6d0",
)


def moonlit(canvas: Canvas, stream: Stream) -> None:
    zenith, middle, horizon, moon, far, near, lake, haze = _NIGHTS.draw(stream)
    level = stream.between(0.6, 0.8) * canvas.h
    radius = stream.between(0.07, 0.16)
    x, y = stream.between(-0.32, 0.32) * canvas.w, stream.between(0.16, 0.42) * canvas.h
    light = Light(x, y, mix(moon, horizon, 0.6))
    sky(canvas, [zenith, middle, horizon], level)
    stars(canvas, stream, stream.whole(40, 130), level, moon)
    canvas.glow(x, y, 0.6, horizon, stream.between(0.35, 0.6))
    canvas.glow(x, y, 1.9 * radius, light.colour, 0.4)
    if stream.chance(0.35):  # a crescent, through whose dark part the sky shows
        disc = canvas.disc(x, y, radius)
        bite = canvas.disc(x + stream.side() * 0.55 * radius, y - 0.25 * radius, 0.95 * radius)
        mask = np.zeros((canvas.height, canvas.width), np.float32)
        mask[disc.rows, disc.columns] = disc.mask
        mask[bite.rows, bite.columns] *= 1 - bite.mask
        canvas.paint(canvas.all(mask), moon)
    else:
        canvas.paint(canvas.disc(x, y, radius), moon)
        for dx, dy, size in stream.uniform(4, 3):
            canvas.paint(
                canvas.disc(x + (dx - 0.5) * radius, y + (dy - 0.5) * radius, radius * (0.12 + 0.16 * size)),
                mix(moon, horizon, 0.3),
                0.45,
            )
    if stream.chance(0.65):
        streaks(canvas, stream, 0.1 * level, level, mix(haze, moon, 0.2), stream.between(0, 0.7), 0.5)
    layers, lit = stream.whole(2, 4), stream.chance(0.55)
    tall, frequency = stream.between(0.12, 0.26), stream.between(1.5, 3)
    for layer in range(layers):
        t = layer / max(1, layers - 1)
        curve = ridge(canvas, Noise(stream, 3), level + 0.05 * t, tall * (1 - 0.45 * t), frequency * (1 + 0.3 * t))
        if t > 0.3 and stream.chance(0.6):
            curve = conifers(canvas, stream, curve, 0.05 + 0.06 * t, 0.45, 0.2)
        colour = mix(far, near, 0.75 * t)
        land(canvas, curve, colour, mix(colour, haze, 0.45 * (1 - t)), 0.25, light, 0.3)
    if lit:
        water(canvas, stream, level + 0.05, mix(lake, haze, 0.3), lake, 0.5, light, 0.8)
    if not lit or stream.chance(0.5):
        ground = ridge(canvas, Noise(stream, 2), canvas.h - 0.02, stream.between(0.06, 0.2), 1.7)
        if not lit:
            ground = np.minimum(ground, canvas.h - 0.6 * (canvas.h - level) * Noise(stream, 2)(canvas.xs))
        ground = conifers(canvas, stream, ground, stream.between(0.1, 0.26), 0.5, stream.between(0.1, 0.6))
        land(canvas, ground, near, mix(near, zenith, 0.3), 0.4)


# zenith, middle, horizon, far, middle distance, front, window, water
_CITIES = Palettes(
    "2a2f6b 8a5a9c ffb08a b88aa8 6a5590 26234f ffd98a 4a4078",
    "10183a 2b3f7a 7f86b8 6a78ac 3f4c84 141a3c ffe08f 222c5c",
    "3a6ea8 8fc0dc ffe3c0 a9c0d4 6f92b4 2f4c70 fff0c0 5f8fb4",
    "5a3a6a c8607a ffc08a d08a8a 8c567a 3a2548 ffe2a0 7a4a70",
    "0f3b4a 2f7f86 f4cfa0 8ab4ac 4a8288 123842 ffe0a0 2a626c",
    "1a1030 5a2a6a f07a8a a05a8c 623c78 1e1238 ffcf7a 43285c",
)


def skyline(canvas: Canvas, stream: Stream) -> None:
    zenith, middle, horizon, far, mid, front, window, river = _CITIES.draw(stream)
    wet = stream.chance(0.5)
    level = (stream.between(0.74, 0.86) if wet else 1.0) * canvas.h
    light = Light(stream.between(-0.35, 0.35) * canvas.w, level - stream.between(0.25, 0.6) * canvas.h, horizon)
    sky(canvas, [zenith, middle, horizon], level)
    if stream.chance(0.4):
        stars(canvas, stream, 40, 0.6 * level, WHITE, 0.7)
    if stream.chance(0.75):
        sun(canvas, light, stream.between(0.08, 0.2), mix(horizon, WHITE, 0.55), 0.4)
    if stream.chance(0.6):
        streaks(canvas, stream, 0, level, mix(horizon, middle, 0.3), stream.between(0, 0.7), 0.55)
    else:
        puffs(canvas, stream, 3, 0.15 * level, 0.7 * level, mix(horizon, WHITE, 0.35), middle)
    tall, crowd = stream.between(0.42, 0.6) * canvas.h**0.5, stream.between(0.8, 1.3)
    for layer, (colour, share) in enumerate(((far, 1.0), (mid, 0.8), (front, 0.52))):
        cells = Cells.draw(stream, (0.085, 0.11, 0.15)[layer] * crowd)
        centre, spread = stream.between(-0.3, 0.3) * canvas.w, 0.45 * canvas.w
        top = np.full_like(canvas.xs, level - 0.16 * tall * share)
        for distance, values in cells.near(canvas.xs):
            half = cells.spacing * (0.4 + 0.3 * values[..., 1])
            envelope = 0.45 + 0.75 / (1 + ((canvas.xs - distance - centre) / spread) ** 2)
            height = tall * share * (0.3 + 0.7 * values[..., 2]) * envelope
            out = np.abs(distance) / half
            style = values[..., 3]
            roof = np.where(style < 0.2, 0.5 * half * (1 - out), 0)  # gable
            roof = np.where((style > 0.2) & (style < 0.36), 1.6 * half * (out < 0.4), roof)  # stepped
            roof = np.where((style > 0.88) & (out < 0.045), 1.3 * half, roof)  # mast
            top = np.minimum(top, np.where(out < 1, level - height - roof, level))
        light_share = 0.35 - 0.1 * layer
        region = land(
            canvas,
            top,
            colour,
            mix(colour, horizon, 0.45 - 0.13 * layer),
            tall,
            light,
            light_share,
            np.full_like(top, level - tall),
        )
        if layer:
            _windows(canvas, stream, region, top, cells, window, 0.45 + 0.35 * (layer == 2))
        mist(canvas, level - 0.02, 0.22, horizon, 0.28 - 0.1 * layer)
    if wet:
        water(canvas, stream, level, mix(river, horizon, 0.35), river, 0.62, light, 0.5)


def _windows(
    canvas: Canvas, stream: Stream, region: Region, top: Floats, cells: Cells, colour: Colour, strength: float
) -> None:
    pitch_x, pitch_y = 0.034, 0.042
    column, row = canvas.xs[1] / pitch_x, canvas.ys[region.rows] / pitch_y
    lit = stream.uniform(CELLS, CELLS) < stream.between(0.15, 0.5)
    chosen = lit[np.floor(row).astype(np.int64)[:, None] % CELLS, np.floor(column).astype(np.int64)[None] % CELLS]

    def bars(at: Floats, pitch: float) -> Plane:  # one bar for each pitch, half as wide
        off = np.abs(at - np.floor(at) - 0.5)
        return np.clip((0.25 - off) * pitch * canvas.unit + 0.5, 0, 1).astype(np.float32)

    depth = canvas.depth(region, top)
    inside = np.clip((depth - 0.02) * 60, 0, 1) * region.mask
    mask = bars(row, pitch_y)[:, None] * bars(column, pitch_x)[None] * chosen * inside
    canvas.paint(Region(region.rows, region.columns, mask.astype(np.float32)), colour, strength)


# zenith, middle, horizon, low curtain, high curtain, mountain, snow, front
_AURORAS = Palettes(
    "050a1c 0c2238 1f4f5c 5dffb0 7a5cff 16304a 7fb4c4 050c18",
    "0a0820 1a1a4a 35508a 6affc8 d060e0 20285a 8fa4d8 090822",
    "03141a 083038 1f6a60 8cffa0 40b8ff 0f3a44 86c8be 031014",
    "0c0a24 241a50 50408a 70f0d8 ff6ab0 2a2456 a49ad0 0b0820",
)


def aurora(canvas: Canvas, stream: Stream) -> None:
    zenith, middle, horizon, low, high, rock, snow, front = _AURORAS.draw(stream)
    level = stream.between(0.68, 0.84) * canvas.h
    sky(canvas, [zenith, middle, horizon], level)
    stars(canvas, stream, stream.whole(40, 110), level, mix(snow, WHITE, 0.5))
    curtains = stream.whole(2, 3)
    for curtain in range(curtains):
        bend, rays, tall = Noise(stream, 2), Noise(stream, 2, 0.6), Noise(stream, 2)
        x = canvas.xs[1] + 3 * curtain
        tilt = stream.between(-0.25, 0.25)
        foot = level * (stream.between(0.5, 0.85) - 0.55 * (bend(x * 1.6) - 0.5)) + tilt * canvas.xs[1]
        reach = canvas.h * (0.35 + 0.5 * tall(x * 1.2)) * stream.between(0.7, 1.1)
        bright = (0.3 + 0.9 * np.clip(rays(x * 7) * 1.5 - 0.25, 0, 1)) * (0.25 + 1.0 * tall(x * 2.1 + 9))
        up = (foot.astype(np.float32)[None] - canvas.y) / reach.astype(np.float32)[None]
        edge = smooth(-0.1, 0.06, up)
        fall = np.clip(1 - up, 0, 1)
        strength = edge * fall**3 * bright.astype(np.float32)[None] * np.float32(stream.between(0.85, 1.25))
        t = smooth(0.05, 0.75, up)
        canvas.shine(canvas.all(np.clip(strength, 0, 1)), low + t * (high - low))
    glow = Light(stream.between(-0.3, 0.3) * canvas.w, 0.4 * level, low)
    canvas.glow(glow.x, level, 0.5, low, 0.22)
    curve = ridge(canvas, Noise(stream, 4, 0.45, sharp=True), level + 0.03, stream.between(0.14, 0.3), 3.2)
    land(canvas, curve, mix(rock, snow, stream.between(0, 0.6)), mix(rock, horizon, 0.4), 0.16, glow, 0.3)
    if stream.chance(0.6):
        water(canvas, stream, level, mix(rock, horizon, 0.5), zenith, 0.7, None)
    else:
        field = ridge(canvas, Noise(stream, 2), level + 0.06, 0.09, 1.3)
        land(canvas, field, mix(snow, low, 0.12), mix(snow, middle, 0.75), 0.3, glow, 0.2)
    if stream.chance(0.8):
        ground = ridge(canvas, Noise(stream, 2), canvas.h, stream.between(0.05, 0.16), 1.6)
        ground = conifers(canvas, stream, ground, stream.between(0.12, 0.26), 0.5, stream.between(0.1, 0.6))
        land(canvas, ground, front, mix(front, rock, 0.3), 0.3)
