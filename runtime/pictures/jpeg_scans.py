"""How a JPEG file stores its pixels: in one scan, or in several that are combined."""

from __future__ import annotations

from typing import BinaryIO

_SEQUENTIAL, _START_OF_SCAN = (0xC0, 0xC1), 0xDA
_NO_FRAMES = (0xC4, 0xC8, 0xCC)  # markers among those of frames that mean something else


def is_one_scan(file: BinaryIO) -> bool:
    """Whether the first scan holds all components and is sequential. Then a decoder keeps no coefficients.

    The position in the file stays. Damaged files have no such scan.
    """
    position = file.tell()
    try:
        file.seek(2)
        return _find_scan(file)
    finally:
        file.seek(position)


def _find_scan(file: BinaryIO) -> bool:
    components = 0
    while True:
        start, kind = file.read(1), 0xFF
        while kind == 0xFF:  # fill bytes
            following = file.read(1)
            kind = following[0] if following else 0
        size = int.from_bytes(file.read(2), "big")
        if start != b"\xff" or kind == 0 or size < 2:
            return False
        content = file.read(size - 2)
        if kind in _SEQUENTIAL and len(content) > 5:
            components = content[5]
        elif 0xC0 <= kind <= 0xCF and kind not in _NO_FRAMES:
            return False
        elif kind == _START_OF_SCAN:
            return bool(components) and content[:1] == bytes([components])
