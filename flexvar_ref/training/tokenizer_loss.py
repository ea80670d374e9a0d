"""The multi-scale VQ loss: each step reconstructs the images at several scales.

Source: FlexVAR, section 3.1 (several random scales in each step); the commitment and codebook losses of VQGAN, with
l2-normalised codes as in LlamaGen's tokenizer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..scales import Scales
from ..tokenizer import Tokenizer
from .config import VQLoss
from .perceptual import Perceptual
from .scenes.stream import Stream


class VQOutput(NamedTuple):
    """Losses and by-products of one chunk.

    loss: reconstruction + quantisation.
    reconstruction: pixel and perceptual losses.
    quantisation: commitment and codebook losses.
    image_BCHW: the largest scale, decoded.
    counts_V: number of tokens with each code.
    vectors_ND: l2-normalised encoder outputs of the largest scale.
    """

    loss: Tensor
    reconstruction: Tensor
    quantisation: Tensor
    image_BCHW: Tensor
    counts_V: Tensor
    vectors_ND: Tensor


def random_scales(side: int, count: int, draws: Stream) -> Scales:
    """The largest scale, and count − 1 others drawn uniformly from the sides 1 … side − 1. Smallest first."""
    others = list(range(1, side))
    drawn = [others.pop(draws.whole(0, len(others) - 1)) for _ in range(min(count, side) - 1)]
    return tuple((s, s) for s in sorted([*drawn, side]))


class VQObjective(nn.Module):
    """The tokenizer and its loss in one module, which data-parallel training can wrap."""

    def __init__(self, tokenizer: Tokenizer, config: VQLoss, perceptual: Perceptual | None = None) -> None:
        super().__init__()
        self.tokenizer, self.config = tokenizer, config
        self.perceptual = [perceptual]  # in a list, so that its weights are neither trained nor saved

    def forward(self, image_BCHW: Tensor, scales: Scales, bf16: bool = False) -> VQOutput:
        """The losses of images (B, 3, H, W) in −1…1, reconstructed at `scales`, the largest last.

        bf16: compute convolutions in bfloat16.
        """
        device, c = image_BCHW.device.type, self.config
        with torch.autocast(device, torch.bfloat16, enabled=bf16):
            latent = self.tokenizer.encode(image_BCHW)
        latent, codebook_VD = latent.float(), self.tokenizer.codebook_VD
        terms, pixels, counts = [], [], torch.zeros(len(codebook_VD), device=latent.device)
        image, vectors = image_BCHW, latent
        for size in scales:
            vectors = F.normalize(F.interpolate(latent, size=size, mode="area"), dim=1).permute(0, 2, 3, 1)
            index = nearest(vectors, codebook_VD)
            codes = F.embedding(index, codebook_VD)
            counts += torch.bincount(index.flatten(), minlength=len(codebook_VD))
            commitment, codebook = F.mse_loss(vectors, codes.detach()), F.mse_loss(codes, vectors.detach())
            terms.append(c.commitment * commitment + c.codebook * codebook)
            with torch.autocast(device, torch.bfloat16, enabled=bf16):
                image = self.tokenizer.decode_codes(vectors + (codes - vectors).detach())
            image = image.float()
            target = F.interpolate(image_BCHW, size=image.shape[2:], mode="area")
            pixels.append(self._compare(image, target, bf16))
        weights = scale_weights(scales, c.scale_power)
        quantisation = sum_weighted(terms, [1 / len(scales)] * len(scales))
        reconstruction = sum_weighted(pixels, weights)
        return VQOutput(
            reconstruction + quantisation,
            reconstruction,
            quantisation,
            image,
            counts,
            vectors.detach().flatten(0, 2),
        )

    def _compare(self, image: Tensor, target: Tensor, bf16: bool) -> Tensor:
        loss = self.config.l1 * F.l1_loss(image, target) + self.config.l2 * F.mse_loss(image, target)
        if (network := self.perceptual[0]) is not None and self.config.perceptual > 0:
            with torch.autocast(image.device.type, torch.bfloat16, enabled=bf16):
                loss = loss + self.config.perceptual * network(image, target)
        return loss


@torch.no_grad()
def nearest(vectors: Tensor, codebook_VD: Tensor) -> Tensor:
    """Index (...) of the code nearest to each l2-normalised vector (..., D)."""
    return (vectors @ codebook_VD.T).argmax(-1)


def scale_weights(scales: Scales, power: float) -> list[float]:
    """A weight for each scale, in proportion to its number of tokens to the power `power`. They sum to 1."""
    raw = [float(h * w) ** power for h, w in scales]
    return [value / sum(raw) for value in raw]


def sum_weighted(terms: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """The weighted sum of scalars."""
    return torch.stack([term * weight for term, weight in zip(terms, weights, strict=True)]).sum()
