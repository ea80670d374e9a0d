"""TensorRT and TensorRT-RTX: engines that `flexvar build` made, run on one stream of a GPU.

Both have the same interface; the library is injected. An execution context belongs to one set of bindings, so what was
captured with it stays valid; contexts share one working memory, since they never run at the same time.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...bundle.opening import Bundle
from ...cuda.array import ALIGNMENT, DeviceArray
from ...cuda.device import Device, allocate, ignore_errors
from ...cuda.gpu import CudaDevice, find_gpu, find_gpus
from ...errors import ArtifactRefused, BackendUnavailable, DeviceFailed, FlexVARError, InvalidInput, OutOfMemory
from ...model.signatures import REQUIRED
from ...model.tensors import GraphSpec
from ..base import Availability, check_bindings, runs_precision
from ..device_arrays import DeviceBackend
from .engine_files import WIDE, EngineId, Found, build_line, find_engine, read_engine
from .library import TENSORRT_RTX, TrtLibrary, load, probe_library, require_runs_on, runs_on

log = logging.getLogger(__name__)

PRECISIONS = DeviceBackend.precisions
CONTEXTS_KEPT = 8  # of `run`, by shapes; those bound for a generation are its own


def probe(name: str) -> Availability:
    """Whether the library is there, and a GPU that it runs on."""
    found = probe_library(name)
    if not found.available:
        return found
    try:
        gpus = find_gpus()
    except BackendUnavailable as error:
        builds = " (engines can be built here all the same)" if name == TENSORRT_RTX else ""
        return Availability(False, f"{found.detail}, {error.got}{builds}", error.fix)
    library = load(name)
    fit = [gpu for gpu in gpus if runs_on(library, gpu.capability).available]
    if fit:
        return Availability(True, f"{found.detail}, {fit[0]}")
    state = runs_on(library, gpus[0].capability)
    return Availability(False, f"{state.detail} (here is {gpus[0]})", state.fix)


def ready(name: str, bundle: Bundle, *, device: str | None, engines: Path | None) -> Availability:
    """Whether the library runs on this GPU, and engines of every graph are there for both."""
    runs = runs_precision(name, bundle.manifest.precision, PRECISIONS)
    if not runs.available:
        return runs
    try:
        library, gpu = load(name), find_gpu(device)
        state = runs_on(library, gpu.capability)
        if not state.available:
            return state
        for graph in REQUIRED:
            find_engine(
                bundle,
                graph,
                flavour=name,
                version=library.version,
                target=gpu.capability,
                engines_dir=engines,
            )
    except FlexVARError as error:
        return Availability(False, error.got, error.fix)
    return Availability(True, "engines are built")


def create(name: str, *, device: str | None, threads: int | None, engines: Path | None) -> TensorRT:
    if threads is not None:
        raise InvalidInput(
            f"{threads} threads for {name}", expected="none", fix="leave them out: the GPU does the work"
        )
    library, gpu = load(name), find_gpu(device)
    require_runs_on(library, gpu.capability)
    return TensorRT(library, CudaDevice(gpu), engines)


class TensorRT(DeviceBackend):
    """Backend on a library, a device and a folder of engines (None: the bundle's own)."""

    def __init__(self, library: TrtLibrary, device: Device, engines: Path | None) -> None:
        super().__init__(library.flavour, device)
        self._library, self._engines = library, engines
        self._runtime: Any = library.module.Runtime(library.logger)
        self.scratch = Scratch(device)

    def prepared(self, bundle: Bundle, graph: str) -> bool:
        try:
            self._find(bundle, graph)
        except ArtifactRefused as error:
            log.info("%s: no engine (%s), so given scales run one by one", graph, error.got)
            return False
        return True

    def _find(self, bundle: Bundle, graph: str) -> Found:
        return find_engine(
            bundle,
            graph,
            flavour=self.name,
            version=self._library.version,
            target=self.device.capability,
            engines_dir=self._engines,
        )

    def open(self, bundle: Bundle, graph: str, *, once: bool = False) -> TrtGraph:
        """Load a graph's engine. `once` makes no difference: an engine is prepared already."""
        found = self._find(bundle, graph)
        data = read_engine(found)
        with self._library.messages.reading() as errors:
            engine = self._runtime.deserialize_cuda_engine(data)
            if engine is None:
                reason = errors()
                if "memory" in reason.lower() and "out of" in reason.lower():
                    raise OutOfMemory(f"{graph}: {reason}", expected="an engine that fits", fix="free the GPU")
                raise ArtifactRefused(
                    f"{found.path.name}: {self.name} cannot load it ({reason})",
                    expected=f"an engine for {self.device.name}, compute capability {self.device.capability}",
                    fix=f"{build_line(bundle.path, self.name, self._engines)} --force",
                )
        fix = build_line(bundle.path, self.name, self._engines)
        return TrtGraph(self._library, engine, self.device, self.scratch, bundle.graph(graph), found.receipt, fix)

    def close(self) -> None:
        self.scratch.close()
        self.device.close()


class Scratch:
    """Working memory that contexts share. Whoever took a block keeps it: captured work goes on writing there."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._needed, self._block = 0, DeviceArray(0, (0,), "uint8", None)

    def reserve(self, nbytes: int) -> None:
        """The next block taken has at least this size."""
        self._needed = max(self._needed, nbytes)

    def take(self) -> DeviceArray:
        if self._block.nbytes < self._needed:
            memory = allocate(self._device, self._needed)
            self._block = DeviceArray(memory.address, (self._needed,), "uint8", memory)
        return self._block

    def close(self) -> None:
        self._block = DeviceArray(0, (0,), "uint8", None)


class TrtGraph:
    """A loaded engine."""

    def __init__(
        self,
        library: TrtLibrary,
        engine: Any,
        device: Device,
        scratch: Scratch,
        spec: GraphSpec,
        receipt: EngineId,
        build: str,
    ) -> None:
        self.spec, self.library, self.device, self.scratch = spec, library, device, scratch
        self.engine: Any = engine
        self._receipt, self._build = receipt, build
        self._runtime_config = _runtime_config(library, engine)
        self._told: set[int] = set()
        self._contexts: OrderedDict[tuple[tuple[str, int], ...], TrtBound] = OrderedDict()
        names = {engine.get_tensor_name(i) for i in range(engine.num_io_tensors)}
        declared = {tensor.name for tensor in (*spec.inputs, *spec.outputs)}
        if names != declared or engine.num_optimization_profiles != len(receipt.profiles):
            raise ArtifactRefused(
                f"{receipt.graph}: an engine with {engine.num_optimization_profiles} profiles and tensors "
                f"{sorted(names ^ declared)} that only one side knows",
                expected=f"{len(receipt.profiles)} profiles and the tensors of the manifest",
                fix=f"{build} --force",
            )

    def bind(self, inputs: Mapping[str, DeviceArray], outputs: Mapping[str, DeviceArray]) -> TrtBound:
        return TrtBound(self, self.profile(check_bindings(self.spec, inputs, outputs)), inputs, outputs)

    def run(self, inputs: Mapping[str, DeviceArray], outputs: Mapping[str, DeviceArray]) -> None:
        """Run on a context kept for these shapes."""
        sizes = check_bindings(self.spec, inputs, outputs)
        key = tuple(sorted(sizes.items()))
        bound = self._contexts.pop(key, None)
        if bound is None:
            bound = TrtBound(self, self.profile(sizes), inputs, outputs)
        else:
            bound.rebind(inputs, outputs)
        self._contexts[key] = bound
        if len(self._contexts) > CONTEXTS_KEPT:
            self.device.synchronize()
            self._contexts.popitem(last=False)[1].close()
        bound.run()

    def profile(self, sizes: Mapping[str, int]) -> int:
        """The first profile made for these sizes. Raises InvalidInput where there is none."""
        index = self._receipt.profile_for(sizes)
        if index is None:
            shape = ", ".join(f"{size} {axis}" for axis, size in sizes.items())
            raise InvalidInput(
                f"{self._receipt.graph} with {shape}, for which no profile was built",
                expected=f"one of {len(self._receipt.profiles)}: "
                + "; ".join(profile.name for profile in self._receipt.profiles[-2:]),
                fix=f"{self._build} --schedule SCHEDULE --max-batch IMAGES",
            )
        profile = self._receipt.profiles[index]
        if profile.name == WIDE and len(self._receipt.profiles) > 1 and index not in self._told:
            self._told.add(index)
            log.info(
                "%s: sizes without a profile of their own run on the wide one, which may be slower; "
                "flexvar build --schedule prepares for a schedule",
                self._receipt.graph,
            )
        return index

    def new_context(self) -> Any:
        """A context whose working memory is ours; None where there is no memory for it."""
        if self._runtime_config is not None:
            return self.engine.create_execution_context(self._runtime_config)
        return self.engine.create_execution_context(self.library.module.ExecutionContextAllocationStrategy.USER_MANAGED)

    def information(self) -> str:
        """The engine inspector's account of every kernel, as JSON."""
        layers = self.library.module.LayerInformationFormat.JSON
        return str(self.engine.create_engine_inspector().get_engine_information(layers))

    def holds(self, size: tuple[int, int]) -> bool:
        return True

    @property
    def most_images(self) -> int:
        """Images that the largest profile takes."""
        return max(profile.axes.get("images", (1, 1, 1))[2] for profile in self._receipt.profiles)

    def close(self) -> None:
        with ignore_errors("closing an engine"):
            self.device.synchronize()
        for bound in self._contexts.values():
            bound.close()
        self._contexts.clear()
        self.engine = None


class TrtBound:
    """An execution context with its profile, shapes, addresses and working memory set."""

    def __init__(
        self,
        graph: TrtGraph,
        profile: int,
        inputs: Mapping[str, DeviceArray],
        outputs: Mapping[str, DeviceArray],
    ) -> None:
        self._graph, self._device, self._messages = graph, graph.device, graph.library.messages
        with self._messages.reading() as errors:
            self._context: Any = graph.new_context()
            if self._context is None:
                got = f"an execution context ({errors()})"
                raise OutOfMemory(got, expected="one that fits", fix="free the GPU")
            ok = self._context.set_optimization_profile_async(profile, self._device.stream)
            self._require(ok, f"profile {profile}", errors())
            for name, array in inputs.items():
                ok = self._context.set_input_shape(name, array.shape)
                self._require(ok, f"{name} of {array.shape}", errors())
            try:
                missing: Any = self._context.infer_shapes()
            except RuntimeError as error:
                missing = error
            self._require(not missing, f"shapes ({missing})", errors())
            graph.scratch.reserve(int(self._context.update_device_memory_size_for_shapes()))
        self._block: DeviceArray | None = None
        self.rebind(inputs, outputs)
        self._device.synchronize()  # the switch of profiles is done

    def rebind(self, inputs: Mapping[str, DeviceArray], outputs: Mapping[str, DeviceArray]) -> None:
        """Other arrays of the same shapes. What was captured before goes on with the old ones."""
        for name, array in (*inputs.items(), *outputs.items()):
            if array.address == 0 or array.address % ALIGNMENT:
                raise InvalidInput(
                    f"{name} at address {array.address:#x}",
                    expected=f"an address that is a multiple of {ALIGNMENT}",
                    fix="use a batch for which keys of a token fill whole blocks of that size",
                )
            self._require(self._context.set_tensor_address(name, array.address), f"address of {name}", "")
        self._arrays = (inputs, outputs)

    def run(self) -> None:
        if self._block is None:  # kept from now on: what is captured goes on writing there
            self._block = self._graph.scratch.take()
            if self._block.nbytes:
                self._context.set_device_memory(self._block.address, self._block.nbytes)
        with self._messages.reading() as errors:
            if not self._context.execute_async_v3(self._device.stream):
                raise DeviceFailed(
                    f"{self._graph.spec.file}: {errors()}",
                    expected="an engine that runs",
                    fix="build the engines again with --force; flexvar doctor says whether the GPU works",
                )

    def close(self) -> None:
        self._context = self._block = None
        self._arrays = ({}, {})

    def _require(self, ok: bool, what: str, reason: str) -> None:
        if not ok:
            raise BackendUnavailable(
                f"{self._graph.spec.file}: {what} refused ({reason or 'no reason given'})",
                expected="what its profile was built for",
                fix="build the engines again with --force",
            )


def _runtime_config(library: TrtLibrary, engine: Any) -> Any:
    """How TensorRT-RTX makes contexts of an engine; None for TensorRT.

    It finishes kernels for exact shapes at run time, by default beside the first runs: what is captured must be the
    finished ones, so it is told to wait for them. The cache keeps what it compiled for the next context.
    """
    if not library.rtx:
        return None
    trt, config = library.module, engine.create_runtime_config()
    config.set_execution_context_allocation_strategy(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
    config.dynamic_shapes_kernel_specialization_strategy = trt.DynamicShapesKernelSpecializationStrategy.EAGER
    config.set_runtime_cache(config.create_runtime_cache())
    return config
