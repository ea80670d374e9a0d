"""Reading of pictures and masks: every format becomes 8-bit RGB and an opacity."""

from __future__ import annotations

import hashlib
import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from ..checks import invalid
from ..errors import InvalidInput

Pixels = NDArray[np.uint8]
PictureLike: TypeAlias = "Image.Image | NDArray[Any] | str | os.PathLike[str]"

MOST_PIXELS = 2**27  # a square of 11,585; larger pictures are refused before their pixels are read
_SIXTEEN_BITS = ("I;16", "I;16B", "I;16L", "I;16N")


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
        digest.update(np.ascontiguousarray(self.pixels).tobytes())
        if self.opacity is not None:
            digest.update(np.ascontiguousarray(self.opacity).tobytes())
        return digest.hexdigest()


def read_photo(picture: PictureLike) -> Photo:
    """The picture in a file, a PIL image, or an array (H, W), (H, W, 3) or (H, W, 4) uint8.

    It is rotated as its EXIF data says. 16 bits a channel become 8. Every colour model becomes RGB. Transparent parts
    are laid over white. Raises InvalidInput.
    """
    if isinstance(picture, str | os.PathLike):
        return _read_file(Path(picture))
    if isinstance(picture, Image.Image):
        return _normalised(picture, "The picture")
    return _of_array(np.asarray(picture))


def read_mask(mask: PictureLike) -> Pixels:
    """A mask (H, W) uint8 from a file, a PIL image or an array. White (or true) marks the part to repaint.

    Colours become grey. In a picture with transparency, white counts only where it is opaque. Raises InvalidInput.
    """
    if isinstance(mask, np.ndarray) and mask.ndim == 2 and mask.dtype == np.bool_:
        return mask.astype(np.uint8) * np.uint8(255)
    photo = read_photo(mask)
    grey = np.asarray(Image.fromarray(photo.pixels).convert("L"))
    if photo.opacity is None:
        return grey
    return (grey.astype(np.uint16) * photo.opacity // 255).astype(np.uint8)


def _read_file(path: Path) -> Photo:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                return _normalised(image, path.name)
    except FileNotFoundError as error:
        raise InvalidInput(f"There is no file {path}.", expected="a picture", fix="Check the path.") from error
    except Image.DecompressionBombError as error:
        raise _too_large(path.name) from error
    except (OSError, UnidentifiedImageError, ValueError, SyntaxError) as error:
        raise InvalidInput(
            f"{path} cannot be read as a picture ({error}).",
            expected="a readable picture: PNG, JPEG, WebP …",
            fix="Save it again as PNG.",
        ) from error


def _too_large(name: str) -> InvalidInput:
    limit = f"{MOST_PIXELS:,} pixels"
    return InvalidInput(f"{name} has more than {limit}.", expected=f"at most {limit}", fix="Make the picture smaller.")


def _too_deep(name: str, pixels: str) -> InvalidInput:
    return invalid(f"{name} has {pixels}", "a picture of 8 or 16 bits a channel", "Convert it to 8 bits.")


def _normalised(image: Image.Image, name: str) -> Photo:
    width, height = image.size
    if width * height > MOST_PIXELS:
        raise _too_large(name)
    from PIL import ImageOps  # slow to import

    turned = ImageOps.exif_transpose(image)
    if turned.mode in _SIXTEEN_BITS or turned.mode == "I":
        return Photo(_eight_bits(np.asarray(turned), name))
    if turned.mode == "F":
        raise _too_deep(name, "floating-point pixels")
    if turned.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in turned.info:
        rgba = np.asarray(turned.convert("RGBA"))
        return _over_white(rgba)
    return Photo(np.asarray(turned.convert("RGB")))


def _over_white(rgba_HW4: Pixels) -> Photo:
    """The picture laid over white, with its opacity."""
    opacity = np.ascontiguousarray(rgba_HW4[..., 3])
    if (opacity == 255).all():
        return Photo(np.ascontiguousarray(rgba_HW4[..., :3]))
    share = opacity[..., None].astype(np.float32) / 255
    mixed = rgba_HW4[..., :3] * share + 255 * (1 - share)
    return Photo((mixed + 0.5).astype(np.uint8), opacity)


def _eight_bits(grey: NDArray[np.generic], name: str) -> Pixels:
    """8-bit RGB of 16-bit grey."""
    values = grey.astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise _too_deep(name, "32 bits a channel")
    return np.repeat(((values * 255 + 32767) // 65535).astype(np.uint8)[..., None], 3, axis=2)


def _of_array(array: NDArray[np.generic]) -> Photo:
    channels = array.shape[2] if array.ndim == 3 else 1
    if array.dtype != np.uint8 or array.ndim not in (2, 3) or channels not in (1, 3, 4) or array.size == 0:
        problem = f"The picture has shape {array.shape} and dtype {array.dtype}"
        raise invalid(problem, "(H, W), (H, W, 3) or (H, W, 4) uint8", "Convert the array.")
    pixels = np.ascontiguousarray(array.reshape(*array.shape[:2], channels)).astype(np.uint8)
    return _over_white(pixels) if channels == 4 else Photo(np.repeat(pixels, 3 // channels, axis=2))
