"""Decoding of picture files: only common formats, and only within limits that are checked before a pixel is decoded."""

from __future__ import annotations

import ctypes
import io
import logging
import math
import os
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from PIL import ExifTags, Image, ImageFile, TiffImagePlugin, WebPImagePlugin, _imaging

from ..errors import ArtifactRefused, EnvironmentFailed, InvalidInput, OutOfMemory
from ..files.parsing import refuse_failures
from ..memory.available import available_bytes
from .colours import SIXTEEN_BITS
from .jpeg_scans import is_one_scan
from .png_chunks import SIGNATURE, only_pixels

MOST_PIXELS = 2**27  # a square of 11,585
MOST_SIDE = 2**16 - 1
MOST_MEMORY = 900 * 2**20
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF")  # other decoders are never started
_PLUGINS = (TiffImagePlugin, WebPImagePlugin)  # importing them registers their formats; the others are always there
_READABLE = f"a picture in one of the formats {', '.join(FORMATS)}"
_SAVE_AGAIN = "Save it again as PNG with 8 bits a channel."
_CORE_BYTES = {"1": 1, "L": 1, "P": 1, **dict.fromkeys(SIXTEEN_BITS, 2)}  # of a pixel in Pillow; the other modes: 4
_WEBP_BYTES = 12  # two canvases of the decoder, and a copy
logging.getLogger("PIL").addHandler(logging.NullHandler())  # else Python prints what Pillow logs about damaged files


@dataclass(frozen=True)
class Decoded:
    """A decoded picture. orientation: as in EXIF, 1 to 8. profile: its ICC colour profile. name: for messages."""

    image: Image.Image
    orientation: int
    profile: bytes | None
    name: str


@contextmanager
def decoded(picture: str | os.PathLike[str] | bytes | Image.Image) -> Iterator[Decoded]:
    """The pixels of a file, of the content of a file (bytes) or of a PIL image, not yet turned or converted.

    Errors of any kind while the picture is in use become ArtifactRefused or OutOfMemory. Raises InvalidInput if there
    is no such file.
    """
    if isinstance(picture, Image.Image):
        with _refuse_damage("The picture"):
            yield _loaded(picture, picture.info.get("icc_profile"), "The picture")
        return
    name = "The picture" if isinstance(picture, bytes) else str(Path(picture))
    with _content(picture) as file, _refuse_damage(name):
        kind = _format(file, name)
        file.seek(0)
        source, profile = only_pixels(file) if kind == "PNG" else (file, None)
        with Image.open(source, formats=[kind]) as image:
            yield _loaded(image, profile if kind == "PNG" else image.info.get("icc_profile"), name)


@contextmanager
def _refuse_damage(name: str) -> Iterator[None]:
    with (
        refuse_failures(f"{name} cannot be read as a picture", expected=_READABLE, fix=_SAVE_AGAIN),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")  # Pillow warns of what is checked here, and of tags that are not used
        yield


def _content(picture: str | os.PathLike[str] | bytes) -> AbstractContextManager[BinaryIO]:
    return io.BytesIO(picture) if isinstance(picture, bytes) else _opened(Path(picture))


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    try:
        if not path.is_file():
            problem = f"{path} is no file." if path.exists() else f"There is no file {path}."
            raise InvalidInput(problem, expected="a picture", fix="Check the path.")
        file = path.open("rb")
    except PermissionError as error:
        got, fix = f"{path} cannot be opened: {error.strerror}.", "Check the permissions."
        raise EnvironmentFailed(got, expected="a file that can be read", fix=fix) from error
    except OSError as error:
        got = f"{path} cannot be opened: {error.strerror}."
        raise InvalidInput(got, expected="a picture", fix="Check the path.") from error
    with file:
        yield file


def _format(file: BinaryIO, name: str) -> str:
    """The format of a file by its first bytes. Its name does not matter. Raises ArtifactRefused."""
    start = file.read(12)
    for signature, kind in {
        SIGNATURE: "PNG",
        b"\xff\xd8\xff": "JPEG",
        b"BM": "BMP",
        b"GIF87a": "GIF",
        b"GIF89a": "GIF",
        b"II\x2a\0": "TIFF",
        b"MM\0\x2a": "TIFF",
        b"II\x2b\0": "TIFF",
        b"MM\0\x2b": "TIFF",
    }.items():
        if start.startswith(signature):
            return kind
    if start[:4] == b"RIFF" and start[8:] == b"WEBP":
        return "WEBP"
    raise _unknown_format(name)


def _unknown_format(name: str) -> ArtifactRefused:
    return ArtifactRefused(f"{name} is not {_READABLE}.", expected=_READABLE, fix="Save it as PNG.")


def _loaded(image: Image.Image, profile: bytes | None, name: str) -> Decoded:
    """The image with its pixels decoded. Raises ArtifactRefused, OutOfMemory."""
    if isinstance(image, ImageFile.ImageFile) and image.format not in (*FORMATS, "MPO"):  # MPO: JPEG with more pictures
        raise _unknown_format(name)
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        _drop_other_tags(image)
    _check_header(image, name)
    if image.format == "PNG":
        _scale_key(image)
    with _quiet_libtiff() if image.format == "TIFF" else nullcontext():
        image.load()
    return Decoded(image, _orientation(image), profile, name)


@contextmanager
def _quiet_libtiff() -> Iterator[None]:
    """Keep libtiff from writing to standard error itself. Pillow raises its errors too."""
    library = ctypes.CDLL(_imaging.__file__)
    if not hasattr(library, "TIFFSetErrorHandler"):
        yield
        return
    set_handler = library.TIFFSetErrorHandler
    set_handler.argtypes, set_handler.restype = [ctypes.c_void_p], ctypes.c_void_p
    before = set_handler(None)
    try:
        yield
    finally:
        set_handler(before)


def _check_header(image: Image.Image, name: str) -> None:
    """Refuse a picture by its size, its kind of pixels, and the memory that it takes to read."""
    width, height = image.size
    if not (1 <= width <= MOST_SIDE and 1 <= height <= MOST_SIDE and width * height <= MOST_PIXELS):
        limits = f"1 to {MOST_PIXELS:,} pixels, and sides up to {MOST_SIDE:,}"
        got = f"{name} has {width:,} x {height:,} pixels, but a picture must have {limits}."
        raise ArtifactRefused(got, expected=limits, fix="Make it smaller.")
    tags = getattr(image, "tag_v2", {})
    bits = tags.get(TiffImagePlugin.BITSPERSAMPLE, (16,))
    dark = tags.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == 0
    if image.mode in ("I", "F") or (image.mode in SIXTEEN_BITS and (bits != (16,) or dark)):
        got = f"{name} must have 8 or 16 bits a channel. If it has 16 bits, 0 must be black."
        raise ArtifactRefused(got, expected="8 or 16 bits a channel", fix="Convert it to 8 bits a channel.")
    needed, available = _bytes_to_read(image), available_bytes()
    if needed > MOST_MEMORY:
        got = f"{name} takes {_megabytes(needed)} of memory to read, but the limit is {_megabytes(MOST_MEMORY)}."
        raise ArtifactRefused(got, expected=f"at most {_megabytes(MOST_MEMORY)}", fix="Make it smaller.")
    if available is not None and needed > available:
        got = f"{name} takes {_megabytes(needed)} of memory to read, but only {_megabytes(available)} is available."
        raise OutOfMemory(got, expected=f"at most {_megabytes(available)}", fix="Free memory, or make it smaller.")


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.0f} MB"


def _bytes_to_read(image: Image.Image) -> int:
    """An upper bound of the memory for decoding a picture, and for its pixels and opacity afterwards."""
    pixels, extra, file = math.prod(image.size), 0, getattr(image, "fp", None)
    if image.format in ("JPEG", "MPO"):
        one_scan = file is not None and not file.closed and is_one_scan(file)
        extra = 0 if one_scan else pixels * 2 * len(image.getbands())  # else the decoder keeps coefficients
    elif image.format == "WEBP":
        extra = pixels * _WEBP_BYTES
    elif isinstance(image, TiffImagePlugin.TiffImageFile):
        sides = zip(image.size, (TiffImagePlugin.TILEWIDTH, TiffImagePlugin.TILELENGTH), strict=True)
        tile = math.prod(max(side, int(image.tag_v2.get(tag, side))) for side, tag in sides)
        extra = max(tile * sum(image.tag_v2.get(TiffImagePlugin.BITSPERSAMPLE, (1,))) // 8, 4 * pixels)
    elif isinstance(file, io.BytesIO):
        extra = file.getbuffer().nbytes
    return pixels * _CORE_BYTES.get(image.mode, 4) + max(extra, 4 * pixels)


def _scale_key(image: Image.Image) -> None:
    """Bring the transparent colour of a PNG file to the 8 bits of the pixels, which Pillow does not do."""
    key, tiles = image.info.get("transparency"), getattr(image, "tile", ())
    packing = tiles[0].args if tiles else ""
    if packing in ("L;2", "L;4") and isinstance(key, int):
        image.info["transparency"] = key * (85 if packing == "L;2" else 17)
    elif packing == "RGB;16B" and isinstance(key, tuple):
        image.info["transparency"] = tuple(value >> 8 for value in key)


def _drop_other_tags(image: TiffImagePlugin.TiffImageFile) -> None:
    """Leave only the orientation in the EXIF data of a TIFF file. Pillow stumbles over damaged tags while it turns."""
    exif = image.getexif()
    for tag in set(exif) - {ExifTags.Base.Orientation}:
        del exif[tag]
    image.info.pop("xmp", None)


def _orientation(image: Image.Image) -> int:
    """The orientation in the EXIF data. It is 1, upright, if they are damaged, as in viewers."""
    try:
        value = image.getexif().get(ExifTags.Base.Orientation, 1)
        return int(value) if isinstance(value, int | float) and value in range(1, 9) else 1
    except Exception:  # whatever the parser raises
        return 1
