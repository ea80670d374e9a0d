"""Colours: from the pixels of any Pillow mode, and from any colour profile, to 8-bit sRGB and an opacity."""

from __future__ import annotations

import io
import logging
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..errors import first_line

if TYPE_CHECKING:
    from PIL.ImageCms import ImageCmsTransform

log = logging.getLogger(__name__)

Pixels = NDArray[np.uint8]

SIXTEEN_BITS = frozenset({"I;16", "I;16B", "I;16L", "I;16N"})
_GREYS = frozenset({"1", "L", "LA", "La"}) | SIXTEEN_BITS
_MODES = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}  # Pillow's mode for the colour model of a profile


def to_rgb(part: Image.Image, to_srgb: ImageCmsTransform | None) -> tuple[Pixels, Pixels | None]:
    """A picture as sRGB (H, W, 3) uint8 over white, and its opacity (H, W) uint8; None if it has no transparency.

    to_srgb: from `profile_transform`; None if the pixels are sRGB, or their model has no profile.
    """
    opacity = None
    if part.mode in SIXTEEN_BITS:
        values, key = np.asarray(part).astype(np.uint32), part.info.get("transparency")
        opacity = None if key is None else np.where(values == key, 0, 255).astype(np.uint8)
        part = Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8))
    elif part.has_transparency_data:
        rgba = (part.convert("LA") if part.mode == "La" else part).convert("RGBA")
        opacity, part = np.asarray(rgba.getchannel("A")), rgba.convert("RGB")
    if to_srgb is not None:
        part = to_srgb.apply(part.convert(to_srgb.input_mode))
    rgb = np.asarray(part.convert("RGB"))
    return (rgb, None) if opacity is None else (over_white(rgb, opacity), opacity)


def over_white(rgb_HW3: Pixels, opacity_HW: Pixels) -> Pixels:
    """Pixels laid over white."""
    if opacity_HW.min() == 255:
        return rgb_HW3
    share = opacity_HW[..., None].astype(np.float32) / 255
    mixed = rgb_HW3 * share + 255 * (1 - share)
    return (mixed + np.float32(0.5)).astype(np.uint8)


def profile_transform(profile: bytes, mode: str, name: str) -> ImageCmsTransform | None:
    """The conversion of pixels of a Pillow mode from a colour profile (ICC) to sRGB; None if none is needed.

    As in viewers and browsers, a profile that is broken or belongs to another colour model is not used. A warning with
    the `name` of the picture says so. A profile for RGB also holds for grey pixels.
    """
    try:
        transform = _transform(profile, mode)
        return None if _changes_nothing(transform) else transform
    except Exception as error:  # the library raises exceptions of several types
        log.warning("the colour profile of %s is not used: %s. Its colours are taken as sRGB.", name, first_line(error))
        return None


def _transform(profile: bytes, mode: str) -> ImageCmsTransform:
    from PIL import ImageCms  # slow to import

    source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    model = source.profile.xcolor_space.strip()
    fits = {"RGB": mode != "CMYK", "GRAY": mode in _GREYS, "CMYK": mode == "CMYK"}
    if not fits.get(model, False):
        raise ValueError(f"it describes {model} colours, but the pixels have mode {mode}")
    return ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), _MODES[model], "RGB")


def _changes_nothing(transform: ImageCmsTransform) -> bool:
    """Whether a conversion moves no RGB colour of a grid by more than its own rounding, one level."""
    if transform.input_mode != "RGB":
        return False
    levels = np.arange(0, 256, 15, dtype=np.uint8)
    grid = np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(len(levels), -1, 3)
    moved = np.asarray(transform.apply(Image.fromarray(grid))).astype(np.int16) - grid
    return bool(np.abs(moved).max() <= 1)
