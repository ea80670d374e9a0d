"""Build an engine of one graph of a bundle: parse, check, add profiles, build.

TensorRT's parser silently ignores some inputs, changes precisions and decomposes attention. Such graphs raise an error.
"""

from __future__ import annotations

import gc
import logging
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flexvar_runtime.backends.tensorrt.engine_files import PORTABLE, EngineId, PrecisionReport
from flexvar_runtime.backends.tensorrt.library import TrtLibrary, known_targets
from flexvar_runtime.bundle.onnx_scan import Scan
from flexvar_runtime.bundle.opening import Bundle
from flexvar_runtime.errors import ArtifactRefused, BackendUnavailable, FlexVARError, InvalidInput, OutOfMemory
from flexvar_runtime.files.atomic import atomic_write
from flexvar_runtime.files.private import make_private
from flexvar_runtime.model.tensors import GraphSpec

from .engine_precision import arithmetic, decompose_attention, dtype_name, prove_precision

log = logging.getLogger(__name__)

OPTIONAL_ATTENTION_INPUTS = {4: "past_key", 5: "past_value", 6: "nonpad_kv_seqlen"}
POLL_SECONDS = 0.2
UNFIT_TARGETS = {"7.5"}  # TensorRT-RTX has no float32 matrix products there; `step` has one
PROFILE_PHASE = "Computing profile costs"  # the phase that takes nearly all of a build
_EXPORT_AGAIN = "Export the bundle again with this version."
_OUT_OF_MEMORY = ("out of memory", "outofmemory", "bad_alloc", "insufficient memory", "could not allocate")

Tick = Callable[[], None]


@dataclass(frozen=True)
class Plan:
    """A built engine: its bytes (a buffer of the library) and the types it computes in."""

    data: Any
    precision: PrecisionReport


def build_engine(
    library: TrtLibrary,
    bundle: Bundle,
    wanted: EngineId,
    *,
    timing: Path | None = None,
    tick: Tick = lambda: None,
) -> Plan:
    """Build an engine of `wanted.graph`.

    timing: file with the timing cache of TensorRT (TensorRT-RTX has none). tick: called once a profile. Raises
    ArtifactRefused (the graph is not what the manifest declares), BackendUnavailable (the library cannot build it),
    OutOfMemory, KeyboardInterrupt.
    """
    name = bundle.graph(wanted.graph).file
    try:
        return _parse_and_build(library, bundle, wanted, timing if not library.rtx else None, tick)
    except MemoryError as error:
        raise error if isinstance(error, OutOfMemory) else _too_large(name, str(error) or "no memory left") from error
    finally:
        gc.collect()  # free this graph before the next is built


def _parse_and_build(library: TrtLibrary, bundle: Bundle, wanted: EngineId, timing: Path | None, tick: Tick) -> Plan:
    spec, path = bundle.graph(wanted.graph), bundle.graph_file(wanted.graph)
    builder = library.module.Builder(library.logger)
    network = builder.create_network()
    with bundle.unchanged():
        content = bundle.scan(wanted.graph)
        _check_content(path.name, content)
        parser = _parse(library, network, path)  # it owns the weights that the network refers to
    decompose_attention(library, network)
    attention = sum(node.operator == "Attention" for node in content.nodes)
    precision = prove_precision(
        wanted.graph,
        bundle.manifest.precision,
        arithmetic(library, network),
        attention,
        bundle.manifest.float32_parts,
    )
    _check_bindings(path.name, spec, network)
    config = _config(library, builder, spec, wanted)
    if timing is not None:
        _load_timing(config, timing)
    data = _build(library, builder, network, config, len(wanted.profiles), tick, path.name)
    if timing is not None:
        _save_timing(config, timing)
    del parser
    return Plan(data, precision)


def supported_targets(library: TrtLibrary) -> tuple[str, ...]:
    """The compute capabilities ("8.6") that TensorRT-RTX can build these graphs for by name. None for TensorRT."""
    return tuple(name for name in known_targets(library) if name not in UNFIT_TARGETS)


def _check_content(name: str, content: Scan) -> None:
    """Raise ArtifactRefused for inputs that the parser would ignore."""
    for node in content.nodes:
        if node.operator != "Attention":
            continue
        for position, optional in OPTIONAL_ATTENTION_INPUTS.items():
            if len(node.inputs) > position and node.inputs[position]:
                raise ArtifactRefused(
                    f"{name}: the node {node.name} (Attention) has the input {optional}, which TensorRT ignores.",
                    expected="attention without optional inputs",
                    fix=_EXPORT_AGAIN,
                )


def _parse(library: TrtLibrary, network: Any, path: Path) -> Any:
    parser = library.module.OnnxParser(network, library.logger)
    with library.messages.reading() as errors:
        if parser.parse_from_file(str(path)):
            return parser
        failures = [parser.get_error(i) for i in range(parser.num_errors)]
        texts = [f"node {e.node_name()} ({e.node_operator()}): {e.desc()}" for e in failures] or [errors()]
    raise BackendUnavailable(
        f"{library.flavour} {library.version} cannot parse {path.name}: {'; '.join(texts)}.",
        expected=f"a graph that {library.flavour} {library.version} can parse",
        fix="Export the bundle again with this version, or use another backend.",
    )


def _check_bindings(name: str, spec: GraphSpec, network: Any) -> None:
    """Raise ArtifactRefused unless inputs and outputs are those of the manifest. The runtime binds them by address."""
    for declared, count, get in (
        (spec.inputs, network.num_inputs, network.get_input),
        (spec.outputs, network.num_outputs, network.get_output),
    ):
        expected = [(t.name, t.dtype, tuple(a if isinstance(a, int) else -1 for a in t.axes)) for t in declared]
        found = [(t.name, dtype_name(t.dtype), tuple(t.shape)) for t in map(get, range(count))]
        differ = [pair for pair in zip(found, expected, strict=False) if not _agree(*pair)]
        if len(found) != len(expected) or differ:
            got, wanted = differ[0] if differ else (f"{len(found)} tensors", f"{len(expected)}")
            raise ArtifactRefused(
                f"{name} has {got}, but the manifest declares {wanted}.", expected=f"{wanted}", fix=_EXPORT_AGAIN
            )


def _agree(found: tuple[str, str, tuple[int, ...]], expected: tuple[str, str, tuple[int, ...]]) -> bool:
    """Whether name, type and sizes agree. A dynamic axis may be fixed in the manifest, but not the reverse."""
    sizes = zip(found[2], expected[2], strict=False)
    same_rank = len(found[2]) == len(expected[2])
    return found[:2] == expected[:2] and same_rank and all(got in (want, -1) for got, want in sizes)


def _config(library: TrtLibrary, builder: Any, spec: GraphSpec, wanted: EngineId) -> Any:
    trt = library.module
    config = builder.create_builder_config()
    config.clear_flag(trt.BuilderFlag.TF32)  # layers in float32 need its precision
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # without it an engine does not report its types
    if library.rtx and wanted.target != PORTABLE:
        targets = wanted.target.split(",")
        config.num_compute_capabilities = len(targets)
        for i, target in enumerate(targets):
            capability = trt.ComputeCapability.__members__[f"SM{target.replace('.', '')}"]
            if not config.set_compute_capability(capability, i):
                raise BackendUnavailable(
                    f"{library.flavour} {library.version} cannot build for --target {target}.",
                    expected=", ".join(supported_targets(library)),
                    fix=f"Name one of {', '.join(supported_targets(library))}.",
                )
    for profile in wanted.profiles:
        shapes = builder.create_optimization_profile()
        for tensor in spec.inputs:
            shapes.set_shape(tensor.name, *profile.shapes(tensor))
        with library.messages.reading() as errors:
            if config.add_optimization_profile(shapes) < 0:
                raise InvalidInput(
                    f"The graph {wanted.graph} does not take the sizes of profile {profile.name}: {errors()}.",
                    expected="sizes that the graph takes",
                    fix="Correct --schedule or --max-batch.",
                )
    return config


def _build(library: TrtLibrary, builder: Any, network: Any, config: Any, profiles: int, tick: Tick, name: str) -> Any:
    """Build on a separate thread, so that this one can be interrupted. A cancelled build ends within seconds."""
    monitor = config.progress_monitor = _monitor(library.module)
    done: list[Any] = []
    failed: list[BaseException] = []

    def work() -> None:
        try:
            done.append(builder.build_serialized_network(network, config))
        except BaseException as error:  # raised again below, on the caller's thread
            failed.append(error)
        finally:
            finished.set()

    finished = threading.Event()  # after an interrupted join(), Python 3.11 takes a running thread for ended
    worker = threading.Thread(target=work, name=f"build {name}")
    with library.messages.reading() as errors:
        worker.start()
        ticks = 0
        try:
            while not finished.wait(POLL_SECONDS):
                for _ in range(ticks, int(monitor.share * profiles)):
                    ticks += 1
                    tick()
        except BaseException:
            monitor.cancelled.set()
            raise
        finally:
            while not finished.is_set():  # also after a second Ctrl-C: the library still uses these objects
                with suppress(KeyboardInterrupt):
                    finished.wait()
            worker.join()
            config.progress_monitor = None
        if failed:
            raise failed[0]
        if done[0] is None:
            raise _build_error(library, name, errors())
    for _ in range(ticks, profiles):
        tick()
    return done[0]


def _monitor(trt: Any) -> Any:
    """A progress monitor that follows a build and can cancel it. Several threads may report to it at once.

    share: the finished share of the longest phase, 0 to 1.
    """

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)  # the binding does not allow super()
            self.cancelled = threading.Event()
            self.share = 0.0
            self._steps = 1

        def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
            if phase == PROFILE_PHASE:
                self._steps = max(1, steps)

        def step_complete(self, phase: str, step: int) -> bool:
            if phase == PROFILE_PHASE:
                self.share = max(self.share, min(1.0, (step + 1) / self._steps))
            return not self.cancelled.is_set()

        def phase_finish(self, phase: str) -> None:
            return

    return Monitor()


def _build_error(library: TrtLibrary, name: str, text: str) -> FlexVARError:
    if any(sign in text.lower() for sign in _OUT_OF_MEMORY):
        return _too_large(name, text)
    return BackendUnavailable(
        f"{library.flavour} {library.version} cannot build {name}: {text}.",
        expected=f"a graph that {library.flavour} {library.version} can build",
        fix="Export the bundle again with this version, or use another backend.",
    )


def _too_large(name: str, text: str) -> OutOfMemory:
    return OutOfMemory(
        f"The build of {name} does not fit in memory: {text}.",
        expected="a build that fits in memory",
        fix="Use fewer --schedule options, or a smaller --max-batch.",
    )


def _load_timing(config: Any, path: Path) -> None:
    """Use the timings of earlier builds. A file that TensorRT does not accept is ignored."""
    make_private(path.parent)
    data = b""
    with suppress(OSError):
        data = path.read_bytes()
    cache = config.create_timing_cache(data) or config.create_timing_cache(b"")
    if cache is not None:
        config.set_timing_cache(cache, False)


def _save_timing(config: Any, path: Path) -> None:
    """Save the timings for the next build. A failure is only logged."""
    cache = config.get_timing_cache()
    if cache is None:
        return
    try:
        with atomic_write(path, force=True) as temporary:
            temporary.write_bytes(cache.serialize())
    except (OSError, FlexVARError) as error:
        log.debug("The timing cache cannot be saved: %s", error)
