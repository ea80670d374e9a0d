"""What an ONNX file asks for, read off its protobuf: operators, which of their inputs are given, and weight files.

The builder runs where neither onnx nor torch is installed, and TensorRT's parser drops some inputs without a word.
Field numbers are those of onnx.proto.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from flexvar_runtime.errors import ArtifactRefused

_MODEL_GRAPH, _MODEL_FUNCTION = 7, 25
_GRAPH_NODE, _GRAPH_INITIALIZER, _GRAPH_SPARSE = 1, 5, 15
_FUNCTION_NODE = 7
_NODE_INPUT, _NODE_NAME, _NODE_OPERATOR, _NODE_ATTRIBUTE = 1, 3, 4, 5
_ATTRIBUTE_TENSOR, _ATTRIBUTE_GRAPH, _ATTRIBUTE_TENSORS, _ATTRIBUTE_GRAPHS = 5, 6, 10, 11
_TENSOR_EXTERNAL = 13
_ENTRY_KEY, _ENTRY_VALUE = 1, 2
_BYTES = 2  # wire type of texts, bytes and messages
_MAX_DEPTH = 8


@dataclass(frozen=True)
class Node:
    """One operator. inputs: names, "" for one left out."""

    name: str
    operator: str
    inputs: tuple[str, ...]


@dataclass(frozen=True)
class Scan:
    """All nodes, those of subgraphs and functions included, and the files that weights are taken from."""

    nodes: tuple[Node, ...]
    weight_files: frozenset[str]


def scan(path: Path) -> Scan:
    """Read an ONNX file without its weights. Raises ArtifactRefused where it is none."""
    nodes: list[Node] = []
    files: set[str] = set()
    try:
        for number, value in _fields(memoryview(path.read_bytes())):
            if number == _MODEL_GRAPH:
                _graph(value, nodes, files, 0)
            elif number == _MODEL_FUNCTION:
                nodes += [_node(node, nodes, files, 0) for field, node in _fields(value) if field == _FUNCTION_NODE]
    except (IndexError, ValueError, RecursionError) as error:
        raise ArtifactRefused(
            f"{path.name} ({error})", expected="a graph in ONNX form", fix="export the bundle again"
        ) from error
    return Scan(tuple(nodes), frozenset(files))


def _graph(data: memoryview, nodes: list[Node], files: set[str], depth: int) -> None:
    if depth > _MAX_DEPTH:
        raise ValueError("graphs in graphs in graphs")
    for number, value in _fields(data):
        if number == _GRAPH_NODE:
            nodes.append(_node(value, nodes, files, depth))
        elif number == _GRAPH_INITIALIZER:
            files |= _weight_files(value)
        elif number == _GRAPH_SPARSE:
            raise ValueError("sparse weights")


def _node(data: memoryview, nodes: list[Node], files: set[str], depth: int) -> Node:
    name = operator = ""
    inputs: list[str] = []
    for number, value in _fields(data):
        if number == _NODE_INPUT:
            inputs.append(_text(value))
        elif number == _NODE_NAME:
            name = _text(value)
        elif number == _NODE_OPERATOR:
            operator = _text(value)
        elif number == _NODE_ATTRIBUTE:
            for field, part in _fields(value):
                if field in (_ATTRIBUTE_TENSOR, _ATTRIBUTE_TENSORS):
                    files |= _weight_files(part)
                elif field in (_ATTRIBUTE_GRAPH, _ATTRIBUTE_GRAPHS):
                    _graph(part, nodes, files, depth + 1)
    return Node(name, operator, tuple(inputs))


def _weight_files(tensor: memoryview) -> set[str]:
    entries = [dict(_fields(value)) for number, value in _fields(tensor) if number == _TENSOR_EXTERNAL]
    empty = memoryview(b"")
    pairs = [(_text(entry.get(_ENTRY_KEY, empty)), _text(entry.get(_ENTRY_VALUE, empty))) for entry in entries]
    return {value for key, value in pairs if key == "location"}


def _text(value: memoryview) -> str:
    return str(value, "utf-8")


def _fields(data: memoryview) -> Iterator[tuple[int, memoryview]]:
    """Number and content of the texts, bytes and messages in a message; numbers are passed over."""
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        number, wire = tag >> 3, tag & 7
        if wire == _BYTES:
            size, at = _varint(data, at)
            if size > len(data) - at:
                raise ValueError("cut")
            yield number, data[at : at + size]
            at += size
        elif wire == 0:
            _, at = _varint(data, at)
        elif wire in (1, 5):
            at += 8 if wire == 1 else 4
        else:
            raise ValueError(f"wire type {wire}")
    if at != len(data):
        raise ValueError("cut")


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    result = 0
    for shift in range(0, 70, 7):
        byte = data[at]
        at += 1
        result |= (byte & 0x7F) << shift
        if byte < 0x80:
            return result, at
    raise ValueError("a number without an end")
