"""Pixels from the decoder's output, and the encoder's input from pixels."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..checks import check_array, invalid
from ..errors import ArtifactRefused

if TYPE_CHECKING:
    from PIL import Image


def to_uint8(decoded_BCHW: NDArray[np.float32], value_range: tuple[float, float] = (-1.0, 1.0)) -> NDArray[np.uint8]:
    """Pixels (B, H, W, 3) of the decoder's output (B, 3, H, W).

    The published rule for −1…1: x · 127.5 + 127.5 + 0.5, clamped to 0…255, truncated. Rounding changes FID, so no other
    code rounds pixels.
    """
    low, high = value_range
    gain = np.float32(255 / (high - low))
    pixels = decoded_BCHW.astype(np.float32) * gain
    pixels -= np.float32(low) * gain
    pixels += np.float32(0.5)
    np.clip(pixels, 0, 255, out=pixels)
    return np.ascontiguousarray(pixels.astype(np.uint8).transpose(0, 2, 3, 1))


def refuse_pixels() -> ArtifactRefused:
    """The error for a decoder's output that is not finite."""
    return ArtifactRefused(
        "The decoder gave NaN or infinity.",
        expected="finite pixels",
        fix="Use a bundle exported with --precision bf16 or fp32.",
    )


def require_finite(decoded_BCHW: NDArray[np.float32]) -> None:
    """Raise ArtifactRefused if the decoder's output has NaN or infinity."""
    if not np.isfinite(decoded_BCHW).all():
        raise refuse_pixels()


def from_uint8(images_BHWC: NDArray[np.uint8], value_range: tuple[float, float] = (-1.0, 1.0)) -> NDArray[np.float32]:
    """The encoder's input (B, 3, H, W) of pixels (B, H, W, 3)."""
    low, high = value_range
    scaled = images_BHWC.astype(np.float32) * np.float32((high - low) / 255) + np.float32(low)
    return np.ascontiguousarray(scaled.transpose(0, 3, 1, 2))


def check_images(image: Image.Image | ArrayLike, factor: int) -> NDArray[np.uint8]:
    """One image or a batch of images as an array (B, H, W, 3) uint8.

    PIL images are read as by `read_photo`. Raises its errors, and InvalidInput for other arrays and for sides that are
    not multiples of `factor`.
    """
    from PIL import Image  # slow to import

    from .photo import read_photo

    pixels = read_photo(image).pixels if isinstance(image, Image.Image) else check_array("image", image)
    pixels = pixels[None] if pixels.ndim == 3 else pixels
    colour = pixels.ndim == 4 and pixels.shape[3] == 3 and pixels.dtype == np.uint8 and len(pixels) > 0
    if not colour or any(side < factor or side % factor for side in pixels.shape[1:3]):
        raise invalid(
            f"image has shape {pixels.shape} and dtype {pixels.dtype}",
            f"(B, H, W, 3) uint8 with sides in multiples of {factor}",
            "Resize or pad the image first.",
        )
    return pixels
