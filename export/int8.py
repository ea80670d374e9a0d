"""Matrix products on 8-bit integers, for CPUs. Weights have one scale per output, inputs have one step size per token.

W ≈ s·Q with one s per output and Q in −127…127. x ≈ step·(q − z) with one step size per row, q in 0…255, and one z per
layer. Hence x·W ≈ step·s·((q − z)·Q). The product of integers is exact, so the result of a token does not depend on the
rest of its batch.

Inputs are unsigned and weights are signed, because CPUs have dot products for such bytes: ONNX Runtime is two and a
half times as fast with them as with unsigned weights. On CPUs without these instructions it adds pairs of products in
16 bits, which saturate, unless it is set to be exact (`flexvar_runtime.backends.ort.byte_products`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx
import torch
from onnxscript import opset23 as op
from torch import Tensor, nn

LARGEST = 127  # the largest level of a weight
LEVELS = 255  # the largest level of an input
MIDDLE = 128  # the level of zero where inputs have either sign
LOW = 16  # the level of zero after a GELU, which is never below -0.17; gives finer steps to rows that reach 1.35
SMALLEST = 1e-30  # the smallest step size and scale, for rows and outputs that are all 0


class Int8Dense(nn.Module):
    """x (…, I) float32 -> x · W (I, O) + bias (O), (…, O) float32, computed on 8-bit integers.

    weight (I, O) int8 is Q. scale (O) and bias (O) are float32. zero is z.
    """

    weight: Tensor
    scale: Tensor
    bias: Tensor

    def __init__(self, weight_IO: Tensor, bias_O: Tensor, zero: int = MIDDLE) -> None:
        super().__init__()
        exact = weight_IO.detach().double()
        scale = (exact.abs().amax(0) / LARGEST).clamp_min(SMALLEST)
        self.register_buffer("weight", (exact / scale).round().to(torch.int8).contiguous())
        self.register_buffer("scale", scale.float())
        self.register_buffer("bias", bias_O.detach().float().contiguous())
        self.zero = zero

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = int8_linear(x, self.weight, self.scale, self.bias, self.zero)
        return result


@torch.library.custom_op("flexvar::int8_linear", mutates_args=())
def int8_linear(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor, zero: int) -> Tensor:
    """The arithmetic of `Int8Dense`. A row that holds NaN or infinity becomes NaN.

    It is one custom operation, because the exporter would take seconds per layer for its parts.
    """
    above, below = x.amax(-1, keepdim=True) / (LEVELS - zero), x.amin(-1, keepdim=True) / -zero
    step = torch.maximum(above, below).clamp_min(SMALLEST) + x.sum(-1, keepdim=True) * 0
    levels = (x * (1 / step)).round().clamp(-zero, LEVELS - zero)
    product = levels.double() @ weight.double()  # exact: float64 holds these sums
    return product.float() * scale * step + bias


@int8_linear.register_fake
def _(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor, zero: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[1]))


def _int8_linear(x: Any, weight: Any, scale: Any, bias: Any, zero: int) -> Any:
    last: Any = op.Constant(value_ints=[-1])
    nothing = op.Mul(op.ReduceSum(x, last, keepdims=1), op.Constant(value_float=0.0))  # ReduceMax ignores NaN
    above = op.Mul(op.ReduceMax(x, last, keepdims=1), op.Constant(value_float=1 / (LEVELS - zero)))
    below = op.Mul(op.ReduceMin(x, last, keepdims=1), op.Constant(value_float=-1 / zero))
    step = op.Add(op.Max(above, below, op.Constant(value_float=SMALLEST)), nothing)
    z: Any = op.Constant(value=onnx.helper.make_tensor("zero_point", onnx.TensorProto.UINT8, [], [zero]))
    one: Any = op.Constant(value_float=1.0)
    levels: Any = op.QuantizeLinear(op.Mul(x, op.Reciprocal(step)), one, z)
    product = op.Cast(op.MatMulInteger(levels, weight, z), to=onnx.TensorProto.FLOAT)
    return op.Add(op.Mul(op.Mul(product, scale), step), bias)


TRANSLATIONS: dict[Callable[..., Any], Callable[..., Any]] = {torch.ops.flexvar.int8_linear.default: _int8_linear}
"""The ONNX form of the custom operations of this module, for the exporter."""
