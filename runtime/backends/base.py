"""The protocols of a backend. A backend knows graphs and arrays, but no classes, schedules or sampling."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from numpy.typing import NDArray

from ..bundle.opening import Bundle
from ..checks import invalid
from ..errors import FlexVARError, InvalidInput, OutOfMemory
from ..memory.library import LibraryMemory
from ..model.precision import Precision
from ..model.tensors import GraphSpec, host_dtype

if TYPE_CHECKING:
    from ..cuda.device import Device

EXPORT_AGAIN = "Export the bundle again with this version."

Array: TypeAlias = Any
"""A contiguous array of the backend. `array[i]`, `array[i:j]` (first axis) and `array.reshape` are views."""

Arrays: TypeAlias = Mapping[str, Array]
"""Arrays by the names of the tensors that they hold."""


@dataclass(frozen=True)
class Availability:
    """Whether a backend works here.

    detail: the versions and hardware found, or the reason why it does not work; without a full stop. fix: a sentence
    that says what to do, or a command to run.
    """

    available: bool
    detail: str
    fix: str | None = None

    @property
    def advice(self) -> str:
        """`fix` as a sentence."""
        return f"Run: {self.fix}" if (self.fix or "").startswith(("pip ", "flexvar ")) else self.fix or ""

    @classmethod
    def of_error(cls, error: FlexVARError) -> Availability:
        """The availability of what raised an error."""
        return cls(False, error.got.removesuffix("."), error.fix.removeprefix("Run: "))


class Bound(Protocol):
    """A graph with the arrays that it reads and writes. It can run many times, and be captured."""

    def run(self) -> None:
        """Run the graph. On a GPU this only enqueues it. Raises FlexVARError."""

    def close(self) -> None:
        """Free the binding. On a GPU it must not be running."""


class Graph(Protocol):
    """An opened graph of a bundle. Classes that derive from it inherit what most graphs do."""

    spec: GraphSpec

    @property
    def most_images(self) -> int | None:
        """The largest number of images in one run; None means any number."""
        return None

    def holds(self, size: tuple[int, int]) -> bool:
        """Whether the weights for images of (h, w) tokens are in memory already. A memory plan does not count them."""
        return True

    def working_bytes(self, sizes: Mapping[str, int]) -> int:
        """Memory that a run with these sizes of the named axes will allocate inside the graph, where that is known."""
        return 0

    def bind(self, inputs: Arrays, outputs: Arrays) -> Bound:
        """Bind all inputs and any of the outputs, without a copy. Raises FlexVARError."""

    def run(self, inputs: Arrays, outputs: Arrays) -> None:
        """Bind and run in one call. Raises FlexVARError."""
        self.bind(inputs, outputs).run()

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
    """Number of labels in every run of the condition graph. It is constant, so that the result for a label does not
    depend on the number of labels in a request."""

    @property
    def device(self) -> Device | None:
        """The device that holds the arrays. None: arrays are NumPy arrays, and no call returns before it is done."""

    def open(self, bundle: Bundle, graph: str, *, once: bool = False) -> Graph:
        """Open a graph of a checked bundle. once: it will run only a few times, so slow preparation does not pay.

        Raises FlexVARError.
        """

    def prepared(self, bundle: Bundle, graph: str) -> bool:
        """Whether an optional graph of the bundle can be opened. TensorRT needs an engine of it."""
        return True

    def empty(self, shape: tuple[int, ...], dtype: str) -> Array:
        """An uninitialised array of a manifest dtype."""

    def upload(self, host: NDArray[Any]) -> Array:
        """A host array as an array of the backend."""

    def download(self, array: Array) -> NDArray[Any]:
        """An array of the backend as a host array. On a CPU it is the array itself."""

    def available_bytes(self) -> int | None:
        """Free bytes for buffers; None if unknown."""

    def close(self) -> None:
        """Free the backend. Its graphs must be closed."""


class BackendModule(Protocol):
    """The functions of a backend's module. One module may serve several backends."""

    PRECISIONS: frozenset[Precision]

    def libraries(self, precision: Precision) -> Mapping[str, LibraryMemory]:
        """The memory of the library that runs each graph of a bundle of this precision. Only CPU backends have this."""

    def probe(self, name: str) -> Availability:
        """Whether the backend of that name works here."""

    def examine(self, name: str) -> str | None:
        """What works less well than it should here; None if there is nothing. Only `cuda` has this."""

    def ready(self, name: str, bundle: Bundle, *, device: str | None, engines: Path | None) -> Availability:
        """Whether the backend can run this bundle now. `probe` has said that it works here."""

    def create(self, name: str, *, device: str | None, threads: int | None, engines: Path | None) -> Backend:
        """Start the backend. engines: the folder of the engines; None means that of the bundle. Raises FlexVARError."""


def refuse_option(option: str, value: object, backend: str, needed: str) -> None:
    """Raise InvalidInput if an option was given that a backend does not take. needed: a backend that takes it."""
    if value is not None:
        got = f"{option} needs {needed}, but the backend is {backend}."
        raise InvalidInput(got, expected="none", fix=f"Leave out {option}, or name {needed}.")


def closed_graph(name: str) -> InvalidInput:
    """The error of a graph that is used after it was closed."""
    return InvalidInput(f"{name} is closed.", expected="an open graph", fix="Open the bundle again.")


def no_memory(name: str, reason: str) -> OutOfMemory:
    """The error of a graph that ran out of memory."""
    return OutOfMemory(
        f"{name} ran out of memory: {reason.removesuffix('.')}.",
        expected="a request that fits in memory",
        fix="Use a smaller batch or schedule.",
    )


def runs_precision(name: str, precision: Precision, precisions: frozenset[Precision]) -> Availability:
    """Whether the precision of a bundle is among those of a backend."""
    if precision in precisions:
        return Availability(True, f"runs {precision}")
    return Availability(
        False,
        f"{name} runs {' and '.join(sorted(precisions))} bundles, but the bundle is {precision}",
        f"Name a backend that runs {precision} bundles: {RUN_BY[precision]}.",
    )


RUN_BY = {
    Precision.FP32: "ort-cuda on a GPU, ort-cpu on a CPU",
    Precision.FP16: "cuda on a GPU, ort-cpu on a CPU",
    Precision.BF16: "cuda on a GPU, openvino on a CPU",
    Precision.INT8: "ort-cpu",
    Precision.INT8_BF16: "ort-openvino",
}
"""A backend for each precision, as advice."""


class BindingCheck:
    """Checks arrays against the declaration of a graph: names, ranks, dtypes, and one size for each named axis.

    Made once for each graph, because it runs before every step.
    """

    def __init__(self, spec: GraphSpec) -> None:
        self._inputs, self._outputs = (
            {tensor.name: (tensor.axes, host_dtype(tensor.dtype)) for tensor in tensors}
            for tensors in (spec.inputs, spec.outputs)
        )

    def __call__(self, inputs: Arrays, outputs: Arrays) -> dict[str, int]:
        """The size of every named axis. Outputs may be left out.

        Raises InvalidInput, because an array that does not fit would corrupt memory: arrays are bound by address.
        """
        sizes: dict[str, int] = {}
        for declared, bound, complete in ((self._inputs, inputs, True), (self._outputs, outputs, False)):
            if not bound.keys() <= declared.keys() or (complete and len(bound) != len(declared)):
                raise InvalidInput(
                    f"The bound tensors are {sorted(bound)}, but the graph declares {sorted(declared)}.",
                    expected=f"{sorted(declared)}",
                    fix="Bind the tensors that the manifest of the bundle declares.",
                )
            for name, array in bound.items():
                axes, dtype = declared[name]
                fits = len(array.shape) == len(axes)
                for axis, size in zip(axes, array.shape, strict=False):
                    fits &= size == (sizes.setdefault(axis, size) if isinstance(axis, str) else axis)
                if not fits:
                    raise InvalidInput(
                        f"The tensor {name} has shape {tuple(array.shape)}, but its axes are {axes} with {sizes}.",
                        expected=f"axes {axes} with {sizes}",
                        fix="Bind an array of that shape.",
                    )
                if array.dtype is not dtype and host_dtype(array.dtype) != dtype:
                    problem = f"The tensor {name} has dtype {array.dtype}"
                    raise invalid(problem, str(dtype), "Convert the array first.")
        return sizes


def check_bindings(spec: GraphSpec, inputs: Arrays, outputs: Arrays) -> dict[str, int]:
    """Run a `BindingCheck` once. Raises InvalidInput."""
    return BindingCheck(spec)(inputs, outputs)
