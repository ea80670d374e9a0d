"""The runtime on one backend: does it run, does it agree, how fast is it, does it leak."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flexvar_export.build_command import Places, build_graph, choose_target, present_gpu, wanted_engines
from flexvar_export.parity import GATES, compare, holds
from flexvar_export.proof import SEED, Case, Proof
from flexvar_runtime import Bundle, FlexVARPipeline, Sampling
from flexvar_runtime.backends import TENSORRT_BACKENDS
from flexvar_runtime.backends.trt_library import load
from flexvar_runtime.engines import receipts_folder, user_folder
from flexvar_runtime.errors import BackendUnavailable, FlexVARError
from flexvar_runtime.loop import Draws
from flexvar_runtime.sampling import sample
from flexvar_runtime.strict_json import encode

from . import gpu_device
from .gpu_machine import probe_backend, used_bytes
from .gpu_models import ModelFiles, Save, default_guidance, load_proof, schedule_of
from .gpu_plan import CPU_BACKEND, TINY
from .timing import Budget, memory_watch, quantiles, repeat, resident_bytes, timed_row
from .token_agreement import Agreement, agreement, compare_tokens

NEW_CLASSES = Budget(warmup=1, least=3, most=50, seconds=1.0)
GROWTH_WARM_UP = 20
GROWTH_SAMPLES = 10
KNOWN_CLASSES = 32  # their conditions are remembered


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
            "schedule": str(schedule_of(self.model)),
            "guidance": default_guidance().to_json(),
            "sampling": Sampling().to_json(),
            "device": "cpu" if self.pipeline.backend.device is None else self.pipeline.backend.device.name,
            "open_s": self.seconds,
        }

    def generate(self, labels: Sequence[int], seed: int = 0) -> Any:
        return self.pipeline(labels, schedule_of(self.model), default_guidance(), Sampling(), seed=seed)


@contextmanager
def opened(work: Path, model: str, backend: str) -> Iterator[Opened]:
    start = time.perf_counter()
    with FlexVARPipeline.from_bundle(ModelFiles.of(work, model).bundle, backend=backend) as pipeline:
        yield Opened(pipeline, model, time.perf_counter() - start)


def build(work: Path, model: str, backend: str, max_batch: int, save: Save) -> None:
    """Engines of every graph, one after the other, for this machine's GPU, as `flexvar build` does."""
    bundle, library = Bundle.open(ModelFiles.of(work, model).bundle), load(backend)
    target = choose_target(library, [], present_gpu)
    cache = user_folder("XDG_CACHE_HOME", ".cache") / "timing" / f"{library.version}-{target}.cache"
    places = Places(bundle, None, receipts_folder(), cache)
    engines: list[dict[str, Any]] = []
    for wanted in wanted_engines(bundle, library, target, [schedule_of(model)], max_batch):
        result = build_graph(library, wanted, places, force=False, advance=lambda _: None)
        receipt = result.found.receipt
        engines.append(
            {
                "graph": receipt.graph,
                "seconds": result.seconds,
                "bytes": receipt.size,
                "profiles": len(receipt.profiles),
                "precision": encode(receipt.precision),
            }
        )
        save(
            {
                "backend": backend,
                "version": library.version,
                "target": target,
                "max_batch": max_batch,
                "engines": engines,
            }
        )


def tiny(work: Path, backend: str, save: Save) -> None:
    """The whole way on the tiny model: probe, engines where needed, parity, and tokens against ort-cpu."""
    result: dict[str, Any] = {"probe": probe_backend(backend)}
    save(result)
    if not result["probe"]["available"]:
        raise BackendUnavailable(
            f"backend {backend}: {result['probe']['detail']}",
            expected="one that works here",
            fix=result["probe"]["fix"] or "flexvar doctor",
        )
    if backend in TENSORRT_BACKENDS:
        build(work, TINY, backend, 2, lambda built: save(result | {"build": built}))
    batches = ([1], [1, 2])
    with opened(work, TINY, backend) as run:
        result |= run.facts | {"parity": parity(run, load_proof(work, TINY))}
        save(result)
        outputs = [run.generate(labels) for labels in batches]
        result["mode"] = [output.timings.mode for output in outputs]
    save(result)
    with opened(work, TINY, CPU_BACKEND) as host:
        pairs = zip(outputs, map(host.generate, batches), strict=True)
        result["tokens_equal_to_ort_cpu"] = [equal_share(ours.tokens, theirs.tokens) for ours, theirs in pairs]
    save(result)


def parity(run: Opened, proof: Proof) -> dict[str, Any]:
    """Every graph against the reference, then tokens under teacher forcing, then tokens running free."""
    pipeline = run.pipeline
    proof.require_fit(pipeline.model)
    gate = GATES[pipeline.bundle.manifest.precision]
    rows = list(compare(pipeline.engine, proof, gate))
    worst = {
        name: max((row for row in rows if row.graph == name), key=lambda row: row.value / row.bound * _sign(row.metric))
        for name in dict.fromkeys(row.graph for row in rows)
    }
    case = proof.cases[0]
    request = case.labels, case.schedule, case.guidance, Sampling(max_side=case.guidance.max_side), SEED
    free, again = pipeline(*request).tokens, pipeline(*request).tokens
    stepwise = [step.tokens for step in pipeline.iter_scales(*request)]
    return {
        "passed": all(map(holds, rows)),
        "checks": len(rows),
        "failed": [asdict(row) for row in rows if not holds(row)],
        "worst": {name: asdict(row) for name, row in worst.items()},
        "teacher_forced_tokens": forced_tokens(pipeline, case).to_json(),
        "free_running_agreement": equal_share(free, case.tokens),
        "again_equal": equal_share(free, again),
        "scale_by_scale_equal": equal_share(free, stepwise),
    }


def _sign(metric: str) -> int:
    """The worst is the largest error, but the smallest PSNR."""
    return -1 if metric == "psnr_db" else 1


def forced_tokens(pipeline: FlexVARPipeline, case: Case) -> Agreement:
    """Tokens drawn where the backend draws, from its own logits, the reference's tokens fed at every scale."""
    sampling = Sampling(max_side=case.guidance.max_side)
    draws = Draws(sampling, SEED, tuple(range(len(case.labels))))
    parts = []
    with pipeline.engine.loop(case.labels, case.schedule, case.guidance) as loop:
        previous = None
        for i, (h, w) in enumerate(case.schedule):
            got = np.array(loop.logits(i, previous))
            reference, previous = case.logits[i], case.tokens[i]
            if reference.shape != got.shape:
                raise ValueError(f"logits of {reference.shape} in the proof; all rows, {got.shape}, are needed")
            flat = got.reshape(-1, got.shape[-1])
            top_k, noise = sampling.top_k_at(h, w), draws.noise(i, h * w)
            tokens = _draw(pipeline, got, draws, i, top_k)
            parts.append(
                compare_tokens(
                    reference.reshape(flat.shape),
                    flat,
                    case.tokens[i].reshape(-1),
                    tokens,
                    noise,
                    top_k=top_k,
                    top_p=sampling.top_p,
                )
            )
    return agreement(parts)


def _draw(
    pipeline: FlexVARPipeline, logits_BLV: NDArray[np.float32], draws: Draws, scale: int, top_k: int
) -> NDArray[np.int32]:
    if pipeline.backend.device is not None:
        return gpu_device.sample_on_device(pipeline.backend, logits_BLV, draws, scale, top_k)
    B, L, V = logits_BLV.shape
    return sample(logits_BLV.reshape(B * L, V), draws.noise(scale, L), top_k=top_k, top_p=draws.sampling.top_p)


def equal_share(a: Sequence[NDArray[Any]], b: Sequence[NDArray[Any]]) -> float:
    """Of the tokens of all scales."""
    return sum(int((x == y).sum()) for x, y in zip(a, b, strict=True)) / sum(x.size for x in a)


def run(work: Path, model: str, backend: str, batches: Sequence[int], budget: Budget, save: Save) -> None:
    """Parity first, in a fresh process, then times by batch, then times by scale."""
    proof = load_proof(work, model)
    used = used_bytes()
    with opened(work, model, backend) as run:
        result: dict[str, Any] = run.facts | {"parity": parity(run, proof)}
        save(result)
        result["rows"] = []
        for batch in batches:
            try:
                row = latency(run, batch, budget, used)
            except FlexVARError as error:  # too large a batch says nothing of the others
                row = {"batch": batch, "reason": f"not measured: {error}"}
            result["rows"].append(row)
            save(result)
        result["scales"] = {
            "how": "iter_scales, batch 1: the host's clock, one wait a scale, nothing captured; medians of 5",
            "step_s": scale_times(run),
        }
        save(result)


def latency(run: Opened, batch: int, budget: Budget, used: Callable[[], int] | None) -> dict[str, Any]:
    """One row of times, and on its own the height of memory: both with everything opened and captured."""
    labels = [i % run.pipeline.model.classes for i in range(batch)]
    modes = set()

    def known() -> float | None:
        timings = run.generate(labels).timings
        modes.add(timings.mode)
        return timings.device  # type: ignore[no-any-return]

    first = time.perf_counter()
    known()
    first_s = time.perf_counter() - first
    walls, devices = repeat(known, budget)
    turn = 0

    def new() -> None:
        nonlocal turn
        turn += 1
        classes = run.pipeline.model.classes
        run.generate([(turn * batch + i) % classes for i in range(batch)])

    fresh, _ = repeat(new, NEW_CLASSES)
    with memory_watch(used) as memory:
        known()
    row = timed_row(batch, walls, devices, budget) | {
        "mode": sorted(modes),
        "first_call_s": first_s,
        "wall_s_new_classes": quantiles(fresh),
        "classes": "wall_s and device_s: classes met before; wall_s_new_classes: conditions of new ones computed too",
        "device_memory_bytes": memory or None,
    }
    if devices:
        row["images_per_second_device"] = batch / quantiles(devices)["median"]
    return row


def scale_times(run: Opened, repeats: int = 5) -> list[float]:
    """Seconds of every scale, draws included, driven one by one."""
    schedule, guidance = schedule_of(run.model), default_guidance()
    times = []
    for _ in range(repeats + 1):
        steps = run.pipeline.iter_scales([0], schedule, guidance, Sampling(), seed=0)
        times.append([step.time.step + step.time.sample for step in steps])
    return [float(np.median(scale)) for scale in zip(*times[1:], strict=True)]


def growth(work: Path, model: str, backend: str, generations: int, save: Save) -> None:
    """Memory of the process and of the device over many generations of one image."""
    with opened(work, model, backend) as run:
        device = run.pipeline.backend.device

        def look(done: int) -> dict[str, int | None]:
            free = None if device is None else device.free_bytes()
            return {"generations": done, "device_free_bytes": free, "resident_bytes": resident_bytes()}

        def generate(i: int) -> None:
            run.generate([i % min(run.pipeline.model.classes, KNOWN_CLASSES)], seed=i)

        for i in range(GROWTH_WARM_UP):
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
