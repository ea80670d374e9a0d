"""The decoder's upsampling: the same numbers from 16 multiplications in place of 36.

Doubling a map to the nearest pixel repeats each one, so of the nine taps of the 3×3 convolution that follows up to four
meet the same pixel. Summed beforehand they are 16 taps in all. In phases: 2×2, others for each of the four phases, the
parity of an output pixel's row and column. Transposed: one convolution of 4×4 with stride 2. The zeros around the
doubled map become zeros around the small one: exact at the border too.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flexvar_ref.tokenizer import Decoder, Upsample
from flexvar_runtime.bundle.manifest import PHASES, TRANSPOSED

# (phase, place in the window, tap): even rows meet one pixel with the first tap and the next with the other two.
_FOLD = ((1, 0, 0), (0, 1, 1)), ((1, 1, 0), (0, 0, 1))
# (place in the kernel, tap): the row of the result that a pixel begins at meets it with the last tap alone.
_SPREAD = (0, 0, 1), (0, 1, 1), (1, 1, 0), (1, 0, 0)


def phase_kernels(weight: Tensor) -> Tensor:
    """Kernels (2, 2, O, I, 2, 2), by phase of row and column, of a convolution (O, I, 3, 3); summed in float64."""
    fold = torch.tensor(_FOLD, dtype=torch.float64)
    return torch.einsum("apy,bqx,oiyx->aboipq", fold, fold, weight.detach().double())


def transposed_kernel(weight: Tensor) -> Tensor:
    """Kernel (I, O, 4, 4) of the transposed convolution for a convolution (O, I, 3, 3); summed in float64."""
    spread = torch.tensor(_SPREAD, dtype=torch.float64)
    return torch.einsum("py,qx,oiyx->iopq", spread, spread, weight.detach().double())


class PhaseUpsample(nn.Module):
    """x (B, C, h, w) -> (B, C, 2h, 2w): what `upsample` makes of it, in `dtype`.

    Four convolutions, each with the zeros that its phase meets. Interleaved by joining the last axis, then the rows.
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
        """Pixels (2i + a, 2j + b) of the result: of the rows i − 1 + a and i + a, columns likewise."""
        return F.conv2d(F.pad(x, (1 - b, b, 1 - a, a)), self.get_buffer(f"weight_{a}{b}"), self.bias)


class TransposedUpsample(nn.Module):
    """x (B, C, h, w) -> (B, C, 2h, 2w): what `upsample` makes of it, in `dtype`. One convolution, nothing to join."""

    weight: Tensor
    bias: Tensor

    def __init__(self, upsample: Upsample, dtype: torch.dtype) -> None:
        super().__init__()
        self.register_buffer("weight", transposed_kernel(upsample.conv.weight).to(dtype).contiguous())
        self.register_buffer("bias", _bias(upsample, dtype))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv_transpose2d(x, self.weight, self.bias, stride=2, padding=1)


class RepeatUpsample(nn.Module):
    """x (B, C, h, w) -> (B, C, 2h, 2w): as `upsample`, every pixel repeated without a resize.

    ONNX Runtime's CUDA provider resizes no bfloat16.
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
    """Give every upsampling of `decoder`, whose weights are the reference's, another form, in place.

    PLAIN keeps the reference's layer, except in bfloat16, where `RepeatUpsample` takes its place.
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
