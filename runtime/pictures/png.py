"""PNG files that record how their image was made."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ..errors import ArtifactRefused
from ..files.atomic import atomic_write
from ..files.parsing import refuse_failures
from ..files.strict_json import loads
from .png_chunks import inflate, read_chunks

METADATA_KEY = "flexvar"
MOST_TEXT_BYTES = 2**20
PNG_LEVEL = 1  # five times faster than the default level; files are a few per cent larger
_TEXT_KINDS = (b"tEXt", b"zTXt", b"iTXt")
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
    """The metadata that `save_png` wrote, wherever in the file they are. Raises ArtifactRefused for any other file."""
    if not os.path.isfile(path):
        raise ArtifactRefused(f"There is no file {path}.", expected="a PNG file", fix="Check the path.")
    problem, readable = f"{path} cannot be read as PNG", "a readable PNG file"
    with refuse_failures(problem, expected=readable, fix=_USE_ORIGINAL), path.open("rb") as file:
        chunks = read_chunks(file, _TEXT_KINDS)
        texts = [_text(kind, data) for kind, data in chunks if data.startswith(METADATA_KEY.encode() + b"\0")]
    if len(texts) != 1:
        number = "no generation settings" if not texts else f"{len(texts)} texts with generation settings"
        raise _refusal(f"{path} has {number}.", "a PNG file of flexvar")
    metadata = loads(texts[0], where=f"{path.name}: {METADATA_KEY}", fix=_USE_ORIGINAL)
    if not isinstance(metadata, dict):
        raise _refusal(f"The generation settings in {path} are not a JSON object.", "a JSON object")
    return metadata


def _text(kind: bytes, data: bytes) -> bytes:
    """The text in a chunk, in UTF-8, of at most MOST_TEXT_BYTES. Raises ValueError."""
    text = data.partition(b"\0")[2]
    packed = kind == b"zTXt"
    if kind == b"iTXt":  # a flag, the method, then a language and a translated key, each with a zero byte
        packed, text = text[:1] == b"\1", text[2:].split(b"\0", 2)[-1]
    elif packed:
        text = text[1:]
    if packed:
        text = inflate(text, MOST_TEXT_BYTES)
    if len(text) > MOST_TEXT_BYTES:
        raise ValueError(f"its text {METADATA_KEY} is longer than {MOST_TEXT_BYTES:,} bytes")
    return text if kind == b"iTXt" else text.decode("latin-1").encode()


def _refusal(got: str, expected: str) -> ArtifactRefused:
    return ArtifactRefused(got, expected=expected, fix=_USE_ORIGINAL)
