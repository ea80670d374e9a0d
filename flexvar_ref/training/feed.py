"""Batches for training: which samples each step gets, in which order, and where they come from."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from ..errors import ConfigError
from . import data
from .data import Dataset
from .randomness import ORDER, generator

Array = NDArray[Any]


class Source(Protocol):
    """A source of samples by index. Indices count over all epochs."""

    def take(self, indices: Array) -> tuple[Array, Array]:
        """Images or latents (B, …), and labels, int64 (B,)."""


@dataclass(frozen=True)
class BatchPlan:
    """The sample indices of every chunk of every step, for one process.

    A chunk is the part of a batch that one process computes at once. batch: samples in each step, over all processes.
    rank: number of this process. accumulation: chunks of each process in a step. Raises ConfigError if the batch cannot
    be divided into equal chunks.
    """

    batch: int
    processes: int = 1
    rank: int = 0
    accumulation: int = 1

    def __post_init__(self) -> None:
        if self.batch % self.chunks:
            raise ConfigError(
                f"loop.batch is {self.batch}, but with {self.processes} processes and optim.accumulation = "
                f"{self.accumulation} it must be a multiple of {self.chunks}.",
                expected=f"a multiple of {self.chunks}",
                fix="Change loop.batch or optim.accumulation.",
            )

    @property
    def chunks(self) -> int:
        """Number of chunks in a step, over all processes."""
        return self.processes * self.accumulation

    @property
    def chunk_size(self) -> int:
        """Number of samples in a chunk."""
        return self.batch // self.chunks

    def chunk(self, turn: int) -> int:
        """Index within the step of this process's chunk number `turn`."""
        return turn * self.processes + self.rank

    def indices(self, step: int, turn: int) -> Array:
        """Sample indices of this process's chunk number `turn` of a step."""
        start = step * self.batch + self.chunk(turn) * self.chunk_size
        return np.arange(start, start + self.chunk_size)

    def from_step(self, step: int) -> Iterator[Array]:
        """The sample indices of all chunks of this process from `step` on, without end."""
        while True:
            yield from (self.indices(step, turn) for turn in range(self.accumulation))
            step += 1


@dataclass(frozen=True)
class DatasetSource:
    """Samples of a data set, each prepared when it is needed."""

    dataset: Dataset

    def take(self, indices: Array) -> tuple[Array, Array]:
        return data.batch(self.dataset, int(indices[0]), len(indices))


@dataclass(frozen=True)
class CachedSource:
    """Samples from arrays, in a new random order in every epoch."""

    values: Array
    labels: Array
    seed: int

    def take(self, indices: Array) -> tuple[Array, Array]:
        count = len(self.labels)
        rows = np.array([_order(self.seed, int(index) // count, count)[int(index) % count] for index in indices])
        return self.values[rows], self.labels[rows]


@lru_cache(maxsize=4)
def _order(seed: int, epoch: int, count: int) -> Array:
    return torch.randperm(count, generator=generator(seed, ORDER, epoch)).numpy()


def batches(source: Source, plan: BatchPlan, start: int, workers: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The chunks of this process from step `start` on, without end: images or latents (B, …), and labels, int64 (B,).

    workers: processes that prepare samples in advance. Cached samples need none.
    """
    if isinstance(source, CachedSource) or workers == 0:
        for indices in plan.from_step(start):
            yield _tensors(*source.take(indices))
        return
    chunks = _Chunks(source, plan, start)
    # without a batch size the loader keeps the order of its sampler, with any number of workers
    yield from DataLoader(chunks, batch_size=None, sampler=_Counter(), num_workers=workers, generator=torch.Generator())


def _tensors(values: Array, labels: Array) -> tuple[Tensor, Tensor]:
    return torch.from_numpy(np.ascontiguousarray(values)), torch.from_numpy(np.asarray(labels, np.int64))


@dataclass(frozen=True)
class _Chunks(TorchDataset[tuple[Tensor, Tensor]]):
    """The chunks of this process as a torch data set."""

    source: Source
    plan: BatchPlan
    start: int

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        step, turn = divmod(index, self.plan.accumulation)
        return _tensors(*self.source.take(self.plan.indices(self.start + step, turn)))


class _Counter:
    """An iterable of 0, 1, 2, …"""

    def __iter__(self) -> Iterator[int]:
        return itertools.count()


def signed(images: Tensor) -> Tensor:
    """Images as float32 (B, 3, H, W) in −1…1. Images of dtype uint8 (B, H, W, 3) are converted, others returned."""
    if images.dtype != torch.uint8:
        return images
    return images.permute(0, 3, 1, 2).float().div_(127.5).sub_(1).contiguous()
