"""Matrix products in eight bits, for processors: weights rounded per output, what they multiply per token.

W ≈ s·(Q − 128) with an s of every output, x ≈ low + step·q with a low and a step of every row, both Q and q in 0…255.
Hence x·W ≈ step·s·(q·(Q − 128)) + low·(s·Σ(Q − 128)), where the product of integers is exact: a token's result does not
depend on what else is in its batch.

Eight bits for weights and input both: in processors without dot products of bytes ONNX Runtime adds pairs of them in
sixteen bits, which only unsigned by unsigned cannot overflow.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from onnxscript import opset23 as op
from torch import Tensor, nn

ZERO = 128  # what stands for 0 among the levels of a weight
LEVELS = 255
SMALLEST = 1e-12  # step of a row in which all is equal


@torch.library.custom_op("flexvar::integer_product", mutates_args=())
def integer_product(levels: Tensor, weight: Tensor) -> Tensor:
    """levels (…, I) uint8 · (weight (I, O) uint8 − ZERO) -> (…, O) int32, exact."""
    return (levels.double() @ (weight.double() - ZERO)).to(torch.int32)  # float64 holds such sums exactly


@integer_product.register_fake
def _(levels: Tensor, weight: Tensor) -> Tensor:
    return levels.new_empty((*levels.shape[:-1], weight.shape[1]), dtype=torch.int32)


def _matmul_integer(levels: Any, weight: Any) -> Any:
    zeros = [op.Constant(value=_uint8(value)) for value in (0, ZERO)]
    return op.MatMulInteger(levels, weight, *zeros)


def _uint8(value: int) -> Any:
    import onnx

    return onnx.helper.make_tensor("", onnx.TensorProto.UINT8, [], [value])


TRANSLATIONS: dict[Callable[..., Any], Callable[..., Any]] = {
    torch.ops.flexvar.integer_product.default: _matmul_integer,
}
"""For the exporter: what stands in a graph for the operations declared here."""


class Int8Dense(nn.Module):
    """x (…, I) float32 · weight (I, O) + bias (O), in eight bits as the file says -> float32."""

    weight: Tensor
    scale: Tensor
    sums: Tensor
    bias: Tensor

    def __init__(self, weight_IO: Tensor, bias_O: Tensor) -> None:
        super().__init__()
        exact = weight_IO.detach().double()
        scale = (exact.abs().amax(0) / (LEVELS // 2)).clamp_min(SMALLEST)
        levels = (exact / scale).round()
        self.register_buffer("weight", (levels + ZERO).to(torch.uint8).contiguous())
        self.register_buffer("scale", scale.float())
        self.register_buffer("sums", (levels.sum(0) * scale).float())
        self.register_buffer("bias", bias_O.detach().float().contiguous())

    def forward(self, x: Tensor) -> Tensor:
        low = x.amin(-1, keepdim=True)
        step = ((x.amax(-1, keepdim=True) - low) / LEVELS).clamp_min(SMALLEST)
        levels = ((x - low) / step).round().to(torch.uint8)
        return integer_product(levels, self.weight).float() * self.scale * step + (low * self.sums + self.bias)
