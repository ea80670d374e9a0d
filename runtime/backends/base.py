"""What a backend is: it knows graphs and arrays, never classes, schedules or sampling."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ..errors import InvalidInput
from ..manifest import GraphSpec

Array: TypeAlias = Any
"""An array of the backend: contiguous, with `shape`; `array[i]`, `array[i:j]` (first axis), `reshape` are views."""


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

    def probe(self, name: str) -> Availability:
        """Whether the backend of that name works here: one file may serve several, with another library each."""

    def create(self, name: str, *, device: str | None, threads: int | None) -> Backend:
        """Start it."""


def check_bindings(spec: GraphSpec, inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> None:
    """Refuse bindings that are not what a graph declares: names, ranks, sizes, and axes of one name of one size.

    Outputs may be left out. Raises InvalidInput: bound by address, a wrong shape would read or write beside the array.
    """
    sizes: dict[str, int] = {}
    for declared, bound, optional in ((spec.inputs, inputs, False), (spec.outputs, outputs, True)):
        names = {tensor.name for tensor in declared}
        if not set(bound) <= names or not (optional or set(bound) == names):
            raise InvalidInput(
                f"bindings {sorted(bound)}", expected=f"{sorted(names)}", fix="bind what the manifest declares"
            )
        for tensor in declared:
            if tensor.name not in bound:
                continue
            shape = tuple(bound[tensor.name].shape)
            wanted = tuple(
                sizes.setdefault(axis, size) if isinstance(axis, str) else axis
                for axis, size in zip(tensor.axes, shape, strict=False)
            )
            if len(shape) != len(tensor.axes) or shape != wanted:
                raise InvalidInput(
                    f"{tensor.name} of shape {shape}",
                    expected=f"axes {tensor.axes} with {sizes}",
                    fix="bind an array of that shape",
                )


def host_dtype(dtype: str) -> np.dtype[Any]:
    """NumPy type that stores a manifest dtype (bfloat16 as its bits)."""
    return np.dtype(np.uint16) if dtype == "bfloat16" else np.dtype(dtype)
