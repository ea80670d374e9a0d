"""Made-up features with the scale and the spectrum of Inception's pooling layer, for tests without the network.

The golden record of OpenAI's evaluator was made with the same generator, so its random draws must stay as they are.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

WIDTH, FACTORS, CLASSES = 2048, 160, 1000
WORLD = 7
"""Seed of what all sets share: the factors, their weights and the centres of the classes."""


def pool_like(count: int, seed: int, shift: float = 0.0) -> NDArray[np.float32]:
    """Features of `count` images, (count, 2048) float32, none negative. Image i has class i modulo 1,000.

    An image is its class's centre and noise in a space of 160 factors, mapped to 2,048 features and clipped at 0. The
    variance over all features is about 170, their mean 0.4. shift: how far the distribution differs from that with 0.
    """
    world = np.random.default_rng(WORLD)
    strength = (1 + np.arange(FACTORS))[:, None] ** -0.6
    weights = (world.standard_normal((FACTORS, WIDTH)) * strength).astype(np.float32)
    bias = (world.standard_normal(WIDTH) * 0.15 - 0.05).astype(np.float32)
    centres = world.standard_normal((CLASSES, FACTORS)).astype(np.float32)
    moved = weights + shift * 0.25 * (world.standard_normal((FACTORS, WIDTH)) * strength).astype(np.float32)
    draws, spread = np.random.default_rng([seed, 99]), 0.7 - 0.3 * shift
    features = np.empty((count, WIDTH), np.float32)
    for block in np.split(features, range(5000, count, 5000)):  # the draws come in blocks of 5,000
        classes = np.arange(len(block)) % CLASSES  # 5,000 is a multiple of 1,000
        factors = centres[classes] * 0.9 + draws.standard_normal((len(block), FACTORS), np.float32) * spread
        values = factors @ moved * 0.13 + bias + draws.standard_normal((len(block), WIDTH), np.float32) * 0.12 + 0.28
        np.maximum(values, 0, out=block)
    return features
