"""The transformer's loss: cross-entropy of the true tokens of all scales."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..scales import Scales
from ..transformer import FlexVAR


class TokenObjective(nn.Module):
    """The transformer and its loss in one module, which data-parallel training can wrap."""

    def __init__(self, model: FlexVAR) -> None:
        super().__init__()
        self.model = model

    def forward(self, labels_B: Tensor, tokens: Sequence[Tensor], scales: Scales, bf16: bool = False) -> Tensor:
        """Cross-entropy (B, L) of the true tokens (B, h, w) of every scale. bf16: compute blocks in bfloat16."""
        with torch.autocast(labels_B.device.type, torch.bfloat16, enabled=bf16):
            logits_BLV = self.model(labels_B, tokens, scales)
        target_BL = torch.cat([scale.flatten(1) for scale in tokens], dim=1).long()
        loss = F.cross_entropy(logits_BLV.float().flatten(0, 1), target_BL.flatten(), reduction="none")
        return loss.view_as(target_BL)


def per_scale(loss_BL: Tensor, scales: Scales) -> list[Tensor]:
    """The mean of loss_BL over the tokens of each scale."""
    return [part.mean() for part in torch.split(loss_BL, [h * w for h, w in scales], dim=1)]
