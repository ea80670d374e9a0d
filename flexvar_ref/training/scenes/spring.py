"""Scenes of mild weather: balloons, cherry blossom."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .canvas import Canvas, Region, chosen_colours, smooth
from .colour import Colour, Palettes, mix, rgb
from .nature import (
    WHITE,
    Light,
    Noise,
    conifers,
    land,
    puffs,
    ridge,
    round_trees,
    sky,
    streaks,
    sun,
    water,
)
from .stream import Stream

# zenith, middle, horizon, far hill, hill, near, and four colours of cloth
_SKIES = Palettes(
    "4fa0d8 a4d8ec fff0d8 a4c0cc 84b08c 3c7858 e8503c fbc440 fff4e0 2f6c9c",
    "6c84c8 dcb8d0 ffe0c0 bcacc4 94a090 4c5c68 f0647c fcb464 fff0e0 5c4c98",
    "f0946c fcc494 fff0d0 dcac98 b48c78 6c4c54 c83c4c f8a83c fff4dc 3c6c8c",
    "48b4b8 b4e4d8 fffae4 a4d0c0 88bc8c 38806c f07048 fcd868 fffbf0 28747c",
    "5c6cb0 a8b4e0 fce8e8 a8a8cc 8898ac 485878 d84880 f8c8a0 ffffff 7c54a8",
)


def balloons(canvas: Canvas, stream: Stream) -> None:
    zenith, middle, horizon, far, hill, near, *cloths = _SKIES.draw(stream)
    level = stream.between(0.74, 0.9) * canvas.h
    light = Light(
        stream.between(-0.45, 0.45) * canvas.w, stream.between(0.15, 0.6) * canvas.h, mix(horizon, WHITE, 0.4)
    )
    sky(canvas, [zenith, middle, horizon], level)
    if stream.chance(0.5):
        sun(canvas, light, stream.between(0.05, 0.1), mix(light.colour, WHITE, 0.6), 0.35)
    else:
        canvas.glow(light.x, light.y, 0.7, light.colour, 0.35)
    puffs(canvas, stream, stream.whole(2, 5), 0.2 * level, 0.95 * level, WHITE, mix(middle, horizon, 0.4))
    for layer in range(3):
        t = layer / 2
        curve = ridge(canvas, Noise(stream, 3), level + 0.04 + 0.12 * t, 0.16, 2 - 0.6 * t)
        if layer and stream.chance(0.5):
            curve = conifers(canvas, stream, curve, 0.04 + 0.03 * t, 0.5, 0.4)
        colour = (far, hill, near)[layer]
        land(canvas, curve, mix(colour, horizon, 0.15), mix(colour, horizon, 0.45 - 0.3 * t), 0.2, light, 0.25)
    count = stream.pick((1, 2, 3, 3, 4, 5, 6))
    first = stream.between(0.17, 0.25) if count < 4 else stream.between(0.12, 0.17)
    placed: list[tuple[float, float, float, _Look]] = []
    for rank in range(count):
        look = _Look.draw(stream)
        size = first * (1 - 0.62 * rank / max(1, count - 1)) * stream.between(0.9, 1.1)
        tries = stream.uniform(12, 2)
        best, room = (0.0, 0.3), -np.inf
        for u, v in tries:  # the place with the most room
            x = (u - 0.5) * max(0.1, canvas.w - 2.3 * size)
            y = 1.15 * size + v * max(0.02, level - 2.5 * size)
            free = min((np.hypot(x - a, (y - b) * 0.8) - 1.15 * (size + r) for a, b, r, _ in placed), default=0.0)
            if free > room:
                best, room = (x, y), free
        if room < -0.02:
            continue
        placed.append((*best, size, look))
    haze = mix(horizon, middle, 0.4)
    for x, y, size, look in sorted(placed, key=lambda place: place[2]):  # small balloons are far away
        fog = max(0.0, 0.5 * (1 - size / first))
        cloth = [mix(cloths[k], haze, fog) for k in look.cloths]
        _balloon(canvas, (x, y, size), look, cloth, mix(rgb("6a4630"), haze, fog), light)


@dataclass(frozen=True)
class _Look:
    """The pattern of a balloon.

    cloths: indices of three colours. stripes: pairs of vertical stripes, unless `plain`.
    band: (height, half width) of a horizontal band, or None.
    """

    cloths: tuple[int, int, int]
    stripes: int
    plain: bool
    band: tuple[float, float] | None

    @classmethod
    def draw(cls, stream: Stream) -> _Look:
        start, step = stream.whole(0, 3), stream.whole(1, 3)
        stripes, style = stream.whole(3, 5), stream.whole(0, 3)
        at, thick = stream.between(-0.2, 0.25), stream.between(0.12, 0.3)
        cloths = start, (start + step) % 4, (start + 2 * step + 1) % 4
        return cls(cloths, stripes, style == 3, (at, thick) if style else None)


def _balloon(
    canvas: Canvas,
    place: tuple[float, float, float],
    look: _Look,
    cloths: list[Colour],
    basket: Colour,
    light: Light,
) -> None:
    (x, y, size), (first, second, third) = place, cloths
    rows, columns = canvas.box(x - 1.1 * size, y - 1.05 * size, x + 1.1 * size, y + 1.75 * size)
    q = (canvas.ys[rows] - y) / size
    lower = np.clip((q - 0.15) / 1.05, 0, 1)
    half = np.where(q < 0.15, np.sqrt(np.maximum(1 - q * q, 0)), 0.9887 * (1 - lower**1.7 * 0.8))
    half = np.where((q > -1) & (q < 1.2), half, 0.0)
    cover = np.clip((1.2 - q) * size * canvas.unit + 0.5, 0, 1) * (half > 0)
    wide = np.maximum(half, 1e-3).astype(np.float32)[:, None]
    across = (canvas.x[:, columns] - np.float32(x)) * np.float32(1 / size)
    pixels = np.float32(size * canvas.unit)
    mask = np.clip((wide - np.abs(across)) * pixels + 0.5, 0, 1) * cover.astype(np.float32)[:, None]
    down = q.astype(np.float32)[:, None]
    round_part = np.clip((1 - np.sqrt(across * across + down * down)) * pixels + 0.5, 0, 1)
    mask = np.where(down < 0.15, round_part, mask)
    region = Region(rows, columns, mask)
    canvas.paint(region, first)
    if not look.plain:  # stripes, narrower towards the sides as on a round body
        edges = np.sin(np.pi * (np.arange(2 * look.stripes) / (2 * look.stripes - 1) - 0.5))
        share = np.zeros_like(mask)
        for sign, edge in zip([1, -1] * look.stripes, edges, strict=True):
            share += sign * np.clip((across - np.float32(edge) * wide) * pixels + 0.5, 0, 1)
        canvas.paint(Region(rows, columns, mask * np.clip(share, 0, 1)), second)
    if look.band is not None:  # a horizontal band
        at, thick = look.band
        sag = (0.16 * (1 - np.minimum(across * across, 1))).astype(np.float32)
        band = np.clip(-(np.abs((q - at)[:, None].astype(np.float32) - sag) - np.float32(thick)) * pixels + 0.5, 0, 1)
        canvas.paint(Region(rows, columns, mask * band), third)
    side = -1.0 if light.x > x else 1.0
    turned = across / wide * np.float32(side)
    dark = mix(first, rgb("1a1a40"), 0.75)
    canvas.paint(Region(rows, columns, mask * smooth(-0.1, 1.25, turned)), dark, 0.5)
    canvas.shine(Region(rows, columns, mask * smooth(0.1, 1.1, -turned)), light.colour, 0.25)
    for s in (-1, 1):
        canvas.paint(
            canvas.stroke(
                (x + 0.17 * s * size, y + 1.18 * size, 0.012 * size),
                (x + 0.11 * s * size, y + 1.5 * size, 0.012 * size),
            ),
            basket,
            0.8,
        )
    canvas.paint(canvas.stroke((x, y + 1.5 * size, 0.12 * size), (x, y + 1.58 * size, 0.1 * size)), basket)


# zenith, middle, horizon, mountain, snow, hill, water, deep blossom, blossom, pale blossom, bark
_BLOSSOMS = Palettes(
    "84bce4 c4e0f0 fff0ec 8ca8cc ffffff 7ca890 88b8d0 e07c9c f8b4c8 ffe4ec 5a4048",
    "a4a4dc e4c8e4 ffe8e0 a094c8 fff4f8 8c98a8 a8a8d4 d86ca0 f4a4c8 ffdcec 4c344c",
    "6cb8c0 b8e0d8 fff4e4 88b4b8 fbfdfb 74a484 7cb8b8 e8808c fcb8b8 fff0e8 5c4440",
    "f0a494 fcccb4 fff0d8 c494a8 fff0ec a08c90 dca8a4 d05c84 f094b0 ffdce0 4c2c3c",
    "788cc4 b4c4e8 f4ecf8 8494c4 f8fbff 7c94a0 8ca4d0 c878b8 e8a8dc fae4f8 443450",
)


def blossoms(canvas: Canvas, stream: Stream) -> None:
    zenith, middle, horizon, rock, snow, hill, lake, deep, bloom, pale, bark = _BLOSSOMS.draw(stream)
    level = stream.between(0.66, 0.8) * canvas.h
    side = stream.side()  # side of the tree
    light = Light(
        -side * stream.between(0.05, 0.35) * canvas.w, stream.between(0.2, 0.5) * canvas.h, mix(horizon, WHITE, 0.3)
    )
    sky(canvas, [zenith, middle, horizon], level)
    if stream.chance(0.5):
        sun(canvas, light, stream.between(0.06, 0.13), mix(light.colour, WHITE, 0.5), 0.3)
    if stream.chance(0.5):
        streaks(canvas, stream, 0, 0.9 * level, mix(horizon, WHITE, 0.5), stream.between(0.2, 0.8), 0.6)
    if stream.chance(0.75):  # one symmetric mountain with a snow cap
        summit, tall = -side * stream.between(0.02, 0.28) * canvas.w, stream.between(0.26, 0.42) * canvas.h**0.5
        away = np.abs(canvas.xs - summit) / (1.35 * tall)
        slope = level - tall * np.minimum(1.12 * np.maximum(1 - away, 0) ** 1.5, 0.94)
        land(canvas, slope, mix(rock, middle, 0.15), mix(rock, horizon, 0.7), tall, light, 0.2)
        jag = Noise(stream, 2, 0.5, True)(canvas.xs * 14)
        cap = np.where(away < 1, np.maximum(slope, level - tall * (0.72 - 0.3 * jag)), slope)
        canvas.paint(canvas.between(slope, cap), snow, 0.95)
    grove = stream.pick((0.15, 0.6, 0.9))  # share of blossom in the trees behind
    for step in range(2):
        curve = ridge(canvas, Noise(stream, 2), level + 0.02 + 0.04 * step, 0.1, 2)
        if step:
            curve = round_trees(canvas, stream, curve, 0.04, 0.045, stream.between(0.1, 0.6))
        colour = mix(mix(rock, hill, 0.4 + 0.5 * step), bloom, grove * step)
        land(canvas, curve, mix(colour, horizon, 0.25), mix(colour, horizon, 0.55), 0.14, light, 0.2)
    if stream.chance(0.65):
        water(canvas, stream, level + 0.05, mix(lake, horizon, 0.5), lake, 0.6, light, 0.4)
    else:
        for step in range(2):
            curve = ridge(canvas, Noise(stream, 2), level + 0.1 + 0.1 * step, 0.1, 1.2)
            land(canvas, curve, mix(hill, pale, 0.45 - 0.2 * step), mix(hill, deep, 0.25 * step), 0.25, light, 0.2)
    _blossom_tree(canvas, stream, side, (deep, bloom, pale), bark, light)
    many = stream.uniform(4 * 60, 4)[: int(stream.whole(15, 60) * canvas.area)]
    x, y = (many[:, 0] - 0.5) * canvas.w, many[:, 1] * canvas.h
    colours = chosen_colours([bloom, pale, mix(bloom, pale, 0.5)], (many[:, 3] * 3).astype(np.int64))
    canvas.dots(x, y, 0.005 + 0.007 * many[:, 2], colours, np.full(len(many), 0.9))


def _blossom_tree(
    canvas: Canvas, stream: Stream, side: float, tones: tuple[Colour, Colour, Colour], bark: Colour, light: Light
) -> None:
    """Paint a tree at one edge, with branches into the picture, or a bough from an upper corner."""
    size = stream.between(0.75, 1.0) * canvas.h**0.5
    hanging = stream.chance(0.35)
    if hanging:
        knee = (side * (0.5 * canvas.w + 0.02), stream.between(0.02, 0.22) * canvas.h)
        spread = (1.2, 1.45, 1.7, 1.95, 2.2)
    else:
        x, foot = side * stream.between(0.24, 0.42) * canvas.w, canvas.h + 0.03
        knee = (x - side * 0.05, foot - stream.between(0.36, 0.5) * size)
        spread = (-0.75, -0.1, 0.45, 1.0, 1.6)
        canvas.paint(canvas.stroke((x, foot, 0.05 * size), (*knee, 0.032 * size)), bark)
    ends: list[tuple[float, float, float]] = []
    for angle in spread:
        reach = stream.between(0.22, 0.4) * size * (1.9 if hanging else 1.0)
        turn = angle + stream.between(-0.18, 0.18)  # angle between upright and the inside of the picture
        end = (knee[0] - side * reach * np.sin(turn), knee[1] - reach * np.cos(turn))
        canvas.paint(canvas.stroke((*knee, 0.024 * size), (*end, 0.009 * size)), bark)
        for share, wide in ((1.0, 0.1), (0.65, 0.11), (0.3, 0.08)):
            ends.append((knee[0] + share * (end[0] - knee[0]), knee[1] + share * (end[1] - knee[1]), wide * size))
    if not hanging:
        lift, steep = stream.between(0.1, 0.2), stream.between(0.8, 1.5)
        bank = canvas.h - lift * np.clip(0.35 + steep * side * canvas.xs / canvas.w, 0, 1.2) ** 1.5 - 0.01
        land(canvas, bank, mix(bark, tones[0], 0.45), bark, 0.2, light, 0.25)
    lit = 1.0 if light.x > knee[0] else -1.0
    tufts = stream.uniform(len(ends), 3, 3)
    for tone, colour in enumerate(tones):
        for (ex, ey, wide), group in zip(ends, tufts, strict=True):
            for dx, dy, grow in group:
                shift = 0.024 * tone * size
                radius = size * (0.05 + 0.04 * grow) * (1.0, 0.74, 0.42)[tone]
                at = ex + (dx - 0.5) * 2 * wide + lit * shift, ey + (dy - 0.5) * 1.6 * wide - shift
                canvas.paint(canvas.disc(*at, radius), colour)
