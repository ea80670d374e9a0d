"""The backend `cuda`: our own kernels, products by cuBLASLt and convolutions by cuDNN. It builds no engines.

    bundle ─> weights, laid out once ─> a list of launches for each binding ─> captured with the sampling as one graph

It takes the layers from the names of a bundle's parameters (`parameters.py`), so it runs every bundle of half precision
that `flexvar export` writes. Any schedule, size and batch runs at once.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

from ...bundle.opening import Bundle
from ...checks import version_numbers
from ...cuda import layers
from ...cuda.array import DeviceArray
from ...cuda.device import Device, ignore_errors
from ...cuda.gpu import CudaDevice, find_gpu
from ...cuda.layers import LayerConfig
from ...errors import BackendUnavailable, FlexVARError, InvalidInput
from ...model.precision import Precision
from ...model.signatures import CONDITION, DECODE, ENCODE, PREFILL, STEP
from ...model.tensors import GraphSpec
from ..base import Arrays, Availability, BindingCheck, Graph, closed_graph, refuse_option, runs_precision
from ..device_arrays import DeviceBackend, probe_gpu
from ..scratch import Scratch
from . import autoencoder, condition, transformer
from .convolutions import Convolutions, Padding
from .loading import load_cublaslt, load_cudnn
from .operations import Operation, Operations, Pool
from .parameters import match
from .products import Products

log = logging.getLogger(__name__)

Maker: TypeAlias = Callable[[Arrays, Arrays, Pool], Iterator[Operation]]
"""Makes the operations of a graph from its inputs, its outputs, and working memory. With a pool that measures, none."""

PRECISIONS = frozenset({Precision.FP16, Precision.BF16})
OLDEST_GPU = (8, 0)  # compute capability; older ones have no bf16 and no asynchronous copies
WORKSPACE_BYTES = 64 * 2**20  # of both libraries. cuBLASLt wants 32 MiB on Hopper, cuDNN's plans at most 67 MB


def probe(name: str) -> Availability:
    gpu = probe_gpu()
    if not gpu.available:
        return gpu
    facts = find_gpu()
    if version_numbers(facts.capability) < OLDEST_GPU:
        return Availability(
            False,
            f"{facts.name} has compute capability {facts.capability}, and at least 8.0 is needed",
            "Use --backend ort-cuda on this GPU.",
        )
    try:
        cublaslt, cudnn = load_cublaslt(), load_cudnn()
        versions = f"cuBLASLt {cublaslt.get_version()}, cuDNN {cudnn.backend_version()}"
    except BackendUnavailable as error:
        return Availability.of_error(error)
    return Availability(True, f"{versions}, {gpu.detail}")


def examine(name: str) -> str | None:
    """Which convolutions cuDNN has no plan for on the first GPU. Tries one of the decoder in both types."""
    try:
        backend = create(name, device=None, threads=None, engines=None)
    except FlexVARError as error:
        return error.got
    try:
        return examine_convolutions(backend)
    except FlexVARError as error:
        return error.got
    finally:
        backend.close()


def examine_convolutions(backend: Cuda) -> str | None:
    """See `examine`."""
    for half in sorted(layers.HALVES):
        x, y = (backend.empty((1, 16, 16, 128), half) for _ in range(2))
        weight, bias = backend.empty((128, 3, 3, 128), half), backend.empty((128,), half)
        backend.convolutions.convolution(x, weight, bias, y, residual=x, padding=Padding(1, 1, 1, 1))
    slow = backend.convolutions.substituted
    return (
        f"cuDNN has no plan for {'; '.join(slow)}. im2col and cuBLASLt take their place, which is slower"
        if slow
        else None
    )


def ready(name: str, bundle: Bundle, *, device: str | None, engines: Path | None) -> Availability:
    """Whether the precision fits and the graphs have the layers that this backend knows."""
    state = runs_precision(name, bundle.manifest.precision, PRECISIONS)
    if not state.available:
        return state
    try:
        require_known_layers(bundle)
    except FlexVARError as error:
        return Availability.of_error(error)
    return state


def require_known_layers(bundle: Bundle) -> None:
    """Raise ArtifactRefused or BackendUnavailable if this backend does not know what a graph of a bundle computes."""
    config_of(bundle)
    depth = bundle.manifest.model.depth
    match(bundle, CONDITION, condition.parameter_names(depth))
    match(bundle, STEP, transformer.parameter_names(depth))
    for graph in (DECODE, ENCODE):
        autoencoder.match_layers(bundle, graph)


def create(name: str, *, device: str | None, threads: int | None, engines: Path | None) -> Cuda:
    refuse_option("threads", threads, name, "a CPU backend")
    refuse_option("engines", engines, name, "a TensorRT backend")
    facts = find_gpu(device)
    if version_numbers(facts.capability) < OLDEST_GPU:
        raise BackendUnavailable(
            f"{facts.name} has compute capability {facts.capability}, and the backend {name} needs at least 8.0.",
            expected="a GPU of compute capability 8.0 or later",
            fix="Use --backend ort-cuda on this GPU.",
        )
    return Cuda(CudaDevice(facts))


def config_of(bundle: Bundle) -> LayerConfig:
    """The configuration of the kernels for a bundle. Raises BackendUnavailable."""
    model = bundle.manifest.model
    return LayerConfig(bundle.manifest.precision.dtype, model.width, model.heads, model.code_dim)


class Cuda(DeviceBackend):
    """The backend `cuda` on a device."""

    precisions = PRECISIONS

    def __init__(self, device: Device, cublaslt: Any = None, cudnn: Any = None) -> None:
        """cublaslt, cudnn: modules of the libraries; None loads them. Raises BackendUnavailable, OutOfMemory."""
        super().__init__("cuda", device)
        device.activate()
        self._workspace = self.empty((WORKSPACE_BYTES,), "uint8")
        self.products = Products(device, self._workspace, cublaslt)
        self.convolutions = Convolutions(device, self._workspace, self.products, cudnn)
        self.scratch = Scratch(device)
        self._config: LayerConfig | None = None
        self._transformer: tuple[str, transformer.Weights] | None = None

    def open(self, bundle: Bundle, graph: str, *, once: bool = False) -> CudaGraph:
        """Lay out the weights of a graph. `step` and `prefill` share them. `once` changes nothing."""
        self._load_kernels(config_of(bundle))
        return CudaGraph(bundle.graph(graph), self.device, self.scratch, self._maker(bundle, graph))

    def _maker(self, bundle: Bundle, graph: str) -> Maker:
        """What makes the operations of a graph."""
        device, products = self.device, self.products
        if graph == CONDITION:
            return partial(condition.operations, condition.load(device, bundle), device, products)
        if graph in (STEP, PREFILL):
            if self._transformer is None or self._transformer[0] != bundle.sha256:
                self._transformer = bundle.sha256, transformer.load(device, bundle)
            return partial(transformer.operations, self._transformer[1], device, products, graph)
        weights = autoencoder.load(device, bundle, graph)
        return partial(autoencoder.operations, weights, device, products, self.convolutions, graph)

    def _load_kernels(self, config: LayerConfig) -> None:
        if self._config not in (None, config):
            raise InvalidInput(
                "This backend runs a bundle with other sizes already.",
                expected="one backend for each bundle",
                fix="Open another pipeline.",
            )
        if self._config is None:
            self.device.load(config)
            self._config = config

    def close(self) -> None:
        self._transformer = None
        with ignore_errors("closing the libraries"):
            self.convolutions.close()
            self.products.close()
        self.scratch.close()
        self._workspace = DeviceArray(0, (0,), "uint8", None)
        self.device.close()


class CudaGraph(Graph):
    """A graph whose weights are on the device. All outputs must be bound."""

    def __init__(self, spec: GraphSpec, device: Device, scratch: Scratch, maker: Maker) -> None:
        self.spec, self._device, self._scratch, self._check = spec, device, scratch, BindingCheck(spec)
        self._maker: Maker | None = maker

    def bind(self, inputs: Arrays, outputs: Arrays) -> Operations:
        self._check(inputs, outputs)
        missing = {tensor.name for tensor in self.spec.outputs} - outputs.keys()
        if missing:
            raise InvalidInput(
                f"{self.spec.file} is bound without {', '.join(sorted(missing))}.",
                expected="every output",
                fix="Bind all outputs of the graph.",
            )
        pool = self._measure(inputs, outputs)
        self._scratch.reserve(pool.nbytes)
        return Operations(self.spec.file, partial(self._operations, inputs, outputs, pool))

    def working_bytes(self, sizes: Mapping[str, int]) -> int:
        """What the scratch memory of the backend lacks for a binding of these sizes."""
        inputs, outputs = (
            {tensor.name: DeviceArray(0, tensor.shape(sizes), tensor.dtype, None) for tensor in tensors}
            for tensors in (self.spec.inputs, self.spec.outputs)
        )
        return self._scratch.missing(self._measure(inputs, outputs).nbytes)

    def _measure(self, inputs: Arrays, outputs: Arrays) -> Pool:
        """The working memory of a binding. Only the shapes of the arrays matter."""
        if self._maker is None:
            raise closed_graph(self.spec.file)
        pool = Pool()
        for _ in self._maker(inputs, outputs, pool):
            raise AssertionError("an operation was made while its memory was measured")
        return pool

    def _operations(self, inputs: Arrays, outputs: Arrays, pool: Pool) -> tuple[Operation, ...]:
        if self._maker is None:
            raise closed_graph(self.spec.file)
        return tuple(self._maker(inputs, outputs, pool.placed(self._scratch.take())))

    def close(self) -> None:
        """Free the weights, if no binding is left."""
        with ignore_errors("closing a graph"):
            self._device.synchronize()
        self._maker = None
