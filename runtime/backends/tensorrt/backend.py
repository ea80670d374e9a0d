"""TensorRT and TensorRT-RTX. They run engines that `flexvar build` made, on one stream of a GPU.

Both libraries have the same interface, and the backend gets one of them as an argument. Each set of bindings has its
own execution context, so a captured CUDA graph stays valid. Contexts never run at the same time, so they share one
working memory.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

from ...bundle.opening import Bundle
from ...checks import invalid
from ...cuda.array import ALIGNMENT, DeviceArray
from ...cuda.device import Device, ignore_errors
from ...cuda.gpu import CudaDevice, GpuFacts, find_gpu, find_gpus
from ...errors import ArtifactRefused, BackendUnavailable, DeviceFailed, FlexVARError, InvalidInput, OutOfMemory
from ...model.signatures import REQUIRED
from ...model.tensors import GraphSpec
from ..base import Availability, Graph, check_bindings, refuse_option, runs_precision
from ..device_arrays import DeviceBackend
from ..scratch import Scratch
from .engine_files import WIDE, EngineId, Found, build_line, find_engine, read_engine
from .library import TENSORRT_RTX, TrtLibrary, load, probe_library, require_runs_on, runs_on

Tensors: TypeAlias = Mapping[str, DeviceArray]
"""Arrays by the names of the tensors that they hold."""

log = logging.getLogger(__name__)

FREE_GPU = "End other programs that use the GPU, or use a smaller batch or schedule."
PRECISIONS = DeviceBackend.precisions
CONTEXTS_KEPT = 8  # contexts that `TrtGraph.run` keeps, by shapes


def probe(name: str) -> Availability:
    """Whether the library is installed and there is a GPU that it runs on."""
    found = probe_library(name)
    if not found.available:
        return found
    try:
        gpus = find_gpus()
    except BackendUnavailable as error:
        builds = " (it can build engines without a GPU)" if name == TENSORRT_RTX else ""
        state = Availability.of_error(error)
        return Availability(False, f"{found.detail} is installed{builds}, but {state.detail}", state.fix)
    library = load(name)
    fit = [gpu for gpu in gpus if runs_on(library, gpu.capability).available]
    if fit:
        return Availability(True, f"{found.detail}, {fit[0]}")
    state = runs_on(library, gpus[0].capability)
    return Availability(False, f"{state.detail} (this GPU is {gpus[0]})", state.fix)


def ready(name: str, bundle: Bundle, *, device: str | None, engines: Path | None) -> Availability:
    """Whether the library runs on this GPU and there is a fitting engine of every graph."""
    runs = runs_precision(name, bundle.manifest.precision, PRECISIONS)
    if not runs.available:
        return runs
    try:
        library, gpu = _find(name, device)
        for graph in REQUIRED:
            _find_engine(bundle, graph, library, gpu.capability, engines)
    except FlexVARError as error:
        return Availability.of_error(error)
    return Availability(True, "engines are built")


def create(name: str, *, device: str | None, threads: int | None, engines: Path | None) -> TensorRT:
    refuse_option("threads", threads, name, "a CPU backend")
    library, gpu = _find(name, device)
    return TensorRT(library, CudaDevice(gpu), engines)


def _find(name: str, device: str | None) -> tuple[TrtLibrary, GpuFacts]:
    """The library and the GPU that it runs on. Raises BackendUnavailable, InvalidInput."""
    library, gpu = load(name), find_gpu(device)
    require_runs_on(library, gpu.capability)
    return library, gpu


def _find_engine(bundle: Bundle, graph: str, library: TrtLibrary, target: str, engines: Path | None) -> Found:
    flavour, version = library.flavour, library.version
    return find_engine(bundle, graph, flavour=flavour, version=version, target=target, engines_dir=engines)


class TensorRT(DeviceBackend):
    """The backend of a library on a device. engines: the folder of the engines; None means that of the bundle."""

    def __init__(self, library: TrtLibrary, device: Device, engines: Path | None) -> None:
        super().__init__(library.flavour, device)
        self.library, self._engines = library, engines
        self._runtime: Any = library.module.Runtime(library.logger)
        self.scratch = Scratch(device)

    def prepared(self, bundle: Bundle, graph: str) -> bool:
        try:
            _find_engine(bundle, graph, self.library, self.device.capability, self._engines)
        except ArtifactRefused as error:
            log.info("%s is not used, so given scales run one by one. %s", graph, error.got)
            return False
        return True

    def open(self, bundle: Bundle, graph: str, *, once: bool = False) -> TrtGraph:
        """Load the engine of a graph. `once` changes nothing: an engine needs no preparation."""
        found = _find_engine(bundle, graph, self.library, self.device.capability, self._engines)
        data, build = read_engine(found), build_line(bundle.path, self.name, self._engines)
        with self.library.messages.reading() as errors:
            engine = self._runtime.deserialize_cuda_engine(data)
            if engine is None:
                reason = errors()
                if "memory" in reason.lower() and "out of" in reason.lower():
                    raise OutOfMemory(
                        f"The engine of {graph} does not fit in the memory of {self.device.name} ({reason}).",
                        expected="an engine that fits",
                        fix=FREE_GPU,
                    )
                raise ArtifactRefused(
                    f"{self.name} cannot load {found.path.name} ({reason}).",
                    expected=f"an engine for {self.device.name}, compute capability {self.device.capability}",
                    fix=f"Run: {build} --force",
                )
        return TrtGraph(self, engine, bundle.graph(graph), found.receipt, build)

    def free_unused(self) -> None:
        self.scratch.drop()

    def close(self) -> None:
        self.scratch.drop()
        self.device.close()


class TrtGraph(Graph):
    """A loaded engine. build: the command that builds it again."""

    def __init__(self, backend: TensorRT, engine: Any, spec: GraphSpec, receipt: EngineId, build: str) -> None:
        self.spec, self.library, self.device, self.scratch = spec, backend.library, backend.device, backend.scratch
        self.engine: Any = engine
        self._receipt, self._build = receipt, build
        self._runtime_config = _runtime_config(self.library, engine)
        self._logged: set[int] = set()
        self._contexts: OrderedDict[tuple[tuple[str, int], ...], TrtBound] = OrderedDict()
        names = {engine.get_tensor_name(i) for i in range(engine.num_io_tensors)}
        declared = {tensor.name for tensor in (*spec.inputs, *spec.outputs)}
        if names != declared or engine.num_optimization_profiles != len(receipt.profiles):
            count = len(receipt.profiles)
            raise ArtifactRefused(
                f"The engine of {receipt.graph} does not match the bundle: it has {engine.num_optimization_profiles} "
                f"profiles, not {count}, and differs in the tensors {sorted(names ^ declared)}.",
                expected=f"{count} profiles and the tensors of the manifest",
                fix=f"Run: {build} --force",
            )

    def bind(self, inputs: Tensors, outputs: Tensors) -> TrtBound:
        return TrtBound(self, self.profile(check_bindings(self.spec, inputs, outputs)), inputs, outputs)

    def run(self, inputs: Tensors, outputs: Tensors) -> None:
        """Run with the context that is kept for these shapes."""
        sizes = check_bindings(self.spec, inputs, outputs)
        key = tuple(sorted(sizes.items()))
        if key in self._contexts:
            self._contexts.move_to_end(key)
            self._contexts[key].rebind(inputs, outputs)
        else:
            self._contexts[key] = TrtBound(self, self.profile(sizes), inputs, outputs)
        if len(self._contexts) > CONTEXTS_KEPT:
            self.device.synchronize()
            self._contexts.popitem(last=False)[1].close()
        self._contexts[key].run()

    def profile(self, sizes: Mapping[str, int]) -> int:
        """Index of the first profile for these sizes. Raises InvalidInput if there is none."""
        index = self._receipt.profile_for(sizes)
        if index is None:
            shape = ", ".join(f"{size} {axis}" for axis, size in sizes.items())
            raise InvalidInput(
                f"The engine of {self._receipt.graph} was not built for this request ({shape}).",
                expected=f"one of {len(self._receipt.profiles)} profiles, such as "
                + "; ".join(profile.name for profile in self._receipt.profiles[-2:]),
                fix=f"Run: {self._build} --schedule SCHEDULE --max-batch IMAGES",
            )
        profile = self._receipt.profiles[index]
        if profile.name == WIDE and len(self._receipt.profiles) > 1 and index not in self._logged:
            self._logged.add(index)
            log.info(
                "%s: no profile was built for these sizes, so they use the wide profile, which may be slower. To build "
                "one, run flexvar build with --schedule.",
                self._receipt.graph,
            )
        return index

    def new_context(self) -> Any:
        """A context that uses our working memory; None if it does not fit."""
        user_managed = self.library.module.ExecutionContextAllocationStrategy.USER_MANAGED
        return self.engine.create_execution_context(self._runtime_config or user_managed)

    def information(self) -> str:
        """What TensorRT's engine inspector reports of every layer, as JSON."""
        layers = self.library.module.LayerInformationFormat.JSON
        return str(self.engine.create_engine_inspector().get_engine_information(layers))

    @property
    def most_images(self) -> int:
        """The number of images that the largest profile takes."""
        return max(profile.axes.get("images", (1, 1, 1))[2] for profile in self._receipt.profiles)

    def close(self) -> None:
        with ignore_errors("closing an engine"):
            self.device.synchronize()
        for bound in self._contexts.values():
            bound.close()
        self._contexts.clear()
        self.engine = None


class TrtBound:
    """An execution context with its profile, shapes, addresses and working memory."""

    def __init__(self, graph: TrtGraph, profile: int, inputs: Tensors, outputs: Tensors) -> None:
        self._graph, self._device, self._messages = graph, graph.device, graph.library.messages
        with self._messages.reading() as errors:
            self._context: Any = graph.new_context()
            if self._context is None:
                got = f"There is not enough GPU memory to run {graph.spec.file} ({errors()})."
                raise OutOfMemory(got, expected="an execution context that fits", fix=FREE_GPU)
            ok = self._context.set_optimization_profile_async(profile, self._device.stream)
            self._require(ok, f"profile {profile}", errors())
            for name, array in inputs.items():
                ok = self._context.set_input_shape(name, array.shape)
                self._require(ok, f"shape {array.shape} of {name}", errors())
            try:
                missing: Any = self._context.infer_shapes()
            except RuntimeError as error:
                missing = error
            self._require(not missing, f"the shapes ({missing})", errors())
            self._scratch_bytes = int(self._context.update_device_memory_size_for_shapes())
            graph.scratch.reserve(self._scratch_bytes)
        self._block: DeviceArray | None = None
        self.rebind(inputs, outputs)
        self._device.synchronize()  # waits until the profile is set

    def rebind(self, inputs: Tensors, outputs: Tensors) -> None:
        """Use other arrays of the same shapes. Captured work still uses the old ones."""
        for name, array in (*inputs.items(), *outputs.items()):
            if array.address == 0 or array.address % ALIGNMENT:
                expected = f"a multiple of {ALIGNMENT} for TensorRT"
                fix = f"Use a batch for which the keys of one token take a multiple of {ALIGNMENT} bytes."
                raise invalid(f"The address of the tensor {name} is {array.address:#x}", expected, fix)
            self._require(self._context.set_tensor_address(name, array.address), f"the address of {name}", "")
        self._arrays = (inputs, outputs)

    def run(self) -> None:
        if self._block is None:  # kept from now on: captured work writes there
            self._block = self._graph.scratch.take(self._scratch_bytes)
            if self._block.nbytes:
                self._context.set_device_memory(self._block.address, self._block.nbytes)
        with self._messages.reading() as errors:
            if not self._context.execute_async_v3(self._device.stream):
                raise DeviceFailed(
                    f"TensorRT failed to run {self._graph.spec.file} ({errors()}).",
                    expected="an engine that runs",
                    fix="Build the engines again with flexvar build --force, and check the GPU with flexvar doctor.",
                )

    def close(self) -> None:
        self._context = self._block = None
        self._arrays = ({}, {})

    def _require(self, ok: bool, what: str, reason: str) -> None:
        if not ok:
            raise BackendUnavailable(
                f"TensorRT refused {what} for {self._graph.spec.file} ({reason or 'no reason given'}).",
                expected="what the profile was built for",
                fix="Build the engines again with flexvar build --force.",
            )


def _runtime_config(library: TrtLibrary, engine: Any) -> Any:
    """The configuration of contexts in TensorRT-RTX; None for TensorRT.

    TensorRT-RTX compiles kernels for exact shapes at run time. By default the first runs do not wait for them. With
    EAGER they wait, so that the final kernels are captured. The runtime cache keeps compiled kernels for the next
    context.
    """
    if not library.rtx:
        return None
    trt, config = library.module, engine.create_runtime_config()
    config.set_execution_context_allocation_strategy(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
    config.dynamic_shapes_kernel_specialization_strategy = trt.DynamicShapesKernelSpecializationStrategy.EAGER
    config.set_runtime_cache(config.create_runtime_cache())
    return config
