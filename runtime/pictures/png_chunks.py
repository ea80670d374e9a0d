"""The chunks of a PNG file: a signature, then chunks of a length, a kind of four letters, data and a checksum."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Collection, Iterator
from typing import BinaryIO

SIGNATURE = b"\x89PNG\r\n\x1a\n"
PIXEL_CHUNKS = frozenset({b"IHDR", b"PLTE", b"tRNS", b"eXIf", b"IDAT", b"IEND"})
MOST_PROFILE_BYTES = 2**24  # as many as a JPEG file can hold


def read_chunks(file: BinaryIO, kinds: Collection[bytes]) -> Iterator[tuple[bytes, bytes]]:
    """Kind and data of every chunk of these kinds, in order, up to the end of the image. Other chunks are skipped.

    Raises ValueError if the file is not PNG, ends early, or has a wrong checksum in one of these chunks.
    """
    size = file.seek(0, io.SEEK_END)
    file.seek(0)
    if file.read(len(SIGNATURE)) != SIGNATURE:
        raise ValueError("it does not begin as PNG files do")
    kind, first = b"", True
    while kind != b"IEND":
        length, kind = struct.unpack(">I4s", _exactly(file, 8))
        if first and kind != b"IHDR":
            raise ValueError("it does not begin with the chunk IHDR")
        first = False
        if length > size - file.tell():
            raise ValueError("it ends too early")
        if kind not in kinds:
            file.seek(length + 4, io.SEEK_CUR)
            continue
        data = file.read(length)
        if struct.unpack(">I", _exactly(file, 4))[0] != zlib.crc32(data, zlib.crc32(kind)):
            raise ValueError(f"its chunk {kind!r} has a wrong checksum")
        yield kind, data


def only_pixels(file: BinaryIO) -> tuple[BinaryIO, bytes | None]:
    """A PNG file without the chunks that hold text and the like, and its colour profile if it has one.

    Pillow limits the size of the chunks that are left out here, and refuses files that exceed it. The profile is b"" if
    it cannot be unpacked. Raises ValueError.
    """
    pixels, profile = io.BytesIO(), None
    pixels.write(SIGNATURE)
    for kind, data in read_chunks(file, PIXEL_CHUNKS | {b"iCCP"}):
        if kind == b"iCCP":
            profile = _profile(data)
            continue
        pixels.write(struct.pack(">I4s", len(data), kind))
        pixels.write(data)
        pixels.write(struct.pack(">I", zlib.crc32(data, zlib.crc32(kind))))
    pixels.seek(0)
    return pixels, profile


def inflate(data: bytes, most: int) -> bytes:
    """Unpack zlib data of at most `most` bytes. Raises ValueError if they are more, and for damaged data."""
    unpacker = zlib.decompressobj()
    try:
        unpacked = unpacker.decompress(data, most + 1)
    except zlib.error as error:
        raise ValueError(str(error)) from error
    if len(unpacked) > most or not unpacker.eof:
        raise ValueError(f"its compressed data are cut short, or hold more than {most:,} bytes")
    return unpacked


def _profile(data: bytes) -> bytes:
    """The colour profile in the data of a chunk iCCP: a name, a zero byte, the method 0 and packed bytes."""
    packed = data.partition(b"\0")[2]
    try:
        return inflate(packed[1:], MOST_PROFILE_BYTES) if packed[:1] == b"\0" else b""
    except ValueError:
        return b""


def _exactly(file: BinaryIO, count: int) -> bytes:
    data = file.read(count)
    if len(data) < count:
        raise ValueError("it ends too early")
    return data
