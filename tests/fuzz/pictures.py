"""Mutated pictures of every common format, compared with what Pillow reads."""

from __future__ import annotations

import io
import warnings
import zlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from random import Random
from typing import Any
from unittest import mock

import numpy as np
from mutate import NUMBERS, mutate_bytes
from outcome import Wrong, refused
from PIL import Image, PngImagePlugin

from flexvar_runtime.pictures.photo import Photo, read_mask, read_photo
from flexvar_runtime.pictures.png import read_metadata

ORIENTATION = 0x0112
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
FORMATS = {
    "png": ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"),
    "jpg": ("L", "RGB", "CMYK"),
    "webp": ("RGB", "RGBA"),
    "gif": ("P", "L"),
    "bmp": ("L", "RGB", "P"),
    "tif": ("1", "L", "RGB", "RGBA", "CMYK", "I;16", "F", "I"),
    "ppm": ("L", "RGB"),
    "tga": ("RGB", "RGBA"),
    "ico": ("RGBA",),
    "dds": ("RGBA",),
    "pcx": ("RGB",),
}
SUFFIXES = (*FORMATS, "eps", "pdf", "avif", "jp2", "png.txt", "")


@cache
def originals() -> tuple[tuple[str, bytes], ...]:
    """(suffix, content) of a small picture in every format and colour model."""
    rng = np.random.default_rng(0)
    colours = Image.fromarray(rng.integers(0, 256, (12, 20, 4), np.uint8))
    found = []
    for suffix, modes in FORMATS.items():
        for mode in modes:
            if mode == "I;16":
                image = Image.fromarray(rng.integers(0, 65536, (12, 20), np.uint16))
            else:
                image = colours.convert("L").convert(mode) if mode in ("1", "F", "I") else colours.convert(mode)
            for turn in (None, 6):
                extra: dict[str, Any] = {}
                if turn and suffix in ("png", "jpg", "webp", "tif"):
                    exif = Image.Exif()
                    exif[ORIENTATION] = turn
                    extra["exif"] = exif
                file = io.BytesIO()
                image.save(file, {"jpg": "JPEG", "tif": "TIFF"}.get(suffix, suffix.upper()), **extra)
                found.append((suffix, file.getvalue()))
    return tuple(found)


def picture(seed: int) -> tuple[str, bytes]:
    """Name and content of the picture of a seed."""
    rng = Random(seed)
    suffix, data = rng.choice(originals())
    changes: list[Callable[[bytes, Random], bytes]] = [mutate_bytes]
    if suffix == "png":
        changes += [_mutate_chunk] * 3
    for _ in range(rng.choice((0, 1, 1, 1, 2))):
        data = rng.choice(changes)(data, rng)
    if rng.random() < 0.1:
        suffix = rng.choice(SUFFIXES)
    return f"picture.{suffix}", data


def _mutate_chunk(data: bytes, rng: Random) -> bytes:
    """A PNG file with one chunk changed, repeated, removed or added. Its checksum is right."""
    chunks, at = [], 8
    while at + 12 <= len(data):
        length = int.from_bytes(data[at : at + 4], "big")
        chunks.append((data[at + 4 : at + 8], data[at + 8 : at + 8 + length]))
        at += length + 12
    if not chunks:
        return mutate_bytes(data, rng)
    index = rng.randrange(len(chunks))
    kind, content = chunks[index]
    change = rng.randrange(5)
    if change == 0:
        chunks[index] = kind, mutate_bytes(content, rng)
    elif change == 1:
        start = 4 * rng.randrange(max(1, len(content) // 4))
        number = (rng.choice(NUMBERS) & 2**32 - 1).to_bytes(4, "big")
        chunks[index] = kind, content[:start] + number + content[start + 4 :]
    elif change == 2:
        chunks.insert(rng.randrange(len(chunks)), chunks[index])
    elif change == 3:
        del chunks[index]
    else:
        text = b"flexvar\0" + rng.choice((b"{}", b"[" * 9999, b'{"version": 1}', b"\xff", b""))
        packed = b"flexvar\0\0" + zlib.compress(b"0" * rng.choice((10, 10**7)))
        added = (
            (b"tEXt", text),
            (b"zTXt", packed),
            (b"tRNS", b"\0\1"),
            (b"iCCP", b"p\0\0" + zlib.compress(b"0" * 200)),
        )
        chunks.insert(rng.randrange(len(chunks) + 1), rng.choice(added))
    coded = [len(c).to_bytes(4, "big") + k + c + zlib.crc32(k + c).to_bytes(4, "big") for k, c in chunks]
    return data[:8] + b"".join(coded)


def prepare(desk: Path) -> None:
    Image.init()


def show(desk: Path, seed: int) -> str:
    """Name and content of the picture of a seed."""
    name, data = picture(seed)
    return f"{name}, {len(data)} bytes: {data.hex()}"


def run(desk: Path, case: Path, seed: int) -> str:
    """Read the picture of a seed in every way. Returns how that ended. Raises Wrong."""
    case.mkdir()
    name, data = picture(seed)
    path = case / name
    path.write_bytes(data)
    found: list[Photo] = []
    ended = refused(lambda: found.append(read_photo(path)))
    refused(lambda: read_mask(path))
    refused(lambda: read_metadata(path))
    opened: list[Any] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            image = Image.open(io.BytesIO(data))
        except Exception:  # Pillow raises exceptions of many types
            image = None
        if image is not None:
            refused(lambda: opened.append(read_photo(image)))
    for photo in (*found, *opened):
        _compare(photo, data)
    return ended or "read"


def _compare(photo: Photo, data: bytes) -> None:
    """Raise Wrong unless a photo is what Pillow reads, within one level of rounding."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            right = _read(data)
    except Exception as error:
        raise Wrong(f"read, but Pillow refuses it ({type(error).__name__}: {error})"[:200]) from error
    if right is None:
        return
    pixels, opacity = right
    if photo.pixels.shape != pixels.shape:
        raise Wrong(f"pixels of shape {photo.pixels.shape}, but Pillow reads {pixels.shape}")
    given = np.full(pixels.shape[:2], 255, np.uint8) if photo.opacity is None else photo.opacity
    if np.abs(given.astype(int) - opacity).max() > 0:
        raise Wrong("the opacity is not the one that Pillow reads")
    if np.abs(photo.pixels.astype(int) - pixels).max() > 1:
        raise Wrong("the pixels are not those that Pillow reads")


def _read(data: bytes) -> tuple[Any, Any] | None:
    """Pixels (H, W, 3) over white and opacity (H, W), from Pillow. None: colours that a profile or 32 bits define."""
    with (
        mock.patch.object(PngImagePlugin, "MAX_TEXT_CHUNK", 2**28),  # texts do not count
        mock.patch.object(PngImagePlugin, "MAX_TEXT_MEMORY", 2**30),
        Image.open(io.BytesIO(data)) as image,
    ):
        image.load()
        try:
            turn = TURNS.get(image.getexif().get(ORIENTATION, 1))
        except Exception:  # damaged EXIF data say nothing
            turn = None
        turned = image if turn is None else image.transpose(turn)
        if "icc_profile" in image.info or turned.mode in ("I", "F"):
            return None
        if turned.mode.startswith("I;16"):
            grey = np.rint(np.asarray(turned).astype(float) * 255 / 65535)
            return np.repeat(grey[..., None], 3, axis=2), np.full(grey.shape, 255)
        transparent = "transparency" in image.info or turned.mode in ("RGBA", "LA", "PA", "RGBa", "La")
        rgba = np.asarray(turned.convert("RGBA")).astype(float) if transparent else None
        if rgba is None:
            return np.asarray(turned.convert("RGB")), np.full(turned.size[::-1], 255)
        share = rgba[..., 3:] / 255
        return np.rint(rgba[..., :3] * share + 255 * (1 - share)), rgba[..., 3]
