"""Random draws of training. Each is a function of (seed, step, chunk), so a resume needs no saved random state.

A chunk is the part of a batch that one process computes at once. A step has processes · accumulation chunks. So one
process that accumulates two chunks makes the same draws as two processes with one chunk each.
"""

from __future__ import annotations

import torch

from .scenes.stream import Stream

# Streams of a seed. The data sets use the numbers below 16.
WEIGHTS, SCHEDULE, SCALES, NOISE, ORDER, REVIVAL = range(16, 22)
_MAX_CHUNKS = 2**20  # more chunks than any step has


def stream(seed: int, purpose: int, index: int = 0) -> Stream:
    """The random stream of one purpose at one index, usually a step."""
    return Stream(seed, index, purpose)


def torch_seed(seed: int, purpose: int, index: int = 0) -> int:
    """A seed for torch, for one purpose at one index."""
    return stream(seed, purpose, index).whole(0, 2**48)


def generator(seed: int, purpose: int, index: int = 0) -> torch.Generator:
    """A torch generator on the CPU for one purpose at one index."""
    return torch.Generator().manual_seed(torch_seed(seed, purpose, index))


def seed_chunk(seed: int, step: int, chunk: int) -> None:
    """Seed torch for the draws of a chunk inside the networks: label dropout and drop path."""
    torch.manual_seed(torch_seed(seed, NOISE, step * _MAX_CHUNKS + chunk))
