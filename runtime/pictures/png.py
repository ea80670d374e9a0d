"""PNG files that record how their image was made."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo

from ..errors import ArtifactRefused
from ..files.atomic import atomic_write
from ..files.strict_json import loads

METADATA_KEY = "flexvar"
PNG_LEVEL = 1  # five times faster than the default level; files are a few per cent larger
_USE_ORIGINAL = (
    "Pass a PNG file that flexvar generate or flexvar edit wrote, not a copy that another program has saved."
)


def save_png(path: Path, pixels_HWC: NDArray[np.uint8], metadata: dict[str, Any], *, force: bool = False) -> None:
    """Write one PNG file atomically, with `metadata` as JSON under the key "flexvar". Raises InvalidInput."""
    info = PngInfo()
    info.add_text(METADATA_KEY, json.dumps(metadata, sort_keys=True))
    with atomic_write(path, force=force) as partial:
        Image.fromarray(pixels_HWC).save(partial, format="PNG", pnginfo=info, compress_level=PNG_LEVEL)


def read_metadata(path: Path) -> dict[str, Any]:
    """The metadata that `save_png` wrote. Raises ArtifactRefused for any other file."""
    try:
        with Image.open(path, formats=["PNG"]) as image:
            text = image.info.get(METADATA_KEY)
    except FileNotFoundError as error:
        raise ArtifactRefused(f"There is no file {path}.", expected="a PNG file", fix="Check the path.") from error
    except (OSError, UnidentifiedImageError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise _refusal(f"{path} cannot be read as PNG: {error}.", "a readable PNG file") from error
    if not isinstance(text, str):
        raise _refusal(f"{path} has no generation settings.", "a PNG file of flexvar")
    metadata = loads(text, where=f"{path.name}: {METADATA_KEY}", fix=_USE_ORIGINAL)
    if not isinstance(metadata, dict):
        raise _refusal(f"The generation settings in {path} are not a JSON object.", "a JSON object")
    return metadata


def _refusal(got: str, expected: str) -> ArtifactRefused:
    return ArtifactRefused(got, expected=expected, fix=_USE_ORIGINAL)
