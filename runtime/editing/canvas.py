"""A picture on the canvas it is edited on: brought to size, placed, with a mask of what is to be made anew."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from ..errors import InvalidInput
from ..model.schedule import MAX_SIDE
from ..pictures.photo import Photo
from .options import ANCHORS, Edit

Pixels = NDArray[np.uint8]
Size = tuple[int, int]
Box = tuple[int, int, int, int]  # top, left, height, width


@dataclass(frozen=True)
class Canvas:
    """pixels (H, W, 3) uint8, sides in multiples of the downsampling; mask (H, W) uint8, 255 where all is made anew,
    None where nothing is masked; cut: what of the result is returned; resolved: sides (h, w) that the canvas would have
    in the picture's own pixels, for refinement."""

    pixels: Pixels
    mask: Pixels | None
    cut: Box
    resolved: Size | None = None

    @property
    def size(self) -> Size:
        return self.pixels.shape[0], self.pixels.shape[1]

    def blend(self, made_HW3: Pixels, feather: int) -> Pixels:
        """The picture's own pixels where nothing is masked; over `feather` pixels around the mask they fade in."""
        assert self.mask is not None
        share = _feathered(self.mask, feather)[..., None].astype(np.float32) / 255
        mixed = made_HW3 * share + self.pixels * (1 - share)
        return (mixed + np.float32(0.5)).astype(np.uint8)

    def returned(self, made_HW3: Pixels) -> Pixels:
        """What of a result is the picture: without padding."""
        top, left, height, width = self.cut
        return np.ascontiguousarray(made_HW3[top : top + height, left : left + width])


def make_canvas(photo: Photo, mask: Pixels | None, edit: Edit, factor: int, area: int) -> Canvas:
    """factor: pixels a token side; area: tokens of the bundle's default image. Raises InvalidInput."""
    mask = _mask_of(photo, mask, edit)
    if edit.task == "expand":
        return _expanded(photo, edit, factor)
    size = edit.size or natural_size(photo.size, factor, area)
    check_sides(size, factor)
    pixels, placed, cut = _fitted(photo.pixels, size, edit.fit)
    if edit.task == "outpaint":
        return _outpainted(pixels, cut, edit, factor)
    masked = None if mask is None else _fitted_mask(mask, size, edit.fit, placed)
    if masked is not None and not (masked >= 128).any():
        raise InvalidInput(
            "a mask without white", expected="white where the picture is to be made anew", fix="check it, or invert it"
        )
    resolved = tuple(
        max(1, round(whole * source / shown)) for whole, source, shown in zip(size, placed[2:], cut[2:], strict=True)
    )
    return Canvas(pixels, masked, cut, (resolved[0], resolved[1]))


def natural_size(size: Size, factor: int, area: int) -> Size:
    """Sides in multiples of `factor` in the proportions of `size`, of `area` tokens as nearly as they can be."""
    height, width = size
    ratio = math.sqrt(height / width)
    side = math.sqrt(area)
    h, w = (min(MAX_SIDE, max(1, round(value))) for value in (side * ratio, side / ratio))
    return h * factor, w * factor


def check_sides(size: Size, factor: int) -> None:
    """Raise InvalidInput unless both sides are multiples of `factor` that a schedule can reach."""
    if any(side < factor or side % factor or side > MAX_SIDE * factor for side in size):
        near = "x".join(str(min(MAX_SIDE, max(1, round(side / factor))) * factor) for side in size)
        raise InvalidInput(
            f"a size of {size[0]}x{size[1]} pixels",
            expected=f"height x width in multiples of {factor}, up to {MAX_SIDE * factor}",
            fix=f"{near} is the nearest",
        )


def _mask_of(photo: Photo, mask: Pixels | None, edit: Edit) -> Pixels | None:
    """The mask of an inpainting, by default what of the picture is transparent. Raises InvalidInput."""
    if edit.task != "inpaint":
        if mask is not None:
            raise InvalidInput(f"a mask for {edit.task}", expected="a mask with inpaint only", fix="leave it out")
        return None
    if mask is None:
        if photo.opacity is None:
            raise InvalidInput(
                "inpaint without a mask", expected="a mask, or a picture with transparency", fix="say what is to be new"
            )
        return (255 - photo.opacity).astype(np.uint8)
    if mask.shape != photo.size:
        raise InvalidInput(
            f"a mask of {mask.shape[0]}x{mask.shape[1]} pixels",
            expected=f"{photo.size[0]}x{photo.size[1]}, the picture's size",
            fix="make it as large as the picture",
        )
    return mask


def _fitted(pixels: Pixels, size: Size, fit: str) -> tuple[Pixels, Box, Box]:
    """A picture on a canvas of `size`: its pixels, the box of the source that is used, the box of the result that is
    the picture."""
    whole = (0, 0, *size)
    height, width = pixels.shape[:2]
    if fit == "resize" or height * size[1] == width * size[0]:
        return _resized(pixels, size), (0, 0, height, width), whole
    if fit == "crop":
        box = _proportional(size, (height, width))
        top, left, h, w = box
        return _resized(pixels[top : top + h, left : left + w], size), box, whole
    top, left, h, w = _proportional((height, width), size)
    inner = _resized(pixels, (h, w))
    edges = (top, size[0] - h - top), (left, size[1] - w - left)
    return np.pad(inner, (*edges, (0, 0)), mode="edge"), (0, 0, height, width), (top, left, h, w)


def _proportional(wanted: Size, space: Size) -> Box:
    """The largest box of the proportions of `wanted` in the middle of `space`."""
    scale = min(space[0] / wanted[0], space[1] / wanted[1])
    h, w = (min(full, max(1, round(side * scale))) for side, full in zip(wanted, space, strict=True))
    return (space[0] - h) // 2, (space[1] - w) // 2, h, w


def _resized(pixels: Pixels, size: Size) -> Pixels:
    if pixels.shape[:2] == size:
        return np.ascontiguousarray(pixels)
    return np.asarray(Image.fromarray(pixels).resize((size[1], size[0]), Image.Resampling.LANCZOS))


def _fitted_mask(mask: Pixels, size: Size, fit: str, used: Box) -> Pixels:
    """A mask brought to size as its picture was; padding is kept, for it is cut off."""
    top, left, h, w = used
    source = mask[top : top + h, left : left + w]
    if fit != "pad":
        return _whitest(source, size)
    top, left, h, w = _proportional((h, w), size)
    placed = np.zeros(size, np.uint8)
    placed[top : top + h, left : left + w] = _whitest(source, (h, w))
    return placed


def _whitest(mask: Pixels, size: Size) -> Pixels:
    """A mask brought to size: every pixel as white as the whitest of those it covers, so that no thin line is lost."""
    for axis, cells in enumerate(size):
        side, cell = mask.shape[axis], np.arange(cells)
        first, end = cell * side // cells, -(-(cell + 1) * side // cells)
        closed = np.pad(mask, [(0, int(axis == i)) for i in (0, 1)])  # reduceat takes no index behind the last
        reduced = np.maximum.reduceat(closed, np.stack([first, end], 1).ravel(), axis=axis)
        mask = reduced.take(2 * cell, axis=axis)
    return mask


def _outpainted(pixels: Pixels, cut: Box, edit: Edit, factor: int) -> Canvas:
    """`sides` more on every side of the picture; padding of its fit is made anew as well, and returned."""
    up, right, down, left = edit.sides
    top, beside, h, w = cut
    size = pixels.shape[0] + up + down, pixels.shape[1] + left + right
    check_sides(size, factor)
    canvas = np.pad(pixels, ((up, down), (left, right), (0, 0)), mode="edge")
    mask = np.full(size, 255, np.uint8)
    mask[up + top : up + top + h, left + beside : left + beside + w] = 0
    return Canvas(canvas, mask, (0, 0, *size))


def _expanded(photo: Photo, edit: Edit, factor: int) -> Canvas:
    """The picture as large as it goes on the canvas, at its anchor."""
    assert edit.size is not None
    check_sides(edit.size, factor)
    height, width = edit.size
    pixels = photo.pixels
    _, _, h, w = _proportional(photo.size, edit.size)
    if (h, w) == edit.size:
        raise InvalidInput(
            f"a picture of {photo.size[0]}x{photo.size[1]} to be expanded to {height}x{width}",
            expected="a canvas of other proportions",
            fix="refine makes a picture larger; outpaint adds to its sides",
        )
    down, along = ANCHORS[edit.anchor]
    top, left = round((height - h) * down), round((width - w) * along)
    edges = (top, height - h - top), (left, width - w - left)
    mask = np.full(edit.size, 255, np.uint8)
    mask[top : top + h, left : left + w] = 0
    canvas = np.pad(_resized(pixels, (h, w)), (*edges, (0, 0)), mode="edge")
    return Canvas(canvas, mask, (0, 0, height, width))


def _feathered(mask: Pixels, feather: int) -> Pixels:
    """The mask, whole where it is white, fading to nothing `feather` pixels outside."""
    if feather == 0:
        return mask
    grown, blurred = (feather + 1) // 2, feather // 2
    image = Image.fromarray(_grown(mask, grown))
    faded: Pixels = np.maximum(np.asarray(image.filter(ImageFilter.BoxBlur(blurred))), mask)
    return faded


def _grown(mask: Pixels, by: int) -> Pixels:
    """Every pixel as white as the whitest within `by` rows and columns: axis by axis, in windows that double."""
    for axis in (0, 1):
        mask, covered = np.pad(mask, [(by * (axis == i),) * 2 for i in (0, 1)]), 1
        while covered < 2 * by + 1:
            shift = min(covered, 2 * by + 1 - covered)
            kept = np.arange(mask.shape[axis] - shift)
            mask, covered = np.maximum(mask.take(kept, axis), mask.take(kept + shift, axis)), covered + shift
    return mask
