"""Usage statistics of the codebook, and the reset of codes that are hardly used."""

from __future__ import annotations

import torch
from torch import Tensor

DECAY = 0.9  # of the moving average of the shares, in each step


def even_shares(vocabulary: int, device: torch.device | None = None) -> Tensor:
    """Equal shares (V,): the state before the first step."""
    return torch.full((vocabulary,), 1 / vocabulary, device=device)


def updated_shares(share_V: Tensor, counts_V: Tensor) -> Tensor:
    """The moving average (V,) of each code's share of all tokens, after a step that used the codes counts_V times."""
    return DECAY * share_V + (1 - DECAY) * counts_V / counts_V.sum().clamp_min(1)


def perplexity(share_V: Tensor) -> float:
    """Perplexity of the shares, exp(entropy): from 1 (one code is used) to V (all are used equally)."""
    share = share_V.double() / share_V.double().sum().clamp_min(1e-30)
    return float((-(share * share.clamp_min(1e-30).log()).sum()).exp())


def dead_codes(share_V: Tensor, below: float) -> Tensor:
    """Indices of the codes whose share is less than `below` / V, the least used first."""
    order = share_V.argsort(stable=True)
    return order[share_V[order] < below / len(share_V)]


@torch.no_grad()
def revive(embedding_VD: Tensor, codes: Tensor, vectors_ND: Tensor, generator: torch.Generator) -> Tensor:
    """Set the rows `codes` of the codebook to different encoder outputs drawn from `vectors_ND`, in place.

    Returns the codes that were set, which are at most N. All processes that hold the same vectors get the same result.
    """
    order = torch.randperm(len(vectors_ND), generator=generator)[: len(codes)].to(vectors_ND.device)
    codes = codes[: len(order)]
    embedding_VD[codes] = vectors_ND[order].to(embedding_VD.dtype)
    return codes
