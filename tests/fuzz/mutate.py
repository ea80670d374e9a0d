"""Random changes to bytes, to the fields of protobuf messages and to JSON documents."""

from __future__ import annotations

import copy
from random import Random
from typing import Any, NamedTuple

NUMBERS = (0, 1, 2, 7, 127, 128, 255, 2**16, 10**9, 2**31 - 1, 2**31, 2**32, 2**63, 2**64 - 1)
TEXTS = (
    *(b"", b"\0", b"\xff\xfe", b"a" * 5000, b"/etc/passwd", b"../outside", b"*/_ORT_MEM_ADDR_/*", b"engines/x"),
    *b"Loop If Scan Identity Constant com.microsoft location offset length step.onnx.data tokens".split(),
)
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, 2, 3, -1, 64, 2**31, 2**63, 2**64, 10**30, 0.5, -0.5, 1e308, [], [None], {}, {"a": 1}),
    *("", "a", "1_2", "1_2_99999", "../x", "\0", "a" * 5000, "float16", "fp16", "step.onnx", "0" * 64),
)


def mutate_bytes(data: bytes, rng: Random) -> bytes:
    """The bytes with a few of them changed, inserted, removed, repeated or cut off."""
    content = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8))):
        start = rng.choice((rng.randrange(len(content) + 1), rng.randrange(min(len(content), 200) + 1)))
        length = rng.choice((1, 1, 2, 4, 8, 100))
        kind = rng.randrange(6)
        if kind == 0 and start < len(content):
            content[start] ^= 1 << rng.randrange(8)
        elif kind == 1:
            piece = rng.choice((rng.randbytes(length), b"\0" * length, b"\xff" * length))
            content[start : start + length] = piece[: len(content) - start]
        elif kind == 2:
            content[start:start] = rng.randbytes(length)
        elif kind == 3:
            del content[start : start + length]
        elif kind == 4:
            content[start:start] = content[start : start + length]
        elif rng.random() < 0.3:
            del content[start:]
    return bytes(content)


class Field(NamedTuple):
    """A field of a protobuf message: number, wire type, and value (an int, or the bytes)."""

    number: int
    wire: int
    value: int | bytes


def parse(data: bytes) -> list[Field] | None:
    """The fields of a protobuf message, or None if the bytes are none."""
    fields, at = [], 0
    try:
        while at < len(data):
            key, at = _varint(data, at)
            number, wire = key >> 3, key & 7
            if number == 0 or wire not in (0, 1, 2, 5):
                return None
            value: int | bytes
            if wire == 0:
                value, at = _varint(data, at)
            else:
                length, at = (8, at) if wire == 1 else (4, at) if wire == 5 else _varint(data, at)
                value, at = data[at : at + length], at + length
            if at > len(data):
                return None
            fields.append(Field(number, wire, value))
    except IndexError:
        return None
    return fields


def serialise(fields: list[Field]) -> bytes:
    """The message that has these fields."""
    parts = []
    for number, wire, value in fields:
        parts.append(_coded(number << 3 | wire))
        if isinstance(value, int):
            parts.append(_coded(value))
        else:
            parts += [_coded(len(value)), value] if wire == 2 else [value]
    return b"".join(parts)


def mutate_message(data: bytes, rng: Random) -> bytes:
    """A protobuf message with one field changed, removed, repeated, moved or put in place of another, at any depth."""
    fields = parse(data)
    if not fields:
        return mutate_bytes(data, rng)
    at = rng.randrange(len(fields))
    number, wire, value = fields[at]
    inner = isinstance(value, bytes) and wire == 2 and len(value) > 1 and parse(value)
    if isinstance(value, bytes) and inner and rng.random() < 0.8:
        fields[at] = Field(number, wire, mutate_message(value, rng))
        return serialise(fields)
    kind = rng.randrange(6)
    if kind == 0:
        del fields[at]
    elif kind == 1:
        fields.insert(rng.randrange(len(fields) + 1), fields[at])
    elif kind == 2:
        fields.insert(rng.randrange(len(fields)), fields.pop(at))
    elif kind == 3:
        other = rng.choice(fields)
        fields[at] = Field(number, other.wire, other.value)
    elif isinstance(value, int):
        fields[at] = Field(number, wire, rng.choice((*NUMBERS, value + 1, max(0, value - 1))))
    elif wire == 2:
        fields[at] = Field(number, wire, rng.choice((*TEXTS, mutate_bytes(value, rng), mutate_bytes(value, rng))))
    else:
        fields[at] = Field(number, wire, rng.randbytes(len(value)))
    return serialise(fields)


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value, shift, at = value | (byte & 127) << shift, shift + 7, at + 1
        if byte < 128:
            return value & 2**64 - 1, at


def _coded(value: int) -> bytes:
    parts = bytearray()
    while value > 127:
        parts.append(value & 127 | 128)
        value >>= 7
    return bytes([*parts, value])


def mutate_json(document: Any, rng: Random) -> tuple[Any, list[str | int]]:
    """The document with one value changed, removed, added or repeated, and the path of that value."""
    document = copy.deepcopy(document)
    node, path = document, []
    while True:
        keys: list[Any] = list(node) if isinstance(node, dict) else list(range(len(node)))
        key = rng.choice(keys)
        path.append(key)
        if not isinstance(node[key], dict | list) or not node[key] or rng.random() < 0.1:
            break
        node = node[key]
    kind = rng.randrange(6)
    if kind == 0:
        del node[key]
    elif kind == 1 and isinstance(node, dict):
        node[rng.choice((f"{key} ", "new", str(key).upper(), ""))] = node[key]
    elif kind == 1:
        node.append(node[key])
    elif kind == 2 and isinstance(node[key], int | float):
        node[key] = rng.choice((node[key] + 1, -node[key], node[key] * 2, float(node[key]), str(node[key])))
    elif kind == 2 and isinstance(node[key], str):
        node[key] = rng.choice((node[key][:-1], node[key] + "0", node[key].upper(), node[key][::-1]))
    else:
        node[key] = rng.choice(VALUES)
    return document, path
