"""The phases of a run, in the order of importance, with their needs, durations and limits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from flexvar_runtime.backends import TENSORRT_BACKENDS
from flexvar_runtime.errors import InvalidInput

from .files import ModelFiles

TINY = "tiny"  # the name of the tiny model
GPU_BACKENDS = ("cuda", "ort-cuda", "tensorrt", "tensorrt-rtx")  # in the order in which they are measured
CPU_BACKEND = "ort-cpu"
MODELS = (16, 20, 24)
BATCHES = (1, 8, 64)
GENERATIONS = 1000  # of the memory-growth test
MINUTES = 9.0  # that the limits below are made for
REUSED = "there from an earlier run"


@dataclass(frozen=True)
class Phase:
    """One process of a run.

    name: its key in the result. job: the function of `child` that it runs, with `options`. seconds: its expected
    duration. limit: the seconds after which it is stopped. alone: nothing may run beside it, because it takes times.
    needs: the names of phases that must be done before.
    """

    name: str
    job: str
    options: dict[str, Any] = field(default_factory=dict)
    seconds: float = 30
    limit: float = 90
    alone: bool = True
    needs: tuple[str, ...] = ()


@dataclass(frozen=True)
class PlanOptions:
    """The models, batches and backends that the command line asks for."""

    depths: tuple[int, ...] = MODELS
    batches: tuple[int, ...] = BATCHES
    backends: tuple[str, ...] = GPU_BACKENDS
    tiny: bool = False
    precision: str = "fp16"
    generations: int = GENERATIONS

    @property
    def models(self) -> tuple[str, ...]:
        return (TINY,) if self.tiny else tuple(f"d{depth}" for depth in self.depths)

    @property
    def max_batch(self) -> int:
        """The largest batch of engines. It is at least two, because the proof needs two."""
        return max(*self.batches, 2)

    @property
    def budget(self) -> dict[str, float]:
        """The time budget of one row of times, as keywords of `timing.Budget`."""
        return {"warmup": 1, "least": 2, "most": 3, "seconds": 0.2} if self.tiny else {"seconds": 2.5}


def phases(asked: PlanOptions) -> list[Phase]:
    """The plan of a run, in the order of importance. Names are unique."""
    main, others = asked.models[0], asked.models[1:]
    small = () if asked.tiny else (TINY,)
    found = [Phase("machine", "machine", {"tiny": asked.tiny}, 20, 60)]
    exported: tuple[str, ...] = (*small, *asked.models)
    found += [_export(model, asked, share=len(exported)) for model in exported]
    found += [_tiny(backend) for backend in asked.backends]
    found.append(
        Phase(f"in-phases {main}", "in-phases", {"model": main}, 20, 60, alone=False, needs=(f"export {main}",))
    )
    found.append(Phase("kernels", "kernels", {"model": main, "batches": asked.batches}, 12, 40))
    for backend in asked.backends:
        found += _measure(main, backend, asked)
    rows = [compiled(main, batch, dynamic, asked.budget) for batch, dynamic in compiled_rows(asked.batches)]
    others_first = len(asked.batches) - 1
    found += [_reference(main, asked), *rows[:others_first]]
    found += [_growth(main, backend, asked) for backend in asked.backends]
    found += [_decoders(main, backend, asked) for backend in asked.backends]
    for model in others:
        for backend in asked.backends:
            found += _measure(model, backend, asked)
        found.append(_reference(model, asked))
    return [*found, *rows[others_first:]]


def planned_seconds(plan: Sequence[Phase]) -> float:
    """The expected duration of a plan, whose phases start in the runner's order."""
    names, waiting = {phase.name for phase in plan}, list(plan)
    running, done, now = list[tuple[float, Phase]](), set[str](), 0.0
    while waiting or running:
        for phase in list(waiting):
            if any(need in names and need not in done for need in phase.needs):
                continue
            if running and (phase.alone or any(other.alone for _, other in running)):
                break
            waiting.remove(phase)
            running.append((now + phase.seconds, phase))
            if phase.alone:
                break
        now, ended = min(running, key=lambda one: one[0])
        running.remove((now, ended))
        done.add(ended.name)
    return now


def makers(plan: Sequence[Phase]) -> list[Phase]:
    """The phases that make a bundle and a proof, which a later run can use again."""
    return [phase for phase in plan if phase.job in ("export", "regenerate")]


def finished_before(plan: Sequence[Phase], work: Path, sources: str) -> dict[str, dict[str, Any]]:
    """Phases that need not run, with the result of each: what they make lies in `work`, made by the same sources.

    sources: the hash of our source files.
    """
    found = {}
    for phase in makers(plan):
        files = ModelFiles.of(work, phase.options["model"])
        if files.exist and files.made_by(sources):
            facts = {key: phase.options[key] for key in ("model", "precision") if key in phase.options}
            found[phase.name] = facts | {"reason": REUSED}
    return found


def select(plan: Sequence[Phase], only: Sequence[str] | None) -> list[Phase]:
    """The phases of these names or jobs, and the phases that they need. Raises InvalidInput for an unknown name."""
    if not only:
        return list(plan)
    known = {phase.name for phase in plan} | {phase.job for phase in plan}
    strange = sorted(set(only) - known)
    if strange:
        raise InvalidInput(
            f"--only {strange[0]!r} is neither a phase nor a job.",
            expected="names of phases or jobs",
            fix=f"Use one of: {', '.join(sorted(known))}.",
        )
    wanted = {phase.name for phase in plan if {phase.name, phase.job} & {*only, "machine"}}
    for phase in reversed(plan):  # what is needed comes before
        if phase.name in wanted:
            wanted |= set(phase.needs)
    return [phase for phase in plan if phase.name in wanted]


def with_limits(plan: Sequence[Phase], minutes: float) -> list[Phase]:
    """The same plan, with longer limits where there is more time than usual, or than the phases should take."""
    factor = max(1.0, minutes / MINUTES, 60 * minutes / max(planned_seconds(plan), 1))
    return [replace(phase, limit=factor * phase.limit) for phase in plan]


def _export(model: str, asked: PlanOptions, share: int) -> Phase:
    options = {"model": model, "precision": asked.precision, "processes": share}
    small = model == TINY
    return Phase(f"export {model}", "export", options, 20 if small else 90, 60 if small else 200, alone=False)


def _tiny(backend: str) -> Phase:
    options = {"backend": backend}
    return Phase(f"tiny {backend}", "tiny", options, 15, 75, alone=False, needs=(f"export {TINY}",))


def _measure(model: str, backend: str, asked: PlanOptions) -> list[Phase]:
    """The phases of a model on a backend: engines if the backend needs them, parity and times, then a profile."""
    options, found = {"model": model, "backend": backend}, list[Phase]()
    ready: tuple[str, ...] = (f"export {model}", f"tiny {backend}")
    if backend in TENSORRT_BACKENDS:
        build = Phase(
            f"build {backend} {model}",
            "build",
            options | {"max_batch": asked.max_batch},
            70,
            150,
            alone=backend == "tensorrt",  # it chooses kernels by timing them
            needs=ready,
        )
        found, ready = [build], (build.name,)
    timed = {"batches": asked.batches, "budget": asked.budget}
    run = Phase(f"run {backend} {model}", "run", options | timed, 30, 90, needs=ready)
    ends = tuple(dict.fromkeys((asked.batches[0], asked.batches[-1])))
    profile = Phase(f"profile {backend} {model}", "profile", options | {"batches": ends}, 15, 45, needs=(run.name,))
    return [*found, run, profile]


def _reference(model: str, asked: PlanOptions) -> Phase:
    budget = asked.budget | {"warmup": 1, "least": 2, "most": 10}
    options = {"model": model, "batches": asked.batches, "budget": budget}
    return Phase(f"reference {model}", "reference", options, 25, 60, needs=("machine",))


def compiled_rows(batches: Sequence[int]) -> list[tuple[int, bool]]:
    """The rows of torch.compile, each a batch and whether it has dynamic shapes.

    The first batch, whose times are known best, comes last, with dynamic and with exact shapes.
    """
    first, *others = batches
    return [*((batch, True) for batch in others), (first, True), (first, False)]


def compiled(model: str, batch: int, dynamic: bool, budget: dict[str, float], needs: str = "export") -> Phase:
    """The phase of one row of torch.compile. Each row has its own process, so that stopping one loses no other.

    needs: the job that makes the proof.
    """
    options = {"model": model, "batch": batch, "dynamic": dynamic, "budget": budget}
    name = f"compiled {model} batch {batch} {'dynamic' if dynamic else 'exact'}"
    return Phase(name, "compiled", options, 70 if dynamic else 60, 100, needs=(f"{needs} {model}",))


def _growth(model: str, backend: str, asked: PlanOptions) -> Phase:
    options = {"model": model, "backend": backend, "generations": asked.generations}
    return Phase(f"growth {backend} {model}", "growth", options, 20, 60, needs=(f"run {backend} {model}",))


def _decoders(model: str, backend: str, asked: PlanOptions) -> Phase:
    options = {
        "model": model,
        "backend": backend,
        "batches": asked.batches,
        "max_batch": asked.max_batch,
        "budget": asked.budget | {"seconds": 1},
    }
    needs = (f"in-phases {model}", f"run {backend} {model}")
    return Phase(f"decoders {backend} {model}", "decoders", options, 20, 90, needs=needs)
