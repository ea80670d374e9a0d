"""Scenes of green land: a flower meadow, a rainbow over hills."""

from __future__ import annotations

import numpy as np

from .canvas import Canvas, Region, chosen_colours, smooth
from .colour import Colour, Palettes, gradient, mix, rgb
from .nature import (
    WHITE,
    Light,
    Noise,
    clouding,
    land,
    puffs,
    ridge,
    round_trees,
    sky,
    streaks,
    sun,
    water,
)
from .stream import Floats, Stream

# zenith, middle, horizon, far hill, near grass, deep grass, and four colours of flowers
_MEADOWS = Palettes(
    "4f9fdc a8d8f0 fff6dc 8cc0a0 8cc04c 3c7a34 e8402c f46048 fff4e0 f4b830",
    "5a8cd0 b8ccf0 ffe8e8 94b4b8 7cb060 346c48 8c5cc8 b48ce0 f4e8ff e870b0",
    "48a8c8 b4e4e0 fffae0 98cca0 a4cc50 4c8c34 fcd02c fff0a0 ffffff f49c28",
    "8c84c8 f0b8b8 ffe8b8 a0b090 90a854 4c6c3c f06c9c fca4b8 fff0e4 e84c6c",
    "6cb0d8 c8e8f0 fffbe8 9cc8b8 78b868 2c7454 4c78e0 88b0f4 f4f8ff fce070",
    "f09c6c fcc88c fff0c0 c0b080 a8a848 5c6c30 e84c34 f8a030 fff0c8 c8386c",
)


def meadow(canvas: Canvas, stream: Stream) -> None:
    zenith, middle, horizon, far, grass, deep, *blooms = _MEADOWS.draw(stream)
    level = stream.between(0.32, 0.52) * canvas.h
    light = Light(
        stream.between(-0.4, 0.4) * canvas.w, level - stream.between(0.08, 0.3) * canvas.h, mix(horizon, WHITE, 0.3)
    )
    sky(canvas, [zenith, middle, horizon], level)
    if stream.chance(0.45):
        sun(canvas, light, stream.between(0.05, 0.1), mix(light.colour, WHITE, 0.5), 0.35)
    if stream.chance(0.75):
        puffs(canvas, stream, stream.whole(2, 4), 0.1 * level, 0.85 * level, WHITE, mix(middle, horizon, 0.5), 0.9)
    for step in range(2):
        curve = ridge(canvas, Noise(stream, 2), level + 0.03 * step + 0.02, 0.13 - 0.04 * step, 1.8)
        if step and stream.chance(0.6):
            curve = round_trees(canvas, stream, curve, 0.045, 0.05, stream.between(0.4, 0.8))
        colour = mix(far, grass, 0.45 * step)
        land(canvas, curve, mix(colour, deep, 0.15 * step), mix(colour, horizon, 0.4), 0.18, light, 0.2)
    curve = ridge(canvas, Noise(stream, 2), level + 0.08, stream.between(0.05, 0.12), 1.0)
    if stream.chance(0.55):
        _tree(canvas, stream, curve, stream.between(0.1, 0.17), mix(deep, far, 0.2), mix(grass, horizon, 0.15), light)
    ground = land(canvas, curve, mix(grass, horizon, 0.25), mix(grass, deep, 0.85), 0.6 * canvas.h, light, 0.2)
    bloom = stream.whole(0, len(blooms) - 1) if stream.chance(0.4) else None  # one colour only
    # distant flowers are one patch of colour, near ones are painted one by one
    wash = clouding(stream, canvas.xs[0] * 3, np.log1p(8 * np.maximum(canvas.ys - level, 0)) * 5, 2, 0.6)
    near = np.clip((canvas.y[ground.rows] - np.float32(level)) * np.float32(1 / (canvas.h - level)), 0, 1)
    tint = blooms[bloom if bloom is not None else 0]
    mask = ground.mask * smooth(0.35, 0.8, wash[ground.rows]) * (1 - smooth(0.25, 0.8, near))
    canvas.paint(Region(ground.rows, ground.columns, mask), tint, 0.7)
    top = float(curve.max())
    count = stream.whole(40, 90)
    many = stream.uniform(4 * 90, 5)[: int(count * canvas.area)]
    many = many[np.argsort(many[:, 1], kind="stable")]
    close = many[:, 1] ** 1.25
    x, y = (many[:, 0] - 0.5) * 1.04 * canvas.w, top + 0.01 + (canvas.h - top + 0.02) * close
    size = (0.012 + 0.036 * close**1.3) * (0.7 + 0.6 * many[:, 2])
    kind = (many[:, 3] * len(blooms)).astype(np.int64) if bloom is None else np.full(len(many), bloom)
    order = (kind + (many[:, 4] > 0.7)) % len(blooms) if bloom is None else kind
    petals = chosen_colours([mix(b, deep, 0.12) for b in blooms], order)
    for lower in (0.0, 0.45, 0.75):  # nearer flowers cover farther ones
        band = (close >= lower) & (close < {0.0: 0.45, 0.45: 0.75, 0.75: 2.0}[lower])
        if not band.any():
            continue
        xs, ys, rs = x[band], y[band], size[band]
        full = np.ones(len(xs))
        canvas.dots(xs, ys + 0.9 * rs, 0.8 * rs, chosen_colours([deep], np.zeros(len(xs), np.int64)), 0.25 * full)
        canvas.dots(xs, ys, rs, petals[:, band], full)
        if lower > 0.5:
            heart = chosen_colours(
                [mix(blooms[-1], WHITE, 0.3), mix(deep, blooms[0], 0.3)],
                (order[band] == len(blooms) - 1).astype(np.int64),
            )
            canvas.dots(xs, ys, 0.36 * rs, heart, full)


def _tree(
    canvas: Canvas, stream: Stream, ground: Floats, size: float, dark: Colour, bright: Colour, light: Light
) -> None:
    x = stream.side() * stream.between(0.2, 0.4) * canvas.w
    column = int(np.clip((x + canvas.w / 2) * canvas.unit, 0, canvas.width - 1))
    y = float(ground[1, column])
    bark = mix(dark, rgb("4a3428"), 0.7)
    canvas.paint(canvas.stroke((x, y + 0.03, 0.12 * size), (x, y - 1.3 * size, 0.06 * size)), bark)
    _crown(canvas, stream, x, y - 1.5 * size, size, dark, bright, light, 9)


def _crown(
    canvas: Canvas,
    stream: Stream,
    x: float,
    y: float,
    size: float,
    dark: Colour,
    bright: Colour,
    light: Light,
    count: int,
) -> None:
    """A crown of round tufts, darker below and away from the light."""
    side = 1.0 if light.x > x else -1.0
    tufts = stream.uniform(count, 3)
    for tone in (0.0, 0.4, 0.75):
        canvas.paint(
            canvas.disc(x + 0.2 * tone * side * size, y - 0.2 * tone * size, 0.62 * size * (1 - 0.4 * tone)),
            mix(dark, bright, tone),
        )
        for k, (out, turn, grow) in enumerate(tufts):
            angle = 2 * np.pi * (k + 0.6 * turn) / count
            away, shift = size * (0.5 + 0.2 * out) * (1 - 0.35 * tone), tone * 0.26 * size
            where = x + 1.15 * away * np.cos(angle) + side * shift, y + 0.8 * away * np.sin(angle) - shift
            radius = size * (0.26 + 0.16 * grow) * (1 - 0.4 * tone)
            canvas.paint(canvas.disc(*where, radius), mix(dark, bright, tone))


# zenith, middle, horizon, cloud, far hill, hill, near hill, light on the fields
_RAINBOWS = Palettes(
    "4a84bc 8cc0e0 e8f4f4 7c9cbc 7cb0b8 58ac64 206c44 d4ec7c",
    "3f6ca4 84acd4 ffe8c4 647ca8 84a8b4 84b044 2f7034 f8e070",
    "4c94b4 a0d0d4 fff4dc 84a8bc 84bcac 44ac80 186460 b4ec98",
    "6468b0 b49cd0 ffd8c8 8078a8 9c9cc4 7cac70 2f6450 f4d88c",
    "2f94d0 8cd0f0 f4fcf0 78a8cc 78c0bc 64c04c 1f8038 e4f878",
    "3c5c8c 7c98bc fcd4a8 5c6c94 8490ac a09c4c 4c5c34 ffcc6c",
)
_BOW = [rgb(code) for code in ("e8505c", "f79a4c", "fbe36a", "7fd07c", "58a8e8", "6a6ad8", "a45cc8")]


def rainbow(canvas: Canvas, stream: Stream) -> None:
    zenith, middle, horizon, cloud, far, hill, near, field = _RAINBOWS.draw(stream)
    level = stream.between(0.55, 0.72) * canvas.h
    light = Light(stream.side() * 0.6 * canvas.w, 0.2 * level, mix(horizon, WHITE, 0.4))
    sky(canvas, [zenith, middle, horizon], level)
    streaks(canvas, stream, -0.5 * level, 0.75 * level, cloud, stream.between(0.3, 1), 0.7)
    canvas.glow(light.x, light.y, 0.6, light.colour, 0.35)
    x = stream.between(-0.3, 0.3) * canvas.w
    radius = stream.between(0.42, 0.6) * max(1.0, 0.5 * (canvas.w + canvas.h) ** 0.5)
    centre, width = level + stream.between(-0.02, 0.12), stream.between(0.1, 0.17)
    _bow(canvas, x, centre, radius, width, stream.between(0.6, 0.85), _BOW)
    if stream.chance(0.4):
        _bow(canvas, x, centre, 1.32 * radius, 0.9 * width, 0.28, _BOW[::-1])
    if stream.chance(0.7):
        puffs(
            canvas,
            stream,
            stream.whole(2, 4),
            0.15 * level,
            0.8 * level,
            mix(WHITE, horizon, 0.3),
            mix(cloud, middle, 0.4),
        )
    hills = stream.whole(3, 4)
    for layer in range(hills):
        t = layer / (hills - 1)
        base = level + 0.06 + (canvas.h - level) * 0.7 * t
        curve = ridge(canvas, Noise(stream, 2), base, 0.16 + 0.06 * t, 1.6 - 0.4 * t)
        colour = mix(far, hill, min(1.0, 1.6 * t)) if layer < hills - 1 else mix(hill, near, 0.5)
        if layer and stream.chance(0.6):
            trees = round_trees(canvas, stream, curve, 0.03 + 0.035 * t, 0.035 + 0.05 * t, stream.between(0.55, 0.85))
            land(canvas, trees, mix(colour, near, 0.6), near, 0.12, light, 0.2)
        ground = land(canvas, curve, mix(colour, field, 0.45), mix(colour, near, 0.55 * t), 0.3, light, 0.25)
        stripes = clouding(stream, canvas.xs[0] * 1.5, canvas.ys[ground.rows] * 9, 1)
        canvas.paint(Region(ground.rows, ground.columns, ground.mask * smooth(0.5, 0.7, stripes)), field, 0.5)
    if stream.chance(0.35):
        water(canvas, stream, canvas.h - stream.between(0.1, 0.2), mix(horizon, hill, 0.3), mix(middle, near, 0.4), 0.5)


def _bow(
    canvas: Canvas, x: float, y: float, radius: float, width: float, strength: float, colours: list[Colour]
) -> None:
    table = gradient(np.linspace(0, 1, 64), colours)[:, :, 0]
    dx, dy = canvas.x - np.float32(x), canvas.y - np.float32(y)
    t = (np.float32(radius) - np.sqrt(dx * dx + dy * dy)) * np.float32(1 / width) + np.float32(0.5)
    edge = smooth(0, 0.18, t) * smooth(0, 0.18, 1 - t)
    colour = table[:, (np.clip(t, 0, 1) * 63).astype(np.int64)]
    canvas.paint(canvas.all(edge), colour, strength)
    inner = smooth(-3.5, 0.6, -np.abs(t - 1)) * (t > 0.5)  # the sky is brighter inside a rainbow
    canvas.shine(canvas.all(inner.astype(np.float32)), WHITE, 0.1)
