"""Pixels: the rounding rule by hand, PNG files read back exactly, settings read back or refused."""

from __future__ import annotations

import json
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from flexvar_runtime import ArtifactRefused, InvalidInput
from flexvar_runtime.pictures.pixels import from_uint8, to_uint8
from flexvar_runtime.pictures.png import METADATA_KEY, read_metadata, save_png


def pixel(value: float) -> int:
    return int(to_uint8(np.full((1, 3, 1, 1), value, np.float32))[0, 0, 0, 0])


@pytest.fixture
def pixels() -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (24, 40, 3), dtype=np.uint8)


# Rounding ------------------------------------------------------------------------------------------------------------


def test_every_pixel_value_comes_back() -> None:
    values = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, axis=-1)
    np.testing.assert_array_equal(to_uint8(from_uint8(values)), values)
    np.testing.assert_array_equal(to_uint8(from_uint8(values, (0.0, 1.0)), (0.0, 1.0)), values)


def test_the_middle_between_two_values_goes_up() -> None:
    """x · 127.5 + 127.5 + 0.5, truncated: value k begins half a step below k."""
    for k in range(1, 256):
        edge = (k - 0.5 - 127.5) / 127.5
        assert pixel(edge + 1e-5) == k
        assert pixel(edge - 1e-5) == k - 1
    exact = np.float32(-1 / 255)  # · 127.5 + 127.5 = 127, not a middle
    assert pixel(float(exact)) == 127
    assert pixel(0.0) == 128  # 127.5 is a middle


def test_edges() -> None:
    values = (-1, 1, -1.001, 1.001, -3.35, 3.35, 1e30, -1e30, -0.9961)
    assert [pixel(value) for value in values] == [0, 255, 0, 255, 0, 255, 255, 0, 0]


def test_the_published_rule_in_its_own_order_of_operations() -> None:
    """Float32 rounds after every operation: another order would round some pixels the other way."""
    x = np.random.default_rng(0).uniform(-1.2, 1.2, (1, 3, 256, 256)).astype(np.float32)
    half = np.float32(127.5)
    expected = np.clip(x * half + half + np.float32(0.5), 0, 255).astype(np.uint8).transpose(0, 2, 3, 1)
    np.testing.assert_array_equal(to_uint8(x), expected)


def test_another_value_range() -> None:
    x = np.array([0, 0.5, 1, 2], np.float32).reshape(1, 1, 2, 2).repeat(3, axis=1)
    np.testing.assert_array_equal(to_uint8(x, (0.0, 1.0))[0, :, :, 0], [[0, 128], [255, 255]])


def test_layout() -> None:
    x = np.linspace(-1, 1, 2 * 3 * 4 * 5, dtype=np.float32).reshape(2, 3, 4, 5)
    before = x.copy()
    images = to_uint8(x)
    assert images.shape == (2, 4, 5, 3) and images.dtype == np.uint8 and images.flags.c_contiguous
    assert images[1, 3, 2, 0] == pixel(float(x[1, 0, 3, 2]))
    np.testing.assert_array_equal(x, before)
    back = from_uint8(images)
    assert back.shape == x.shape and back.dtype == np.float32 and back.flags.c_contiguous
    ends = from_uint8(np.array([[[[0, 255, 127]]]], np.uint8)).ravel()
    assert ends == pytest.approx([-1, 1, -1 / 255], abs=1e-6)  # a few roundings of float32


# PNG -----------------------------------------------------------------------------------------------------------------


def test_png_comes_back_exactly(tmp_path: Path, pixels: NDArray[np.uint8]) -> None:
    metadata = {"seed": str(2**64 - 1), "class": 7, "name": "crème brûlée ↑ \x00", "nested": {"top_p": 0.95}}
    save_png(tmp_path / "a.png", pixels, metadata)
    with Image.open(tmp_path / "a.png") as image:
        assert image.format == "PNG" and image.mode == "RGB"
        np.testing.assert_array_equal(np.asarray(image), pixels)
    assert read_metadata(tmp_path / "a.png") == metadata
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_an_existing_image_is_kept(tmp_path: Path, pixels: NDArray[np.uint8]) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(b"mine")
    with pytest.raises(InvalidInput, match=r"a\.png .*--force"):
        save_png(path, pixels, {})
    assert path.read_bytes() == b"mine"
    save_png(path, pixels, {}, force=True)
    assert read_metadata(path) == {}


def test_nothing_is_left_of_an_image_that_could_not_be_written(tmp_path: Path) -> None:
    with pytest.raises((TypeError, ValueError)):
        save_png(tmp_path / "a.png", np.zeros((2, 2, 7), np.uint8), {})
    assert not list(tmp_path.iterdir())


def with_text(path: Path, text: str | None) -> Path:
    info = PngInfo()
    if text is not None:
        info.add_text(METADATA_KEY, text)
    Image.new("RGB", (4, 4)).save(path, pnginfo=info)
    return path


@pytest.mark.parametrize(
    ("text", "named"),
    [
        (None, "settings"),
        ("", "Expecting value"),
        ('{"seed": NaN}', "NaN"),
        ('{"a": 1, "a": 2}', "'a' twice"),
        ("[" * 100_000, "recursion depth"),
        ("[1]", "object"),
    ],
)
def test_damaged_settings(tmp_path: Path, text: str | None, named: str) -> None:
    with pytest.raises(ArtifactRefused) as refusal:
        read_metadata(with_text(tmp_path / "a.png", text))
    assert named in refusal.value.got and "a.png" in refusal.value.got


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, *chunks: bytes) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + b"".join(chunks)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"no image",
        b"\x89PNG\r\n\x1a\n",
        png(1, 1)[:20],
        png(1, 1).replace(b"IHDR", b"IHDX"),
        png(2**30, 2**30, chunk(b"IDAT", b"")),  # would be 3 EiB
        png(1, 1, chunk(b"zTXt", METADATA_KEY.encode() + b"\0\0" + zlib.compress(bytes(2**27)))),
    ],
    ids=["empty", "text", "signature", "cut", "chunk", "huge", "bomb"],
)
def test_what_is_no_png(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(ArtifactRefused, match=r"a\.png") as refusal:
        read_metadata(tmp_path / "a.png")
    assert refusal.value.exit_code == 5 and refusal.value.expected == "a readable PNG file"


def test_another_format_with_the_name_of_a_png(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png", format="JPEG")
    with pytest.raises(ArtifactRefused, match=r"a\.png"):
        read_metadata(tmp_path / "a.png")


def test_no_file(tmp_path: Path) -> None:
    for path in (tmp_path / "none.png", tmp_path):
        with pytest.raises(ArtifactRefused, match=path.name):
            read_metadata(path)


def test_settings_as_another_program_would_write_them(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"seed": "12"}
    assert read_metadata(with_text(tmp_path / "a.png", json.dumps(settings, indent=4))) == settings


def with_settings(
    *, kind: bytes = b"tEXt", last: bool = False, text: bytes = b'{"seed": "12"}', copies: int = 1
) -> bytes:
    """A PNG file with the text `text`, before or behind its pixels."""
    key = METADATA_KEY.encode() + b"\0"
    data = {
        b"tEXt": key + text,
        b"zTXt": key + b"\0" + zlib.compress(text),
        b"iTXt": key + b"\0\0en\0key\0" + text,
        b"iTXt packed": key + b"\1\0\0\0" + zlib.compress(text),
    }[kind]
    texts = [chunk(kind[:4], data)] * copies
    pixels = [chunk(b"IDAT", zlib.compress(bytes(4)))]
    return png(1, 1, *(pixels + texts if last else texts + pixels), chunk(b"IEND", b""))


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("kind", [b"tEXt", b"zTXt", b"iTXt", b"iTXt packed"])
def test_settings_are_found_anywhere_in_a_file(tmp_path: Path, kind: bytes, last: bool) -> None:
    (tmp_path / "a.png").write_bytes(with_settings(kind=kind, last=last))
    assert read_metadata(tmp_path / "a.png") == {"seed": "12"}


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (with_settings(copies=2), "2 texts"),
        (with_settings(kind=b"iTXt", text=b'{"name": "\xff\xfe"}'), "utf-8"),
        (with_settings(kind=b"zTXt", text=b" " * 2**21), "1,048,576 bytes"),
        (with_settings(kind=b"iTXt packed", text=b" " * 2**21), "1,048,576 bytes"),
        (with_settings(text=b" " * 2**21), "1,048,576 bytes"),
        (with_settings(kind=b"zTXt").replace(b"x\x9c", b"x\x9d"), "checksum"),
        (with_settings()[:-12], "too early"),
        (with_settings(text=b"[" * 100_000), "recursion"),
    ],
    ids=["twice", "no utf-8", "packed bomb", "packed utf-8 bomb", "long", "checksum", "cut", "deep"],
)
def test_settings_that_are_refused(tmp_path: Path, content: bytes, named: str) -> None:
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(ArtifactRefused, match=named) as refusal:
        read_metadata(tmp_path / "a.png")
    assert "a.png" in refusal.value.got
