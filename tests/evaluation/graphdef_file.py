"""Writes frozen GraphDefs without TensorFlow: the recorded network of random weights, and small ones like it.

`inception()` has the node names, operations, shapes and sizes of OpenAI's classify_image_graph_def.pb. Its weights are
those that the recorded features in `tests/golden/openai_evaluator.npz` were computed with.
"""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

FLOAT, UINT8, INT32, STRING = 1, 4, 3, 7  # TensorFlow's element types
_KINDS = {np.dtype(np.float32): FLOAT, np.dtype(np.int32): INT32}
_VARINT, _BYTES, _FIXED32 = 0, 2, 5  # wire types
_DTYPE, _SHAPE, _CONTENT, _FLOATS, _INTS, _STRINGS = 1, 2, 4, 5, 7, 8  # fields of a TensorProto


@dataclass(frozen=True)
class Type:
    """An attribute that is an element type."""

    kind: int


@dataclass(frozen=True)
class GraphNode:
    """A node. attributes: an AttrValue in bytes by name."""

    operation: str
    name: str
    inputs: tuple[str, ...] = ()
    attributes: dict[str, bytes] = dataclasses.field(default_factory=dict)

    def to_bytes(self) -> bytes:
        """This node as a field of a GraphDef."""
        parts = [field(1, self.name.encode()), field(2, self.operation.encode())]
        parts += [field(3, name.encode()) for name in self.inputs]
        parts += [field(5, field(1, key.encode()) + field(2, value)) for key, value in self.attributes.items()]
        return field(1, b"".join(parts))


def attribute(value: bool | int | float | bytes | Type | list[int]) -> bytes:
    """An AttrValue."""
    match value:
        case bool():
            return _number(5, value)
        case int():
            return _number(3, value)
        case float():
            return _tag(4, _FIXED32) + struct.pack("<f", value)
        case bytes():
            return field(2, value)
        case Type(kind):
            return _number(6, kind)
    return field(1, field(3, b"".join(_varint(number) for number in value)))


def tensor(array: NDArray[np.float32] | NDArray[np.int32], *, values: bytes | None = None) -> bytes:
    """A TensorProto. values: the field that holds the numbers, if it is not the usual one.

    As TensorFlow does, single numbers are written as numbers, and others as bytes.
    """
    if values is None and array.size == 1:
        values = floats(array.ravel()) if array.dtype == np.float32 else ints(array.ravel())
    elif values is None:
        values = field(_CONTENT, array.tobytes())
    return tensor_of(_KINDS[array.dtype], array.shape, values)


def tensor_of(kind: int, shape: Iterable[int], values: bytes) -> bytes:
    """A TensorProto of an element type, a shape, and the field that holds its numbers. They need not fit."""
    sizes = b"".join(field(2, _number(1, size % 2**64)) for size in shape)
    return _number(_DTYPE, kind) + field(_SHAPE, sizes) + values


def floats(numbers: Iterable[float], packed: bool = True) -> bytes:
    """The field float_val of a TensorProto."""
    each = [struct.pack("<f", number) for number in numbers]
    return field(_FLOATS, b"".join(each)) if packed else b"".join(_tag(_FLOATS, _FIXED32) + one for one in each)


def ints(numbers: Iterable[int], packed: bool = True) -> bytes:
    """The field int_val of a TensorProto."""
    each = [int(number) % 2**64 for number in numbers]
    return field(_INTS, b"".join(map(_varint, each))) if packed else b"".join(_number(_INTS, one) for one in each)


def constant_of(name: str, kind: int, value: bytes) -> GraphNode:
    """A constant of an element type. value: a TensorProto."""
    return GraphNode("Const", name, (), {"dtype": attribute(Type(kind)), "value": field(8, value)})


class GraphFile:
    """The nodes of a GraphDef in order. channels: of the tensors that convolutions read, by node."""

    def __init__(self, seed: int = 0) -> None:
        self.nodes: list[GraphNode] = []
        self.channels: dict[str, int] = {}
        self.random = np.random.default_rng(seed)

    def node(
        self, operation: str, name: str, *inputs: str, **attributes: bool | int | float | bytes | Type | list[int]
    ) -> str:
        values = {key: attribute(value) for key, value in attributes.items()}
        self.nodes.append(GraphNode(operation, name, inputs, values))
        return name

    def constant(self, name: str, array: NDArray[np.float32] | NDArray[np.int32]) -> str:
        self.nodes.append(constant_of(name, _KINDS[array.dtype], tensor(array)))
        return name

    def begin(self, side: int = 299) -> str:
        """The nodes from an encoded picture to the network's input, of `side` x `side` pixels from -1 to 1."""
        self.nodes.append(constant_of("DecodeJpeg/contents", STRING, tensor_of(STRING, (), field(_STRINGS, b""))))
        self.node("DecodeJpeg", "DecodeJpeg", "DecodeJpeg/contents", channels=3)
        self.node("Cast", "Cast", "DecodeJpeg", SrcT=Type(UINT8), DstT=Type(FLOAT))
        self.constant("ExpandDims/dim", np.array(0, np.int32))
        self.node("ExpandDims", "ExpandDims", "Cast", "ExpandDims/dim", T=Type(FLOAT))
        self.constant("ResizeBilinear/size", np.array([side, side], np.int32))
        inputs = "ExpandDims", "ResizeBilinear/size"
        self.node("ResizeBilinear", "ResizeBilinear", *inputs, T=Type(FLOAT), align_corners=False)
        self.constant("Sub/y", np.array(128, np.float32))
        self.node("Sub", "Sub", "ResizeBilinear", "Sub/y", T=Type(FLOAT))
        self.constant("Mul/y", np.array(1 / 128, np.float32))
        self.channels["Mul"] = 3
        return self.node("Mul", "Mul", "Sub", "Mul/y", T=Type(FLOAT))

    def convolution(
        self,
        name: str,
        source: str,
        channels: int,
        size: tuple[int, int] = (1, 1),
        stride: int = 1,
        padding: bytes = b"SAME",
    ) -> str:
        """A convolution with its batch normalisation, as the original network has it. The ReLU has the name `name`."""
        height, width, read = *size, self.channels[source]
        weights = self.random.standard_normal((height, width, read, channels))
        weights *= np.sqrt(2 / (height * width * read))
        self.constant(f"{name}/conv2d_params", weights.astype(np.float32))
        self.node(
            "Conv2D",
            f"{name}/Conv2D",
            source,
            f"{name}/conv2d_params",
            T=Type(FLOAT),
            strides=[1, stride, stride, 1],
            padding=padding,
            use_cudnn_on_gpu=True,
        )
        norm = f"{name}/batchnorm"
        beta = (self.random.standard_normal(channels) * 0.2 + 0.05).astype(np.float32)
        mean = (self.random.standard_normal(channels) * 0.1).astype(np.float32)
        variance = self.random.uniform(0.6, 1.6, channels).astype(np.float32)
        self.constant(f"{norm}/beta", beta)
        self.constant(f"{norm}/gamma", np.ones(channels, np.float32))
        self.constant(f"{norm}/moving_mean", mean)
        self.constant(f"{norm}/moving_variance", variance)
        statistics = [f"{norm}/{part}" for part in ("moving_mean", "moving_variance", "beta", "gamma")]
        self.node(
            "BatchNormWithGlobalNormalization",
            norm,
            f"{name}/Conv2D",
            *statistics,
            T=Type(FLOAT),
            variance_epsilon=0.001,
            scale_after_normalization=False,
        )
        check = self.node("CheckNumerics", f"{name}/CheckNumerics", norm, T=Type(FLOAT), message=b"")
        checked = self.node("Identity", f"{name}/control_dependency", norm, f"^{check}", T=Type(FLOAT))
        self.channels[name] = channels
        return self.node("Relu", name, checked, T=Type(FLOAT))

    def pool(self, name: str, source: str, kind: str, size: int, stride: int, padding: bytes) -> str:
        self.channels[name] = self.channels[source]
        window, strides = [1, size, size, 1], [1, stride, stride, 1]
        return self.node(kind, name, source, T=Type(FLOAT), ksize=window, strides=strides, padding=padding)

    def join(self, name: str, *sources: str) -> str:
        axis = self.constant(f"{name}/concat_dim", np.array(3, np.int32))
        self.channels[name] = sum(self.channels[source] for source in sources)
        return self.node("Concat", name, axis, *sources, T=Type(FLOAT), N=len(sources))

    def end(self, source: str, classes: int, biases: bool) -> None:
        """The nodes from the pooled features to the probabilities. biases: whether the classes have random biases."""
        width = self.channels[source]
        shape = self.constant(f"{source}/_reshape/shape", np.array([1, width], np.int32))
        flat = self.node("Reshape", f"{source}/_reshape", source, shape, T=Type(FLOAT))
        weights = (self.random.standard_normal((width, classes)) * 0.12).astype(np.float32)
        bias = self.random.standard_normal(classes).astype(np.float32) if biases else np.zeros(classes, np.float32)
        self.constant("softmax/weights", weights)
        self.constant("softmax/biases", bias)
        self.node("MatMul", "softmax/logits/MatMul", flat, "softmax/weights", T=Type(FLOAT))
        self.node("BiasAdd", "softmax/logits", "softmax/logits/MatMul", "softmax/biases", T=Type(FLOAT))
        self.node("Softmax", "softmax", "softmax/logits", T=Type(FLOAT))

    def change(self, name: str, **changes: object) -> None:
        """Replace fields of one node."""
        [node] = [node for node in self.nodes if node.name == name]
        self.replace(replace(node, **changes))  # type: ignore[arg-type]

    def replace(self, node: GraphNode) -> None:
        """Put another node in the place of the one of its name."""
        [at] = [i for i, each in enumerate(self.nodes) if each.name == node.name]
        self.nodes[at] = node

    def set_attribute(self, name: str, key: str, value: bool | int | float | bytes | Type | list[int]) -> None:
        """Set one attribute of a node."""
        [node] = [node for node in self.nodes if node.name == name]
        node.attributes[key] = attribute(value)

    def to_bytes(self) -> bytes:
        versions = field(4, _number(1, 8))
        return b"".join([node.to_bytes() for node in self.nodes] + [versions])

    def write(self, path: Path) -> Path:
        with path.open("wb") as file:
            file.writelines(node.to_bytes() for node in self.nodes)
            file.write(field(4, _number(1, 8)))
        return path


def tiny(biases: bool = False) -> GraphFile:
    """A network of a few channels with every operation of the large one, and with its outputs' names."""
    graph = GraphFile()
    start = graph.convolution("conv", graph.begin(side=24), 8, (3, 3), 2, b"VALID")
    pooled = graph.pool("pool", start, "MaxPool", 3, 2, b"VALID")
    spatial = graph.convolution("mixed_6/conv", pooled, 8)
    mean = graph.pool("mixed_6/tower_2/pool", pooled, "AvgPool", 3, 1, b"SAME")
    largest = graph.pool("mixed_10/tower_2/pool", pooled, "MaxPool", 3, 1, b"SAME")
    joined = graph.join("mixed_6/join", spatial, graph.convolution("mixed_7/conv", mean, 4, (1, 3)), largest)
    graph.end(graph.pool("pool_3", joined, "AvgPool", 5, 1, b"VALID"), 10, biases)
    return graph


def inception(biases: bool = False) -> GraphFile:
    """The recorded network. biases: whether its classes have random biases, which the recorded one has not."""
    graph = GraphFile()
    conv, pool, join = graph.convolution, graph.pool, graph.join
    x = conv("conv", graph.begin(), 32, (3, 3), 2, b"VALID")
    x = conv("conv_1", x, 32, (3, 3), 1, b"VALID")
    x = conv("conv_2", x, 64, (3, 3))
    x = pool("pool", x, "MaxPool", 3, 2, b"VALID")
    x = conv("conv_3", x, 80, padding=b"VALID")
    x = conv("conv_4", x, 192, (3, 3), 1, b"VALID")
    x = pool("pool_1", x, "MaxPool", 3, 2, b"VALID")
    for block, last in (("mixed", 32), ("mixed_1", 64), ("mixed_2", 64)):
        a = conv(f"{block}/conv", x, 64)
        b = conv(f"{block}/tower/conv_1", conv(f"{block}/tower/conv", x, 48), 64, (5, 5))
        c = conv(f"{block}/tower_1/conv_1", conv(f"{block}/tower_1/conv", x, 64), 96, (3, 3))
        c = conv(f"{block}/tower_1/conv_2", c, 96, (3, 3))
        d = conv(f"{block}/tower_2/conv", pool(f"{block}/tower_2/pool", x, "AvgPool", 3, 1, b"SAME"), last)
        x = join(f"{block}/join", a, b, c, d)
    a = conv("mixed_3/conv", x, 384, (3, 3), 2, b"VALID")
    b = conv("mixed_3/tower/conv_1", conv("mixed_3/tower/conv", x, 64), 96, (3, 3))
    b = conv("mixed_3/tower/conv_2", b, 96, (3, 3), 2, b"VALID")
    x = join("mixed_3/join", a, b, pool("mixed_3/pool", x, "MaxPool", 3, 2, b"VALID"))
    for block, inner in (("mixed_4", 128), ("mixed_5", 160), ("mixed_6", 160), ("mixed_7", 192)):
        a = conv(f"{block}/conv", x, 192)
        b = conv(f"{block}/tower/conv_1", conv(f"{block}/tower/conv", x, inner), inner, (1, 7))
        b = conv(f"{block}/tower/conv_2", b, 192, (7, 1))
        c = conv(f"{block}/tower_1/conv_1", conv(f"{block}/tower_1/conv", x, inner), inner, (7, 1))
        c = conv(f"{block}/tower_1/conv_2", c, inner, (1, 7))
        c = conv(f"{block}/tower_1/conv_3", c, inner, (7, 1))
        c = conv(f"{block}/tower_1/conv_4", c, 192, (1, 7))
        d = conv(f"{block}/tower_2/conv", pool(f"{block}/tower_2/pool", x, "AvgPool", 3, 1, b"SAME"), 192)
        x = join(f"{block}/join", a, b, c, d)
    a = conv("mixed_8/tower/conv_1", conv("mixed_8/tower/conv", x, 192), 320, (3, 3), 2, b"VALID")
    b = conv("mixed_8/tower_1/conv_1", conv("mixed_8/tower_1/conv", x, 192), 192, (1, 7))
    b = conv("mixed_8/tower_1/conv_2", b, 192, (7, 1))
    b = conv("mixed_8/tower_1/conv_3", b, 192, (3, 3), 2, b"VALID")
    x = join("mixed_8/join", a, b, pool("mixed_8/pool", x, "MaxPool", 3, 2, b"VALID"))
    for block, kind in (("mixed_9", "AvgPool"), ("mixed_10", "MaxPool")):
        a = conv(f"{block}/conv", x, 320)
        b = conv(f"{block}/tower/conv", x, 384)
        b1 = conv(f"{block}/tower/mixed/conv", b, 384, (1, 3))
        b2 = conv(f"{block}/tower/mixed/conv_1", b, 384, (3, 1))
        c = conv(f"{block}/tower_1/conv_1", conv(f"{block}/tower_1/conv", x, 448), 384, (3, 3))
        c1 = conv(f"{block}/tower_1/mixed/conv", c, 384, (1, 3))
        c2 = conv(f"{block}/tower_1/mixed/conv_1", c, 384, (3, 1))
        d = conv(f"{block}/tower_2/conv", pool(f"{block}/tower_2/pool", x, kind, 3, 1, b"SAME"), 192)
        x = join(f"{block}/join", a, b1, b2, c1, c2, d)
    graph.end(pool("pool_3", x, "AvgPool", 8, 1, b"VALID"), 1008, biases)
    return graph


def field(number: int, value: bytes) -> bytes:
    """A field that holds a text, bytes or a message."""
    return _tag(number, _BYTES) + _varint(len(value)) + value


def _number(number: int, value: int) -> bytes:
    return _tag(number, _VARINT) + _varint(value)


def _tag(number: int, wire: int) -> bytes:
    return _varint(number << 3 | wire)


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])
