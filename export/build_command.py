"""`flexvar build`: engines of a bundle's graphs. Runs without torch and onnx."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flexvar_runtime.cli.console import JsonOption, emit, err, out, steps
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
    backend: Annotated[str, typer.Option(help="tensorrt or tensorrt-rtx.")],
    schedule: Annotated[
        list[str] | None, typer.Option(help="Scales to prepare for, e.g. 1_2_4_8_16 or 512px; may be repeated.")
    ] = None,
    max_batch: Annotated[int, typer.Option(min=1, max=MAX_BATCH, help="Most images at a time.")] = DEFAULT_MAX_BATCH,
    target: Annotated[
        list[str] | None, typer.Option(help="Compute capability to build for, e.g. 86; may be repeated.")
    ] = None,
    engines: Annotated[
        Path | None, typer.Option(help="Directory for the engines; the bundle's own if left out.")
    ] = None,
    prefill: Annotated[
        bool, typer.Option("--prefill", help="Also for given scales of edits in one pass: the weights once more.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Build again what is built.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Build the engines of a bundle. What this user built before for the same purpose is kept.

    Every scale of the schedules gets a profile of its own, any other schedule up to the largest shares a wide one.
    Without --target, engines are for this machine's GPU; TensorRT-RTX builds without one, for a set of its own choice.
    TensorRT-RTX does not run on compute capability 9.0 (H100, H200): build with TensorRT there.
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
        raise InvalidInput(f"backend {backend!r:.100}", expected=" or ".join(FLAVOURS), fix="name one of them")
    library = load(backend)
    chosen = choose_target(library, target or [], present_gpu)
    opened, known = Bundle.open(bundle), sorted(precisions(backend))
    if opened.manifest.precision not in known:
        raise InvalidInput(
            f"a bundle in {opened.manifest.precision} for {backend}",
            expected=f"one in {' or '.join(known)}",
            fix="export it with one of these",
        )
    if library.rtx and (opened.manifest.precision, opened.manifest.decoder) == (Precision.BF16, TRANSPOSED):
        raise InvalidInput(
            f"a decoder in bf16 that upsamples transposed for {backend}, which has no such layer (1.7)",
            expected="one in phases or plain",
            fix="export it with --decoder phases",
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
    """Where things lie: the bundle, the folder of engines (None: its own), this user's receipts, the timing cache."""

    bundle: Bundle
    engines: Path | None
    receipts: Path
    timing: Path


@dataclass(frozen=True)
class Result:
    """One engine; `built` where it was built now, in `seconds`."""

    found: Found
    built: bool
    seconds: float


def gpu_facts() -> GpuFacts | None:
    """This machine's GPU; None without one."""
    from flexvar_runtime.cuda.gpu import find_gpu

    try:
        return find_gpu()
    except BackendUnavailable:
        return None


def present_gpu() -> str | None:
    """Compute capability ("8.6") of this machine's GPU; None without one."""
    facts = gpu_facts()
    return None if facts is None else facts.capability


def choose_target(library: TrtLibrary, asked: list[str], current: Callable[[], str | None]) -> str:
    """The target of the engines: what was asked for, else the present GPU, else (TensorRT-RTX only) portable.

    Raises InvalidInput; BackendUnavailable where TensorRT finds no GPU, or TensorRT-RTX does not run on the one meant.
    """
    from flexvar_runtime.backends.tensorrt.engine_files import PORTABLE
    from flexvar_runtime.backends.tensorrt.library import require_runs_on

    from .engine_builder import supported_targets

    if not library.rtx:
        if asked:
            raise InvalidInput(
                f"--target {asked[0]} with {library.flavour}",
                expected="none: TensorRT builds for the GPU it runs on",
                fix="leave out --target and run flexvar build on that machine; tensorrt-rtx builds for other GPUs",
            )
        gpu = current()
        if gpu is None:
            raise BackendUnavailable(
                f"no GPU for {library.flavour}",
                expected="the GPU the engines are for",
                fix="build on the target machine (flexvar doctor says what is wrong), or use --backend tensorrt-rtx",
            )
        return gpu
    if asked:
        return _named_targets(library, asked)
    gpu = current()
    if gpu is None:
        return PORTABLE
    require_runs_on(library, gpu, instead="; or name the GPU of another machine with --target")
    return gpu if gpu in supported_targets(library) else PORTABLE


def _named_targets(library: TrtLibrary, asked: list[str]) -> str:
    """The targets that were asked for ("86" or "8.6"), in the library's order, joined by commas."""
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
            f"--target {one:.100}",
            expected=f"one of {', '.join(names)} ({library.flavour} {library.version})",
            fix="name one of them, or leave it out",
        )
    chosen = {one.replace(".", "") for one in asked}
    return ",".join(name for short, name in names.items() if short in chosen)


def read_schedules(bundle: Bundle, texts: list[str]) -> list[ScaleSchedule]:
    """The schedules asked for, by default that of the bundle. Raises InvalidInput."""
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
    """One for each graph, the large one last. Raises ArtifactRefused where the bundle has none to prefill with."""
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
    """Build one engine, or find it built; one builder at a time. `advance` is called once a profile."""
    from flexvar_runtime.backends.tensorrt.engine_files import engines_folder

    from .engine_builder import build_engine
    from .engine_writer import built, lock_engine, write_engine

    folder, names = engines_folder(places.bundle, places.engines), iter(wanted.profiles)

    def waiting() -> None:
        err.print(f"{wanted.graph}: another flexvar build is at it, waiting", highlight=False, soft_wrap=True)

    def tick() -> None:
        advance(f"{wanted.graph}, {next(names).name}")

    with lock_engine(folder, wanted, places.receipts, waiting):
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
            _say(f"{result.found.path}: {_summary(result)}")
        _say(f"{library.flavour} {library.version}, target {target.replace(',', ', ')}")

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


def _say(line: str) -> None:
    out.print(line, highlight=False, markup=False, soft_wrap=True)
