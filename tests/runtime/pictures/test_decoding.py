"""What is refused before or while a picture is decoded: formats, sizes, memory, and damage of every kind."""

from __future__ import annotations

import io
import os
import random
import resource
import struct
import subprocess
import sys
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, features

from flexvar_runtime import ArtifactRefused, FlexVARPipeline, InvalidInput
from flexvar_runtime.errors import FlexVARError, OutOfMemory
from flexvar_runtime.pictures import decoding
from flexvar_runtime.pictures.jpeg_scans import is_one_scan
from flexvar_runtime.pictures.photo import read_mask, read_photo

POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n%%EndComments\nshowpage\n"
DOS_START = b"\xc5\xd0\xd3\xc6" + struct.pack("<6I", 32, len(POSTSCRIPT), 0, 0, 0, 0) + bytes(4)


def picture(mode: str = "RGB") -> Image.Image:
    y, x = np.mgrid[:32, :48].astype(np.uint8)
    return Image.fromarray(np.stack([x * 5, y * 7, 255 - x * 5, x * 5], -1)).convert(mode)


# Formats -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder at the front of PATH whose program `gs` leaves a file `ran` when it is started."""
    folder = tmp_path / "programs"
    folder.mkdir()
    (folder / "gs").write_text(f"#!/bin/sh\ntouch {folder}/ran\necho 10.0\n", encoding="utf-8")
    (folder / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return folder


@pytest.mark.parametrize("name", ["photo.png", "photo.eps", "photo.jpg"])
@pytest.mark.parametrize(
    "start", [b"", b"\xc5\xd0\xd3\xc6" + struct.pack("<6I", 32, len(POSTSCRIPT), 0, 0, 0, 0) + b"\0\0\0\0"]
)
def test_postscript_is_refused_and_not_run(tmp_path: Path, programs: Path, name: str, start: bytes) -> None:
    (tmp_path / name).write_bytes(start + POSTSCRIPT)
    for read in (read_photo, read_mask):
        with pytest.raises(ArtifactRefused, match=name):
            read(tmp_path / name)
    if not start:
        with Image.open(tmp_path / name) as image, pytest.raises(ArtifactRefused, match="PNG"):
            read_photo(image)
    assert not (programs / "ran").exists()


@pytest.mark.parametrize("kind", ["AVIF", "DDS", "BLP", "PPM", "ICO", "JPEG2000", "TGA", "PCX", "ICNS", "QOI", "SGI"])
def test_other_formats_are_refused_whatever_they_are_called(tmp_path: Path, kind: str) -> None:
    Image.init()
    absent = kind not in Image.SAVE
    if absent or not {"AVIF": features.check("avif"), "JPEG2000": features.check("jpg_2000")}.get(kind, True):
        pytest.skip(f"Pillow has no {kind} here")
    path = tmp_path / "photo.png"
    picture("P" if kind == "BLP" else "RGB").save(path, format=kind)
    with pytest.raises(ArtifactRefused, match=r"photo\.png") as refusal:
        read_photo(path)
    assert refusal.value.exit_code == 5
    with Image.open(path) as image:
        for read in (read_photo, read_mask):
            with pytest.raises(ArtifactRefused, match="PNG"):
                read(image)


def test_pictures_in_memory_have_no_format_and_are_read() -> None:
    assert read_photo(picture().copy()).size == (32, 48)


def test_an_image_to_encode_is_read_as_any_picture(tiny_bundle: Path, programs: Path, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(POSTSCRIPT)
    with FlexVARPipeline.from_bundle(tiny_bundle, "ort-cpu") as pipe:
        with Image.open(tmp_path / "a.png") as image, pytest.raises(ArtifactRefused):
            pipe.encode(image)
        deep = Image.fromarray(np.full((32, 32), 30_000, np.uint16))
        flat = Image.fromarray(read_photo(deep).pixels)
        assert np.array_equal(pipe.encode(deep), pipe.encode(flat))
    assert not (programs / "ran").exists()


# Sizes and memory ----------------------------------------------------------------------------------------------------


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_header(width: int, height: int, depth: int = 8, colour: int = 6) -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def bmp_header(width: int, height: int) -> bytes:
    return (
        b"BM"
        + struct.pack("<IHHI", 54, 0, 0, 54)
        + struct.pack("<IiiHHIIiiII", 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0)
    )


def gif_header(width: int, height: int) -> bytes:
    return (
        b"GIF89a" + struct.pack("<HHBBB", width, height, 0, 0, 0) + b"," + struct.pack("<HHHHB", 0, 0, width, height, 0)
    )


@pytest.mark.parametrize(
    "content",
    [
        png_header(2**27 + 1, 1),
        png_header(11_586, 11_586),
        png_header(2**31 - 1, 2**31 - 1),
        png_header(0, 5),
        png_header(70_000, 1),
        bmp_header(65_000, 65_000),
        bmp_header(0, 5),
        bmp_header(2**27, 1),
        gif_header(65_535, 65_535),
        gif_header(0, 0),
    ],
)
def test_absurd_sizes_are_refused_by_the_header(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(ArtifactRefused, match=r"a\.png"):
        read_photo(tmp_path / "a.png")


def test_a_tile_much_larger_than_its_picture_is_refused(tmp_path: Path) -> None:
    """Grey, 64 x 64 pixels, in one packed tile of 40,000 x 40,000."""
    tags = {256: 64, 257: 64, 258: 8, 259: 8, 262: 1, 277: 1, 322: 40_000, 323: 40_000, 324: 200, 325: 20}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    start = b"II*\0\x08\0\0\0" + struct.pack("<H", len(tags)) + entries + bytes(4)
    (tmp_path / "a.tif").write_bytes(start.ljust(200, b"\0") + zlib.compress(bytes(64)))
    with pytest.raises(ArtifactRefused, match="memory"):
        read_photo(tmp_path / "a.tif")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF"])
def test_a_picture_that_does_not_fit_in_memory_is_refused(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    picture().save(tmp_path / "a", format=kind)
    monkeypatch.setattr(decoding, "available_bytes", lambda: 5_000)
    for read in (read_photo, read_mask):
        with pytest.raises(OutOfMemory, match="memory") as refusal:
            read(tmp_path / "a")
        assert refusal.value.exit_code == 6
    monkeypatch.setattr(decoding, "available_bytes", lambda: None)  # unknown
    assert read_photo(tmp_path / "a").size == (32, 48)
    monkeypatch.setattr(decoding, "MOST_MEMORY", 5_000)
    with pytest.raises(ArtifactRefused, match="memory"):
        read_photo(tmp_path / "a")


def test_jpeg_files_of_one_scan(tmp_path: Path) -> None:
    """Only for these a decoder needs no memory for coefficients."""
    for mode, options, one in (
        *[("RGB", {}, True), ("L", {}, True), ("CMYK", {}, True), ("RGB", {"restart_marker_rows": 1}, True)],
        *[("RGB", {"progressive": True}, False), ("L", {"progressive": True}, False)],
    ):
        picture(mode).save(tmp_path / "a.jpg", **options)
        whole = (tmp_path / "a.jpg").read_bytes()
        assert is_one_scan(io.BytesIO(whole)) == one
        start = whole.index(b"\xff\xda")
        single = whole[: start + 4] + b"\1" + whole[start + 5 :]  # as if the scan held only one component
        assert is_one_scan(io.BytesIO(single)) == (one and mode == "L")
        for end in range(start + 4):
            assert not is_one_scan(io.BytesIO(whole[:end]))


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(("progressive", "fits"), [(False, True), (True, False)])
def test_a_photo_of_108_million_pixels(tmp_path: Path, progressive: bool, fits: bool) -> None:
    """Its header is enough to know the memory that it takes."""
    picture().save(tmp_path / "a.jpg", progressive=progressive)
    whole, size = (tmp_path / "a.jpg").read_bytes(), struct.pack(">HH", 32, 48)
    assert whole.count(size) == 1
    with Image.open(io.BytesIO(whole.replace(size, struct.pack(">HH", 9_000, 12_000)))) as photo:
        assert photo.size == (12_000, 9_000)
        assert (decoding._bytes_to_read(photo) < decoding.MOST_MEMORY) == fits


PEAK = """
import sys, resource
from flexvar_runtime.pictures import decoding
from flexvar_runtime.pictures.photo import read_photo
bound, largest = decoding._bytes_to_read, []
decoding._bytes_to_read = lambda image: largest.append(bound(image)) or largest[-1]
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
read_photo(sys.argv[1])
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 - largest[0])
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["a.png", "progressive.jpg", "a.webp", "a.gif", "a.tif", "turned.tif", "a.bmp"])
def test_memory_is_within_its_bound(tmp_path: Path, name: str) -> None:
    """The peak of a process that reads 12 million pixels. 64 MiB: libraries, and the strips that are converted."""
    noise = np.random.default_rng(0).integers(0, 256, (300, 400, 4), np.uint8)
    image = Image.fromarray(np.tile(noise, (10, 10, 1)))
    exif = Image.Exif()
    exif[0x112] = 6 if name == "turned.tif" else 1
    options = {"jpg": {"progressive": True, "subsampling": 0}, "webp": {"lossless": True, "method": 0}}
    options["tif"] = {"compression": "tiff_lzw", "exif": exif}
    kind = name.partition(".")[2]
    (image if kind in ("png", "webp") else image.convert("RGB")).save(tmp_path / name, **options.get(kind, {}))
    ended = subprocess.run([sys.executable, "-c", PEAK, tmp_path / name], capture_output=True, text=True, check=True)
    assert int(ended.stdout) < 2**26


@pytest.mark.slow
@pytest.mark.parametrize(("depth", "colour", "bytes_a_pixel"), [(8, 6, 4), (16, 6, 8), (8, 4, 2)])
def test_a_small_file_of_many_pixels_takes_little_memory(
    tmp_path: Path, depth: int, colour: int, bytes_a_pixel: int
) -> None:
    side, packer = 10_700, zlib.compressobj(1)
    packed = b"".join(packer.compress(bytes(1 + bytes_a_pixel * side)) for _ in range(side)) + packer.flush()
    whole = png_header(side, side, depth, colour)
    (tmp_path / "a.png").write_bytes(whole[:33] + chunk(b"IDAT", packed) + whole[-12:])
    code = f"{PEAK}\nprint(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    ended = subprocess.run([sys.executable, "-c", code, tmp_path / "a.png"], capture_output=True, text=True, check=True)
    assert int(ended.stdout.split()[1]) < 1_000_000  # kB


# Damage --------------------------------------------------------------------------------------------------------------


def whole_pictures(folder: Path) -> list[bytes]:
    exif = Image.Exif()
    exif[0x112], exif[0x10F] = 6, "camera"
    kinds: list[tuple[str, str, dict[str, object]]] = [
        *[("RGB", "PNG", {"exif": exif}), ("RGBA", "PNG", {}), ("P", "PNG", {"transparency": 3})],
        *[("RGB", "JPEG", {"exif": exif}), ("CMYK", "JPEG", {}), ("L", "JPEG", {"progressive": True})],
        *[("RGB", "WEBP", {"exif": exif}), ("RGBA", "WEBP", {"lossless": True})],
        *[("RGB", "BMP", {}), ("P", "BMP", {}), ("RGB", "GIF", {}), ("P", "GIF", {"transparency": 2})],
        *[("RGB", "TIFF", {"exif": exif, "compression": c}) for c in ("raw", "tiff_lzw", "tiff_adobe_deflate", "jpeg")],
        *[("1", "TIFF", {"compression": "group4"}), ("RGBA", "TIFF", {"compression": "packbits"})],
    ]
    whole = []
    for mode, kind, options in kinds:
        picture(mode).save(folder / "whole", format=kind, **options)
        whole.append((folder / "whole").read_bytes())
    return whole


def damaged(whole: bytes, rng: random.Random) -> bytes:
    """A copy that is cut, has other bytes somewhere, or has a few flipped bits, most of them in its header."""
    kind = rng.randrange(4)
    if kind == 0:
        return whole[: rng.randrange(len(whole))]
    if kind == 1:
        at = rng.randrange(len(whole))
        return whole[:at] + rng.randbytes(rng.randrange(40)) + whole[at + rng.randrange(1, 40) :]
    content = bytearray(whole)
    for _ in range(rng.choice([1, 2, 20])):
        at = rng.randrange(min(len(content), rng.choice([64, 10**9])))
        content[at] = rng.choice([0, 255, 128, content[at] ^ (1 << rng.randrange(8))])
    return bytes(content)


def with_checksums(png: bytes) -> bytes:
    """A PNG file whose checksums are right again."""
    result, at = png[:8], 8
    while at + 12 <= len(png):
        end = at + 8 + int.from_bytes(png[at : at + 4], "big")
        result += png[at:end] + struct.pack(">I", zlib.crc32(png[at + 4 : end]))
        at = end + 4
    return result


def test_damaged_pictures_are_refused_or_read(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Nothing but a refusal of this package, and nothing on standard error: neither from Pillow nor from libtiff."""
    rng, path = random.Random(0), tmp_path / "damaged"
    whole, refused = whole_pictures(tmp_path), list[tuple[int, bool]]()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for number in range(600):
            content = damaged(whole[number % len(whole)], rng)
            png = content.startswith(b"\x89PNG") and number % 5
            path.write_bytes(with_checksums(content) if png else content)
            try:
                assert read_photo(path).pixels.size
            except FlexVARError as error:
                refused.append((error.exit_code, str(path) in error.got))
    assert 200 < len(refused) < 500 and set(refused) <= {(5, True), (6, True)}
    assert capfd.readouterr().err == ""
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**20  # kB


@pytest.mark.parametrize("name", ["missing.png", "folder", "\0.png", "n" * 300])
def test_paths_without_a_file_are_a_wrong_argument(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(InvalidInput) as refusal:
        read_photo(tmp_path / name)
    assert refusal.value.exit_code == 2


def test_a_pipe_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(InvalidInput, match="pipe"):
        read_photo(tmp_path / "pipe.png")
