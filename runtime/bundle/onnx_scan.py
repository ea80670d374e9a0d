"""A strict reader of ONNX files that needs no onnx: nodes with their inputs and outputs, types, and stored tensors.

A file that libraries could read in another way is refused: unknown parts, functions, subgraphs, sparse tensors, and
files that do not begin as serialised ONNX does. `graph_rules.py` checks what was read when a bundle opens. The engine
builder uses it because TensorRT's parser silently drops some inputs. `ort-cuda`, `export` and `inspect` use it to find
nodes without a CUDA kernel. Field numbers are those of onnx.proto.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..checks import short
from ..files import protobuf
from ..files.parsing import refuse_failures
from ..files.reading import read_small

_MODEL_GRAPH, _MODEL_OPSET, _MODEL_METADATA = 7, 8, 14
_MODEL_PARTS = frozenset({*range(1, 9), 14})  # not 20, 25 and 26: training, functions, devices
_MODEL_BEGIN = b"\x08"  # the first field: version of the format. Other formats that libraries read begin differently
_MOST_BYTES = 2**24  # graphs without their weights are far smaller
_MOST_PARTS = 10_000  # nodes, tensors and values of a graph, to end early. `graph_rules.py` has the limit of a model
_MOST_DIMS = 8
_MOST_NUMBERS, _LARGEST_NUMBER = 64, 2**20  # of attributes, such as axes and kernel sizes
_MOST_OPSET = 100  # libraries may try every version up to that of a file
_OPSET_DOMAIN, _OPSET_VERSION = 1, 2
_GRAPH_NODE, _GRAPH_NAME, _GRAPH_INITIALIZER, _GRAPH_DOC, _GRAPH_METADATA = 1, 2, 5, 10, 16
_GRAPH_INPUT, _GRAPH_OUTPUT, _GRAPH_INNER = _GRAPH_VALUES = (11, 12, 13)
_GRAPH_IGNORED = frozenset({_GRAPH_NAME, _GRAPH_DOC, _GRAPH_METADATA})
_VALUE_NAME, _VALUE_TYPE, _TYPE_TENSOR = 1, 2, 1
_TENSOR_KIND, _TENSOR_SHAPE, _SHAPE_DIM, _DIM_SIZE = 1, 2, 1, 1
_NODE_TEXTS = (1, 2, 3, 4, 7)  # inputs, outputs, name, operator, domain
_NODE_ATTRIBUTE, _NODE_DOC, _NODE_METADATA = 5, 6, 9
_ATTRIBUTE_TENSOR, _ATTRIBUTE_TENSORS, _ATTRIBUTE_NUMBERS = 5, 10, (3, 8)
_ATTRIBUTE_PARTS = frozenset({1, 2, 3, 4, 5, 7, 8, 9, 10, 13, 20})  # not graphs, sparse tensors, types and references
_TENSOR_DIMS, _TENSOR_TYPE, _TENSOR_INT32, _TENSOR_INT64, _TENSOR_NAME, _TENSOR_RAW = 1, 2, 5, 7, 8, 9
_TENSOR_EXTERNAL, _TENSOR_LOCATION = 13, 14
_TENSOR_PARTS = frozenset({1, 2, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 16})  # not 3: segments
_ENTRY_KEY, _ENTRY_VALUE = 1, 2
_MOST_CODE = 2**31  # of an element type or location. Some readers drop the bits above it
_SHAPES = frozenset({"Shape", "Size"})
_FLOATING = frozenset({1, 10, 11, 16})  # element types of the ONNX format: float32, float16, float64, bfloat16
_EXPECTED, _FIX = "a graph in ONNX format", "Export the bundle again."
INTEGERS = {6: "<i4", 7: "<i8"}  # element types of the ONNX format that hold sizes, and their NumPy types
FEW = 64  # a tensor of integers with at most so many elements can be a shape


@dataclass(frozen=True)
class Node:
    """One node. inputs: names, "" for an input that is left out. domain: "" for ONNX's own operators.

    tensors: how many of its attributes are tensors.
    """

    name: str
    operator: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...] = ()
    domain: str = ""
    tensors: int = 0


@dataclass(frozen=True)
class StoredTensor:
    """A constant tensor. kind: element type, a number of the ONNX format.

    external: key and value of the entries that say where its bytes are, if they are in another file. integers: its
    values, if it is a short tensor of integers in the graph's file. raw: its bytes, if the file has them in one piece.
    """

    name: str
    kind: int
    shape: tuple[int, ...]
    external: tuple[tuple[str, str], ...] = ()
    integers: tuple[int, ...] = ()
    raw: bytes = field(default=b"", repr=False, compare=False)


@dataclass(frozen=True)
class Scan:
    """Content of an ONNX file.

    nodes: in the order of the file. tensors: the constants, also those in attributes. constants: names of the tensors
    that are no attributes. inputs, outputs: names. kinds: element types (numbers of the ONNX format) by tensor, and
    sizes: shapes by tensor, in which None is a size that may change; both only if the file has them. opset: version of
    ONNX's own operators, 0 if the file has none. domains: names of other sets of operators. metadata: key and value of
    the model's own entries.
    """

    nodes: tuple[Node, ...]
    tensors: tuple[StoredTensor, ...] = ()
    constants: frozenset[str] = frozenset()
    inputs: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    kinds: dict[str, int] = field(default_factory=dict)
    sizes: dict[str, tuple[int | None, ...]] = field(default_factory=dict)
    opset: int = 0
    domains: frozenset[str] = frozenset()
    metadata: tuple[tuple[str, str], ...] = ()

    @property
    def weight_files(self) -> frozenset[str]:
        """The files that hold weights, as the graph names them."""
        return frozenset(value for tensor in self.tensors for key, value in tensor.external if key == "location")

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
        self.tensors: list[StoredTensor] = []
        self.constants, self.domains = set[str](), set[str]()
        self.values: dict[int, list[str]] = {number: [] for number in _GRAPH_VALUES}
        self.kinds: dict[str, int] = {}
        self.sizes: dict[str, tuple[int | None, ...]] = {}
        self.opset = 0
        self.metadata: list[tuple[str, str]] = []

    def require_few(self) -> None:
        """Raise ValueError if there are more parts than a graph may have."""
        parts: tuple[list[Any], ...] = (self.nodes, self.tensors, self.metadata, *self.values.values())
        if max(map(len, parts)) > _MOST_PARTS:
            raise ValueError(f"it has more than {_MOST_PARTS:,} nodes, tensors, values or entries")

    def scan(self) -> Scan:
        return Scan(
            nodes=tuple(self.nodes),
            tensors=tuple(self.tensors),
            constants=frozenset(self.constants),
            inputs=tuple(self.values[_GRAPH_INPUT]),
            outputs=tuple(self.values[_GRAPH_OUTPUT]),
            kinds=self.kinds,
            sizes=self.sizes,
            opset=self.opset,
            domains=frozenset(self.domains),
            metadata=tuple(self.metadata),
        )


def scan(path: Path) -> Scan:
    """Read an ONNX file without its weights. Raises ArtifactRefused if it is not an ONNX file, or not a plain one."""
    with refuse_failures(f"{path.name} cannot be read as ONNX", expected=_EXPECTED, fix=_FIX):
        data = read_small(path, fix=_FIX, most=_MOST_BYTES)
    return scan_bytes(data, path.name, fix=_FIX)


def scan_bytes(data: bytes, name: str, *, fix: str) -> Scan:
    """Read the bytes of an ONNX file. name: of the file, for messages. Raises ArtifactRefused with `fix`."""
    with refuse_failures(f"{name} cannot be read as ONNX", expected=_EXPECTED, fix=fix):
        if not data.startswith(_MODEL_BEGIN):
            raise ValueError("it does not begin with the version of the format")
        found = _Found()
        for number, value in protobuf.fields(data):
            if number not in _MODEL_PARTS:
                raise ValueError(f"the model has the field {number}")
            if number == _MODEL_GRAPH:
                _graph(protobuf.message(value), found)
            elif number == _MODEL_OPSET:
                _opset(protobuf.message(value), found)
            elif number == _MODEL_METADATA:
                found.metadata.append(_entry(protobuf.message(value), "the model's metadata"))
                found.require_few()
        return found.scan()


def _opset(data: bytes, found: _Found) -> None:
    domain, version = "", 0
    for number, value in protobuf.fields(data):
        if number == _OPSET_DOMAIN:
            domain += protobuf.text(protobuf.message(value))
        elif number == _OPSET_VERSION and isinstance(value, int):
            version = value
        else:
            raise ValueError(f"a set of operators has the field {number}")
    if version > _MOST_OPSET:
        raise ValueError(f"it has the version {version} of operators")
    if domain:
        found.domains.add(domain)
    else:
        found.opset = version


def _graph(data: bytes, found: _Found) -> None:
    for number, part in protobuf.fields(data):
        found.require_few()
        value = protobuf.message(part)
        if number == _GRAPH_NODE:
            found.nodes.append(_node(value, found))
        elif number == _GRAPH_INITIALIZER:
            tensor = _tensor(value)
            found.tensors.append(tensor)
            found.constants.add(tensor.name)
        elif number in _GRAPH_VALUES:
            found.values[number].append(_value(value, found, number == _GRAPH_INPUT))
        elif number not in _GRAPH_IGNORED:
            raise ValueError(f"the graph has the field {number}")


def _value(data: bytes, found: _Found, sized: bool) -> str:
    """Name of a tensor. Its element type is recorded, and with `sized` its shape, if the file has them.

    Parts that come several times are joined, as by every reader of the format.
    """
    name, kinds, shape = "", b"", None
    for number, value in protobuf.fields(data):
        if number == _VALUE_NAME:
            name = protobuf.text(protobuf.message(value))
        elif number == _VALUE_TYPE:
            kinds += protobuf.message(value)
    tensor = b"".join(protobuf.message(value) for number, value in protobuf.fields(kinds) if number == _TYPE_TENSOR)
    for number, value in protobuf.fields(tensor):
        if number == _TENSOR_KIND and isinstance(value, int):
            found.kinds[name] = value
        elif number == _TENSOR_SHAPE:
            shape = (shape or b"") + protobuf.message(value)
    if sized and shape is not None:
        dims = [
            protobuf.numbers(protobuf.message(dim)) for number, dim in protobuf.fields(shape) if number == _SHAPE_DIM
        ]
        found.sizes[name] = tuple(dim.get(_DIM_SIZE) for dim in dims)
    return name


def _node(data: bytes, found: _Found) -> Node:
    texts: dict[int, list[str]] = {number: [] for number in _NODE_TEXTS}
    before = len(found.tensors)
    for number, part in protobuf.fields(data):
        value = protobuf.message(part)
        if number in texts:
            texts[number].append(protobuf.text(value))
        elif number == _NODE_ATTRIBUTE:
            _attribute(value, found)
            found.require_few()
        elif number not in (_NODE_DOC, _NODE_METADATA):
            raise ValueError(f"a node has the field {number}")
    inputs, outputs, *single = (texts[number] for number in _NODE_TEXTS)
    name, operator, domain = (values[-1] if values else "" for values in single)
    return Node(name, operator, tuple(inputs), tuple(outputs), domain, len(found.tensors) - before)


def _attribute(data: bytes, found: _Found) -> None:
    numbers = list[int]()
    for number, value in protobuf.fields(data):
        if number not in _ATTRIBUTE_PARTS:
            raise ValueError(f"an attribute has the field {number}")
        if number in (_ATTRIBUTE_TENSOR, _ATTRIBUTE_TENSORS):
            found.tensors.append(_tensor(protobuf.message(value)))
        elif number in _ATTRIBUTE_NUMBERS:
            numbers += protobuf.signed(value, _MOST_NUMBERS)
            if len(numbers) > _MOST_NUMBERS or any(abs(each) > _LARGEST_NUMBER for each in numbers):
                raise ValueError("an attribute has too many or too large numbers")


def _tensor(data: bytes) -> StoredTensor:
    """A tensor. Numbers may come one by one or packed in a text, as the format allows."""
    name, kind, external, location = "", 0, [], 0
    dims, stored = list[int](), list[int]()
    raw = b""
    for number, value in protobuf.fields(data):
        if number not in _TENSOR_PARTS:
            raise ValueError(f"a tensor has the field {number}")
        if number == _TENSOR_DIMS:
            dims += protobuf.signed(value, _MOST_DIMS)
            if len(dims) > _MOST_DIMS:
                raise ValueError(f"a tensor has more than {_MOST_DIMS} axes")
        elif number in (_TENSOR_INT32, _TENSOR_INT64):
            stored += protobuf.signed(value, FEW) if len(stored) <= FEW else ()
        elif isinstance(value, int):
            if value >= _MOST_CODE:
                raise ValueError(f"a tensor has the number {value}")
            kind = value if number == _TENSOR_TYPE else kind
            location = value if number == _TENSOR_LOCATION else location
        elif number == _TENSOR_NAME:
            name = protobuf.text(value)
        elif number == _TENSOR_RAW:
            raw = value
        elif number == _TENSOR_EXTERNAL:
            external.append(_entry(value, "the place of a weight"))
    if bool(external) != (location == 1) or location > 1:
        raise ValueError(f"the tensor {short(name)} does not say clearly where its bytes are")
    integers = stored
    if kind in INTEGERS and 0 < len(raw) <= 8 * FEW:
        integers = np.frombuffer(raw, INTEGERS[kind]).tolist()
    few = kind in INTEGERS and len(integers) <= FEW
    return StoredTensor(name, kind, tuple(dims), tuple(external), tuple(integers) if few else (), raw)


def _entry(data: bytes, what: str) -> tuple[str, str]:
    """Key and value of an entry. what: the entry's owner, for messages."""
    entry = dict(protobuf.fields(data))
    if not entry.keys() <= {_ENTRY_KEY, _ENTRY_VALUE}:
        raise ValueError(f"{what} has unknown fields")
    key, value = (protobuf.text(protobuf.message(entry.get(number, b""))) for number in (_ENTRY_KEY, _ENTRY_VALUE))
    return key, value
