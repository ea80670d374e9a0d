"""The canvas of an edit: the picture, resized and placed, with a mask of the part to generate."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..checks import invalid
from ..errors import InvalidInput
from ..model.schedule import MAX_SIDE
from ..pictures.photo import Photo
from .options import ANCHORS, Edit, wrong_task

Pixels = NDArray[np.uint8]
Size = tuple[int, int]
Box = tuple[int, int, int, int]  # top, left, height, width


@dataclass(frozen=True)
class Canvas:
    """A picture that is ready to be edited.

    pixels (H, W, 3) uint8; sides are multiples of the downsampling. mask (H, W) uint8: 0 where pixels are kept, else
    128 to 255, the share of the generated pixel; None for refinement. cut: the box of the result that is returned.
    resolved: size (h, w) of the canvas in pixels of the picture, for refinement.
    """

    pixels: Pixels
    mask: Pixels | None
    cut: Box
    resolved: Size | None = None

    @property
    def size(self) -> Size:
        return self.pixels.shape[0], self.pixels.shape[1]

    def blend(self, made_HW3: Pixels, feather: int) -> Pixels:
        """The generated pixels in the mask, the picture's own outside it, blended over `feather` pixels around it."""
        assert self.mask is not None
        share = _feathered(self.mask, feather)[..., None].astype(np.float32) / 255
        mixed = made_HW3 * share + self.pixels * (1 - share)
        return (mixed + np.float32(0.5)).astype(np.uint8)

    def returned(self, made_HW3: Pixels) -> Pixels:
        """The part of a result that is returned: without padding."""
        top, left, height, width = self.cut
        return np.ascontiguousarray(made_HW3[top : top + height, left : left + width])


def make_canvas(photo: Photo, mask: Pixels | None, edit: Edit, factor: int, area: int) -> Canvas:
    """The canvas of an edit. Raises InvalidInput.

    factor: pixels per side of a token. area: number of tokens of the bundle's default image.
    """
    mask = _mask_of(photo, mask, edit)
    if edit.task == "expand":
        return _expanded(photo, edit, factor)
    size = edit.size or natural_size(photo.size, factor, area)
    check_sides(size, factor)
    pixels, placed, cut = _fitted(photo.pixels, size, edit.fit)
    if edit.task == "outpaint":
        return _outpainted(pixels, cut, edit, factor)
    masked = None if mask is None else _fitted_mask(mask, size, edit.fit, placed)
    if masked is not None and not masked.any():
        fix = "Paint the part to repaint white, or invert the mask."
        raise InvalidInput("mask has no white pixels.", expected="white where the picture is repainted", fix=fix)
    sides = zip(size, placed[2:], cut[2:], strict=True)
    h, w = (max(1, round(whole * source / shown)) for whole, source, shown in sides)
    return Canvas(pixels, masked, cut, (h, w))


def natural_size(size: Size, factor: int, area: int) -> Size:
    """The size with the proportions of `size`, sides in multiples of `factor`, and about `area` tokens."""
    height, width = size
    ratio = math.sqrt(height / width)
    side = math.sqrt(area)
    h, w = (min(MAX_SIDE, max(1, round(value))) for value in (side * ratio, side / ratio))
    return h * factor, w * factor


def check_sides(size: Size, factor: int) -> None:
    """Raise InvalidInput unless both sides are multiples of `factor` and small enough for a schedule."""
    if any(side < factor or side % factor or side > MAX_SIDE * factor for side in size):
        near = "x".join(str(min(MAX_SIDE, max(1, round(side / factor))) * factor) for side in size)
        expected = f"multiples of {factor} and at most {MAX_SIDE * factor}"
        got = f"size is {size[0]}x{size[1]} pixels, but its sides must be {expected}."
        raise InvalidInput(got, expected=f"sides that are {expected}", fix=f"Use {near}, the nearest size.")


def _mask_of(photo: Photo, mask: Pixels | None, edit: Edit) -> Pixels | None:
    """The mask of an inpainting, by default the transparent part of the picture. Raises InvalidInput.

    Values below 128 become 0. So the noise that JPEG adds to black changes no pixel outside the mask.
    """
    if edit.task != "inpaint":
        if mask is not None:
            raise wrong_task("mask", edit.task, ["inpaint"])
        return None
    if mask is None:
        if photo.opacity is None:
            fix = "Pass mask, whose white pixels are repainted, or a picture with transparency."
            raise InvalidInput("Inpainting needs a mask.", expected="a mask, or a picture with transparency", fix=fix)
        return _without_noise(255 - photo.opacity)
    if mask.shape != photo.size:
        has, expected = "{}x{} pixels".format(*mask.shape), "{}x{}, the size of the picture".format(*photo.size)
        raise invalid(f"mask has {has}", expected, "Pass a mask of the size of the picture.")
    return _without_noise(mask)


def _without_noise(mask: Pixels) -> Pixels:
    return np.where(mask < 128, 0, mask).astype(np.uint8)


def _fitted(pixels: Pixels, size: Size, fit: str) -> tuple[Pixels, Box, Box]:
    """A picture on a canvas of `size`: its pixels, the box of the picture that is used, and the box of the canvas that
    shows it."""
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
    """The largest box in the middle of `space` with the proportions of `wanted`."""
    scale = min(space[0] / wanted[0], space[1] / wanted[1])
    h, w = (min(full, max(1, round(side * scale))) for side, full in zip(wanted, space, strict=True))
    return (space[0] - h) // 2, (space[1] - w) // 2, h, w


def _resized(pixels: Pixels, size: Size) -> Pixels:
    if pixels.shape[:2] == size:
        return np.ascontiguousarray(pixels)
    whole = Image.new("RGB", (pixels.shape[1], pixels.shape[0]))
    step = max(1, 2**19 // whole.width)
    for top in range(
        0, whole.height, step
    ):  # in strips: Pillow copies a part of a picture once more before it reads it
        whole.paste(Image.fromarray(pixels[top : top + step]), (0, top))
    return np.asarray(whole.resize((size[1], size[0]), Image.Resampling.LANCZOS))


def _fitted_mask(mask: Pixels, size: Size, fit: str, used: Box) -> Pixels:
    """A mask resized and placed like its picture. Padding is not masked, because it is cut off."""
    top, left, h, w = used
    source = mask[top : top + h, left : left + w]
    if fit != "pad":
        return _resized_mask(source, size)
    top, left, h, w = _proportional((h, w), size)
    placed = np.zeros(size, np.uint8)
    placed[top : top + h, left : left + w] = _resized_mask(source, (h, w))
    return placed


def _resized_mask(mask: Pixels, size: Size) -> Pixels:
    """A resized mask. Every pixel is the maximum of the pixels that it covers, so that no thin line is lost."""
    for axis, cells in enumerate(size):
        side, cell = mask.shape[axis], np.arange(cells)
        first, end = cell * side // cells, -(-(cell + 1) * side // cells)
        closed = np.pad(mask, [(0, int(axis == i)) for i in (0, 1)])  # reduceat takes no index after the last
        reduced = np.maximum.reduceat(closed, np.stack([first, end], 1).ravel(), axis=axis)
        mask = reduced.take(2 * cell, axis=axis)
    return mask


def _outpainted(pixels: Pixels, cut: Box, edit: Edit, factor: int) -> Canvas:
    """A canvas with `sides` added around the picture. Padding from its fit is generated and returned too."""
    up, right, down, left = edit.sides
    top, beside, h, w = cut
    size = pixels.shape[0] + up + down, pixels.shape[1] + left + right
    check_sides(size, factor)
    canvas = np.pad(pixels, ((up, down), (left, right), (0, 0)), mode="edge")
    mask = np.full(size, 255, np.uint8)
    mask[up + top : up + top + h, left + beside : left + beside + w] = 0
    return Canvas(canvas, mask, (0, 0, *size))


def _expanded(photo: Photo, edit: Edit, factor: int) -> Canvas:
    """A canvas of `edit.size` with the picture at its anchor, as large as possible."""
    assert edit.size is not None
    check_sides(edit.size, factor)
    height, width = edit.size
    _, _, h, w = _proportional(photo.size, edit.size)
    if (h, w) == edit.size:
        raise InvalidInput(
            f"size is {height}x{width}, but a picture of {photo.size[0]}x{photo.size[1]} fills that completely.",
            expected="a canvas of other proportions",
            fix="Use refine to enlarge the picture, or outpaint to add to its sides.",
        )
    down, along = ANCHORS[edit.anchor]
    top, left = round((height - h) * down), round((width - w) * along)
    edges = (top, height - h - top), (left, width - w - left)
    mask = np.full(edit.size, 255, np.uint8)
    mask[top : top + h, left : left + w] = 0
    canvas = np.pad(_resized(photo.pixels, (h, w)), (*edges, (0, 0)), mode="edge")
    return Canvas(canvas, mask, (0, 0, height, width))


def _feathered(mask: Pixels, feather: int) -> Pixels:
    """The mask, with a border of `feather` pixels around it in which it fades to 0."""
    from PIL import ImageFilter  # slow to import

    if feather == 0:
        return mask
    grown, blurred = (feather + 1) // 2, feather // 2
    image = Image.fromarray(_dilated(mask, grown))
    faded: Pixels = np.maximum(np.asarray(image.filter(ImageFilter.BoxBlur(blurred))), mask)
    return faded


def _dilated(mask: Pixels, by: int) -> Pixels:
    """A mask in which every pixel is the maximum within `by` rows and columns.

    It is computed axis by axis, in windows that double: that takes a logarithmic number of steps.
    """
    for axis in (0, 1):
        mask, covered = np.pad(mask, [(by * (axis == i),) * 2 for i in (0, 1)]), 1
        while covered < 2 * by + 1:
            shift = min(covered, 2 * by + 1 - covered)
            kept = np.arange(mask.shape[axis] - shift)
            mask, covered = np.maximum(mask.take(kept, axis), mask.take(kept + shift, axis)), covered + shift
    return mask
