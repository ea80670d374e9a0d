"""Images as files: PNG is exact, JPEG and WebP follow their quality. And which scales of an image are shown."""

from __future__ import annotations

import io
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from flexvar_runtime import ArtifactRefused
from flexvar_runtime.pictures.png import read_metadata, save_png
from flexvar_serving.errors import HTTPError
from flexvar_serving.images import encoding
from flexvar_serving.images.encoding import Output, png
from flexvar_serving.workers.process import preview_scales

Pixels = NDArray[np.uint8]
METADATA = {"seed": 2**64 - 1, "class_name": "crème brûlée ☂", "guidance": {"scale": 2.5}, "edit": None, "": [1, "\0"]}


@pytest.fixture(params=["zlib", "isal"])
def deflate(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """PNG files are packed with this library."""
    if request.param == "isal":
        pytest.importorskip("isal", reason="isal is not installed")
    monkeypatch.setattr(encoding, "deflate", getattr(encoding, f"_{request.param}"))


def random_pixels(height: int, width: int) -> Pixels:
    return np.random.default_rng(height * 1000 + width).integers(0, 256, (height, width, 3), np.uint8)


def smooth_pixels(height: int, width: int) -> Pixels:
    """What a photo is for a codec: slow changes and little noise."""
    rows, columns = np.mgrid[0:height, 0:width]
    planes = [np.sin(rows / 9), np.cos(columns / 7), np.sin((rows + columns) / 11)]
    return (np.stack(planes, axis=-1) * 90 + 128 + random_pixels(height, width) % 8).astype(np.uint8)


def decoded(file: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(file))
    image.load()
    return image


@pytest.mark.usefixtures("deflate")
@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 2), (1, 97), (97, 1), (3, 5), (31, 33), (200, 301)])
def test_png_keeps_every_pixel(height: int, width: int) -> None:
    noise = random_pixels(height, width)
    rows = np.broadcast_to((np.arange(width) % 256).astype(np.uint8)[None, :, None], noise.shape)
    for pixels in (noise, np.zeros_like(noise), np.full_like(noise, 255), smooth_pixels(height, width), rows):
        image = decoded(png(pixels))
        assert (image.format, image.mode, image.size) == ("PNG", "RGB", (width, height))
        assert np.array_equal(np.asarray(image), pixels)
    flipped = random_pixels(2 * height, width)[::2, ::-1]  # a view that is not contiguous
    assert np.array_equal(np.asarray(decoded(png(flipped))), flipped)


@pytest.mark.usefixtures("deflate")
def test_png_records_the_settings_as_flexvar_generate_does(tmp_path: Path) -> None:
    pixels = smooth_pixels(12, 20)
    (tmp_path / "served.png").write_bytes(png(pixels, METADATA))
    save_png(tmp_path / "saved.png", pixels, METADATA)
    for name in ("served.png", "saved.png"):
        assert read_metadata(tmp_path / name) == METADATA
        image = Image.open(tmp_path / name)
        assert np.array_equal(np.asarray(image), pixels)
    served, saved = (Image.open(tmp_path / name).text["flexvar"] for name in ("served.png", "saved.png"))
    assert served == saved
    (tmp_path / "without.png").write_bytes(png(pixels))
    with pytest.raises(ArtifactRefused, match="no generation settings"):
        read_metadata(tmp_path / "without.png")


@pytest.mark.usefixtures("deflate")
def test_a_changed_png_is_noticed() -> None:
    """The checksums are those of the content."""
    file = bytearray(png(random_pixels(9, 9)))
    file[file.index(b"IDAT") + 20] ^= 1
    with pytest.raises((OSError, SyntaxError)):
        decoded(bytes(file))


@pytest.mark.usefixtures("deflate")
def test_png_compresses() -> None:
    assert len(png(np.zeros((256, 256, 3), np.uint8))) < 5000
    assert len(png(random_pixels(256, 256))) < 1.01 * 3 * 256**2  # what cannot be compressed hardly grows


@pytest.mark.parametrize("name", ["jpeg", "webp"])
@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 33), (33, 1), (17, 31), (64, 64)])
def test_other_formats_keep_the_size(name: str, height: int, width: int) -> None:
    image = decoded(Output(name).encode(random_pixels(height, width), METADATA))
    assert (image.format, image.mode, image.size) == (name.upper(), "RGB", (width, height))


@pytest.mark.parametrize("name", ["jpeg", "webp"])
def test_the_quality(name: str) -> None:
    """A higher quality gives a larger file that is nearer to the pixels. The default is a high one."""
    pixels = smooth_pixels(96, 128)
    sizes, errors = [], []
    for quality in (0, 30, 60, 85, 100):
        file = Output.of(name, quality).encode(pixels)
        sizes.append(len(file))
        errors.append(np.abs(np.asarray(decoded(file)).astype(int) - pixels).mean())
    assert all(a < b for a, b in pairwise(sizes))
    assert all(a > b for a, b in pairwise(errors))
    default = Output.of(name, None).encode(pixels)
    assert sizes[3] < len(default) < sizes[4] and default == Output.of(name, 95).encode(pixels)


def test_outputs() -> None:
    assert Output.of(None, None) == Output.of("png", None) == Output("png")
    assert Output.of("jpeg", 0) == Output("jpeg", 0)  # 0 is a quality
    assert [Output(name).media_type for name in ("png", "jpeg", "webp")] == ["image/png", "image/jpeg", "image/webp"]
    pixels = random_pixels(4, 4)
    assert Output("png").encode(pixels, METADATA) == png(pixels, METADATA)
    for name, quality in (("png", 50), (None, 50), (None, 0), ("png", 100)):
        with pytest.raises(HTTPError) as refusal:
            Output.of(name, quality)
        found = refusal.value
        assert (found.status, found.code, found.param) == (400, "invalid_value", "output_compression")


@pytest.mark.parametrize(
    ("scales", "previews", "shown"),
    [(10, 0, ()), (10, 1, (4,)), (10, 4, (1, 3, 5, 7)), (4, 3, (0, 1, 2)), (2, 3, (0,)), (1, 3, ())],
)
def test_which_scales_are_shown(scales: int, previews: int, shown: tuple[int, ...]) -> None:
    assert preview_scales(scales, previews) == shown


def test_shown_scales_are_spread_evenly_before_the_last() -> None:
    for scales in range(1, 65):
        for previews in range(4):
            shown = preview_scales(scales, previews)
            assert len(shown) == min(previews, scales - 1)
            gaps = [b - a for a, b in pairwise((-1, *shown, scales - 1))]
            assert min(gaps) >= 1 and max(gaps) - min(gaps) <= 1
