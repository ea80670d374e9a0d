"""The command `flexvar build`: builds engines of the graphs of a bundle. It needs neither torch nor onnx."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flexvar_runtime.cli import options
from flexvar_runtime.cli.console import JsonOption, emit, err, say, steps
from flexvar_runtime.errors import BackendUnavailable, InvalidInput

if TYPE_CHECKING:
    from flexvar_runtime.backends.tensorrt.engine_files import EngineId, Found
    from flexvar_runtime.backends.tensorrt.library import TrtLibrary
    from flexvar_runtime.bundle.opening import Bundle
    from flexvar_runtime.cuda.gpu import GpuFacts
    from flexvar_runtime.model.schedule import ScaleSchedule

DEFAULT_MAX_BATCH = 8
MAX_BATCH = 1024


def build(
    bundle: Annotated[Path, typer.Argument(help="Bundle directory.")],
    backend: Annotated[str, typer.Option(help="Backend to build for: tensorrt or tensorrt-rtx.")],
    schedule: Annotated[
        list[str] | None, typer.Option(help="Schedule to make fast, such as 1_2_4_8_16 or 512px. May be repeated.")
    ] = None,
    max_batch: Annotated[int, typer.Option(min=1, max=MAX_BATCH, help="Largest batch, in images.")] = DEFAULT_MAX_BATCH,
    target: Annotated[
        list[str] | None, typer.Option(help="For tensorrt-rtx: compute capability such as 86. May be repeated.")
    ] = None,
    engines: Annotated[
        Path | None, typer.Option(help="Directory to write the engines to. The default is in the bundle.")
    ] = None,
    prefill: Annotated[
        bool, typer.Option("--prefill", help="Also build the prefill engine for edits. It needs more GPU memory.")
    ] = False,
    allow_unproved: options.AllowUnproved = False,
    force: Annotated[bool, typer.Option("--force", help="Build engines again that exist already.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Build TensorRT engines for a bundle. An engine is a graph that is compiled for one kind of GPU.

    Engines that you built before with the same options are kept.

    The engines are fastest for the schedules in --schedule, by default the one of the bundle. Other schedules run too,
    up to the largest size among these.

    Without --target, engines are built for the GPU of this machine. Without a GPU, tensorrt-rtx builds engines that
    run on several kinds of GPU.

    tensorrt-rtx does not run on compute capability 9.0 (H100, H200). Use tensorrt there.
    """
    from flexvar_runtime.backends import precisions
    from flexvar_runtime.backends.tensorrt.engine_files import receipts_folder
    from flexvar_runtime.backends.tensorrt.library import FLAVOURS, load
    from flexvar_runtime.bundle.manifest import TRANSPOSED
    from flexvar_runtime.bundle.opening import Bundle
    from flexvar_runtime.files.private import user_folder
    from flexvar_runtime.generation.device_memory import require_on_device
    from flexvar_runtime.model.precision import Precision
    from flexvar_runtime.request import Shape

    if backend not in FLAVOURS:
        raise InvalidInput(
            f"flexvar build builds no engines for --backend {backend:.100}.",
            expected=" or ".join(FLAVOURS),
            fix=f"Pass --backend {' or --backend '.join(FLAVOURS)}.",
        )
    library = load(backend)
    chosen = choose_target(library, target or [], present_gpu)
    opened, known = Bundle.open(bundle, allow_unproved=allow_unproved), sorted(precisions(backend))
    if opened.manifest.precision not in known:
        raise InvalidInput(
            f"{bundle} is a bundle in {opened.manifest.precision}, which {backend} does not run.",
            expected=f"a bundle in {' or '.join(known)}",
            fix=f"Export it with --precision {' or '.join(known)}.",
        )
    if library.rtx and (opened.manifest.precision, opened.manifest.decoder) == (Precision.BF16, TRANSPOSED):
        raise InvalidInput(
            f"{bundle} has a transposed decoder in bf16, but {backend} 1.7 has no such layer.",
            expected="a plain decoder, or one in phases",
            fix="Export it with --decoder phases.",
        )
    cache = user_folder("XDG_CACHE_HOME", ".cache") / "timing" / f"{library.version}-{chosen}.cache"
    here, schedules = None if target else gpu_facts(), read_schedules(opened, schedule or [])
    if here is not None:
        largest = max(schedules, key=lambda one: one.tokens)
        require_on_device(opened, Shape(largest, max_batch, guided=True), here.total_bytes, here.name, prefill)
    wanted = wanted_engines(opened, library, chosen, schedules, max_batch, prefill)
    places = Places(opened, engines, receipts_folder(), cache)
    with steps(sum(len(one.profiles) for one in wanted), "build") as advance:
        results = [build_graph(library, one, places, force=force, advance=advance) for one in wanted]
    _report(opened, library, chosen, results, as_json)


@dataclass(frozen=True)
class Places:
    """The bundle, the folder of its engines (None: inside the bundle), the receipts of this user, the timing cache."""

    bundle: Bundle
    engines: Path | None
    receipts: Path
    timing: Path


@dataclass(frozen=True)
class Result:
    """One engine. built: whether this command built it. seconds: the duration of the build."""

    found: Found
    built: bool
    seconds: float


def gpu_facts() -> GpuFacts | None:
    """The GPU of this machine, or None."""
    from flexvar_runtime.cuda.gpu import find_gpu

    try:
        return find_gpu()
    except BackendUnavailable:
        return None


def present_gpu() -> str | None:
    """The compute capability ("8.6") of the GPU of this machine, or None."""
    facts = gpu_facts()
    return None if facts is None else facts.capability


def choose_target(library: TrtLibrary, asked: list[str], current: Callable[[], str | None]) -> str:
    """The target of the engines: the one asked for, or the present GPU, or (TensorRT-RTX without a GPU) portable.

    Raises InvalidInput. Raises BackendUnavailable where TensorRT finds no GPU, or TensorRT-RTX does not run on the GPU.
    """
    from flexvar_runtime.backends.tensorrt.engine_files import PORTABLE
    from flexvar_runtime.backends.tensorrt.library import require_runs_on

    from .engine_builder import supported_targets

    if not library.rtx:
        if asked:
            raise InvalidInput(
                f"--target {asked[0]} cannot be used with {library.flavour}, which builds for the GPU it runs on.",
                expected="no --target",
                fix="Leave out --target and run flexvar build on the target machine, or use --backend tensorrt-rtx.",
            )
        gpu = current()
        if gpu is None:
            raise BackendUnavailable(
                f"{library.flavour} builds engines for the GPU of this machine, but found none.",
                expected="the GPU that the engines are for",
                fix="Build on the target machine (flexvar doctor shows what is wrong), or use --backend tensorrt-rtx.",
            )
        return gpu
    if asked:
        return _named_targets(library, asked)
    gpu = current()
    if gpu is None:
        return PORTABLE
    require_runs_on(library, gpu, instead=" Or name the GPU of another machine with --target.")
    return gpu if gpu in supported_targets(library) else PORTABLE


def _named_targets(library: TrtLibrary, asked: list[str]) -> str:
    """The targets asked for ("86" or "8.6"), in the order of the library, joined by commas."""
    from flexvar_runtime.backends.tensorrt.library import known_targets, require_runs_on

    from .engine_builder import supported_targets

    names = {name.replace(".", ""): name for name in supported_targets(library)}
    for one in asked:
        if one.replace(".", "") in names:
            continue
        number = re.fullmatch(r"([0-9]{1,2})\.?([0-9])", one)
        capability = ".".join(number.groups()) if number else None
        if capability is not None and capability not in known_targets(library):
            require_runs_on(library, capability, given=f"--target {one}: ")
        raise InvalidInput(
            f"--target {one:.100} is not among the targets of {library.flavour} {library.version}: {', '.join(names)}.",
            expected=f"one of {', '.join(names)}",
            fix="Name one of them, or leave --target out.",
        )
    chosen = {one.replace(".", "") for one in asked}
    return ",".join(name for short, name in names.items() if short in chosen)


def read_schedules(bundle: Bundle, texts: list[str]) -> list[ScaleSchedule]:
    """The schedules asked for. Default: the schedule of the bundle. Raises InvalidInput."""
    from flexvar_runtime.model.schedule import ScaleSchedule

    return [ScaleSchedule.parse(text) for text in texts or [bundle.manifest.defaults.schedule]]


def wanted_engines(
    bundle: Bundle,
    library: TrtLibrary,
    target: str,
    schedules: list[ScaleSchedule],
    max_batch: int,
    prefill: bool = False,
) -> list[EngineId]:
    """The ids of the engines to build, one for each graph, the largest last.

    Raises ArtifactRefused where `prefill` is asked for and the bundle has no such graph.
    """
    from flexvar_runtime.backends.tensorrt.engine_files import RECIPE, EngineId, graph_sha256
    from flexvar_runtime.model.signatures import CONDITION, DECODE, ENCODE, PREFILL, STEP

    from .engine_profiles import profiles

    return [
        EngineId(
            graph=graph,
            graph_sha256=graph_sha256(bundle, graph),
            recipe=RECIPE,
            flavour=library.flavour,
            version=library.version,
            target=target,
            profiles=profiles(graph, schedules, max_batch, bundle.manifest.model),
        )
        for graph in (CONDITION, DECODE, ENCODE, *([PREFILL] if prefill else []), STEP)
    ]


def build_graph(
    library: TrtLibrary, wanted: EngineId, places: Places, *, force: bool, advance: Callable[[str], None]
) -> Result:
    """Build one engine, or find one that was built before. One process at a time builds an engine.

    advance: called once a profile.
    """
    from flexvar_runtime.backends.tensorrt.engine_files import engines_folder

    from .engine_builder import build_engine
    from .engine_writer import built, lock_engine, write_engine

    folder, names = engines_folder(places.bundle, places.engines), iter(wanted.profiles)

    def on_wait() -> None:
        say(f"{wanted.graph}: waiting for another flexvar build of the same engine", err)

    def tick() -> None:
        advance(f"{wanted.graph}, {next(names).name}")

    with lock_engine(folder, wanted, places.receipts, on_wait):
        found = None if force else built(folder, wanted, places.receipts)
        if found is not None:
            for _ in wanted.profiles:
                tick()
            return Result(found, False, 0.0)
        start = time.perf_counter()
        plan = build_engine(library, places.bundle, wanted, timing=places.timing, tick=tick)
        found = write_engine(folder, wanted, memoryview(plan.data), plan.precision, places.receipts)
        return Result(found, True, time.perf_counter() - start)


def _report(bundle: Bundle, library: TrtLibrary, target: str, results: list[Result], as_json: bool) -> None:
    from flexvar_runtime.files.strict_json import encode

    data = {
        "bundle": str(bundle.path),
        "sha256": bundle.sha256,
        "backend": library.flavour,
        "version": library.version,
        "target": target,
        "engines": [
            {
                "graph": result.found.receipt.graph,
                "file": str(result.found.path),
                "sha256": result.found.receipt.engine_sha256,
                "size_bytes": result.found.receipt.size,
                "built": result.built,
                "seconds": round(result.seconds, 1),
                "profiles": encode(result.found.receipt.profiles),
                "precision": encode(result.found.receipt.precision),
            }
            for result in results
        ],
    }

    def show() -> None:
        for result in results:
            say(f"{result.found.path}: {_summary(result)}")
        say(f"{library.flavour} {library.version}, target {target.replace(',', ', ')}")

    emit(data, as_json, show)


def _summary(result: Result) -> str:
    receipt, precision = result.found.receipt, result.found.receipt.precision
    layers = [f"{n} {kind} {dtype}" for kind, dtypes in precision.layers.items() for dtype, n in dtypes.items()]
    if precision.fused_attention:
        layers.append(f"{precision.fused_attention} attention fused")
    profiles = f"{len(receipt.profiles)} profile{'s' * (len(receipt.profiles) != 1)}"
    taken = f"{result.seconds:.0f} s" if result.built else "built before"
    share = f"{precision.share:.0%} {precision.claimed} ({', '.join(layers)})"
    return f"{receipt.size / 1e6:.0f} MB, {profiles}, {taken}; {share}"
