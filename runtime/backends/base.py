"""What a backend is: it knows graphs and arrays, never classes, schedules or sampling."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ..bundle import Bundle
from ..errors import InvalidInput
from ..manifest import GraphSpec

if TYPE_CHECKING:
    from ..cuda.device import Device

Array: TypeAlias = Any
"""An array of the backend: contiguous, with `shape`; `array[i]`, `array[i:j]` (first axis), `reshape` are views."""


@dataclass(frozen=True)
class Availability:
    """Whether a backend works here; if not, why, and the one line that fixes it."""

    available: bool
    detail: str
    fix: str | None = None


class Bound(Protocol):
    """A graph together with the arrays it reads and writes: it can be run again and again, and captured."""

    def run(self) -> None:
        """Run, or on a device enqueue. Raises FlexVARError."""

    def close(self) -> None:
        """Free what binding took; on a device, not while it runs."""


class Graph(Protocol):
    """An opened graph of a bundle."""

    spec: GraphSpec

    @property
    def most_images(self) -> int | None:
        """Images it takes at once; None for any number."""

    def holds(self, size: tuple[int, int]) -> bool:
        """Whether its weights are in memory for images of (h, w) tokens: a plan does not count them again."""

    def bind(self, inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> Bound:
        """Every input, and the outputs that are wanted, bound in place. Raises FlexVARError."""

    def run(self, inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> None:
        """`bind`, `run` and `close` in one."""

    def close(self) -> None:
        """Free the weights and everything else."""


class Backend(Protocol):
    """Opens graphs and moves arrays. Files of this package implement it; one backend a file."""

    name: str
    precisions: frozenset[str]
    threads: int
    labels_per_run: int
    """Rows of the condition graph, always: a label's row must not depend on how many are asked for."""
    maps_weights: bool
    """Whether a graph opened `once` leaves its weights in the file: it is opened at once and takes no memory of its own
    (of half precision, which is widened, it does)."""
    captures: bool
    """Whether its graphs can be part of a captured CUDA graph."""
    bf16_arithmetic: bool
    """Whether it computes bfloat16 as such on this processor; where it does not, or on a device, False."""
    device: Device | None
    """Where arrays live in device memory; None where they are NumPy arrays and every call is done when it returns."""

    def open(self, bundle: Bundle, graph: str, *, once: bool = False) -> Graph:
        """Open a graph of a checked bundle. `once`: it will run a few times only, so no preparation pays."""

    def prepared(self, bundle: Bundle, graph: str) -> bool:
        """Whether an optional graph of the bundle can be opened: an engine has to have been built for it."""

    def empty(self, shape: tuple[int, ...], dtype: str) -> Array:
        """An uninitialised array of a manifest dtype."""

    def upload(self, host: NDArray[Any]) -> Array:
        """A host array as an array of the backend."""

    def download(self, array: Array) -> NDArray[Any]:
        """An array of the backend as a host array (a view where memory is shared)."""

    def available_bytes(self) -> int | None:
        """Memory left for buffers, None where it cannot be known."""

    def close(self) -> None:
        """Free what the backend itself holds, after its graphs are closed."""


class BackendModule(Protocol):
    """A file of this package."""

    PRECISIONS: frozenset[str]

    def probe(self, name: str) -> Availability:
        """Whether the backend of that name works here: one file may serve several, with another library each."""

    def ready(self, name: str, bundle: Bundle, *, device: str | None, engines: Path | None) -> Availability:
        """Whether it could run this bundle now, given that it works here."""

    def create(self, name: str, *, device: str | None, threads: int | None, engines: Path | None) -> Backend:
        """Start it. `engines`: the folder of built engines where it is not the bundle's own."""


def runs_precision(name: str, precision: str, precisions: frozenset[str]) -> Availability:
    """Whether a bundle's precision is among those of a backend."""
    if precision in precisions:
        return Availability(True, f"runs {precision}")
    return Availability(
        False,
        f"{name} runs {' and '.join(sorted(precisions))}, the bundle is {precision}",
        "export with --precision fp32, or name a backend that runs it (flexvar doctor)",
    )


class BindingCheck:
    """Holds arrays against what a graph declares: names, ranks, types, sizes, and axes of one name of one size.

    Made once a graph, since it runs before every step.
    """

    def __init__(self, spec: GraphSpec) -> None:
        self._inputs, self._outputs = (
            {tensor.name: (tensor.axes, host_dtype(tensor.dtype)) for tensor in tensors}
            for tensors in (spec.inputs, spec.outputs)
        )

    def __call__(self, inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> dict[str, int]:
        """The size of every named axis. Outputs may be left out.

        Raises InvalidInput: bound by address, a wrong array would be read or written beside.
        """
        sizes: dict[str, int] = {}
        for declared, bound, complete in ((self._inputs, inputs, True), (self._outputs, outputs, False)):
            if not bound.keys() <= declared.keys() or (complete and len(bound) != len(declared)):
                raise InvalidInput(
                    f"bindings {sorted(bound)}", expected=f"{sorted(declared)}", fix="bind what the manifest declares"
                )
            for name, array in bound.items():
                axes, dtype = declared[name]
                self._check(name, array, axes, dtype, sizes)
        return sizes

    @staticmethod
    def _check(
        name: str, array: Array, axes: tuple[str | int, ...], dtype: np.dtype[Any], sizes: dict[str, int]
    ) -> None:
        shape = array.shape
        fits = len(shape) == len(axes)
        for axis, size in zip(axes, shape, strict=False):
            fits &= size == (sizes.setdefault(axis, size) if isinstance(axis, str) else axis)
        if not fits:
            raise InvalidInput(
                f"{name} of shape {tuple(shape)}",
                expected=f"axes {axes} with {sizes}",
                fix="bind an array of that shape",
            )
        if array.dtype is not dtype and host_dtype(array.dtype) != dtype:
            raise InvalidInput(f"{name} of {array.dtype}", expected=str(dtype), fix="convert it first")


def check_bindings(spec: GraphSpec, inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> dict[str, int]:
    """`BindingCheck` of a graph that is bound once. Raises InvalidInput."""
    return BindingCheck(spec)(inputs, outputs)


def host_dtype(dtype: str | np.dtype[Any]) -> np.dtype[Any]:
    """NumPy type that stores a manifest dtype (bfloat16 as its bits)."""
    return np.dtype(np.uint16) if isinstance(dtype, str) and dtype == "bfloat16" else np.dtype(dtype)
