"""What a step is fed: which samples, in which order, from where."""

from __future__ import annotations

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

from . import data
from .data import Dataset
from .errors import ConfigError
from .randomness import ORDER, generator

Array = NDArray[Any]


class Source(Protocol):
    """Samples by their index, counted through all epochs."""

    def take(self, indices: Array) -> tuple[Array, Array]:
        """What the networks see, (B, …), and labels, int64 (B,)."""


@dataclass(frozen=True)
class Plan:
    """Which samples every chunk of every step holds: a function of (step, process), never of what came before."""

    batch: int
    processes: int = 1
    rank: int = 0
    accumulation: int = 1

    def __post_init__(self) -> None:
        if self.batch % self.chunks:
            raise ConfigError(
                f"{self.batch} images a step for {self.processes} processes with {self.accumulation} chunks each",
                expected=f"a multiple of {self.chunks}",
                fix="change loop.batch or optim.accumulation",
            )

    @property
    def chunks(self) -> int:
        """Of a step, all processes together."""
        return self.processes * self.accumulation

    @property
    def chunk_size(self) -> int:
        return self.batch // self.chunks

    def chunk(self, turn: int) -> int:
        """Number within the step of this process's chunk at `turn` of its accumulation."""
        return turn * self.processes + self.rank

    def indices(self, step: int, turn: int) -> Array:
        start = step * self.batch + self.chunk(turn) * self.chunk_size
        return np.arange(start, start + self.chunk_size)

    def from_step(self, step: int) -> Iterator[Array]:
        """The indices of every turn of this process from `step` on, without end."""
        while True:
            yield from (self.indices(step, turn) for turn in range(self.accumulation))
            step += 1


@dataclass(frozen=True)
class Drawn:
    """Samples of a data set, each drawn when it is asked for."""

    dataset: Dataset

    def take(self, indices: Array) -> tuple[Array, Array]:
        return data.batch(self.dataset, int(indices[0]), len(indices))


@dataclass(frozen=True)
class Kept:
    """Samples that lie ready, in a new order every epoch."""

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


def batches(source: Source, plan: Plan, start: int, workers: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The chunks of this process from step `start` on, without end; drawn ahead by `workers` processes if not kept."""
    if isinstance(source, Kept) or workers == 0:
        for indices in plan.from_step(start):
            yield _tensors(*source.take(indices))
        return
    turns = _Turns(source, plan, start)
    # without a batch size the loader keeps the order of its sampler, whoever draws
    yield from DataLoader(turns, batch_size=None, sampler=_Count(), num_workers=workers, generator=torch.Generator())


def _tensors(values: Array, labels: Array) -> tuple[Tensor, Tensor]:
    return torch.from_numpy(np.ascontiguousarray(values)), torch.from_numpy(np.asarray(labels, np.int64))


@dataclass(frozen=True)
class _Turns(TorchDataset[tuple[Tensor, Tensor]]):
    source: Source
    plan: Plan
    start: int

    def __getitem__(self, turn: int) -> tuple[Tensor, Tensor]:
        step, turn = divmod(turn, self.plan.accumulation)
        return _tensors(*self.source.take(self.plan.indices(self.start + step, turn)))


class _Count:
    """0, 1, 2, …"""

    def __iter__(self) -> Iterator[int]:
        turn = 0
        while True:
            yield turn
            turn += 1


def signed(images: Tensor) -> Tensor:
    """Images (B, 3, H, W), float32 in −1…1, of what a source gives: the same, or uint8 (B, H, W, 3)."""
    if images.dtype != torch.uint8:
        return images
    return images.permute(0, 3, 1, 2).float().div_(127.5).sub_(1).contiguous()
