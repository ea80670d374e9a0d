"""A strict reader of the wire format of protocol buffers. It needs no schema and no library.

The caller knows which field number has which meaning. Every function raises ValueError, or IndexError if the bytes
end inside a number. Wrap the reading of a file in `refuse_failures`. The format is described at
https://protobuf.dev/programming-guides/encoding.
"""

from __future__ import annotations

from collections.abc import Iterator

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
"""The wire types: numbers of variable size and of 8 bytes, bytes with a length, numbers of 4 bytes."""
_FIXED_BYTES = {FIXED64: 8, FIXED32: 4}
_MOST_FIELD = 2**29  # some readers drop the bits above it


def wire_fields(data: bytes) -> Iterator[tuple[int, int, bytes | int]]:
    """Field number, wire type and content of every field of a message.

    The content is an int for VARINT and bytes for the other types: little-endian for FIXED64 and FIXED32.
    """
    at, end = 0, len(data)
    while at < end:
        tag, at = (data[at], at + 1) if data[at] < 0x80 else varint(data, at)  # most are short, and this is fast
        number, wire = tag >> 3, tag & 7
        if not 0 < number < _MOST_FIELD:
            raise ValueError(f"it has the field {number}")
        if wire == VARINT:
            value, at = varint(data, at)
            yield number, wire, value
            continue
        if wire == BYTES:
            size, at = varint(data, at)
        elif wire in _FIXED_BYTES:
            size = _FIXED_BYTES[wire]
        else:
            raise ValueError(f"it has a field of type {wire}")
        if size > end - at:
            raise ValueError("it ends too early")
        yield number, wire, data[at : at + size]
        at += size
    if at != end:
        raise ValueError("it ends too early")


def fields(data: bytes) -> Iterator[tuple[int, bytes | int]]:
    """Field number and content of every field of a message, except numbers of a fixed size."""
    return ((number, value) for number, wire, value in wire_fields(data) if wire not in _FIXED_BYTES)


def message(value: bytes | int) -> bytes:
    """A text or message. Raises ValueError for a number in its place, which other readers ignore."""
    if isinstance(value, int):
        raise ValueError("it has a number where a text or message belongs")
    return value


def text(value: bytes) -> str:
    """The text in a field, which is UTF-8."""
    return str(value, "utf-8")


def numbers(data: bytes) -> dict[int, int]:
    """The whole numbers in a message by field number. Of a repeated field, the last."""
    return {number: value for number, value in fields(data) if isinstance(value, int)}


def signed(value: bytes | int, most: int) -> list[int]:
    """One number, or those packed in a text, as int64. Stops after `most` + 1 numbers."""
    found = [value] if isinstance(value, int) else []
    at = 0
    while isinstance(value, bytes) and at < len(value) and len(found) <= most:
        number, at = varint(value, at)
        found.append(number)
    return [number - 2**64 if number >= 2**63 else number for number in found]


def varint(data: bytes, at: int) -> tuple[int, int]:
    """A number of variable size that begins at an index, and the index after it."""
    byte = data[at]
    if byte < 0x80:
        return byte, at + 1
    result = 0
    for shift in range(0, 70, 7):
        byte = data[at]
        at += 1
        result |= (byte & 0x7F) << shift
        if byte < 0x80:
            return result, at
    raise ValueError("it has a number without an end")
