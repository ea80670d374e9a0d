"""What a backend is: it knows graphs and arrays, never classes, schedules or sampling."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ..manifest import GraphSpec

Array: TypeAlias = Any
"""An array of the backend: has `shape`, and `array[i:j]` is a view along its first axis."""


@dataclass(frozen=True)
class Availability:
    """Whether a backend works here; if not, why, and the one line that fixes it."""

    available: bool
    detail: str
    fix: str | None = None


class Graph(Protocol):
    """An opened graph of a bundle."""

    spec: GraphSpec

    def run(self, inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> None:
        """Run with every input bound and the results written in place into `outputs`. Raises FlexVARError."""

    def close(self) -> None:
        """Free the weights and everything else."""


class Backend(Protocol):
    """Opens graphs and moves arrays. Files of this package implement it; one backend a file."""

    name: str
    precisions: frozenset[str]
    threads: int

    def open(self, path: Path, spec: GraphSpec, *, once: bool = False) -> Graph:
        """Open a graph file of a checked bundle. `once`: it will run a few times only, so no preparation pays."""

    def empty(self, shape: tuple[int, ...], dtype: str) -> Array:
        """An uninitialised array of a manifest dtype."""

    def upload(self, host: NDArray[Any]) -> Array:
        """A host array as an array of the backend."""

    def download(self, array: Array) -> NDArray[Any]:
        """An array of the backend as a host array (a view where memory is shared)."""

    def available_bytes(self) -> int | None:
        """Memory left for buffers, None where it cannot be known."""


class BackendModule(Protocol):
    """A file of this package."""

    def probe(self) -> Availability: ...

    def create(self, *, device: str | None, threads: int | None) -> Backend: ...


def host_dtype(dtype: str) -> np.dtype[Any]:
    """NumPy type that stores a manifest dtype (bfloat16 as its bits)."""
    return np.dtype(np.uint16) if dtype == "bfloat16" else np.dtype(dtype)
