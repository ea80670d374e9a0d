"""Reading of pictures and masks: every format becomes 8-bit sRGB and an opacity."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..checks import check_array, check_path, invalid
from .colours import over_white, profile_transform, to_rgb
from .decoding import Decoded, decoded

Pixels = NDArray[np.uint8]
PictureLike: TypeAlias = "Photo | Image.Image | NDArray[Any] | str | os.PathLike[str] | bytes"

_FILES = (str, os.PathLike, bytes, Image.Image)
_STRIP_PIXELS = 2**19  # pixels that are converted at once
_TURNS = {  # by EXIF orientation: whether rows and columns are reversed, and whether they are exchanged afterwards
    1: (1, 1, False),
    2: (1, -1, False),
    3: (-1, -1, False),
    4: (-1, 1, False),
    5: (1, 1, True),
    6: (-1, 1, True),
    7: (-1, -1, True),
    8: (1, -1, True),
}


@dataclass(frozen=True)
class Photo:
    """pixels (H, W, 3) uint8. opacity (H, W) uint8, 0 for transparent; None if every pixel is opaque."""

    pixels: Pixels
    opacity: Pixels | None = None

    @property
    def size(self) -> tuple[int, int]:
        """(height, width)."""
        return self.pixels.shape[0], self.pixels.shape[1]

    @property
    def sha256(self) -> str:
        """Hash of pixels and opacity. It does not depend on the format of the file."""
        digest = hashlib.sha256(repr(self.pixels.shape).encode())
        digest.update(np.ascontiguousarray(self.pixels).data)
        if self.opacity is not None:
            digest.update(np.ascontiguousarray(self.opacity).data)
        return digest.hexdigest()


def read_photo(picture: PictureLike) -> Photo:
    """The picture in a file, the content of a file as bytes, a PIL image, or an array (H, W), (H, W, 3) or (H, W, 4)
    uint8.

    Files are PNG, JPEG, WebP, BMP, TIFF or GIF; of several pictures in a file the first is read. The picture is turned
    as its EXIF orientation says. 16 bits a channel become 8. Every colour model and colour profile becomes sRGB.
    Transparent parts are laid over white. Raises InvalidInput if there is no such file or the array has another form,
    ArtifactRefused if the picture cannot be read, and OutOfMemory. A Photo is returned as it is.
    """
    if isinstance(picture, Photo):
        return picture
    if not isinstance(picture, _FILES):
        return _of_array(check_array("The picture", picture))
    with decoded(_checked("The picture", picture)) as source:
        pixels, upright = _upright(source, channels=(3,))
        clear = source.image.has_transparency_data
        opacity, upright_opacity = _upright(source) if clear else (None, None)
        for rows, rgb, own in _strips(source, use_profile=True):
            upright[rows] = rgb
            if upright_opacity is not None and own is not None:
                upright_opacity[rows] = own
    return Photo(pixels, None if opacity is None or opacity.min() == 255 else opacity)


def read_mask(mask: PictureLike) -> Pixels:
    """A mask (H, W) uint8 from a file, its content, a PIL image or an array. White (or true) marks the part to repaint.

    Colours become grey. A colour profile is not used. In a picture with transparency, white counts only where it is
    opaque. Raises the errors of `read_photo`.
    """
    if isinstance(mask, np.ndarray) and mask.ndim == 2 and mask.dtype == np.bool_:
        return mask.astype(np.uint8) * np.uint8(255)
    if not isinstance(mask, _FILES):
        photo = mask if isinstance(mask, Photo) else _of_array(check_array("The mask", mask))
        return _opaque_grey(photo.pixels, photo.opacity)
    with decoded(_checked("The mask", mask)) as source:
        grey, upright = _upright(source)
        for rows, rgb, opacity in _strips(source, use_profile=False):
            upright[rows] = _opaque_grey(rgb, opacity)
    return grey


def _checked(name: str, picture: str | os.PathLike[str] | bytes | Image.Image) -> str | bytes | Image.Image:
    return picture if isinstance(picture, Image.Image | bytes) else check_path(name, picture)


def _upright(source: Decoded, channels: tuple[int, ...] = ()) -> tuple[Pixels, Pixels]:
    """An empty picture as it is returned, and a view of it with the rows and columns of the source."""
    width, height = source.image.size
    down, along, exchanged = _TURNS[source.orientation]
    turned = np.empty(((width, height) if exchanged else (height, width)) + channels, np.uint8)
    return turned, (turned.swapaxes(0, 1) if exchanged else turned)[::down, ::along]


def _strips(source: Decoded, use_profile: bool) -> Iterator[tuple[slice, Pixels, Pixels | None]]:
    """The picture in strips: their rows, pixels and opacity. A whole copy in every step would take much memory."""
    image = source.image
    profile = source.profile if use_profile else None
    to_srgb = None if profile is None else profile_transform(profile, image.mode, source.name)
    step = max(1, _STRIP_PIXELS // image.width)
    for top in range(0, image.height, step):
        rows = slice(top, min(top + step, image.height))
        yield rows, *to_rgb(image.crop((0, rows.start, image.width, rows.stop)), to_srgb)


def _opaque_grey(rgb_HW3: Pixels, opacity_HW: Pixels | None) -> Pixels:
    grey = np.asarray(Image.fromarray(rgb_HW3).convert("L"))
    return grey if opacity_HW is None else (grey.astype(np.uint16) * opacity_HW // 255).astype(np.uint8)


def _of_array(array: NDArray[np.generic]) -> Photo:
    channels = array.shape[2] if array.ndim == 3 else 1
    if array.dtype != np.uint8 or array.ndim not in (2, 3) or channels not in (1, 3, 4) or array.size == 0:
        problem = f"The picture has shape {array.shape} and dtype {array.dtype}"
        raise invalid(problem, "(H, W), (H, W, 3) or (H, W, 4) uint8", "Convert the array.")
    pixels = np.ascontiguousarray(array.reshape(*array.shape[:2], channels)).astype(np.uint8)
    if channels < 4:
        return Photo(np.repeat(pixels, 3 // channels, axis=2))
    opacity = np.ascontiguousarray(pixels[..., 3])
    opaque = bool((opacity == 255).all())
    return Photo(over_white(pixels[..., :3], opacity), None if opaque else opacity)
