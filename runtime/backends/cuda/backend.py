"""The backend `cuda`: our own kernels, products by cuBLASLt and convolutions by cuDNN. It builds no engines.

    bundle ─> weights, laid out once ─> a list of launches for each binding ─> captured with the sampling as one graph

It finds the layers of a model by the names of its parameters (`parameters.py`). It runs fp16 and bf16 bundles whose
sizes `LayerConfig` accepts. No schedule, size or batch needs a build.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias
from weakref import WeakValueDictionary

from ...bundle.opening import Bundle
from ...checks import version_numbers
from ...cuda.array import HALVES, DeviceArray
from ...cuda.device import Device, ignore_errors
from ...cuda.gpu import CudaDevice, GpuFacts, find_gpu, find_gpus
from ...cuda.layers import LayerConfig
from ...errors import BackendUnavailable, FlexVARError, InvalidInput
from ...model.precision import Precision
from ...model.signatures import CONDITION, DECODE, ENCODE, PREFILL, STEP
from ...model.tensors import GraphSpec
from ..base import Arrays, Availability, BindingCheck, Graph, closed_graph, refuse_option, runs_precision
from ..device_arrays import DeviceBackend
from ..scratch import Scratch
from . import autoencoder, autoencoder_weights, condition, transformer
from .convolutions import Convolutions, Padding
from .loading import load_cublaslt, load_cudnn
from .operations import Made, Operation, Operations, Pool
from .parameters import match
from .products import Products

Maker: TypeAlias = Callable[[Arrays, Arrays, Pool], Iterator[Operation]]
"""Makes the operations of a graph from its inputs, its outputs and working memory. If the pool only measures, none."""

PRECISIONS = frozenset({Precision.FP16, Precision.BF16})
OLDEST_GPU = (8, 0)  # compute capability; older ones have no bf16 and no asynchronous copies
WORKSPACE_BYTES = 64 * 2**20  # of both libraries. cuBLASLt wants 32 MiB on Hopper, cuDNN's plans at most 67 MB


def probe(name: str) -> Availability:
    try:
        gpus = find_gpus()
    except BackendUnavailable as error:
        return Availability.of_error(error)
    able = [gpu for gpu in gpus if _is_new_enough(gpu)]
    if not able:
        return _too_old(gpus[0])
    try:
        cublaslt, cudnn = load_cublaslt(), load_cudnn()
        versions = f"cuBLASLt {cublaslt.get_version()}, cuDNN {cudnn.backend_version()}"
    except BackendUnavailable as error:
        return Availability.of_error(error)
    return Availability(True, f"{versions}, {able[0]}")


def _is_new_enough(gpu: GpuFacts) -> bool:
    return version_numbers(gpu.capability) >= OLDEST_GPU


def _too_old(gpu: GpuFacts) -> Availability:
    detail = f"{gpu.name} has compute capability {gpu.capability}, and cuda needs at least 8.0"
    return Availability(False, detail, "Use --backend ort-cuda on this GPU.")


def examine(name: str) -> str | None:
    """A warning if cuDNN has no plan for a usual convolution on the first GPU, or why the backend does not start."""
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
    """Try a 3x3 convolution with a residual in both types. See `examine`."""
    slow = []
    for half in sorted(HALVES):
        x, y = (backend.empty((1, 16, 16, 128), half) for _ in range(2))
        weight, bias = backend.empty((128, 3, 3, 128), half), backend.empty((128,), half)
        before = len(backend.convolutions.substituted)
        backend.convolutions.convolution(x, weight, bias, y, residual=x, padding=Padding(1, 1, 1, 1))
        slow += [half] * (len(backend.convolutions.substituted) > before)
    if not slow:
        return None
    return (
        f"cuDNN has no plan for a 3x3 convolution in {' and '.join(slow)} on this GPU. A slower product replaces it. "
        "Run: pip install --upgrade nvidia-cudnn-cu13"
    )


def ready(name: str, bundle: Bundle, *, device: str | None, engines: Path | None) -> Availability:
    """Whether the precision fits, the graphs have the layers that this backend knows, and the GPU is new enough."""
    state = runs_precision(name, bundle.manifest.precision, PRECISIONS)
    if not state.available:
        return state
    try:
        require_known_layers(bundle)
    except FlexVARError as error:
        return Availability.of_error(error)
    with suppress(BackendUnavailable):  # without a GPU, only the bundle is judged
        gpu = find_gpu(device)
        return state if _is_new_enough(gpu) else _too_old(gpu)
    return state


def require_known_layers(bundle: Bundle) -> None:
    """Raise ArtifactRefused or BackendUnavailable if this backend does not know what a graph of a bundle computes."""
    config_of(bundle)
    match(bundle, CONDITION, condition.parameter_names(bundle.manifest.model.depth))
    transformer.match_graphs(bundle)
    for graph in (DECODE, ENCODE):
        autoencoder_weights.match_layers(bundle, graph)


def create(name: str, *, device: str | None, threads: int | None, engines: Path | None) -> Cuda:
    refuse_option("threads", threads, name, "a CPU backend")
    refuse_option("engines", engines, name, "a TensorRT backend")
    gpu = find_gpu(device)
    if not _is_new_enough(gpu):
        state = _too_old(gpu)
        expected = "a GPU of compute capability 8.0 or later"
        raise BackendUnavailable(f"{state.detail}.", expected=expected, fix=state.advice)
    return Cuda(CudaDevice(gpu))


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
        self.scratch = Scratch(device)
        workspace = self.empty((WORKSPACE_BYTES,), "uint8")
        self.products = Products(device, workspace, cublaslt)
        try:
            self.convolutions = Convolutions(device, workspace, self.products, cudnn)
        except FlexVARError:
            self.products.close()
            raise
        self._config: LayerConfig | None = None
        self._transformers: WeakValueDictionary[str, transformer.Weights] = WeakValueDictionary()  # by hash of a bundle

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
            shared = self._transformers.get(bundle.sha256) or transformer.load(device, bundle)
            self._transformers[bundle.sha256] = shared
            return partial(transformer.operations, shared, device, products, graph)
        weights = autoencoder_weights.load(device, bundle, graph)
        return partial(autoencoder.operations, weights, device, products, self.convolutions, graph)

    def _load_kernels(self, config: LayerConfig) -> None:
        if self._config not in (None, config):
            raise InvalidInput(
                "This backend cuda runs a bundle with other sizes already.",
                expected="one backend for each bundle",
                fix="Create one backend for each bundle.",
            )
        if self._config is None:
            self.device.load(config)
            self._config = config

    def free_unused(self) -> None:
        self.scratch.drop()

    def close(self) -> None:
        with ignore_errors("closing the libraries"):
            self.convolutions.close()
            self.products.close()
        self.scratch.drop()
        with ignore_errors("freeing memory"):
            self.device.trim()
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
        """What a binding of these sizes would allocate: 0, or the size of a whole new block of working memory."""
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

    def _operations(self, inputs: Arrays, outputs: Arrays, pool: Pool) -> Made:
        if self._maker is None:
            raise closed_graph(self.spec.file)
        placed = pool.placed(self._scratch.take(pool.nbytes))
        return Made(tuple(self._maker(inputs, outputs, placed)), (placed, self._maker))

    def close(self) -> None:
        """Free the weights, if no binding is left."""
        with ignore_errors("closing a graph"):
            self._device.synchronize()
        self._maker = None
