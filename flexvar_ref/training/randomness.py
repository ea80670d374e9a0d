"""Every random draw of training as a function of (seed, step, chunk): nothing to save, nothing that a resume can lose.

A chunk is what one process computes at once; a step has (processes · accumulation) of them, numbered through. So one
process that accumulates two chunks draws what two processes with one chunk each draw.
"""

from __future__ import annotations

import torch

from .scenes.stream import Stream

# Streams of a seed. The data set has the small numbers.
WEIGHTS, SCHEDULE, SCALES, NOISE, ORDER, REVIVAL = range(16, 22)
_CHUNKS = 2**20  # more than any step has


def stream(seed: int, purpose: int, index: int = 0) -> Stream:
    """Draws for one purpose at one index, most often a step."""
    return Stream(seed, index, purpose)


def torch_seed(seed: int, purpose: int, index: int = 0) -> int:
    """A seed for one of torch's generators."""
    return stream(seed, purpose, index).whole(0, 2**48)


def generator(seed: int, purpose: int, index: int = 0) -> torch.Generator:
    """A generator on the CPU for one purpose at one index."""
    return torch.Generator().manual_seed(torch_seed(seed, purpose, index))


def seed_chunk(seed: int, step: int, chunk: int) -> None:
    """Seed torch for what a chunk draws inside the networks: label dropout and drop path."""
    torch.manual_seed(torch_seed(seed, NOISE, step * _CHUNKS + chunk))
