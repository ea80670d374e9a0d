"""The optional adversarial loss of the tokenizer: a PatchGAN discriminator with hinge losses.

Source: Isola et al., 2017 (the network); Esser et al., 2021 (hinge, start step, adaptive weight).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CHANNELS, LAYERS = 32, 3
MAX_WEIGHT = 1e4


class PatchDiscriminator(nn.Module):
    """Images (B, 3, H, W) to a score for each patch, (B, 1, h, w).

    It has group normalisation, so that no image depends on the others of its batch.
    """

    def __init__(self, channels: int = CHANNELS, layers: int = LAYERS) -> None:
        super().__init__()
        widths = [channels * min(2**i, 8) for i in range(layers + 1)]
        parts: list[nn.Module] = [nn.Conv2d(3, widths[0], 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for i in range(1, layers + 1):
            stride = 2 if i < layers else 1
            parts += [
                nn.Conv2d(widths[i - 1], widths[i], 4, stride=stride, padding=1, bias=False),
                nn.GroupNorm(8, widths[i]),
                nn.LeakyReLU(0.2),
            ]
        self.layers = nn.Sequential(*parts, nn.Conv2d(widths[-1], 1, 4, padding=1))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, 0.02)

    def forward(self, image: Tensor) -> Tensor:
        return self.layers(image)


def discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """The discriminator's hinge loss, from the scores of real and of decoded images."""
    return (F.relu(1 - real.float()).mean() + F.relu(1 + fake.float()).mean()) / 2


def generator_loss(fake: Tensor) -> Tensor:
    """The adversarial loss of the tokenizer, from the scores of decoded images."""
    return -fake.float().mean()


def adaptive_weight(reconstruction: Tensor, adversarial: Tensor, last_layer: Tensor) -> Tensor:
    """The weight that gives both losses gradients of equal norm at the decoder's last layer."""
    [target] = torch.autograd.grad(reconstruction, last_layer, retain_graph=True)
    [current] = torch.autograd.grad(adversarial, last_layer, retain_graph=True)
    return (target.norm() / (current.norm() + 1e-4)).clamp(0, MAX_WEIGHT).detach()
