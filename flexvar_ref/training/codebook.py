"""How the codebook is used, and new life for codes that nothing maps to."""

from __future__ import annotations

import torch
from torch import Tensor

MEMORY = 0.9  # of the moving average of a code's share, over steps


def even(vocabulary: int, device: torch.device | None = None) -> Tensor:
    """Shares (V,) before anything is known: all alike."""
    return torch.full((vocabulary,), 1 / vocabulary, device=device)


def updated(share_V: Tensor, counts_V: Tensor) -> Tensor:
    """Moving average of every code's share of all tokens, after a step that took it counts_V times."""
    return MEMORY * share_V + (1 - MEMORY) * counts_V / counts_V.sum().clamp_min(1)


def perplexity(share_V: Tensor) -> float:
    """How many evenly used codes would be as hard to guess: exp(entropy), from 1 to V."""
    share = share_V.double() / share_V.double().sum().clamp_min(1e-30)
    return float((-(share * share.clamp_min(1e-30).log()).sum()).exp())


def dead(share_V: Tensor, below: float) -> Tensor:
    """Indices of the codes with less than `below` times the even share, the least used first."""
    order = share_V.argsort(stable=True)
    return order[share_V[order] < below / len(share_V)]


@torch.no_grad()
def revive(embedding_VD: Tensor, codes: Tensor, vectors_ND: Tensor, generator: torch.Generator) -> Tensor:
    """Set `codes`, as many as there are different vectors, to encoder outputs drawn by the generator, in place.

    Returns the codes that were set. The same on every process that holds the same vectors.
    """
    order = torch.randperm(len(vectors_ND), generator=generator)[: len(codes)].to(vectors_ND.device)
    codes = codes[: len(order)]
    embedding_VD[codes] = vectors_ND[order].to(embedding_VD.dtype)
    return codes
