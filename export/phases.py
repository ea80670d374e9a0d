"""The decoder's upsampling in phases: the same numbers from 16 multiplications in place of 36.

Doubling a map to the nearest pixel repeats each one, so of the nine taps of the 3×3 convolution that follows up to four
meet the same pixel. Summed beforehand they are 2×2, others for each of the four phases: the parity of an output
pixel's row and column. The zeros around the doubled map become zeros around the small one: exact at the border too.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flexvar_ref.tokenizer import Decoder, Upsample

# (phase, place in the window, tap): even rows meet one pixel with the first tap and the next with the other two.
_FOLD = ((1, 0, 0), (0, 1, 1)), ((1, 1, 0), (0, 0, 1))


def phase_kernels(weight: Tensor) -> Tensor:
    """Kernels (2, 2, O, I, 2, 2), by phase of row and column, of a convolution (O, I, 3, 3); summed in float64."""
    fold = torch.tensor(_FOLD, dtype=torch.float64)
    return torch.einsum("apy,bqx,oiyx->aboipq", fold, fold, weight.detach().double())


class PhaseUpsample(nn.Module):
    """x (B, C, h, w) -> (B, C, 2h, 2w): what `upsample` makes of it, in `dtype`.

    Four convolutions, each with the zeros that its phase meets. Interleaved by joining the last axis, then the rows.
    """

    bias: Tensor

    def __init__(self, upsample: Upsample, dtype: torch.dtype) -> None:
        super().__init__()
        conv = upsample.conv
        assert conv.bias is not None  # a convolution of `Upsample` has one
        kernels = phase_kernels(conv.weight).to(dtype)
        for a in range(2):
            for b in range(2):
                self.register_buffer(f"weight_{a}{b}", kernels[a, b].clone(memory_format=torch.contiguous_format))
        self.register_buffer("bias", conv.bias.detach().to(dtype))

    def forward(self, x: Tensor) -> Tensor:
        rows = [torch.stack((self._phase(x, a, 0), self._phase(x, a, 1)), -1).flatten(-2) for a in range(2)]
        return torch.stack(rows, -2).flatten(-3, -2)

    def _phase(self, x: Tensor, a: int, b: int) -> Tensor:
        """Pixels (2i + a, 2j + b) of the result: of the rows i − 1 + a and i + a, columns likewise."""
        return F.conv2d(F.pad(x, (1 - b, b, 1 - a, a)), self.get_buffer(f"weight_{a}{b}"), self.bias)


def upsample_in_phases(decoder: Decoder, dtype: torch.dtype) -> None:
    """Replace every upsampling of `decoder`, whose weights are the reference's, in place."""
    for level in decoder.conv_blocks:
        if isinstance(level.upsample, Upsample):
            level.upsample = PhaseUpsample(level.upsample, dtype)
