"""How each TensorFlow operation of the network is written in ONNX.

TensorFlow's images are (N, height, width, channels), and ONNX's are (N, channels, height, width).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import numpy as np

from .graphdef import Array, GraphNode
from .onnx_writer import Convolution, Image, OnnxWriter

Value: TypeAlias = Image | Convolution | Array
"""What a node gives: a tensor that depends on the images, or a constant."""
Rule: TypeAlias = Callable[[OnnxWriter, GraphNode, Sequence[Value]], Value]

_CHANNELS = 3  # TensorFlow's axis
_LARGEST_SIDE = 4096  # pixels after the resize


def output_name(node: GraphNode) -> str:
    """The name of a node's output in the ONNX graph. Names of the contract have no colon."""
    return f"{node.name}:0"


def _constant(writer: OnnxWriter, node: GraphNode, inputs: Sequence[Value]) -> Value:
    return node.tensor("value")


def _pass(writer: OnnxWriter, node: GraphNode, inputs: Sequence[Value]) -> Value:
    [value] = _counted(node, inputs, 1)
    return value


def _resize(writer: OnnxWriter, node: GraphNode, inputs: Sequence[Value]) -> Value:
    """The corners of the images are aligned at the top left alone: pixel i is read from i * size_in / size_out."""
    source, size = _counted(node, inputs, 2)
    image, sides = as_image(writer, node, source), as_array(node, size, (2,))
    if node.flag("align_corners", False) or node.flag("half_pixel_centers", False):
        node.refuse("has align_corners or half_pixel_centers", "neither")
    if sides.dtype != np.int32 or not ((sides > 0) & (sides <= _LARGEST_SIDE)).all():
        node.refuse("has wrong sizes", f"sizes from 1 to {_LARGEST_SIDE}")
    height, width = sides.tolist()
    name = output_name(node)
    writer.node(
        "Resize",
        [image.name, "", "", writer.tensor(f"{name}/sizes", sides.astype(np.int64))],
        name,
        axes=[2, 3],
        mode="linear",
        coordinate_transformation_mode="asymmetric",
    )
    return Image(name, image.channels, height, width)


def _arithmetic(operator: str) -> Rule:
    """The rule for an operation of an image and a number."""

    def rule(writer: OnnxWriter, node: GraphNode, inputs: Sequence[Value]) -> Value:
        left, right = _counted(node, inputs, 2)
        image, number, name = as_image(writer, node, left), as_array(node, right, ()), output_name(node)
        if number.dtype != np.float32:
            node.refuse("has a whole number as its second input", "a float32")
        writer.node(operator, [image.name, writer.tensor(f"{name}/number", number)], name)
        return Image(name, image.channels, image.height, image.width)

    return rule


def _convolution(writer: OnnxWriter, node: GraphNode, inputs: Sequence[Value]) -> Value:
    source, kernel = _counted(node, inputs, 2)
    image = as_image(writer, node, source)
    weights = as_array(node, kernel, (None, None, image.channels, None))
    if node.integers("dilations", (1, 1, 1, 1)) != (1, 1, 1, 1):
        node.refuse("has dilations", "none")
    height, width, _, channels = weights.shape
    strides, pads, sides = _window(node, image, (height, width))
    return Convolution(image, weights, strides, pads, Image(output_name(node), channels, *sides))


def _batch_norm(writer: OnnxWriter, node: GraphNode, inputs: Sequence[Value]) -> Value:
    """(x - mean) / sqrt(variance + epsilon) * gamma + beta, in the weights of the convolution before it.

    Without scale_after_normalization there is no gamma. The weights are computed in float64.
    """
    source, *statistics = _counted(node, inputs, 5)
    if not isinstance(source, Convolution):
        node.refuse("does not follow a convolution", "a convolution as its first input")
    shape = (source.output.channels,)
    mean, variance, beta, gamma = (as_array(node, value, shape).astype(np.float64) for value in statistics)
    variance = variance + node.number("variance_epsilon")
    if not (variance > 0).all():
        node.refuse("has a variance that is not positive", "positive variances")
    scale = 1 / np.sqrt(variance)
    if node.flag("scale_after_normalization", False):
        scale = scale * gamma
    return writer.convolve(source, source.weights * scale, beta - mean * scale, output_name(node))


def _relu(writer: OnnxWriter, node: GraphNode, inputs: Sequence[Value]) -> Value:
    [source] = _counted(node, inputs, 1)
    image, name = as_image(writer, node, source), output_name(node)
    writer.node("Relu", [image.name], name)
    return Image(name, image.channels, image.height, image.width)


def _pool(operator: str) -> Rule:
    """The rule for a pooling. TensorFlow's averages leave out the padding, as ONNX's do by default."""

    def rule(writer: OnnxWriter, node: GraphNode, inputs: Sequence[Value]) -> Value:
        [source] = _counted(node, inputs, 1)
        image, name = as_image(writer, node, source), output_name(node)
        window = _spatial(node, "ksize")
        strides, pads, sides = _window(node, image, window)
        writer.node(operator, [image.name], name, kernel_shape=window, strides=strides, pads=pads)
        return Image(name, image.channels, *sides)

    return rule


def _concat(axis_at: int) -> Rule:
    """The rule for a concatenation of channels. axis_at: the index of the input that is the axis."""

    def rule(writer: OnnxWriter, node: GraphNode, inputs: Sequence[Value]) -> Value:
        if len(inputs) < 2:
            node.refuse(f"has {len(inputs)} inputs", "two or more")
        parts = list(inputs)
        axis = as_array(node, parts.pop(axis_at), ())
        if axis.dtype != np.int32 or axis not in (_CHANNELS, -1):
            node.refuse(f"has the axis {axis}", f"the axis {_CHANNELS}")
        images = [as_image(writer, node, part) for part in parts]
        first, name = images[0], output_name(node)
        if any((image.height, image.width) != (first.height, first.width) for image in images):
            node.refuse("joins images of different sizes", "images of one size")
        writer.node("Concat", [image.name for image in images], name, axis=1)
        return Image(name, sum(image.channels for image in images), first.height, first.width)

    return rule


RULES: dict[str, Rule] = {
    "AvgPool": _pool("AveragePool"),
    "BatchNormWithGlobalNormalization": _batch_norm,
    "CheckNumerics": _pass,  # the features of every image are checked instead
    "Concat": _concat(0),
    "ConcatV2": _concat(-1),
    "Const": _constant,
    "Conv2D": _convolution,
    "Identity": _pass,
    "MaxPool": _pool("MaxPool"),
    "Mul": _arithmetic("Mul"),
    "Relu": _relu,
    "ResizeBilinear": _resize,
    "Sub": _arithmetic("Sub"),
}


def as_image(writer: OnnxWriter, node: GraphNode, value: Value) -> Image:
    """An input of a node that depends on the images. A convolution is written first. Raises ArtifactRefused."""
    if isinstance(value, Convolution):
        return writer.plain(value)
    if not isinstance(value, Image):
        node.refuse("has a constant input", "an input that depends on the images")
    return value


def as_array(node: GraphNode, value: Value, shape: tuple[int | None, ...]) -> Array:
    """An input of a node that is a constant of a shape, in which None is any size. Raises ArtifactRefused."""
    if not isinstance(value, np.ndarray):
        node.refuse("has an input that depends on the images", "a constant in its place")
    fits = len(value.shape) == len(shape) and all(
        want in (None, size) for size, want in zip(value.shape, shape, strict=True)
    )
    if not fits or 0 in value.shape:
        node.refuse(f"has a constant of shape {value.shape}", f"the shape {shape}, in which None is any size")
    return value


def _counted(node: GraphNode, inputs: Sequence[Value], count: int) -> Sequence[Value]:
    if len(inputs) != count:
        node.refuse(f"has {len(inputs)} inputs", f"{count}")
    return inputs


def _spatial(node: GraphNode, key: str) -> tuple[int, int]:
    """An attribute with a number for every axis, of which only height and width may differ from 1."""
    numbers = node.integers(key)
    if len(numbers) != 4 or numbers[0] != 1 or numbers[3] != 1 or min(numbers) < 1 or max(numbers) > _LARGEST_SIDE:
        node.refuse(f"has {key} {numbers}", "[1, height, width, 1]")
    return numbers[1], numbers[2]


def _window(
    node: GraphNode, image: Image, window: tuple[int, int]
) -> tuple[tuple[int, int], tuple[int, int, int, int], tuple[int, int]]:
    """Strides, pads (top, left, bottom, right) and the sides of the output, by TensorFlow's rules for padding."""
    if node.text("data_format", "NHWC") != "NHWC":
        node.refuse("has another data_format", "NHWC")
    padding, strides = node.text("padding"), _spatial(node, "strides")
    if padding not in ("SAME", "VALID"):
        node.refuse(f"has the padding {padding!r}", "SAME or VALID")
    begin, end, sides = [0, 0], [0, 0], [0, 0]
    for axis, (size, width, stride) in enumerate(zip((image.height, image.width), window, strides, strict=True)):
        if padding == "SAME":
            sides[axis] = -(-size // stride)
            total = max((sides[axis] - 1) * stride + width - size, 0)
            begin[axis], end[axis] = total // 2, total - total // 2
        else:
            sides[axis] = (size - width) // stride + 1
        if not size or sides[axis] < 1:
            node.refuse(f"reads an image of {image.height} x {image.width}", "an image of the window's size or more")
    return strides, (begin[0], begin[1], end[0], end[1]), (sides[0], sides[1])
