"""Collects the nodes and constants of an ONNX graph while a network is converted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from onnx import TensorProto, helper, numpy_helper  # noqa: TID251 - loaded by the importer alone

from flexvar_runtime.checks import short
from flexvar_runtime.errors import ArtifactRefused

from .contract import IMAGES
from .graphdef import FIX, MOST_BYTES, Array


@dataclass(frozen=True)
class Image:
    """A tensor float32 (N, channels, height, width) of the ONNX graph. The sizes are 0 before the resize."""

    name: str
    channels: int
    height: int = 0
    width: int = 0


@dataclass(frozen=True)
class Convolution:
    """A convolution that is not written yet, because a batch normalisation may follow.

    weights: float32 (height, width, in, out). pads: top, left, bottom, right. output: the tensor that it gives.
    """

    source: Image
    weights: Array
    strides: tuple[int, int]
    pads: tuple[int, int, int, int]
    output: Image


class OnnxWriter:
    """An ONNX graph in the making.

    nodes, tensors: what was written so far, as protocol buffers. operations: additions and multiplications of the
    convolutions for one image.
    """

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.tensors: list[Any] = []
        self.operations = 0
        self._bytes = 0
        self._written: dict[str, Image] = {}

    def images(self) -> Image:
        """Write the nodes that turn the input of the contract into float32."""
        self.node(
            "Transpose", [IMAGES], "transposed", perm=[0, 3, 1, 2]
        )  # of bytes, before they become four times as many
        self.node("Cast", ["transposed"], "pixels", to=TensorProto.FLOAT)
        return Image("pixels", 3)

    def node(self, operator: str, inputs: Sequence[str], output: str, **attributes: Any) -> None:
        self.nodes.append(helper.make_node(operator, inputs, [output], name=output, **attributes))

    def tensor(self, name: str, array: Array) -> str:
        """Store a constant and return its name. Raises ArtifactRefused if it is not finite, or if all are too large."""
        self._bytes += array.nbytes
        if self._bytes > MOST_BYTES or not np.isfinite(array).all():
            expected = f"finite weights of at most {MOST_BYTES / 2**20:g} MiB"
            got = f"The weights of the graph at {short(name)} are too large or not finite."
            raise ArtifactRefused(got, expected=expected, fix=FIX)
        self.tensors.append(numpy_helper.from_array(np.ascontiguousarray(array), name))
        return name

    def plain(self, convolution: Convolution) -> Image:
        """The output of a convolution without a bias. It is written once."""
        name = convolution.output.name
        if name not in self._written:
            self._written[name] = self.convolve(convolution, convolution.weights, None, name)
        return self._written[name]

    def convolve(self, convolution: Convolution, weights: Array, bias: Array | None, name: str) -> Image:
        """Write a convolution with other weights. bias: (out,), or None. name: of its output."""
        shape = convolution.output
        kernel = _float32(weights.transpose(3, 2, 0, 1))
        inputs = [convolution.source.name, self.tensor(f"{name}/weights", kernel)]
        if bias is not None:
            inputs.append(self.tensor(f"{name}/bias", _float32(bias)))
        self.operations += 2 * kernel.size * shape.height * shape.width
        attributes = {"kernel_shape": kernel.shape[2:], "strides": convolution.strides, "pads": convolution.pads}
        self.node("Conv", inputs, name, **attributes)
        return Image(name, shape.channels, shape.height, shape.width)


def _float32(array: Array) -> Array:
    """Numbers that are too large become infinite, without a warning: `OnnxWriter.tensor` refuses them."""
    with np.errstate(over="ignore"):
        return array.astype(np.float32)
