"""The random scenes whose features OpenAI's evaluator computed for the record `tests/golden/openai_evaluator.npz`.

The record was made with the same generator, so its random draws and its arithmetic must stay as they are.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

SETS = {"ref256": (256, 1), "smp256": (256, 2), "smp512": (512, 3), "smp64": (64, 4)}
"""Side in pixels and seed of each recorded set. The record has the features of its first 3 or 6 images."""
_WAVES, _TURN = 6, 6.283


def recorded_images(name: str, count: int) -> NDArray[np.uint8]:
    """The first images of a recorded set, uint8 (count, side, side, 3).

    Each image is a sum of six plane waves in random colours, a disc, and noise.
    """
    side, seed = SETS[name]
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:side, 0:side] / side
    images = np.empty((count, side, side, 3), np.uint8)
    for image in images:
        scene = np.zeros((side, side, 3))
        for wave in range(_WAVES):
            frequency, angle, phase = rng.uniform(0.5, 24), rng.uniform(0, np.pi), rng.uniform(0, 6.28)
            along = x * np.cos(angle) + y * np.sin(angle)
            colour = rng.standard_normal(3)
            scene += np.sin(_TURN * frequency * along + phase)[..., None] * colour / (1 + wave)
        column, row, radius = rng.uniform(0, 1, 3)
        disc = (x - column) ** 2 + (y - row) ** 2 < (radius / 3) ** 2
        scene[disc] += rng.standard_normal(3) * 2
        scene += rng.standard_normal((side, side, 3)) * rng.uniform(0, 0.4)
        image[:] = np.clip(127.5 + 60 * scene, 0, 255).astype(np.uint8)
    return images
