"""Jobs that run the runtime on one backend: engines, parity, times, memory growth, and both forms of the decoder."""

from __future__ import annotations

import io
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from flexvar_export import build_command
from flexvar_export.parity import psnr
from flexvar_runtime import FlexVARPipeline, Sampling
from flexvar_runtime.backends import TENSORRT_BACKENDS
from flexvar_runtime.backends.cuda.backend import Cuda
from flexvar_runtime.backends.device_arrays import DeviceBackend
from flexvar_runtime.bundle.manifest import ENGINES
from flexvar_runtime.errors import BackendUnavailable, FlexVARError
from flexvar_runtime.generation.captured import WARM_UPS
from flexvar_runtime.generation.generator import Generator
from flexvar_runtime.memory.plan import IMAGES_PER_RUN
from flexvar_runtime.model.signatures import DECODE

from ..energy import gpu_counter
from ..timing import Budget, memory_watch, quantiles, repeat, resident_bytes, timed_row
from .files import ModelFiles, Save
from .hardware import probe_backend, used_bytes
from .parity import equal_share, parity
from .plan import CPU_BACKEND, TINY
from .random_models import default_guidance, load_proof, schedule_of

NEW_CLASSES = Budget(warmup=1, least=3, most=50, seconds=1.0)
DECODER_SECONDS = 0.5  # of the decoder's times in `run`, for each number of images
GROWTH_WARM_UP = 20
GROWTH_SAMPLES = 10
KNOWN_CLASSES = 32  # the pipeline keeps the conditions of so many classes


@dataclass(frozen=True)
class Opened:
    """A pipeline on a model of the run, and how long it took to open."""

    pipeline: FlexVARPipeline
    model: str
    seconds: float

    @property
    def facts(self) -> dict[str, Any]:
        return {
            "backend": self.pipeline.backend.name,
            "model": self.model,
            "precision": self.pipeline.bundle.manifest.precision,
            "decoder": self.pipeline.bundle.manifest.decoder,
            "schedule": str(schedule_of(self.model)),
            "guidance": default_guidance().to_json(),
            "sampling": Sampling().to_json(),
            "device": "cpu" if self.pipeline.backend.device is None else self.pipeline.backend.device.name,
            "open_s": self.seconds,
        }

    @property
    def substituted(self) -> dict[str, Any]:
        """On the backend `cuda`: the convolutions that cuDNN had no plan for, so that im2col took their place."""
        backend = self.pipeline.backend
        return {"substituted": list(backend.convolutions.substituted)} if isinstance(backend, Cuda) else {}

    def generate(self, labels: Sequence[int], seed: int = 0) -> Any:
        return self.pipeline(labels, schedule_of(self.model), default_guidance(), Sampling(), seed=seed)


@contextmanager
def opened(work: Path, model: str, backend: str, *, in_phases: bool = False) -> Iterator[Opened]:
    """Open a model of the run on a backend. in_phases: the bundle whose decoder upsamples in phases.

    Both bundles have their engines in one folder.
    """
    files, start = ModelFiles.of(work, model), time.perf_counter()
    bundle, engines = files.in_phases if in_phases else files.bundle, files.bundle / ENGINES
    with FlexVARPipeline.from_bundle(
        bundle, backend=backend, engines=engines if backend in TENSORRT_BACKENDS else None, allow_unproved=True
    ) as pipeline:
        yield Opened(pipeline, model, time.perf_counter() - start)


def build(work: Path, model: str, backend: str, max_batch: int, save: Save, *, in_phases: bool = False) -> None:
    """Run `flexvar build` for the GPU of this machine: engines of every graph. Progress goes to standard error."""
    files, start, printed = ModelFiles.of(work, model), time.perf_counter(), io.StringIO()
    with redirect_stdout(printed):
        build_command.build(
            files.in_phases if in_phases else files.bundle,
            backend,
            schedule=[str(schedule_of(model))],
            max_batch=max_batch,
            target=None,
            engines=files.bundle / ENGINES,
            allow_unproved=True,
            force=False,
            as_json=True,
        )
    built = json.loads(printed.getvalue())
    engines = [
        {key: engine[key] for key in ("graph", "seconds", "size_bytes", "precision")}
        | {"profiles": len(engine["profiles"])}
        for engine in built["engines"]
    ]
    facts = {key: built[key] for key in ("backend", "version", "target")}
    save(facts | {"max_batch": max_batch, "seconds": time.perf_counter() - start, "engines": engines})


def tiny(work: Path, backend: str, save: Save) -> None:
    """Check a backend on the tiny model: probe, engines if needed, parity, and tokens compared with ort-cpu."""
    result: dict[str, Any] = {"probe": probe_backend(backend)}
    save(result)
    if not result["probe"]["available"]:
        raise BackendUnavailable(
            f"The backend {backend} does not work here: {result['probe']['detail'].rstrip('.')}.",
            expected="a backend that works here",
            fix=result["probe"]["fix"] or "Run flexvar doctor.",
        )
    if backend in TENSORRT_BACKENDS:
        build(work, TINY, backend, 2, lambda built: result.update(build=built))
        save(result)
    batches = ([1], [1, 2])
    with opened(work, TINY, backend) as run:
        result |= run.facts | {"parity": parity(run.pipeline, load_proof(work, TINY))}
        save(result)
        outputs = [run.generate(labels) for labels in batches]
        result |= {"mode": [output.timings.mode for output in outputs]} | run.substituted
    save(result)
    try:
        with opened(work, TINY, CPU_BACKEND) as host:
            pairs = zip(outputs, map(host.generate, batches), strict=True)
            result["tokens_equal_to_ort_cpu"] = [equal_share(ours.tokens, theirs.tokens) for ours, theirs in pairs]
    except FlexVARError as error:  # a failure of ort-cpu says nothing about this backend
        result["tokens_equal_to_ort_cpu"] = f"not measured: {error}"
    save(result)


def run(work: Path, model: str, backend: str, batches: Sequence[int], budget: Budget, save: Save) -> None:
    """Measure parity, then times for each batch, for the decoder alone, and for each scale."""
    proof = load_proof(work, model)
    used = used_bytes()
    with opened(work, model, backend) as run:
        result: dict[str, Any] = run.facts | {"parity": parity(run.pipeline, proof)}
        save(result)
        result["rows"] = []
        for batch in batches:
            try:
                row = latency(run, batch, budget, used)
            except FlexVARError as error:  # a batch that is too large must not end the others
                row = {"batch": batch, "reason": f"not measured: {error}"}
            result["rows"].append(row)
            save(result | run.substituted)
        result |= run.substituted
        if run.pipeline.backend.device is not None:
            result["parts"] = part_times(run, result["rows"], replace(budget, seconds=DECODER_SECONDS))
            save(result)
        result["scales"] = {
            "how": "iter_scales, batch 1: the host's clock, one wait a scale, nothing captured; medians of 5",
            "step_s": scale_times(run),
        }
        save(result)


def latency(run: Opened, batch: int, budget: Budget, used: Callable[[], int] | None) -> dict[str, Any]:
    """One row of times, and the peak of memory, measured separately. Everything is opened and captured before."""
    labels = [i % run.pipeline.model.classes for i in range(batch)]
    modes = set()

    def known() -> float | None:
        timings = run.generate(labels).timings
        modes.add(timings.mode)
        return timings.device  # type: ignore[no-any-return]

    first = time.perf_counter()
    known()
    first_s = time.perf_counter() - first
    times = repeat(known, budget, gpu_counter())
    turn = 0

    def new() -> None:
        nonlocal turn
        turn += 1
        classes = run.pipeline.model.classes
        run.generate([(turn * batch + i) % classes for i in range(batch)])

    fresh = repeat(new, NEW_CLASSES).walls
    with memory_watch(used) as memory:
        known()
    row = timed_row(batch, times, budget) | {
        "mode": sorted(modes),
        "first_call_s": first_s,
        "wall_s_new_classes": quantiles(fresh),
        "classes": "wall_s and device_s: classes met before; wall_s_new_classes: conditions of new ones computed too",
        "device_memory_bytes": memory or None,
    }
    if times.devices:
        row["images_per_second_device"] = batch / quantiles(times.devices)["median"]
    return row


def part_times(run: Opened, rows: Sequence[dict[str, Any]], budget: Budget) -> list[dict[str, Any]]:
    """Seconds of the decoder and of all before it, on the device, for each row of times.

    The decoder runs on at most IMAGES_PER_RUN images at a time. It is timed alone, captured if the backend can be
    captured.
    """
    schedule, decoder, found = schedule_of(run.model)[-1], dict[int, float](), list[dict[str, Any]]()
    for row in (row for row in rows if row.get("device_s")):
        batch, whole, seconds = row["batch"], row["device_s"]["median"], 0.0
        for start in range(0, batch, IMAGES_PER_RUN):
            images = min(IMAGES_PER_RUN, batch - start)
            if images not in decoder:
                decoder[images] = decoder_times(run.pipeline.generator, schedule, images, budget)["device_s"]["median"]
            seconds += decoder[images]
        found.append({"batch": batch, "decoder_s": seconds, "transformer_and_sampling_s": whole - seconds})
    return found


def scale_times(run: Opened, repeats: int = 5) -> list[float]:
    """Seconds of every scale, sampling included, when each scale is waited for."""
    schedule, guidance = schedule_of(run.model), default_guidance()
    times = []
    for _ in range(repeats + 1):
        steps = run.pipeline.iter_scales([0], schedule, guidance, Sampling(), seed=0)
        times.append([step.time.step + step.time.sample for step in steps])
    return [float(np.median(scale)) for scale in zip(*times[1:], strict=True)]


def growth(work: Path, model: str, backend: str, generations: int, save: Save) -> None:
    """Measure the memory of the process and of the device over many generations of one image."""
    with opened(work, model, backend) as run:
        memory_growth(run, generations, save)


def memory_growth(run: Opened, generations: int, save: Save) -> None:
    """As `growth`, with an open pipeline."""
    device = run.pipeline.backend.device

    def look(done: int) -> dict[str, int | None]:
        free = None if device is None else device.free_bytes()
        return {"generations": done, "device_free_bytes": free, "resident_bytes": resident_bytes()}

    def generate(i: int) -> None:
        run.generate([i % min(run.pipeline.model.classes, KNOWN_CLASSES)], seed=i)

    for i in range(min(GROWTH_WARM_UP, generations)):
        generate(i)
    samples = [look(0)]
    every = max(1, generations // GROWTH_SAMPLES)
    for i in range(generations):
        generate(i)
        if (i + 1) % every == 0:
            samples.append(look(i + 1))
            save(run.facts | {"batch": 1, "samples": samples})
    first, middle, last = samples[0], samples[len(samples) // 2], samples[-1]
    save(
        run.facts
        | {
            "batch": 1,
            "generations": generations,
            "samples": samples,
            "device_grown_bytes": _difference(first, last, "device_free_bytes"),
            "resident_grown_bytes": _difference(last, first, "resident_bytes"),
            "resident_grown_bytes_second_half": _difference(last, middle, "resident_bytes"),
        }
    )


def _difference(a: dict[str, int | None], b: dict[str, int | None], key: str) -> int | None:
    first, second = a[key], b[key]
    return None if first is None or second is None else first - second


def decoders(
    work: Path, model: str, backend: str, batches: Sequence[int], max_batch: int, budget: Budget, save: Save
) -> None:
    """Time the decoder alone in both forms. It shows whether upsampling in phases saves time on this device."""
    case, result = load_proof(work, model).cases[0], dict[str, Any]()
    for in_phases in (False, True):
        if in_phases and backend in TENSORRT_BACKENDS:  # the engines of the other graphs exist
            build(work, model, backend, max_batch, lambda _: None, in_phases=True)
        with opened(work, model, backend, in_phases=in_phases) as run:
            generator = run.pipeline.generator
            result = run.facts | {"rows": result.get("rows", [])}
            images = np.concatenate([part.copy() for part in generator.decode(case.tokens[-1])])
            facts = {"decoder": result.pop("decoder"), "psnr_db": psnr(images, case.decoded)}
            for batch in sorted({min(batch, IMAGES_PER_RUN) for batch in batches}):
                result["rows"].append(facts | decoder_times(generator, schedule_of(model)[-1], batch, budget))
                save(result)


def decoder_times(generator: Generator, size: tuple[int, int], batch: int, budget: Budget) -> dict[str, Any]:
    """Times of one run of the decoder graph, from tokens to images, both on the device.

    It is captured if the backend can be captured, because the host may enqueue it more slowly than the device runs it.
    """
    (h, w), factor, device = size, generator.model.downsampling, generator.backend.device
    tokens = generator.backend.upload(np.zeros((batch, h, w), np.int32))
    image = generator.backend.empty((batch, 3, h * factor, w * factor), "float32")
    bound = generator.graph(DECODE).bind({"tokens": tokens}, {"image": image})

    launch, close = bound.run, list[Callable[[], None]]()
    if device is not None and isinstance(generator.backend, DeviceBackend) and generator.backend.captures:
        for _ in range(WARM_UPS):
            bound.run()
            device.synchronize()
        replay = device.capture(bound.run)
        launch, close = replay.launch, [replay.close]

    def once() -> float | None:
        if device is None:
            launch()
            return None
        seconds = device.elapsed(launch)
        device.synchronize()
        return seconds()

    times = repeat(once, budget)
    for end in (*close, bound.close):
        end()
    return timed_row(batch, times, budget)
