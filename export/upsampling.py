"""The upsampling of the decoder with 16 multiplications per input pixel in place of 36, and the same result.

Nearest-neighbour doubling repeats every pixel. So up to four of the nine taps of the following 3×3 convolution read the
same pixel. These taps are summed when the graph is made, which leaves 16 taps per input pixel. They take one of two
forms. "phases" is four 2×2 convolutions, one for each parity of the row and column of the output pixel. "transposed" is
one transposed 4×4 convolution with stride 2. Zero padding of the doubled map becomes zero padding of the small map, so
the result is exact at the border too.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flexvar_ref.tokenizer import Decoder, Upsample
from flexvar_runtime.bundle.manifest import PHASES, TRANSPOSED

# (phase, place in the 2-tap kernel, tap): even rows read one pixel with the first tap and the next with the other two.
_FOLD = ((1, 0, 0), (0, 1, 1)), ((1, 1, 0), (0, 0, 1))
# (place in the 4-tap kernel, tap): the first row of the result that a pixel reaches reads it with the last tap only.
_SPREAD = (0, 0, 1), (0, 1, 1), (1, 1, 0), (1, 0, 0)


def phase_kernels(weight: Tensor) -> Tensor:
    """The kernels (2, 2, O, I, 2, 2) by phase of row and column, for a convolution (O, I, 3, 3). Summed in float64."""
    fold = torch.tensor(_FOLD, dtype=torch.float64)
    return torch.einsum("apy,bqx,oiyx->aboipq", fold, fold, weight.detach().double())


def transposed_kernel(weight: Tensor) -> Tensor:
    """The kernel (I, O, 4, 4) of the transposed convolution, for a convolution (O, I, 3, 3). Summed in float64."""
    spread = torch.tensor(_SPREAD, dtype=torch.float64)
    return torch.einsum("py,qx,oiyx->iopq", spread, spread, weight.detach().double())


class PhaseUpsample(nn.Module):
    """x (B, C, h, w) -> (B, C, 2h, 2w): `upsample` as four convolutions in `dtype`.

    Every phase has its own padding. The results are interleaved along the last axis, then along the rows.
    """

    bias: Tensor

    def __init__(self, upsample: Upsample, dtype: torch.dtype) -> None:
        super().__init__()
        kernels = phase_kernels(upsample.conv.weight).to(dtype)
        for a in range(2):
            for b in range(2):
                self.register_buffer(f"weight_{a}{b}", kernels[a, b].clone(memory_format=torch.contiguous_format))
        self.register_buffer("bias", _bias(upsample, dtype))

    def forward(self, x: Tensor) -> Tensor:
        rows = [torch.stack((self._phase(x, a, 0), self._phase(x, a, 1)), -1).flatten(-2) for a in range(2)]
        return torch.stack(rows, -2).flatten(-3, -2)

    def _phase(self, x: Tensor, a: int, b: int) -> Tensor:
        """The pixels (2i + a, 2j + b) of the result, from rows i − 1 + a and i + a and columns j − 1 + b and j + b."""
        return F.conv2d(F.pad(x, (1 - b, b, 1 - a, a)), self.get_buffer(f"weight_{a}{b}"), self.bias)


class TransposedUpsample(nn.Module):
    """x (B, C, h, w) -> (B, C, 2h, 2w): `upsample` as one transposed convolution in `dtype`."""

    weight: Tensor
    bias: Tensor

    def __init__(self, upsample: Upsample, dtype: torch.dtype) -> None:
        super().__init__()
        self.register_buffer("weight", transposed_kernel(upsample.conv.weight).to(dtype).contiguous())
        self.register_buffer("bias", _bias(upsample, dtype))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv_transpose2d(x, self.weight, self.bias, stride=2, padding=1)


class RepeatUpsample(nn.Module):
    """x (B, C, h, w) -> (B, C, 2h, 2w): `upsample` without a resize operation. Every pixel is repeated by a broadcast.

    ONNX Runtime's CUDA provider cannot resize bfloat16.
    """

    def __init__(self, upsample: Upsample, dtype: torch.dtype) -> None:
        super().__init__()
        self.conv = upsample.conv.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        repeated = x[:, :, :, None, :, None].expand(-1, -1, -1, 2, -1, 2)
        result: Tensor = self.conv(repeated.flatten(4, 5).flatten(2, 3))
        return result


_FORMS = {PHASES: PhaseUpsample, TRANSPOSED: TransposedUpsample}


def replace_upsampling(decoder: Decoder, form: str, dtype: torch.dtype) -> None:
    """Replace every upsampling layer of `decoder` by another form, in place. Its weights are those of the reference.

    PLAIN keeps the layer of the reference, except in bfloat16, where it becomes a `RepeatUpsample`.
    """
    make: type[nn.Module] | None = _FORMS.get(form, RepeatUpsample if dtype == torch.bfloat16 else None)
    if make is None:
        return
    for level in decoder.conv_blocks:
        if isinstance(level.upsample, Upsample):
            level.upsample = make(level.upsample, dtype)


def _bias(upsample: Upsample, dtype: torch.dtype) -> Tensor:
    bias = upsample.conv.bias
    assert bias is not None  # a convolution of `Upsample` has one
    return bias.detach().to(dtype)
