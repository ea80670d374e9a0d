"""The reader of protocol buffers reads every wire type, and refuses bytes that are none."""

from __future__ import annotations

import struct

import pytest

from flexvar_runtime.files.protobuf import (
    BYTES,
    FIXED32,
    FIXED64,
    VARINT,
    fields,
    message,
    numbers,
    signed,
    wire_fields,
)

PLAIN = b"\x08\x96\x01" + b"\x12\x02hi" + b"\x1d" + struct.pack("<f", 1.5) + b"\x21" + struct.pack("<d", -2.5)


def test_every_wire_type() -> None:
    assert list(wire_fields(PLAIN)) == [
        (1, VARINT, 150),
        (2, BYTES, b"hi"),
        (3, FIXED32, struct.pack("<f", 1.5)),
        (4, FIXED64, struct.pack("<d", -2.5)),
    ]


def test_fields_leave_out_numbers_of_a_fixed_size() -> None:
    assert list(fields(PLAIN)) == [(1, 150), (2, b"hi")]
    assert numbers(PLAIN + b"\x08\x07") == {1: 7}  # of a repeated field, the last


def test_signed_numbers() -> None:
    assert signed(2**64 - 3, 9) == [-3] and signed(b"\x01\xac\x02", 9) == [1, 300]
    assert len(signed(b"\x01" * 100, 9)) == 10  # one too many, so that the caller can tell


@pytest.mark.parametrize("end", set(range(1, len(PLAIN))) - {3, 7, 12})
def test_cut_bytes_are_refused(end: int) -> None:
    """3, 7 and 12 are ends of fields."""
    with pytest.raises((ValueError, IndexError)):
        list(wire_fields(PLAIN[:end]))


@pytest.mark.parametrize(
    "data",
    [
        b"\x00\x01",  # field 0
        b"\x0b\x0c",  # a group
        b"\x0f",  # no such type
        b"\x12\xff\xff\xff\xff\x7f",  # 34 GB of text
        b"\x08" + b"\xff" * 11,  # a number without an end
        b"\x88\x80\x80\x80\x80\x01\x00",  # a field of more than 29 bits
    ],
)
def test_other_bytes_are_refused(data: bytes) -> None:
    with pytest.raises((ValueError, IndexError)):
        list(wire_fields(data))


def test_a_number_is_no_message() -> None:
    assert message(b"text") == b"text"
    with pytest.raises(ValueError, match="number"):
        message(3)
