"""A reader of ONNX files that needs no onnx: nodes with their inputs and outputs, types, and weight files.

The engine builder uses it because TensorRT's parser silently drops some inputs. `ort-cuda`, `export` and `inspect`
use it to find nodes without a CUDA kernel. Field numbers are those of onnx.proto.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import ArtifactRefused

_MODEL_GRAPH, _MODEL_OPSET, _MODEL_FUNCTION = 7, 8, 25
_OPSET_DOMAIN, _OPSET_VERSION = 1, 2
_GRAPH_NODE, _GRAPH_INITIALIZER, _GRAPH_SPARSE = 1, 5, 15
_GRAPH_VALUES = (11, 12, 13)  # inputs, outputs and inner tensors
_VALUE_NAME, _VALUE_TYPE, _TYPE_TENSOR, _TENSOR_KIND = 1, 2, 1, 1
_FUNCTION_NODE = 7
_NODE_TEXTS = (1, 2, 3, 4, 7)  # inputs, outputs, name, operator, domain
_NODE_ATTRIBUTE = 5
_ATTRIBUTE_TENSOR, _ATTRIBUTE_GRAPH, _ATTRIBUTE_TENSORS, _ATTRIBUTE_GRAPHS = 5, 6, 10, 11
_TENSOR_NAME, _TENSOR_EXTERNAL = 8, 13
_ENTRY_KEY, _ENTRY_VALUE = 1, 2
_BYTES = 2  # wire type of texts, bytes and messages
_MAX_DEPTH = 8
_SHAPES = frozenset({"Shape", "Size"})
_FLOATING = frozenset({1, 10, 11, 16})  # element types of the ONNX format: float32, float16, float64, bfloat16


@dataclass(frozen=True)
class Node:
    """One node. inputs: names, "" for an input that is left out. domain: "" for ONNX's own operators."""

    name: str
    operator: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...] = ()
    domain: str = ""


@dataclass(frozen=True)
class Scan:
    """Content of an ONNX file.

    nodes: all nodes, also those of subgraphs and functions. weight_files: files that hold weights. constants: names of
    the tensors in the file. kinds: element types (numbers of the ONNX format) by tensor, if the file has them. opset:
    version of ONNX's own operators, 0 if the file has none.
    """

    nodes: tuple[Node, ...]
    weight_files: frozenset[str]
    constants: frozenset[str] = frozenset()
    kinds: dict[str, int] = field(default_factory=dict)
    opset: int = 0

    def shape_arithmetic(self) -> frozenset[str]:
        """Names of the tensors that are computed from shapes, or from shapes and constants, and not floating-point."""
        shapes, constants = set[str](), {"", *self.constants}
        for node in self.nodes:
            given = set(node.inputs) - constants
            if node.operator == "Constant":
                constants |= set(node.outputs)
            elif node.operator in _SHAPES or (given and given <= shapes):
                shapes |= {name for name in node.outputs if self.kinds.get(name) not in _FLOATING}
        return frozenset(shapes)


class _Found:
    """The content found so far."""

    def __init__(self) -> None:
        self.nodes: list[Node] = []
        self.files, self.constants = set[str](), set[str]()
        self.kinds: dict[str, int] = {}
        self.opset = 0


def scan(path: Path) -> Scan:
    """Read an ONNX file without its weights. Raises ArtifactRefused if it is not an ONNX file."""
    found = _Found()
    try:
        for number, value in _fields(memoryview(path.read_bytes())):
            if number == _MODEL_GRAPH:
                _graph(value, found, 0)
            elif number == _MODEL_OPSET and not any(field == _OPSET_DOMAIN and text for field, text in _fields(value)):
                found.opset = _numbers(value).get(_OPSET_VERSION, 0)
            elif number == _MODEL_FUNCTION:
                found.nodes += [_node(node, found, 0) for field, node in _fields(value) if field == _FUNCTION_NODE]
    except (IndexError, ValueError, RecursionError) as error:
        problem, fix = f"{path.name} cannot be read as ONNX ({error}).", "Export the bundle again."
        raise ArtifactRefused(problem, expected="a graph in ONNX format", fix=fix) from error
    return Scan(tuple(found.nodes), frozenset(found.files), frozenset(found.constants), found.kinds, found.opset)


def _graph(data: memoryview, found: _Found, depth: int) -> None:
    if depth > _MAX_DEPTH:
        raise ValueError("its graphs are nested too deep")
    for number, value in _fields(data):
        if number == _GRAPH_NODE:
            found.nodes.append(_node(value, found, depth))
        elif number == _GRAPH_INITIALIZER:
            found.files |= _weight_files(value)
            found.constants |= {_text(part) for field, part in _fields(value) if field == _TENSOR_NAME}
        elif number in _GRAPH_VALUES:
            _value(value, found)
        elif number == _GRAPH_SPARSE:
            raise ValueError("it has sparse weights")


def _value(data: memoryview, found: _Found) -> None:
    """Record the element type of a tensor, if the file has it."""
    parts = dict(_fields(data))
    tensor = dict(_fields(parts.get(_VALUE_TYPE, memoryview(b"")))).get(_TYPE_TENSOR)
    if tensor is not None and _VALUE_NAME in parts:
        found.kinds[_text(parts[_VALUE_NAME])] = _numbers(tensor).get(_TENSOR_KIND, 0)


def _node(data: memoryview, found: _Found, depth: int) -> Node:
    texts: dict[int, list[str]] = {number: [] for number in _NODE_TEXTS}
    for number, value in _fields(data):
        if number in texts:
            texts[number].append(_text(value))
        elif number == _NODE_ATTRIBUTE:
            for field, part in _fields(value):
                if field in (_ATTRIBUTE_TENSOR, _ATTRIBUTE_TENSORS):
                    found.files |= _weight_files(part)
                elif field in (_ATTRIBUTE_GRAPH, _ATTRIBUTE_GRAPHS):
                    _graph(part, found, depth + 1)
    inputs, outputs, *single = (texts[number] for number in _NODE_TEXTS)
    name, operator, domain = (values[-1] if values else "" for values in single)
    return Node(name, operator, tuple(inputs), tuple(outputs), domain)


def _weight_files(tensor: memoryview) -> set[str]:
    entries = [dict(_fields(value)) for number, value in _fields(tensor) if number == _TENSOR_EXTERNAL]
    empty = memoryview(b"")
    pairs = [(_text(entry.get(_ENTRY_KEY, empty)), _text(entry.get(_ENTRY_VALUE, empty))) for entry in entries]
    return {value for key, value in pairs if key == "location"}


def _text(value: memoryview) -> str:
    return str(value, "utf-8")


def _fields(data: memoryview) -> Iterator[tuple[int, memoryview]]:
    """Field number and content of the texts, bytes and messages in a message."""
    return ((number, value) for number, value in _all_fields(data) if isinstance(value, memoryview))


def _numbers(data: memoryview) -> dict[int, int]:
    """The whole numbers in a message by field number. Of a repeated field, the last."""
    return {number: value for number, value in _all_fields(data) if isinstance(value, int)}


def _all_fields(data: memoryview) -> Iterator[tuple[int, memoryview | int]]:
    """Field number and content of every field of a message, except numbers of a fixed size."""
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        number, wire = tag >> 3, tag & 7
        if wire == _BYTES:
            size, at = _varint(data, at)
            if size > len(data) - at:
                raise ValueError("it ends too early")
            yield number, data[at : at + size]
            at += size
        elif wire == 0:
            value, at = _varint(data, at)
            yield number, value
        elif wire in (1, 5):
            at += 8 if wire == 1 else 4
        else:
            raise ValueError(f"it has a field of type {wire}")
    if at != len(data):
        raise ValueError("it ends too early")


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    result = 0
    for shift in range(0, 70, 7):
        byte = data[at]
        at += 1
        result |= (byte & 0x7F) << shift
        if byte < 0x80:
            return result, at
    raise ValueError("it has a number without an end")
