"""Pixels: the one rounding rule, PNG files that know how they were made, and images coming in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo

from .atomic import atomic_write
from .errors import ArtifactRefused
from .strict_json import loads

METADATA_KEY = "flexvar"
PNG_LEVEL = 1  # a fifth of the default level's time for a few per cent of size


def to_uint8(decoded_BCHW: NDArray[np.float32], value_range: tuple[float, float] = (-1.0, 1.0)) -> NDArray[np.uint8]:
    """Decoder output (B, 3, H, W) to pixels (B, H, W, 3).

    The published rule for −1…1: x · 127.5 + 127.5 + 0.5, clamped to 0…255, truncated. Rounding moves FID, so it is
    here and nowhere else.
    """
    low, high = value_range
    gain = np.float32(255 / (high - low))
    pixels = decoded_BCHW.astype(np.float32) * gain
    pixels -= np.float32(low) * gain
    pixels += np.float32(0.5)
    np.clip(pixels, 0, 255, out=pixels)
    return np.ascontiguousarray(pixels.astype(np.uint8).transpose(0, 2, 3, 1))


def refuse_pixels() -> ArtifactRefused:
    """The refusal of a decoder's output that is not finite."""
    return ArtifactRefused(
        "NaN or infinity from the decoder",
        expected="finite pixels",
        fix="use a bundle exported with --precision bf16 or fp32",
    )


def from_uint8(images_BHWC: NDArray[np.uint8], value_range: tuple[float, float] = (-1.0, 1.0)) -> NDArray[np.float32]:
    """Pixels (B, H, W, 3) to what the encoder takes, (B, 3, H, W)."""
    low, high = value_range
    scaled = images_BHWC.astype(np.float32) * np.float32((high - low) / 255) + np.float32(low)
    return np.ascontiguousarray(scaled.transpose(0, 3, 1, 2))


def save_png(path: Path, pixels_HWC: NDArray[np.uint8], metadata: dict[str, Any], *, force: bool = False) -> None:
    """Write one PNG atomically, with `metadata` as JSON under the key "flexvar"."""
    info = PngInfo()
    info.add_text(METADATA_KEY, json.dumps(metadata, sort_keys=True))
    with atomic_write(path, force=force) as partial:
        Image.fromarray(pixels_HWC).save(partial, format="PNG", pnginfo=info, compress_level=PNG_LEVEL)


def read_metadata(path: Path) -> dict[str, Any]:
    """What `save_png` wrote. Raises ArtifactRefused for anything that is not such an image."""
    fix = "pass a PNG that flexvar generate wrote, not a copy that an editor or a chat has stripped"
    try:
        with Image.open(path, formats=["PNG"]) as image:
            text = image.info.get(METADATA_KEY)
    except FileNotFoundError as error:
        raise ArtifactRefused(f"no file {path}", expected="a PNG of flexvar generate", fix="check the path") from error
    except (OSError, UnidentifiedImageError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ArtifactRefused(f"{path} ({error})", expected="a readable PNG", fix=fix) from error
    if not isinstance(text, str):
        raise ArtifactRefused(f"{path} without generation settings", expected="a PNG of flexvar generate", fix=fix)
    try:
        metadata = loads(text, where=f"{path.name}: {METADATA_KEY}")
    except ArtifactRefused as error:
        raise ArtifactRefused(error.got, expected=error.expected, fix=fix) from error
    if not isinstance(metadata, dict):
        raise ArtifactRefused(f"{path} with settings that are no object", expected="a JSON object", fix=fix)
    return metadata
