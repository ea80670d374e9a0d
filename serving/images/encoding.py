"""Pixels to PNG, JPEG or WebP. All of it may run in several threads at once."""

from __future__ import annotations

import io
import json
import struct
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from flexvar_runtime.pictures.png import METADATA_KEY

from ..errors import HTTPError

isal_zlib: Any
try:
    from isal import isal_zlib
except ImportError:  # it is optional
    isal_zlib = None

Pixels = NDArray[np.uint8]
QUALITY = 95
"""Of JPEG and WebP, unless output_compression is given."""
_UP = 2
"""The number of the PNG filter that stores differences to the row above."""


def _zlib(data: bytes) -> bytes:
    packer = zlib.compressobj(1, zlib.DEFLATED, 15, 9, zlib.Z_RLE)
    return packer.compress(data) + packer.flush()


def _isal(data: bytes) -> bytes:
    compressed: bytes = isal_zlib.compress(data, 1)
    return compressed


deflate: Callable[[bytes], bytes] = _zlib if isal_zlib is None else _isal


@dataclass(frozen=True)
class Output:
    """The form of an image in an answer: "png", "jpeg" or "webp", and the quality of the last two."""

    format: str
    quality: int = QUALITY

    @classmethod
    def of(cls, name: str | None, quality: int | None) -> Output:
        """Raises HTTPError if a quality is given for PNG, which has none."""
        if quality is not None and name in (None, "png"):
            got = "output_compression works with output_format jpeg and webp. Leave it out, or choose one of them."
            raise HTTPError(400, got, "invalid_value", "output_compression")
        return cls(name or "png", QUALITY if quality is None else quality)

    @property
    def media_type(self) -> str:
        return f"image/{self.format}"

    def encode(self, pixels_HW3: Pixels, metadata: Mapping[str, Any] | None = None) -> bytes:
        """The file of one image. metadata: settings that a PNG file records, as `flexvar generate` writes them."""
        if self.format == "png":
            return png(pixels_HW3, metadata)
        file = io.BytesIO()
        options = {"subsampling": 0} if self.format == "jpeg" and self.quality >= 90 else {}
        Image.fromarray(pixels_HW3).save(file, self.format, quality=self.quality, **options)
        return file.getvalue()


def png(pixels_HW3: Pixels, metadata: Mapping[str, Any] | None = None) -> bytes:
    """A PNG file. Rows are stored as differences to the row above, which compresses well and is computed at once."""
    height, width = pixels_HW3.shape[:2]
    flat = pixels_HW3.reshape(height, 3 * width)
    rows = np.empty((height, 1 + 3 * width), np.uint8)
    rows[:, 0] = _UP
    rows[0, 1:] = flat[0]  # the row above the first counts as black
    np.subtract(flat[1:], flat[:-1], out=rows[1:, 1:])
    chunks = [_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))]
    if metadata is not None:
        text = json.dumps(metadata, sort_keys=True).encode("ascii")
        chunks.append(_chunk(b"tEXt", METADATA_KEY.encode() + b"\0" + text))
    chunks += [_chunk(b"IDAT", deflate(rows.tobytes())), _chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
