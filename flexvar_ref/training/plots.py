"""Images of a run: grids of samples, and curves. Both are drawn with Pillow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from torch import Tensor

Points = Sequence[tuple[float, float]]
COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf")
GAP, WIDTH, HEIGHT, MARGIN = 2, 480, 280, 48


def pixels(image_BCHW: Tensor) -> NDArray[np.uint8]:
    """Images (B, 3, H, W) in −1…1, clamped, as uint8 (B, H, W, 3)."""
    scaled = image_BCHW.detach().float().cpu().mul(127.5).add(128).clamp(0, 255)
    return scaled.permute(0, 2, 3, 1).numpy().astype(np.uint8)


def grid(rows: Sequence[Sequence[NDArray[np.uint8]]]) -> Image.Image:
    """A grid of images, uint8 (H, W, 3). Smaller images are enlarged to the size of the largest."""
    height = max(image.shape[0] for row in rows for image in row)
    width = max(image.shape[1] for row in rows for image in row)
    columns = max(len(row) for row in rows)
    sheet = Image.new("RGB", (columns * (width + GAP) - GAP, len(rows) * (height + GAP) - GAP), "white")
    for y, row in enumerate(rows):
        for x, image in enumerate(row):
            picture = Image.fromarray(image).resize((width, height), Image.Resampling.NEAREST)
            sheet.paste(picture, (x * (width + GAP), y * (height + GAP)))
    return sheet


def curves(panels: Mapping[str, Mapping[str, Points]]) -> Image.Image:
    """Panels in two columns: title -> name of a curve -> its (step, value) points."""
    sheet = Image.new("RGB", (WIDTH * 2, HEIGHT * max(1, -(-len(panels) // 2))), "white")
    for i, (title, lines) in enumerate(panels.items()):
        sheet.paste(_panel(title, lines), (i % 2 * WIDTH, i // 2 * HEIGHT))
    return sheet


def _panel(title: str, lines: Mapping[str, Points]) -> Image.Image:
    panel = Image.new("RGB", (WIDTH, HEIGHT), "white")
    draw = ImageDraw.Draw(panel)
    finite = [(x, y) for points in lines.values() for x, y in points if np.isfinite(y)]
    left, right, upper, lower = MARGIN, WIDTH - 12, 52, HEIGHT - 28
    draw.text((left, 4), title, fill="black")
    draw.rectangle((left, upper, right, lower), outline="#999999")
    if not finite:
        return panel
    x0, x1 = min(x for x, _ in finite), max(x for x, _ in finite)
    y0, y1 = min(y for _, y in finite), max(y for _, y in finite)
    span_x, span_y = (x1 - x0) or 1.0, (y1 - y0) or 1.0
    for share in (0.0, 0.5, 1.0):
        y = lower - share * (lower - upper)
        draw.line((left, y, right, y), fill="#e0e0e0")
        draw.text((4, y - 6), f"{y0 + share * span_y:.4g}", fill="black")
    draw.text((left, lower + 6), f"{x0:.0f}", fill="black")
    draw.text((right - 40, lower + 6), f"{x1:.0f}", fill="black")
    for i, (name, points) in enumerate(lines.items()):
        colour = COLOURS[i % len(COLOURS)]
        path = [
            (left + (x - x0) / span_x * (right - left), lower - (y - y0) / span_y * (lower - upper))
            for x, y in points
            if np.isfinite(y)
        ]
        if len(path) > 1:
            draw.line(path, fill=colour, width=2)
        draw.text((left + i % 6 * 70, 20 + i // 6 * 14), name, fill=colour)
    return panel
