"""Measures a plan: the variants of each case take turns, then the load tests follow. Yields each result at once."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import count

import numpy as np

from flexvar_runtime import Bundle
from flexvar_runtime.backends import BACKENDS
from flexvar_runtime.model.facts import ModelFacts

from .limits import PHASE_SAVING, decoder_flops, transformer_flops
from .records import Measured, Scenario, Served
from .variants import CostWork, Sample, Subject, Work
from .workers import Worker, started
from .workload import LEAST, Case, Load, Plan, calls_of

PUBLISHED_TOKENIZER = 16, 8912, 32  # downsampling, vocabulary, dimension of a code
SEED = 0
REST_SECONDS = 0.1  # before each call, because threads of the last one may still spin: those of `ort-plain` for 45 ms
Progress = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Costs:
    """The costs for deadlines that a backend saved.

    rows: how many schedules and batch sizes were measured. note: why none was.
    """

    model: str
    backend: str
    file: str | None
    rows: int
    note: str


def measure(plan: Plan, threads: int, progress: Progress = lambda _: None) -> Iterator[Measured | Served | Costs]:
    """Measure all cases and load tests of a plan, then the costs for deadlines.

    Each variant runs in its own process. All processes are open at once, and one of them works at a time. A variant
    that cannot run is "not measured", with the reason. Raises ArtifactRefused for a bundle that cannot be read."""
    bundle = Bundle.open(plan.model.bundle, allow_unproved=True)  # `run_session` refuses those that are not allowed
    names = dict.fromkeys(name for case in plan.cases for name in case.variants)
    model = plan.model
    subjects = [Subject(name, model.bundle, model.transformer, model.vae, threads, model.weights) for name in names]
    turns = count()
    progress(f"{plan.model.name}: opening {', '.join(names)} for {plan.calls} calls")
    with started(subjects) as workers:
        by_name = {worker.subject.variant: worker for worker in workers}
        for case in plan.cases:
            progress(f"{plan.model.name}: {_describe(case.work)}, {case.repeats} calls of {', '.join(case.variants)}")
            yield from _in_turns(plan, bundle, case, [by_name[name] for name in case.variants], turns, threads)
        for load in plan.loads:
            progress(f"{plan.model.name}: {load.mode}, {load.requests} requests on {load.variant}")
            worker = by_name[load.variant]
            served = serve(load, worker.call, _scenario(plan, bundle, worker, load.work, threads))
            if served is not None:
                yield served
        for worker in workers:
            if plan.costs is not None and worker.subject.variant in BACKENDS:
                yield _costs(plan.model.name, worker, plan.costs, progress)


def _costs(model: str, worker: Worker, work: CostWork, progress: Progress) -> Costs:
    backend = worker.subject.variant
    progress(f"{model}: costs for deadlines on {backend}, batch {', '.join(map(str, work.batches))}")
    saved = worker.save_costs(work)
    if isinstance(saved, str):
        return Costs(model=model, backend=backend, file=None, rows=0, note=saved)
    return Costs(model=model, backend=backend, file=saved.file, rows=saved.rows, note="")


def _in_turns(
    plan: Plan, bundle: Bundle, case: Case, workers: list[Worker], turns: Iterator[int], threads: int
) -> Iterable[Measured]:
    samples: dict[str, list[tuple[int, Sample]]] = {name: [] for name in case.variants}
    notes = dict.fromkeys(case.variants, "")
    peak_was_reset: dict[str, bool] = {}
    for worker in workers:  # the warm-up opens graphs, allocates and compiles
        peak_was_reset[worker.subject.variant] = worker.reset_peak()
        answer = worker.call(case.work)
        notes[worker.subject.variant] = answer if isinstance(answer, str) else ""
    end = time.perf_counter() + case.seconds
    for turn in range(case.repeats):
        if turn >= LEAST and time.perf_counter() >= end:
            break
        order = workers if turn % 2 == 0 else list(reversed(workers))  # no variant always follows the same one
        for worker in order:
            name = worker.subject.variant
            if notes[name]:
                continue
            time.sleep(REST_SECONDS)
            answer = worker.call(case.work)
            if isinstance(answer, str):
                notes[name] = answer
            else:
                samples[name].append((next(turns), answer))
    for worker in workers:
        name = worker.subject.variant
        scenario = _scenario(plan, bundle, worker, case.work, threads)
        peak = worker.peak_bytes() if peak_was_reset[name] and not notes[name] else None
        joules = worker.joules(case.work) if samples[name] else None
        flops = call_flops(bundle.manifest.model, case.work)
        yield measured(scenario, bundle.sha256, samples[name], peak, flops, joules, notes[name])


def measured(
    scenario: Scenario,
    bundle_sha256: str,
    samples: list[tuple[int, Sample]],
    peak: int | None,
    flops: float,
    joules: float | None,
    note: str,
) -> Measured:
    """Samples with their turns, as one record. note: why there are none, or fewer than planned."""
    only = [sample for _, sample in samples]

    def median(values: list[float | None]) -> float | None:
        known = [value for value in values if value is not None]
        return statistics.median(known) if known and len(known) == len(values) else None

    scales = [sample.scales for sample in only if sample.scales is not None]
    per_scale = tuple(map(statistics.median, zip(*scales, strict=True))) if scales else None
    return Measured(
        scenario=scenario,
        bundle_sha256=bundle_sha256,
        seconds=tuple(sample.total for sample in only),
        turns=tuple(turn for turn, _ in samples),
        condition=median([sample.condition for sample in only]),
        scales=per_scale,
        sampling=median([sample.sampling for sample in only]),
        decode=median([sample.decode for sample in only]),
        peak_memory_bytes=peak,
        flops=flops,
        joules=joules,
        note=f"not measured: {note}" if note and not only else note,
        told=median([_parts_share(sample) for sample in only]),
    )


def _parts_share(sample: Sample) -> float | None:
    """The sum of the parts as a share of the call. None if the variant does not report all parts."""
    if sample.scales is None or sample.condition is None or sample.sampling is None or sample.decode is None:
        return None
    return (sample.condition + sum(sample.scales) + sample.sampling + sample.decode) / sample.total


def serve(load: Load, call: Callable[[Work], Sample | str], scenario: Scenario) -> Served | None:
    """The result of a load test. None if the variant cannot run.

    In the mode "server" requests arrive by a Poisson process and are served one by one. Their waiting time counts.
    """
    first = call(load.work)
    if isinstance(first, str):
        return None
    calls = calls_of(load)
    due = np.zeros(calls)
    rate = bound = None
    if load.mode == "server":
        rate, bound = load.rate / first.total, load.bound * first.total
        due = np.cumsum(np.random.default_rng(SEED).exponential(1 / rate, calls))
    latencies: list[float] = []
    start = time.perf_counter()
    for at in due:
        now = time.perf_counter() - start
        if at > now:
            time.sleep(at - now)
        arrived = at if load.mode == "server" else (0.0 if load.mode == "offline" else time.perf_counter() - start)
        if isinstance(call(load.work), str):
            return None
        latencies += [time.perf_counter() - start - arrived] * load.work.batch
    elapsed = time.perf_counter() - start
    return Served(
        scenario=scenario,
        mode=load.mode,
        rate=rate,
        bound=bound,
        latencies=tuple(latencies),
        images_per_second=len(latencies) / elapsed,
    )


def call_flops(model: ModelFacts, work: Work) -> float:
    """The least operations of a call, with the decoder's upsampling in phases.

    The operations of a decoder other than the published one are not counted. The result is then too low.
    """
    flops = transformer_flops(model, work.schedule, guided=work.guided)
    if (model.downsampling, model.vocabulary, model.code_dim) == PUBLISHED_TOKENIZER:
        flops += decoder_flops(work.schedule) * (1 - PHASE_SAVING)
    return work.batch * flops


def _scenario(plan: Plan, bundle: Bundle, worker: Worker, work: Work, threads: int) -> Scenario:
    variant = worker.subject.variant
    peer = variant.removeprefix("torch-") if variant.startswith("torch-") else None
    precision = worker.precision or {None: bundle.manifest.precision, "bf16": "bf16"}.get(peer, "fp32")
    return Scenario(
        name=f"{plan.model.name}, {_describe(work)}",
        model=plan.model.name,
        variant=variant,
        precision=precision,
        schedule=str(work.schedule),
        batch=work.batch,
        guided=work.guided,
        threads=threads,
    )


def _describe(work: Work) -> str:
    return f"{len(work.schedule)} steps, batch {work.batch}, {'guidance' if work.guided else 'no guidance'}"
