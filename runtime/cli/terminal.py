"""Small pictures on a terminal: each character shows two pixels, one above the other."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console
from rich.style import Style
from rich.text import Text

from .console import say

HALF_BLOCK = "▀"  # the upper half has the foreground colour, the lower half the background colour
MOST_COLUMNS = 48


def show_picture(console: Console, pixels_HW3: NDArray[np.uint8], caption: str) -> None:
    """Print a picture (H, W, 3) and a caption below it; only the caption where there are no colours."""
    if console.is_terminal and console.color_system is not None:
        console.print(as_text(pixels_HW3, min(MOST_COLUMNS, console.width)))
    say(caption, console)


def as_text(pixels_HW3: NDArray[np.uint8], columns: int) -> Text:
    """A picture as lines of half blocks, at most `columns` wide. Proportions are kept."""
    height, width = pixels_HW3.shape[:2]
    across = max(1, min(columns, width))
    down = max(2, 2 * round(across * height / width / 2))
    small = np.asarray(Image.fromarray(pixels_HW3).resize((across, down), Image.Resampling.BOX))
    text = Text()
    for y in range(0, down, 2):
        for upper, lower in zip(small[y].tolist(), small[y + 1].tolist(), strict=True):
            text.append(HALF_BLOCK, Style(color=_rgb(upper), bgcolor=_rgb(lower)))
        text.append("\n" if y + 2 < down else "")
    return text


def _rgb(colour: list[int]) -> str:
    return "rgb({},{},{})".format(*colour)
