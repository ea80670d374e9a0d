"""What a backend is. It knows graphs and arrays, and nothing of classes, schedules or sampling."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ..bundle.opening import Bundle
from ..errors import InvalidInput
from ..memory.library import LibraryMemory
from ..model.precision import Precision
from ..model.tensors import GraphSpec, host_dtype

if TYPE_CHECKING:
    from ..cuda.device import Device

Array: TypeAlias = Any
"""An array of the backend: contiguous, with `shape`; `array[i]`, `array[i:j]` (first axis), `reshape` are views."""


@dataclass(frozen=True)
class Availability:
    """Whether a backend works here. detail: what was found, or why it does not work. fix: what to do about it."""

    available: bool
    detail: str
    fix: str | None = None


class Bound(Protocol):
    """A graph together with the arrays that it reads and writes. It can run many times, and be captured."""

    def run(self) -> None:
        """Run the graph. On a GPU this only enqueues it. Raises FlexVARError."""

    def close(self) -> None:
        """Free the resources of the binding. On a GPU it must not be running."""


class Graph(Protocol):
    """An opened graph of a bundle."""

    spec: GraphSpec

    @property
    def most_images(self) -> int | None:
        """The largest number of images in one run; None means any number."""

    def holds(self, size: tuple[int, int]) -> bool:
        """Whether its weights are in memory for images of (h, w) tokens. A memory plan does not count them again."""

    def bind(self, inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> Bound:
        """Bind every input, and the outputs that are wanted, without a copy. Raises FlexVARError."""

    def run(self, inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> None:
        """Bind, run and close in one call."""

    def close(self) -> None:
        """Free the weights and everything else."""


class Backend(Protocol):
    """Opens graphs and moves arrays.

    `host_arrays.HostBackend` and `device_arrays.DeviceBackend` are the bases of all backends.
    """

    name: str
    precisions: frozenset[Precision]
    threads: int
    labels_per_run: int
    """Labels in every run of the condition graph. It is constant, so that the row of a label does not depend on how
    many labels are asked for."""

    @property
    def device(self) -> Device | None:
        """The device that holds the arrays. None means that arrays are NumPy arrays and every call returns when it is
        done."""

    def open(self, bundle: Bundle, graph: str, *, once: bool = False) -> Graph:
        """Open a graph of a checked bundle. once: it will run only a few times, so preparing it does not pay."""

    def prepared(self, bundle: Bundle, graph: str) -> bool:
        """Whether an optional graph of the bundle can be opened. TensorRT needs an engine for it."""

    def empty(self, shape: tuple[int, ...], dtype: str) -> Array:
        """An uninitialised array of a manifest dtype."""

    def upload(self, host: NDArray[Any]) -> Array:
        """A host array as an array of the backend."""

    def download(self, array: Array) -> NDArray[Any]:
        """An array of the backend as a host array (a view where memory is shared)."""

    def available_bytes(self) -> int | None:
        """Bytes that are left for buffers; None if unknown."""

    def close(self) -> None:
        """Free the resources of the backend, after its graphs are closed."""


class BackendModule(Protocol):
    """The module of a backend. One module may serve several names, each with another library."""

    PRECISIONS: frozenset[Precision]

    def libraries(self, precision: Precision) -> Mapping[str, LibraryMemory]:
        """The memory of the library that runs each graph of a bundle of this precision. Only CPU backends have it."""

    def probe(self, name: str) -> Availability:
        """Whether the backend of that name works here."""

    def ready(self, name: str, bundle: Bundle, *, device: str | None, engines: Path | None) -> Availability:
        """Whether the backend can run this bundle now, given that it works here."""

    def create(self, name: str, *, device: str | None, threads: int | None, engines: Path | None) -> Backend:
        """Start the backend. engines: folder of the engines; None means the bundle's own. Raises FlexVARError."""


def runs_precision(name: str, precision: Precision, precisions: frozenset[Precision]) -> Availability:
    """Whether the precision of a bundle is among those of a backend."""
    if precision in precisions:
        return Availability(True, f"runs {precision}")
    return Availability(
        False,
        f"{name} runs {' and '.join(sorted(precisions))} bundles, and this bundle is {precision}.",
        "Export with --precision fp32, or name a backend that runs it (see flexvar doctor).",
    )


class BindingCheck:
    """Checks arrays against the declaration of a graph: names, ranks, dtypes, and one size for each named axis.

    It is made once for each graph, because it runs before every step.
    """

    def __init__(self, spec: GraphSpec) -> None:
        self._inputs, self._outputs = (
            {tensor.name: (tensor.axes, host_dtype(tensor.dtype)) for tensor in tensors}
            for tensors in (spec.inputs, spec.outputs)
        )

    def __call__(self, inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> dict[str, int]:
        """The size of every named axis. Outputs may be left out.

        Raises InvalidInput. Arrays are bound by address, so a wrong one would corrupt memory.
        """
        sizes: dict[str, int] = {}
        for declared, bound, complete in ((self._inputs, inputs, True), (self._outputs, outputs, False)):
            if not bound.keys() <= declared.keys() or (complete and len(bound) != len(declared)):
                raise InvalidInput(
                    f"The bound tensors are {sorted(bound)}, but the graph declares {sorted(declared)}.",
                    expected=f"{sorted(declared)}",
                    fix="Bind the tensors that the manifest declares.",
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
                f"{name} has shape {tuple(shape)}, but its axes are {axes} with {sizes}.",
                expected=f"axes {axes} with {sizes}",
                fix="Bind an array of that shape.",
            )
        if array.dtype is not dtype and host_dtype(array.dtype) != dtype:
            raise InvalidInput(
                f"{name} has dtype {array.dtype}, but it must be {dtype}.", expected=str(dtype), fix="Convert it first."
            )


def check_bindings(spec: GraphSpec, inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> dict[str, int]:
    """Run a `BindingCheck` once. Raises InvalidInput."""
    return BindingCheck(spec)(inputs, outputs)
