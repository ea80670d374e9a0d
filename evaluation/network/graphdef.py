"""A reader of frozen TensorFlow graphs (GraphDef files) that needs neither TensorFlow nor a schema.

Everything that a graph could do with sizes that its file does not hold is refused. Field numbers are those of
graph.proto, node_def.proto, attr_value.proto and tensor.proto of TensorFlow.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn, TypeAlias

import numpy as np
from numpy.typing import NDArray

from flexvar_runtime.checks import short
from flexvar_runtime.errors import ArtifactRefused
from flexvar_runtime.files import protobuf
from flexvar_runtime.files.parsing import refuse_failures
from flexvar_runtime.files.reading import read_small

MOST_BYTES = 2**29
FIX = "Use the original file classify_image_graph_def.pb of OpenAI's evaluator."
EXPECTED = "a frozen TensorFlow graph"
_MOST_NODES, _MOST_INPUTS, _MOST_ATTRIBUTES, _MOST_DIMS, _MOST_NUMBERS = 10_000, 1_000, 100, 8, 1_000
_MOST_FILLED = 2**20  # elements of a tensor that is filled with one number
_MOST_SINGLE = 2**16  # elements of a tensor that come as single numbers, each with a Python object of its own
_GRAPH_NODE, _GRAPH_LIBRARY = 1, 2
_GRAPH_PARTS = frozenset({1, 2, 3, 4})
_NODE_NAME, _NODE_OPERATION, _NODE_INPUT, _NODE_ATTRIBUTE = 1, 2, 3, 5
_NODE_PARTS = frozenset(range(1, 8))
_VALUE_LIST, _VALUE_BYTES, _VALUE_INTEGER, _VALUE_FLOAT, _VALUE_FLAG, _VALUE_TYPE, _VALUE_TENSOR = 1, 2, 3, 4, 5, 6, 8
_TENSOR_TYPE, _TENSOR_SHAPE, _TENSOR_CONTENT, _TENSOR_FLOATS, _TENSOR_INTEGERS = 1, 2, 4, 5, 7
_FLOAT, _INT32 = 1, 3  # element types
_ELEMENTS: dict[int, np.dtype[Any]] = {_FLOAT: np.dtype("<f4"), _INT32: np.dtype("<i4")}

Array: TypeAlias = NDArray[Any]


@dataclass(frozen=True)
class Attribute:
    """One attribute of a node.

    kind: "flag", "integer", "float", "bytes", "type", "tensor", "integers" or "other". value: a bool, int, float,
    bytes, the number of an element type, an array, or a tuple of int. It is None for "other", and for a tensor whose
    elements are neither float32 nor int32.
    """

    kind: str
    value: Any = None


@dataclass(frozen=True)
class GraphNode:
    """One node. inputs: as the file has them, such as "pool", "split:1", or "^check" for a node that must run before.

    The methods that return an attribute raise ArtifactRefused if it has another kind.
    """

    name: str
    operation: str
    inputs: tuple[str, ...]
    attributes: dict[str, Attribute] = field(repr=False)

    @property
    def sources(self) -> tuple[str, ...]:
        """The inputs that carry a tensor."""
        return tuple(name for name in self.inputs if not name.startswith("^"))

    def flag(self, key: str, default: bool) -> bool:
        value = self._value(key, "flag", default)
        return bool(value)

    def number(self, key: str) -> float:
        return float(self._value(key, "float", None))

    def text(self, key: str, default: str | None = None) -> str:
        """A short text, such as "SAME"."""
        value = self._value(key, "bytes", None if default is None else default.encode())
        return str(value, "ascii", "replace")

    def integers(self, key: str, default: tuple[int, ...] | None = None) -> tuple[int, ...]:
        return tuple(self._value(key, "integers", default))

    def tensor(self, key: str) -> Array:
        return np.asarray(self._value(key, "tensor", None))

    def refuse(self, problem: str, expected: str) -> NoReturn:
        """Raise ArtifactRefused. problem: a clause such as "has no inputs"."""
        name, operation = short(self.name), short(self.operation)
        got = f"The node {name} ({operation}) of the graph {problem}, but it must have {expected}."
        raise ArtifactRefused(got, expected=expected, fix=FIX)

    def _value(self, key: str, kind: str, default: Any) -> Any:
        found = self.attributes.get(key)
        if found is None and default is not None:
            return default
        if found is None or found.kind != kind or found.value is None:
            problem = "lacks the attribute" if found is None else f"has a value of kind {found.kind} as the attribute"
            self.refuse(f"{problem} {short(key)}", f"a value of kind {kind} for it")
        return found.value


@dataclass(frozen=True)
class Graph:
    """Nodes by name, in the order of the file. sha256: of the file."""

    nodes: dict[str, GraphNode]
    sha256: str


def read_graph(path: Path) -> Graph:
    """Read a frozen graph of at most MOST_BYTES. Raises ArtifactRefused if it is not one, and OutOfMemory."""
    with refuse_failures(f"{path.name} cannot be read as a TensorFlow graph", expected=EXPECTED, fix=FIX):
        data = read_small(path, fix=FIX, most=MOST_BYTES)
        nodes: dict[str, GraphNode] = {}
        for number, value in protobuf.fields(data):
            if number not in _GRAPH_PARTS or (number == _GRAPH_LIBRARY and value):
                raise ValueError(f"the graph has the field {number}")
            if number != _GRAPH_NODE:
                continue
            node = _node(protobuf.message(value))
            if node.name in nodes:
                raise ValueError(f"it has the node {short(node.name)} twice")
            nodes[node.name] = node
            if len(nodes) > _MOST_NODES:
                raise ValueError(f"it has more than {_MOST_NODES:,} nodes")
        if not nodes:
            raise ValueError("it has no nodes")
        return Graph(nodes, hashlib.sha256(data).hexdigest())


def _node(data: bytes) -> GraphNode:
    name, operation, inputs = "", "", list[str]()
    attributes: dict[str, Attribute] = {}
    for number, part in protobuf.fields(data):
        if number not in _NODE_PARTS:
            raise ValueError(f"a node has the field {number}")
        value = protobuf.message(part)
        if number == _NODE_NAME:
            name = protobuf.text(value)
        elif number == _NODE_OPERATION:
            operation = protobuf.text(value)
        elif number == _NODE_INPUT:
            inputs.append(protobuf.text(value))
        elif number == _NODE_ATTRIBUTE:
            key, attribute = _entry(value)
            if key in attributes:
                raise ValueError(f"a node has the attribute {short(key)} twice")
            attributes[key] = attribute
        if len(inputs) > _MOST_INPUTS or len(attributes) > _MOST_ATTRIBUTES:
            raise ValueError("a node has too many inputs or attributes")
    if not name or not operation:
        raise ValueError("a node has no name or no operation")
    return GraphNode(name, operation, tuple(inputs), attributes)


def _entry(data: bytes) -> tuple[str, Attribute]:
    entry = dict(protobuf.fields(data))
    if not entry.keys() <= {1, 2}:
        raise ValueError("an attribute has unknown fields")
    return protobuf.text(protobuf.message(entry.get(1, b""))), _attribute(protobuf.message(entry.get(2, b"")))


def _attribute(data: bytes) -> Attribute:
    found = protobuf.wire_fields(data)
    number, wire, value = next(found, (0, protobuf.BYTES, b""))
    if next(found, None) is not None:
        raise ValueError("an attribute has several values")
    if wire == protobuf.VARINT and isinstance(value, int):
        if number == _VALUE_FLAG:
            return Attribute("flag", value != 0)
        if number == _VALUE_TYPE:
            return Attribute("type", value)
        if number == _VALUE_INTEGER:
            return Attribute("integer", protobuf.signed(value, 1)[0])
    elif wire == protobuf.FIXED32 and number == _VALUE_FLOAT:
        return Attribute("float", float(np.frombuffer(protobuf.message(value), "<f4")[0]))
    elif wire == protobuf.BYTES:
        content = protobuf.message(value)
        if number == _VALUE_BYTES:
            return Attribute("bytes", content)
        if number == _VALUE_TENSOR:
            return Attribute("tensor", _tensor(content))
        if number == _VALUE_LIST:
            return _integers(content)
    return Attribute("other")


def _integers(data: bytes) -> Attribute:
    """A list, if all of its entries are integers. An empty list is one too."""
    numbers = list[int]()
    for number, wire, value in protobuf.wire_fields(data):
        if number != _VALUE_INTEGER or wire not in (protobuf.VARINT, protobuf.BYTES):
            return Attribute("other")
        numbers += protobuf.signed(value, _MOST_NUMBERS)
        if len(numbers) > _MOST_NUMBERS:
            raise ValueError(f"an attribute has more than {_MOST_NUMBERS:,} numbers")
    return Attribute("integers", tuple(numbers))


def _tensor(data: bytes) -> Array | None:
    """A read-only array, or None if its elements are neither float32 nor int32.

    The file holds all elements, or one that is repeated. TensorFlow also fills a tensor with zeros if the file holds
    none, which is refused here.
    """
    kind, sizes, content = 0, list[int](), b""
    floats, integers = list[bytes](), list[int]()
    for number, wire, value in protobuf.wire_fields(data):
        if number == _TENSOR_TYPE and isinstance(value, int):
            kind = value
        elif number == _TENSOR_SHAPE:
            sizes += _shape(protobuf.message(value))
        elif number == _TENSOR_CONTENT:
            content = protobuf.message(value)
        elif number == _TENSOR_FLOATS and wire in (protobuf.FIXED32, protobuf.BYTES):
            floats.append(protobuf.message(value))
        elif number == _TENSOR_INTEGERS and wire in (protobuf.VARINT, protobuf.BYTES):
            integers += protobuf.signed(value, _MOST_SINGLE)
        if max(len(floats), len(integers)) > _MOST_SINGLE:
            raise ValueError(f"a tensor has more than {_MOST_SINGLE:,} single numbers")
    if kind not in _ELEMENTS:
        return None
    element, elements = _ELEMENTS[kind], math.prod(sizes)
    stored = [part for part in (content, b"".join(floats), np.array(integers, np.int64).tobytes()) if part]
    if len(stored) > 1 or (floats and kind != _FLOAT) or (integers and kind != _INT32):
        raise ValueError("a tensor has its elements twice, or as numbers of another type")
    if any(not -(2**31) <= number < 2**31 for number in integers):
        raise ValueError("a tensor of 32-bit integers has a larger number")
    flat = np.array(integers, element) if integers else np.frombuffer(content or b"".join(floats), element)
    if flat.size == 1 and 1 < elements <= _MOST_FILLED and not content:
        return np.broadcast_to(flat, sizes)
    if flat.size != elements:
        raise ValueError(f"a tensor of shape {short(tuple(sizes))} has {flat.size:,} elements")
    return flat.reshape(sizes)


def _shape(data: bytes) -> list[int]:
    """The sizes of a TensorShapeProto. Raises ValueError for sizes that are unknown."""
    sizes = list[int]()
    for number, value in protobuf.fields(data):
        if number != 2:
            raise ValueError("a tensor has a shape of unknown rank")
        sizes += protobuf.signed(protobuf.numbers(protobuf.message(value)).get(1, 0), 1)
        if len(sizes) > _MOST_DIMS or sizes[-1] < 0:
            raise ValueError(f"a tensor has more than {_MOST_DIMS} axes, or an unknown size")
    return sizes
