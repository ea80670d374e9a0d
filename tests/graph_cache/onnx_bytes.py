"""ONNX graphs of a few bytes, made without onnx, for bundles that no backend runs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from flexvar_runtime.model.tensors import GraphSpec


def field(number: int, value: bytes | int) -> bytes:
    """One field of a protobuf message: a number, or text, bytes or a message."""
    if isinstance(value, int):
        return _varint(number << 3) + _varint(value)
    return _varint(number << 3 | 2) + _varint(len(value)) + value


def node(operator: str, inputs: Iterable[str], outputs: Iterable[str], *more: bytes) -> bytes:
    """One node of a graph. more: further fields."""
    texts = [field(1, name.encode()) for name in inputs] + [field(2, name.encode()) for name in outputs]
    return field(1, b"".join([*texts, field(4, operator.encode()), *more]))


def plain_graph(spec: GraphSpec, *more: bytes, types: Mapping[str, bytes] | None = None) -> bytes:
    """A graph with the inputs and outputs of `spec`, whose outputs are its first input.

    more: fields of the graph. types: further fields of inputs and outputs, by name.
    """
    nodes = [node("Identity", [spec.inputs[0].name], [tensor.name]) for tensor in spec.outputs]
    values = [(11, tensor) for tensor in spec.inputs] + [(12, tensor) for tensor in spec.outputs]
    parts = [
        *nodes,
        *(
            field(number, field(1, tensor.name.encode()) + (types or {}).get(tensor.name, b""))
            for number, tensor in values
        ),
        *more,
    ]
    return model(b"".join(parts))


def model(graph: bytes, *more: bytes) -> bytes:
    """A model of the operators of version 23. more: further fields."""
    return b"".join([field(1, 10), field(7, graph), field(8, field(1, b"") + field(2, 23)), *more])


def _varint(value: int) -> bytes:
    low, rest = value & 0x7F, value >> 7
    return bytes([low | 0x80]) + _varint(rest) if rest else bytes([low])
