"""Pictures of many kinds, through the runtime's reader and that of training: both must give the same right pixels."""

from __future__ import annotations

import io
import logging
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageCms, TiffImagePlugin

from flexvar_ref.training import pictures as training
from flexvar_ref.training.pictures import read_picture, unreadable
from flexvar_runtime.pictures.photo import read_photo

Pixels = NDArray[np.uint8]
Reader = Callable[[Path], Pixels]
TURNED = 6  # EXIF: the picture lies on its left side


def by_runtime(path: Path) -> Pixels:
    return read_photo(path).pixels


def by_training(path: Path) -> Pixels:
    return np.asarray(read_picture(path))


@pytest.fixture(params=[by_runtime, by_training], ids=["runtime", "training"])
def read(request: pytest.FixtureRequest) -> Reader:
    return request.param  # type: ignore[no-any-return]


def colours() -> Image.Image:
    y, x = np.mgrid[:32, :48].astype(np.uint8)
    return Image.fromarray(np.stack([x * 5, y * 7, 255 - x * 5], -1))


# Colour profiles -----------------------------------------------------------------------------------------------------


def profile(model: bytes, kind: bytes, space: bytes, tags: dict[bytes, bytes]) -> bytes:
    """An ICC profile of version 2 with these tags."""

    def fixed(*values: float) -> bytes:
        return b"".join(struct.pack(">i", round(value * 65536)) for value in values)

    text = b"desc\0\0\0\0" + struct.pack(">I", 5) + b"test\0" + bytes(78) + bytes(1)
    white = b"XYZ \0\0\0\0" + fixed(0.9642, 1, 0.8249)
    tags = {b"desc": text, b"cprt": b"text\0\0\0\0none\0\0\0\0", b"wtpt": white, **tags}
    table, data, start = b"", b"", 132 + 12 * len(tags)
    for name, content in tags.items():
        table += name + struct.pack(">II", start + len(data), len(content))
        data += content + bytes(-len(content) % 4)
    head = struct.pack(
        ">I4s4s4s4s4s6H", start + len(data), b"lcms", b"\2\x10\0\0", kind, model, space, *[2020, 1, 1] * 2
    )
    head += b"acsp" + bytes(28) + fixed(0.9642, 1, 0.8249)
    return head.ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + data


def curve(gamma: float) -> bytes:
    return b"curv\0\0\0\0\0\0\0\1" + struct.pack(">H", round(gamma * 256)) + b"\0\0"


def wide() -> bytes:
    """The primaries and the gamma of Adobe RGB."""
    primaries = ((0.60974, 0.31111, 0.01947), (0.20528, 0.62567, 0.06087), (0.14919, 0.06322, 0.74457))
    tags = {}
    for letter, values in zip((b"r", b"g", b"b"), primaries, strict=True):
        xyz = b"".join(struct.pack(">i", round(value * 65536)) for value in values)
        tags |= {letter + b"XYZ": b"XYZ \0\0\0\0" + xyz, letter + b"TRC": curve(2.2)}
    return profile(b"RGB ", b"mntr", b"XYZ ", tags)


def linear_grey() -> bytes:
    return profile(b"GRAY", b"mntr", b"XYZ ", {b"kTRC": curve(1.0)})


def colourless_ink() -> bytes:
    """A profile for CMYK in which every ink is grey."""
    corners = [[int(digit) for digit in f"{i:04b}"] for i in range(16)]
    nodes = bytes(byte for c, m, y, k in corners for byte in (round(255 * (1 - k) * (1 - (c + m + y) / 3)), 128, 128))
    matrix = b"".join(struct.pack(">i", value << 16) for value in (1, 0, 0, 0, 1, 0, 0, 0, 1))
    straight = bytes(range(256))
    table = b"mft1\0\0\0\0" + bytes([4, 3, 2, 0]) + matrix + straight * 4 + nodes + straight * 3
    return profile(b"CMYK", b"prtr", b"Lab ", {b"A2B0": table})


def srgb() -> bytes:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def in_srgb(image: Image.Image, icc: bytes) -> NDArray[np.int16]:
    target = ImageCms.createProfile("sRGB")
    made = ImageCms.profileToProfile(image, ImageCms.ImageCmsProfile(io.BytesIO(icc)), target, outputMode="RGB")
    return np.asarray(made).astype(np.int16)


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "tif"])
def test_a_profile_for_rgb_is_converted(tmp_path: Path, read: Reader, suffix: str) -> None:
    path, image = tmp_path / f"a.{suffix}", colours()
    options = {"webp": {"lossless": True}, "jpg": {"quality": 100, "subsampling": 0}}.get(suffix, {})
    image.save(path, icc_profile=wide(), **options)
    with Image.open(path) as saved:
        expected = in_srgb(saved.convert("RGB"), wide())
    assert np.abs(read(path) - expected).max() <= 1
    assert np.abs(expected - np.asarray(image)).max() > 30  # the profile matters


@pytest.mark.parametrize(
    ("mode", "icc", "suffix"),
    [
        ("L", linear_grey(), "png"),
        ("L", linear_grey(), "jpg"),
        ("L", wide(), "png"),  # a camera's profile on a grey picture
        ("P", wide(), "png"),
        ("CMYK", colourless_ink(), "tif"),
        ("CMYK", colourless_ink(), "jpg"),
    ],
    ids=["grey", "grey jpeg", "grey with rgb", "palette", "cmyk", "cmyk jpeg"],
)
def test_profiles_of_other_colour_models(tmp_path: Path, read: Reader, mode: str, icc: bytes, suffix: str) -> None:
    path, image = tmp_path / f"a.{suffix}", colours().convert(mode)
    image.save(path, icc_profile=icc, **({"quality": 100} if suffix == "jpg" else {}))
    with Image.open(path) as saved:
        expected = in_srgb(saved.convert("RGB") if icc == wide() else saved.convert(mode), icc)
        plain = np.asarray(saved.convert("RGB")).astype(np.int16)
    assert np.abs(read(path) - expected).max() <= 1 and np.abs(expected - plain).max() > 5


def test_a_profile_changes_colours_but_not_opacity(tmp_path: Path) -> None:
    image = colours()
    image.putalpha(Image.fromarray(np.full((32, 48), 255, np.uint8)))
    half = image.copy()
    half.putalpha(128)
    for name, picture in (("opaque", image), ("half", half)):
        picture.save(tmp_path / f"{name}.png", icc_profile=wide())
    opaque, clear = read_photo(tmp_path / "opaque.png"), read_photo(tmp_path / "half.png")
    assert opaque.opacity is None and clear.opacity is not None and (clear.opacity == 128).all()
    mixed = opaque.pixels * (128 / 255) + 255 * (127 / 255)
    assert np.abs(clear.pixels - mixed).max() <= 0.5 + 1e-3
    assert np.abs(opaque.pixels - in_srgb(colours(), wide())).max() <= 1


def test_pixels_that_are_srgb_already_stay_as_they_are(tmp_path: Path, read: Reader) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "a.png", icc_profile=srgb())
    np.testing.assert_array_equal(read(tmp_path / "a.png"), noise)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(depth: int, colour: int, width: int, rows: list[bytes], *more: bytes) -> bytes:
    header = struct.pack(">IIBBBBB", width, len(rows), depth, colour, 0, 0, 0)
    pixels = zlib.compress(b"".join(b"\0" + row for row in rows))
    return b"\x89PNG\r\n\x1a\n" + b"".join([chunk(b"IHDR", header), *more, chunk(b"IDAT", pixels), chunk(b"IEND", b"")])


def with_profile(icc: bytes) -> bytes:
    pixels = np.asarray(colours())
    return png(8, 2, 48, [row.tobytes() for row in pixels], chunk(b"iCCP", b"x\0\0" + zlib.compress(icc)))


@pytest.mark.parametrize("size", [1_100_000, 2_000_000, 5_000_000])
def test_large_profiles_are_used(tmp_path: Path, read: Reader, size: int) -> None:
    """Pillow alone refuses a PNG file whose profile is larger than 1 MB."""
    large = struct.pack(">I", size) + wide()[4:].ljust(size - 4, b"\1")
    (tmp_path / "a.png").write_bytes(with_profile(large))
    assert np.abs(read(tmp_path / "a.png") - in_srgb(colours(), wide())).max() <= 1


@pytest.mark.parametrize(
    "icc",
    [b"", b"no profile", wide()[:200], colourless_ink(), linear_grey(), bytes(2**25)],
    ids=["empty", "text", "cut", "for ink", "for grey", "bomb"],
)
def test_profiles_that_cannot_be_used_are_reported(
    tmp_path: Path, read: Reader, icc: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "a.png").write_bytes(with_profile(icc))
    with caplog.at_level(logging.WARNING):
        np.testing.assert_array_equal(read(tmp_path / "a.png"), np.asarray(colours()))
    assert read is by_training or "a.png" in caplog.text  # training reports each profile once


# Orientation ---------------------------------------------------------------------------------------------------------

WRONG_TAGS = {  # number, type and value of tags that cameras write with a wrong type, or with nonsense
    "make as a double": (0x10F, 12, 1.5),
    "model as a fraction": (0x110, 5, 7.25),
    "date as a whole number": (0x132, 3, 7),
    "resolution as text": (0x11A, 2, "many"),
    "XMP as a number": (0x2BC, 3, 7),
}


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
@pytest.mark.parametrize("wrong", WRONG_TAGS)
def test_damaged_tags_do_not_hinder_turning(tmp_path: Path, read: Reader, wrong: str, suffix: str) -> None:
    number, kind, value = WRONG_TAGS[wrong]
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    tags[0x112], tags.tagtype[number] = TURNED, kind
    tags[number] = value
    path = tmp_path / f"a.{suffix}"
    if suffix == "tif":
        colours().save(path, tiffinfo=tags)
    else:
        colours().save(path, exif=b"Exif\0\0" + tags_as_bytes(tags), **({"lossless": True} if suffix == "webp" else {}))
    turned = np.asarray(colours().transpose(Image.Transpose.ROTATE_270)).astype(int)
    assert read(path).shape == (48, 32, 3)
    with Image.open(path) as opened:
        for pixels in (read(path), read_photo(opened).pixels):
            assert np.abs(pixels - turned).mean() < (4 if suffix == "jpg" else 0.01)


@pytest.mark.parametrize(
    ("kind", "value", "turns"), [(11, 6.0, True), (12, 6.0, True), (11, 6.5, False), (2, "6", False)]
)
def test_orientations_of_other_types(tmp_path: Path, read: Reader, kind: int, value: object, turns: bool) -> None:
    """A whole number counts whatever its type, text does not."""
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    tags.tagtype[0x112] = kind
    tags[0x112] = value
    colours().save(tmp_path / "a.png", exif=b"Exif\0\0" + tags_as_bytes(tags))
    assert read(tmp_path / "a.png").shape == ((48, 32, 3) if turns else (32, 48, 3))


def tags_as_bytes(tags: TiffImagePlugin.ImageFileDirectory_v2) -> bytes:
    return b"II*\0\x08\0\0\0" + tags.tobytes(8)


@pytest.mark.parametrize("exif", [b"", b"Exif\0\0", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0" + bytes(300)])
def test_damaged_exif_means_upright(tmp_path: Path, read: Reader, exif: bytes) -> None:
    colours().save(tmp_path / "a.png", exif=exif or b"x")
    np.testing.assert_array_equal(read(tmp_path / "a.png"), np.asarray(colours()))


# Depths and transparency ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_sixteen_bits_keep_their_brightness(tmp_path: Path, read: Reader, suffix: str) -> None:
    grey = np.arange(256, dtype=np.uint16).reshape(16, 16)
    Image.fromarray(grey * 257).save(tmp_path / f"a.{suffix}")
    np.testing.assert_array_equal(read(tmp_path / f"a.{suffix}")[..., 0], grey)


KEYED = {  # pixels of which the third is transparent, because the file names its value
    "1 bit": (1, 0, [b"\xd0"], struct.pack(">H", 0), [255, 255, 255, 255]),
    "2 bits": (2, 0, [b"\x1b"], struct.pack(">H", 2), [0, 85, 255, 255]),
    "4 bits": (4, 0, [b"\x12\x34"], struct.pack(">H", 3), [17, 34, 255, 68]),
    "8 bits": (8, 0, [b"\1\2\3\4"], struct.pack(">H", 3), [1, 2, 255, 4]),
    "16 bits": (16, 0, [b"\1\1\2\2\3\3\4\4"], struct.pack(">H", 0x303), [1, 2, 255, 4]),
    "rgb": (8, 2, [bytes([1] * 3 + [2] * 3 + [3] * 3 + [4] * 3)], struct.pack(">3H", 3, 3, 3), [1, 2, 255, 4]),
    "rgb of 16 bits": (
        *(16, 2, [b"\1\7" * 3 + b"\2\7" * 3 + b"\3\7" * 3 + b"\4\7" * 3]),
        *(struct.pack(">3H", 0x307, 0x307, 0x307), [1, 2, 255, 4]),
    ),
}


@pytest.mark.parametrize("kind", KEYED)
def test_hidden_colours_are_not_shown(tmp_path: Path, read: Reader, kind: str) -> None:
    depth, colour, rows, key, expected = KEYED[kind]
    (tmp_path / "a.png").write_bytes(png(depth, colour, 4, rows, chunk(b"tRNS", key)))
    assert read(tmp_path / "a.png")[0, :, 0].tolist() == expected


@pytest.mark.parametrize("suffix", ["png", "webp", "tif", "gif"])
def test_what_is_transparent_is_white(tmp_path: Path, read: Reader, suffix: str) -> None:
    red = np.zeros((8, 8, 4), np.uint8)
    red[..., 0] = 255
    red[:4, :, 3] = 255
    Image.fromarray(red).save(tmp_path / f"a.{suffix}", **({"lossless": True} if suffix == "webp" else {}))
    pixels = read(tmp_path / f"a.{suffix}")
    assert (pixels[:4] == [255, 0, 0]).all() and (pixels[4:] == 255).all()


@pytest.mark.parametrize("dtype", [np.int32, np.float32, np.uint32])
def test_deep_pixels_are_refused(tmp_path: Path, read: Reader, dtype: type) -> None:
    image = Image.fromarray(np.arange(64).reshape(8, 8).astype(np.int32 if dtype is np.uint32 else dtype))
    tags = {TiffImagePlugin.SAMPLEFORMAT: 1} if dtype is np.uint32 else {}
    image.save(tmp_path / "a.tif", tiffinfo=tags)
    with pytest.raises(Exception, match="8 or 16 bits"):
        read(tmp_path / "a.tif")


def test_grey_that_begins_at_white_is_refused_with_sixteen_bits(tmp_path: Path, read: Reader) -> None:
    """Pillow would read it as a negative."""
    path = tmp_path / "a.tif"
    Image.fromarray(np.zeros((4, 4), np.uint16)).save(path)
    tags = path.read_bytes()
    at = tags.index(struct.pack("<HHI", 262, 3, 1)) + 8
    path.write_bytes(tags[:at] + b"\0" + tags[at + 1 :])
    with pytest.raises(Exception, match="8 or 16 bits"):
        read(path)


# Memory --------------------------------------------------------------------------------------------------------------

PEAK = """
import resource, sys
from pathlib import Path
from flexvar_ref.training import pictures as training
from flexvar_ref.training.pictures import read_picture, unreadable
from flexvar_runtime.pictures.photo import read_photo
reader = {"runtime": read_photo, "training": read_picture}[sys.argv[1]]
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
reader(Path(sys.argv[2]))
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


@pytest.mark.parametrize("reader", ["runtime", "training"])
@pytest.mark.parametrize("mode", ["P", "I;16", "RGBA"])
def test_small_files_of_many_pixels(tmp_path: Path, reader: str, mode: str) -> None:
    """16 million pixels in a few kB. Conversions of the whole picture at once take more than this."""
    image = Image.new(mode, (4096, 4096))
    image.save(tmp_path / "a.png", **({} if mode == "RGBA" else {"transparency": 0}))
    command = [sys.executable, "-c", PEAK, reader, str(tmp_path / "a.png")]
    assert int(subprocess.run(command, capture_output=True, text=True, check=True).stdout) < 250


def test_pictures_beyond_the_memory_of_training_are_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF"):
        colours().save(tmp_path / kind, format=kind)
        assert unreadable(tmp_path / kind) is None
        with monkeypatch.context() as patch:
            patch.setattr(training, "MOST_MEMORY", 5_000)
            assert "memory" in str(unreadable(tmp_path / kind))
