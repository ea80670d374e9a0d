"""Matrix products in eight bits, for processors: weights rounded per output, what they multiply per token.

W ≈ s·Q with an s of every output and Q in −127…127; x ≈ low + step·q with a low and a step of every row and q in
0…255. Hence x·W ≈ step·s·(q·Q) + low·(s·ΣQ), where the product of integers is exact: a token's result does not depend
on what else is in its batch.

Unsigned by signed, because that is what processors have dot products of bytes for: ONNX Runtime is two and a half times
as fast at them as at unsigned by unsigned. On a processor without, it adds pairs of them in sixteen bits that saturate,
unless it is told to be exact (`flexvar_runtime.backends.byte_products`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx
import torch
from onnxscript import opset23 as op
from torch import Tensor, nn

LARGEST = 127  # level of a weight
STEPS = 255  # between the smallest and the largest of a row
SMALLEST = 1e-30  # of a step, where all is equal, and of a scale, where all is 0


class Int8Dense(nn.Module):
    """x (…, I) float32 -> x · W (I, O) + bias (O), (…, O) float32, in eight bits.

    weight (I, O) int8 is Q; scale (O), sums (O) = s·ΣQ and bias (O) are float32.
    """

    weight: Tensor
    scale: Tensor
    sums: Tensor
    bias: Tensor

    def __init__(self, weight_IO: Tensor, bias_O: Tensor) -> None:
        super().__init__()
        exact = weight_IO.detach().double()
        scale = (exact.abs().amax(0) / LARGEST).clamp_min(SMALLEST)
        levels = (exact / scale).round()
        self.register_buffer("weight", levels.to(torch.int8).contiguous())
        self.register_buffer("scale", scale.float())
        self.register_buffer("sums", (levels.sum(0) * scale).float())
        self.register_buffer("bias", bias_O.detach().float().contiguous())

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = int8_linear(x, self.weight, self.scale, self.sums, self.bias)
        return result


@torch.library.custom_op("flexvar::int8_linear", mutates_args=())
def int8_linear(x: Tensor, weight: Tensor, scale: Tensor, sums: Tensor, bias: Tensor) -> Tensor:
    """The layer's arithmetic, shapes and types as there. A row with anything that is not finite becomes NaN.

    One operation, because the exporter would take seconds a layer for all that is in it.
    """
    low = x.amin(-1, keepdim=True) + x.sum(-1, keepdim=True) * 0
    step = ((x.amax(-1, keepdim=True) - low) * (1 / STEPS)).clamp_min(SMALLEST)
    levels = ((x - low) / step).round()
    product = levels.double() @ weight.double()  # exact: float64 holds such sums
    return product.float() * scale * step + (low * sums + bias)


@int8_linear.register_fake
def _(x: Tensor, weight: Tensor, scale: Tensor, sums: Tensor, bias: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[1]))


def _int8_linear(x: Any, weight: Any, scale: Any, sums: Any, bias: Any) -> Any:
    last: Any = op.Constant(value_ints=[-1])
    not_finite = op.Mul(op.ReduceSum(x, last, keepdims=1), op.Constant(value_float=0.0))  # ReduceMin leaves NaN out
    low = op.Add(op.ReduceMin(x, last, keepdims=1), not_finite)
    spread = op.Sub(op.ReduceMax(x, last, keepdims=1), low)
    step = op.Max(op.Mul(spread, op.Constant(value_float=1 / STEPS)), op.Constant(value_float=SMALLEST))
    levels = op.Cast(op.Round(op.Div(op.Sub(x, low), step)), to=onnx.TensorProto.UINT8)
    product = op.MatMulInteger(levels, weight)
    scaled = op.Mul(op.Mul(op.Cast(product, to=onnx.TensorProto.FLOAT), scale), step)
    return op.Add(scaled, op.Add(op.Mul(low, sums), bias))


TRANSLATIONS: dict[Callable[..., Any], Callable[..., Any]] = {torch.ops.flexvar.int8_linear.default: _int8_linear}
"""For the exporter: what stands in a graph for the operations declared here."""
