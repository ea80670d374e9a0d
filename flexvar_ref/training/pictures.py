"""Reading of training pictures. The rules are those of the runtime's reader, `flexvar_runtime.pictures`."""

from __future__ import annotations

import io
import logging
import math
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageCms, ImageFile, TiffImagePlugin

log = logging.getLogger(__name__)

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif"})
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF")
MOST_PIXELS, MOST_SIDE, MOST_MEMORY = 2**27, 2**16 - 1, 900 * 2**20
_PIXEL_CHUNKS = frozenset({b"IHDR", b"PLTE", b"tRNS", b"eXIf", b"IDAT", b"IEND"})
_MOST_PROFILE_BYTES = 2**24
_SIXTEEN_BITS = ("I;16", "I;16B", "I;16L", "I;16N")
_CORE_BYTES = {"1": 1, "L": 1, "P": 1, **dict.fromkeys(_SIXTEEN_BITS, 2)}  # of a pixel in Pillow; other modes: 4
_STRIP_PIXELS = 2**19  # pixels that are converted at once
_TURNS = dict(zip(range(2, 9), (0, 3, 1, 5, 4, 6, 2), strict=True))  # EXIF orientation to Image.Transpose


def read_picture(path: Path) -> Image.Image:
    """The picture in a file as RGB: upright, in sRGB, 16 bits as 8, transparent parts over white.

    Raises an exception of any type if it cannot be read: the decoders do.
    """
    with _opened(path) as image:
        image.load()
        profile = image.info.get("icc_profile")
        to_srgb = None if profile is None else _to_srgb(profile, image.mode)
        rgb = np.empty((image.height, image.width, 3), np.uint8)
        step = max(1, _STRIP_PIXELS // image.width)
        for top in range(0, image.height, step):  # a whole copy in every step would take much memory
            rows = slice(top, min(top + step, image.height))
            rgb[rows] = _to_rgb(image.crop((0, rows.start, image.width, rows.stop)), to_srgb)
        turn = _TURNS.get(_orientation(image))
    picture = Image.fromarray(rgb)
    return picture if turn is None else picture.transpose(Image.Transpose(turn))


def unreadable(path: Path) -> str | None:
    """The reason why a file cannot be read, or None.

    Only headers and checksums are checked. Damage inside a JPEG is found when it is decoded.
    """
    try:
        with _opened(path) as image:
            image.verify()
    except Exception as reason:  # Pillow's decoders raise almost anything for a damaged file
        return str(reason) or type(reason).__name__
    return None


@contextmanager
def _opened(path: Path) -> Iterator[ImageFile.ImageFile]:
    """The picture before its pixels are decoded. Raises ValueError if its size or its kind of pixels is refused."""
    with warnings.catch_warnings(), path.open("rb") as file:
        warnings.simplefilter("ignore")  # of tags that are not used, and of sizes that are checked here
        data = file.read()
        source, profile = _only_pixels(data) if data.startswith(b"\x89PNG") else (io.BytesIO(data), None)
        with Image.open(source, formats=FORMATS) as image:
            tags = image.tag_v2 if isinstance(image, TiffImagePlugin.TiffImageFile) else None
            wanted = tags is None or (tags.get(258) == (16,) and tags.get(262) != 0)  # bits, and where white is
            if max(image.size) > MOST_SIDE or image.width * image.height > MOST_PIXELS:
                raise ValueError(f"it has {image.width:,} x {image.height:,} pixels, which is too large")
            if image.mode in ("I", "F") or (image.mode in _SIXTEEN_BITS and not wanted):
                raise ValueError("its pixels are not 8 or 16 bits a channel, from black to white")
            if tags is not None:
                exif = image.getexif()  # Pillow stumbles over damaged tags while it turns a TIFF file
                for tag in set(exif) - {ExifTags.Base.Orientation}:
                    del exif[tag]
                image.info.pop("xmp", None)
            if (needed := _bytes_to_read(image)) > MOST_MEMORY:
                raise ValueError(f"it takes {needed / 1e6:,.0f} MB of memory to read, which is too much")
            if profile is not None:
                image.info["icc_profile"] = profile
            _scale_key(image)
            yield image


def _only_pixels(png: bytes) -> tuple[io.BytesIO, bytes | None]:
    """A PNG file without text, whose size Pillow limits, and its colour profile."""
    kept, profile, at = [png[:8]], None, 8
    while at < len(png):
        end = at + 12 + int.from_bytes(png[at : at + 4])
        kind, data = png[at + 4 : at + 8], png[at + 8 : end - 4]
        if end > len(png):
            break
        if kind in _PIXEL_CHUNKS:
            kept.append(png[at:end])
        elif kind == b"iCCP" and int.from_bytes(png[end - 4 : end]) == zlib.crc32(kind + data):
            profile = _profile(data.partition(b"\0")[2])
        if kind == b"IEND":
            return io.BytesIO(b"".join(kept)), profile
        at = end
    raise ValueError("it ends too early")


def _profile(packed: bytes) -> bytes:
    """The colour profile in the method and data of a chunk iCCP; b"" if it cannot be unpacked."""
    unpacker = zlib.decompressobj()
    try:
        profile = unpacker.decompress(packed[1:], _MOST_PROFILE_BYTES) if packed[:1] == b"\0" else b""
    except zlib.error:
        return b""
    return profile if unpacker.eof else b""


def _bytes_to_read(image: ImageFile.ImageFile) -> int:
    """An upper bound of the memory for decoding a picture, and for its pixels afterwards."""
    pixels, extra = image.width * image.height, 0
    if image.format == "JPEG" or image.format == "MPO":
        extra = 2 * pixels * len(image.getbands())  # coefficients, if they come in several passes
    elif image.format == "WEBP":
        extra = 12 * pixels  # two canvases of the decoder, and a copy
    elif isinstance(image, TiffImagePlugin.TiffImageFile):
        sides = zip(image.size, (TiffImagePlugin.TILEWIDTH, TiffImagePlugin.TILELENGTH), strict=True)
        tile = math.prod(max(side, int(image.tag_v2.get(tag, side))) for side, tag in sides)
        extra = tile * sum(image.tag_v2.get(TiffImagePlugin.BITSPERSAMPLE, (1,))) // 8
    return pixels * _CORE_BYTES.get(image.mode, 4) + max(extra, 6 * pixels)  # 6: as RGB, and turned


def _scale_key(image: ImageFile.ImageFile) -> None:
    """Bring the transparent colour of a PNG file to the 8 bits of the pixels, which Pillow does not do."""
    key, packing = image.info.get("transparency"), image.tile[0].args if image.format == "PNG" else ""
    if packing in ("L;2", "L;4") and isinstance(key, int):
        image.info["transparency"] = key * (85 if packing == "L;2" else 17)
    elif packing == "RGB;16B" and isinstance(key, tuple):
        image.info["transparency"] = tuple(value >> 8 for value in key)


@lru_cache(maxsize=8)
def _to_srgb(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """The conversion from a colour profile to sRGB; None if none is needed, or the profile is broken."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        model = source.profile.xcolor_space.strip()
        grey = mode in ("1", "L", "LA", "La", *_SIXTEEN_BITS)
        if not {"RGB": mode != "CMYK", "GRAY": grey, "CMYK": mode == "CMYK"}.get(model, False):
            raise ValueError(f"it describes {model} colours, but the pixels have mode {mode}")
        taken = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}[model]
        transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), taken, "RGB")
    except Exception as reason:  # the library raises exceptions of several types
        log.warning("a colour profile is not used: %s. The colours of its pictures are taken as sRGB.", reason)
        return None
    levels = np.arange(0, 256, 15, dtype=np.uint8)
    grid = np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(len(levels), -1, 3)
    moves = taken != "RGB" or np.abs(np.asarray(transform.apply(Image.fromarray(grid))).astype(int) - grid).max() > 1
    return transform if moves else None


def _to_rgb(part: Image.Image, to_srgb: ImageCms.ImageCmsTransform | None) -> NDArray[np.uint8]:
    """A part of a picture as sRGB (H, W, 3) uint8 over white."""
    opacity: NDArray[np.uint8] | None = None
    if part.mode in _SIXTEEN_BITS:
        values, key = np.asarray(part).astype(np.uint32), part.info.get("transparency")
        opacity = None if key is None else np.where(values == key, 0, 255).astype(np.uint8)
        part = Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8))
    elif part.has_transparency_data:
        rgba = (part.convert("LA") if part.mode == "La" else part).convert("RGBA")
        opacity, part = np.asarray(rgba.getchannel("A")), rgba.convert("RGB")
    if to_srgb is not None:
        part = to_srgb.apply(part.convert(to_srgb.input_mode))
    rgb = np.asarray(part.convert("RGB"))
    return rgb if opacity is None else _over_white(rgb, opacity)


def _over_white(rgb_HW3: NDArray[np.uint8], opacity_HW: NDArray[np.uint8]) -> NDArray[np.uint8]:
    share = opacity_HW[..., None].astype(np.float32) / 255
    return (rgb_HW3 * share + 255 * (1 - share) + np.float32(0.5)).astype(np.uint8)


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation; 1, upright, if the EXIF data are damaged."""
    try:
        value = image.getexif().get(ExifTags.Base.Orientation, 1)
        return int(value) if isinstance(value, int | float) and value in range(1, 9) else 1
    except Exception:  # whatever the parser raises
        return 1
