"""Pictures of every depth, colour model, orientation and transparency, and files that are not pictures."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flexvar_runtime import ArtifactRefused, InvalidInput
from flexvar_runtime.pictures.decoding import MOST_PIXELS
from flexvar_runtime.pictures.photo import read_mask, read_photo

RAMP = np.arange(0, 240, 20, dtype=np.uint8).reshape(3, 4)


def colours() -> np.ndarray:
    return np.stack([RAMP, RAMP[::-1], RAMP[:, ::-1]], axis=2)


def test_every_colour_model_becomes_rgb() -> None:
    for mode in ("RGB", "L", "P", "1", "CMYK", "YCbCr", "HSV", "LAB"):
        image = Image.fromarray(colours()).convert(mode)
        photo = read_photo(image)
        assert photo.pixels.dtype == np.uint8 and photo.size == (3, 4) and photo.opacity is None
        assert np.array_equal(photo.pixels, np.asarray(image.convert("RGB"))), mode


def test_sixteen_bits_keep_their_brightness(tmp_path: Path) -> None:
    """Pillow alone would clip all above 255 to white."""
    values = (RAMP.astype(np.uint16) * 257).astype(np.uint16)
    Image.fromarray(values).save(tmp_path / "deep.png")
    photo = read_photo(tmp_path / "deep.png")
    assert np.array_equal(photo.pixels, np.repeat(RAMP[..., None], 3, axis=2))


def test_deeper_ones_are_refused() -> None:
    for values in (np.full((2, 2), 70000, np.int32), np.full((2, 2), 0.5, np.float32)):
        with pytest.raises(ArtifactRefused, match="8 or 16 bits"):
            read_photo(Image.fromarray(values))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_turned_jpeg_is_upright(tmp_path: Path, orientation: int) -> None:
    upright = Image.fromarray(np.kron(colours(), np.ones((16, 16, 1), np.uint8)))
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    exif = Image.Exif()
    exif[0x0112] = orientation
    turned = upright.transpose(undo[orientation]) if orientation in undo else upright
    turned.save(tmp_path / "turned.jpg", exif=exif, quality=95)
    photo = read_photo(tmp_path / "turned.jpg")
    assert photo.size == (48, 64)
    assert np.abs(photo.pixels.astype(int) - np.asarray(upright).astype(int)).mean() < 4


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA"])
def test_what_is_transparent_lies_over_white(tmp_path: Path, mode: str) -> None:
    rgba = np.dstack([colours(), np.full((3, 4), 255, np.uint8)])
    rgba[0, :, 3], rgba[1, :, 3] = 0, 128
    image = Image.fromarray(rgba[..., :3]).convert(mode.removesuffix("A"))
    image.putalpha(Image.fromarray(rgba[..., 3]))  # Pillow 11 loses the opacity when it converts RGBA to PA
    photo = read_photo(image)
    assert photo.opacity is not None and photo.opacity[:, 0].tolist() == [0, 128, 255]
    assert (photo.pixels[0] == 255).all()
    flat = np.asarray(image.convert("RGBA"))[..., :3]
    assert np.array_equal(photo.pixels[2], flat[2])
    half = flat[1] * (128 / 255) + 255 * (127 / 255)
    assert np.abs(photo.pixels[1] - half).max() <= 0.5 + 1e-3


def test_an_opaque_picture_has_no_opacity() -> None:
    opaque = np.dstack([colours(), np.full((3, 4), 255, np.uint8)])
    assert read_photo(opaque).opacity is None
    keyed = Image.fromarray(RAMP)
    keyed.info["transparency"] = 20
    opacity = read_photo(keyed).opacity
    assert opacity is not None and opacity[0].tolist() == [255, 0, 255, 255]


def test_files(tmp_path: Path) -> None:
    for suffix in ("png", "jpg", "webp", "bmp", "tiff", "gif"):
        path = tmp_path / f"picture.{suffix}"
        Image.fromarray(colours()).save(path)
        assert read_photo(path).size == read_photo(str(path)).size == (3, 4)


def test_arrays() -> None:
    assert np.array_equal(read_photo(RAMP).pixels, np.repeat(RAMP[..., None], 3, axis=2))
    assert np.array_equal(read_photo(colours()).pixels, colours())
    assert read_photo(np.zeros((1, 1, 1), np.uint8)).size == (1, 1)


def test_arrays_that_are_not_pictures() -> None:
    for shape, dtype in (((2, 2, 2), np.uint8), ((2, 2, 3), np.float32), ((4,), np.uint8), ((0, 3), np.uint8)):
        with pytest.raises(InvalidInput, match=re.escape(f"{shape}")):
            read_photo(np.zeros(shape, dtype))


def test_files_that_are_not_pictures(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"nothing\.png"):
        read_photo(tmp_path / "nothing.png")
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(tmp_path / "whole.png")
    whole = (tmp_path / "whole.png").read_bytes()
    for name, content in (("text.png", b"hello"), ("empty.png", b""), ("cut.png", whole[: len(whole) // 2])):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ArtifactRefused, match=name):
            read_photo(tmp_path / name)
    with pytest.raises(InvalidInput, match=tmp_path.name):
        read_photo(tmp_path)


def test_a_file_so_large_that_pillow_refuses_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("L", (64, 64)).save(tmp_path / "large.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 64)
    with pytest.raises(ArtifactRefused, match=r"large\.png"):
        read_photo(tmp_path / "large.png")


def test_a_picture_too_large_is_refused_before_it_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    image = Image.new("1", (2**14, MOST_PIXELS // 2**14 + 1))
    monkeypatch.setattr(Image.Image, "convert", lambda *_: pytest.fail("its pixels were read"))
    with pytest.raises(ArtifactRefused, match=f"{MOST_PIXELS:,}"):
        read_photo(image)


def test_the_same_pixels_have_the_same_hash(tmp_path: Path) -> None:
    Image.fromarray(colours()).save(tmp_path / "one.png")
    Image.fromarray(colours()).save(tmp_path / "two.bmp")
    one, two = read_photo(tmp_path / "one.png"), read_photo(tmp_path / "two.bmp")
    assert one.sha256 == two.sha256 != read_photo(colours().transpose(1, 0, 2)).sha256
    clear = np.dstack([colours(), np.zeros((3, 4), np.uint8)])
    clear[..., :3] = 255
    assert read_photo(clear).sha256 != read_photo(clear[..., :3]).sha256


def test_masks() -> None:
    assert read_mask(np.array([[True, False]])).tolist() == [[255, 0]]
    assert read_mask(np.array([[255, 100]], np.uint8)).tolist() == [[255, 100]]
    white = np.full((1, 2, 4), 255, np.uint8)
    white[0, 1, 3] = 0
    assert read_mask(white).tolist() == [[255, 0]]  # drawn on a transparent layer
    assert read_mask(Image.new("1", (2, 1), 1)).tolist() == [[255, 255]]


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF"])
def test_the_content_of_a_file_is_read_as_the_file(tmp_path: Path, kind: str) -> None:
    rng = np.random.default_rng(0)
    path = tmp_path / "picture"
    Image.fromarray(rng.integers(0, 256, (9, 14, 3), np.uint8)).save(path, kind)
    whole = read_photo(path)
    assert np.array_equal(read_photo(path.read_bytes()).pixels, whole.pixels)
    assert np.array_equal(read_mask(path.read_bytes()), read_mask(path))
    assert read_photo(whole) is whole
    assert np.array_equal(read_mask(whole), read_mask(whole.pixels))


@pytest.mark.parametrize(
    "content", [b"", b"/etc/passwd", b"\x89PNG\r\n\x1a\n", b"%!PS-Adobe-3.0 EPSF-3.0\n", b"\xff\xd8\xff" + bytes(99)]
)
def test_content_that_is_no_picture(content: bytes) -> None:
    """It is never taken for a path."""
    for read in (read_photo, read_mask):
        with pytest.raises(ArtifactRefused, match=r"^The picture"):
            read(content)
