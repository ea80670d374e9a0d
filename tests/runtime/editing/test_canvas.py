"""The place of a picture on its canvas, its mask, and the pixels that are kept."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image

from flexvar_runtime import InvalidInput
from flexvar_runtime.editing.canvas import Canvas, _dilated, _resized_mask, check_sides, make_canvas, natural_size
from flexvar_runtime.editing.options import Edit
from flexvar_runtime.pictures.photo import Photo, read_mask

FACTOR, AREA = 4, 256


def photo(height: int, width: int) -> Photo:
    return Photo(np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8))


def canvas(picture: Photo, mask: Any = None, **options: Any) -> Canvas:
    return make_canvas(picture, mask, Edit(**options), FACTOR, AREA)


@given(height=st.integers(1, 9000), width=st.integers(1, 9000))
def test_a_natural_size_has_the_default_area_in_the_pictures_proportions(height: int, width: int) -> None:
    h, w = natural_size((height, width), FACTOR, AREA)
    assert h % FACTOR == w % FACTOR == 0 and FACTOR <= h <= 512 and FACTOR <= w <= 512
    if 1 / 16 <= height / width <= 16:
        assert 0.7 < h * w / (AREA * FACTOR**2) < 1.4
        assert abs(np.log((h / w) / (height / width))) < 0.5
    if height == width:
        assert (h, w) == (64, 64)


def test_sides_that_no_schedule_reaches() -> None:
    for size, nearest in (((63, 64), "64x64"), ((64, 2), "64x4"), ((64, 516), "64x512")):
        with pytest.raises(InvalidInput, match=f"size .*{size[0]}x{size[1]}") as refusal:
            check_sides(size, FACTOR)
        assert nearest in refusal.value.fix


def test_a_picture_that_fits_is_not_touched() -> None:
    picture = photo(64, 64)
    for fit in ("resize", "crop", "pad"):
        made = canvas(picture, task="refine", fit=fit)
        assert np.array_equal(made.pixels, picture.pixels) and made.cut == (0, 0, 64, 64) and made.mask is None


def test_three_ways_to_fit() -> None:
    wide = Photo(np.repeat(np.repeat(np.array([[10, 200]], np.uint8), 64, 0), 64, 1)[..., None].repeat(3, 2))
    assert wide.size == (64, 128)
    stretched = canvas(wide, task="refine", size=(64, 64)).pixels
    assert stretched[:, :24].max() <= 12 and stretched[:, 40:].min() >= 198
    cropped = canvas(wide, task="refine", size=(64, 64), fit="crop").pixels
    assert np.array_equal(cropped, wide.pixels[:, 32:96])
    padded = canvas(wide, task="refine", size=(64, 64), fit="pad")
    assert padded.cut == (16, 0, 32, 64) and padded.size == (64, 64)
    assert np.array_equal(padded.pixels[0], padded.pixels[16])  # the edge goes on
    assert padded.returned(padded.pixels).shape == (32, 64, 3)


@pytest.mark.parametrize(("fit", "resolved"), [("resize", (16, 32)), ("crop", (16, 16)), ("pad", (32, 32))])
def test_what_a_picture_resolves_is_said_of_the_canvas(fit: str, resolved: tuple[int, int]) -> None:
    """A canvas of 64x64 on which a pixel of the picture is four wide, two, or two."""
    assert canvas(photo(16, 32), task="refine", size=(64, 64), fit=fit).resolved == resolved


def test_a_mask_goes_where_its_picture_goes() -> None:
    mask = np.zeros((64, 128), np.uint8)
    mask[:, 64:] = 255
    for fit, expected in (("resize", 32), ("crop", 32), ("pad", 32)):
        made = canvas(photo(64, 128), mask, task="inpaint", size=(64, 64), fit=fit)
        assert made.mask is not None
        inside = made.mask[made.cut[0] : made.cut[0] + made.cut[2]]
        assert (inside[:, :expected] == 0).all() and (inside[:, expected:] == 255).all()
        assert (made.mask[: made.cut[0]] == 0).all()  # padding is not painted: it is cut off


def test_what_is_transparent_is_the_mask() -> None:
    clear = np.full((64, 64), 255, np.uint8)
    clear[:16] = 0
    made = canvas(Photo(photo(64, 64).pixels, clear), task="inpaint")
    assert made.mask is not None and (made.mask[:16] == 255).all() and (made.mask[16:] == 0).all()


def test_masks_that_are_refused() -> None:
    for mask, named in (
        (None, "Pass mask"),
        (np.zeros((64, 64), np.uint8), "mask has no white"),
        (np.full((64, 64), 100, np.uint8), "mask has no white"),
        (np.full((64, 32), 255, np.uint8), "mask has 64x32"),
    ):
        with pytest.raises(InvalidInput, match=named):
            canvas(photo(64, 64), mask, task="inpaint")
    with pytest.raises(InvalidInput, match=r"mask .*refine"):
        canvas(photo(64, 64), np.full((64, 64), 255, np.uint8), task="refine")


def test_a_full_mask_is_allowed() -> None:
    made = canvas(photo(64, 64), np.full((64, 64), 255, np.uint8), task="inpaint")
    assert made.mask is not None and made.mask.min() == 255


def test_sides_are_added_and_masked() -> None:
    picture = photo(64, 64)
    made = canvas(picture, task="outpaint", sides=(4, 8, 12, 16))
    assert made.size == (80, 88) and made.cut == (0, 0, 80, 88) and made.mask is not None
    assert np.array_equal(made.pixels[4:68, 16:80], picture.pixels)
    assert not made.mask[4:68, 16:80].any() and (made.mask == 255).sum() == 80 * 88 - 64 * 64
    with pytest.raises(InvalidInput, match=r"size .*64x67"):
        canvas(picture, task="outpaint", sides=(0, 3, 0, 0))
    filled = canvas(photo(64, 128), task="outpaint", size=(64, 64), fit="pad", sides=(4, 0, 0, 0))
    assert filled.mask is not None and (filled.mask == 0).sum() == 32 * 64  # its padding is generated too


@pytest.mark.parametrize(("anchor", "left"), [("centre", 32), ("left", 0), ("right", 64), ("top", 32), ("bottom", 32)])
def test_a_picture_lies_at_its_anchor(anchor: str, left: int) -> None:
    picture = photo(64, 64)
    made = canvas(picture, task="expand", size=(64, 128), anchor=anchor)
    assert np.array_equal(made.pixels[:, left : left + 64], picture.pixels)
    assert made.mask is not None and not made.mask[:, left : left + 64].any() and (made.mask == 255).sum() == 64 * 64
    with pytest.raises(InvalidInput, match="size is 128x128"):
        canvas(picture, task="expand", size=(128, 128), anchor=anchor)


@settings(deadline=None, max_examples=25)
@given(
    feather=st.integers(0, 20),
    top=st.integers(0, 40),
    left=st.integers(0, 40),
    height=st.integers(1, 40),
    width=st.integers(1, 40),
)
def test_pasted_pixels_are_exact_beyond_the_feather(feather: int, top: int, left: int, height: int, width: int) -> None:
    picture = photo(64, 64)
    mask = np.zeros((64, 64), np.uint8)
    mask[top : top + height, left : left + width] = 255
    made = np.full((64, 64, 3), 7, np.uint8)
    result = canvas(picture, mask, task="inpaint", paste=True, feather=feather).blend(made, feather)
    assert (result[mask == 255] == 7).all()
    far = np.ones((64, 64), bool)
    far[max(0, top - feather) : top + height + feather, max(0, left - feather) : left + width + feather] = False
    assert np.array_equal(result[far], picture.pixels[far])


def test_a_seam_is_blended() -> None:
    white = Photo(np.full((64, 64, 3), 255, np.uint8))
    mask = np.zeros((64, 64), np.uint8)
    mask[:, 32:] = 255
    result = canvas(white, mask, task="inpaint").blend(np.zeros((64, 64, 3), np.uint8), 12)[30, :, 0].astype(int)
    assert (np.diff(result) <= 0).all() and np.abs(np.diff(result)).max() < 64 and result[19] == 255 and result[32] == 0
    soft = mask.copy()
    soft[:, 31] = 128
    result = canvas(white, soft, task="inpaint").blend(np.zeros((64, 64, 3), np.uint8), 0)[30, :, 0]
    assert result[30:33].tolist() == [255, 127, 0]  # grey in the mask is half


@pytest.mark.parametrize("quality", [10, 60, 95])
@pytest.mark.parametrize("feather", [0, 5])
def test_noise_in_a_mask_changes_nothing_outside_it(quality: int, feather: int) -> None:
    """As a mask saved as JPEG has it."""
    drawn, file = np.zeros((64, 64), np.uint8), io.BytesIO()
    drawn[20:44, 18:46] = 255
    Image.fromarray(drawn).save(file, "JPEG", quality=quality)
    mask = read_mask(Image.open(file))
    assert ((mask > 0) & (mask < 128)).any()
    picture = photo(64, 64)
    black = np.zeros((64, 64, 3), np.uint8)
    result = canvas(picture, mask, task="inpaint", paste=True, feather=feather).blend(black, feather)
    inside = np.pad(mask >= 128, feather)
    grown = np.zeros((64, 64), bool)
    for down in range(2 * feather + 1):
        for along in range(2 * feather + 1):
            grown |= inside[down : down + 64, along : along + 64]
    assert np.array_equal(result[~grown], picture.pixels[~grown])


@pytest.mark.parametrize("fit", ["resize", "crop", "pad"])
def test_no_thin_line_of_a_mask_is_lost(fit: str) -> None:
    mask = np.zeros((256, 512), np.uint8)
    mask[130], mask[:, 300] = 255, 255
    made = canvas(photo(256, 512), mask, task="inpaint", size=(64, 64), fit=fit).mask
    assert made is not None and (made == 255).all(axis=1).sum() == 1 and (made == 255).any(axis=0).all()
    if fit != "pad":
        assert (made == 255).all(axis=0).sum() == 1
    assert sorted(set(made.ravel())) == [0, 255]


@given(
    mask=arrays(np.uint8, st.tuples(st.integers(1, 40), st.integers(1, 40))),
    size=st.tuples(st.integers(1, 40), st.integers(1, 40)),
)
def test_a_pixel_of_a_mask_is_as_white_as_the_whitest_it_covers(mask: np.ndarray, size: tuple[int, int]) -> None:
    made = _resized_mask(mask, size)
    assert made.shape == size and made.max() == mask.max()
    for (i, j), value in np.ndenumerate(made):
        rows, columns = (
            slice(k * side // cells, -(-(k + 1) * side // cells))
            for k, side, cells in zip((i, j), mask.shape, size, strict=True)
        )
        assert value == mask[rows, columns].max()


@given(mask=arrays(np.uint8, st.tuples(st.integers(1, 12), st.integers(1, 12))), by=st.integers(0, 15))
def test_a_mask_grows_by_as_much_as_asked(mask: np.ndarray, by: int) -> None:
    grown = _dilated(mask, by)
    for (i, j), value in np.ndenumerate(grown):
        assert value == mask[max(0, i - by) : i + by + 1, max(0, j - by) : j + by + 1].max()


def test_a_wide_feather_is_done_before_the_test_runs_out_of_time() -> None:
    """A window that is gone through pixel by pixel takes minutes for this."""
    mask = np.zeros((512, 512), np.uint8)
    mask[200:300, 200:300] = 255
    made = canvas(photo(512, 512), mask, task="inpaint", size=(512, 512), paste=True, feather=1024)
    assert made.blend(np.zeros((512, 512, 3), np.uint8), 1024).shape == (512, 512, 3)
