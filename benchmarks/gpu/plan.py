"""What a run measures, in the order of importance, and what each part needs and may take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from flexvar_runtime.backends import TENSORRT_BACKENDS

TINY = "tiny"  # the name of the tiny model
GPU_BACKENDS = ("tensorrt", "tensorrt-rtx", "ort-cuda")
CPU_BACKEND = "ort-cpu"
MODELS = (16, 20, 24)
BATCHES = (1, 8, 64)
GENERATIONS = 1000  # looked at for growth of memory
MINUTES = 9.0  # that the limits below are made for


@dataclass(frozen=True)
class Phase:
    """One process. name: its key in the result. job: what `child` runs, with `options`.

    seconds: what it should take; limit: when it is stopped. alone: nothing may run beside it, since it takes times.
    needs: names of phases that must have gone well before.
    """

    name: str
    job: str
    options: dict[str, Any] = field(default_factory=dict)
    seconds: float = 30
    limit: float = 90
    alone: bool = True
    needs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Request:
    """What was asked for on the command line."""

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
        """Of engines: the proof takes two."""
        return max(*self.batches, 2)

    @property
    def budget(self) -> dict[str, float]:
        """Of one row of times."""
        return {"warmup": 1, "least": 2, "most": 3, "seconds": 0.2} if self.tiny else {"seconds": 2.5}


def phases(request: Request) -> list[Phase]:
    """In the order of importance; names are unique."""
    main, others = request.models[0], request.models[1:]
    small = () if request.tiny else (TINY,)
    found = [Phase("machine", "machine", {"tiny": request.tiny}, 20, 60)]
    exported: tuple[str, ...] = (*small, *request.models)
    found += [_export(model, request, share=len(exported)) for model in exported]
    found += [_tiny(backend) for backend in request.backends]
    found.append(Phase(f"plain {main}", "plain", {"model": main}, 20, 60, alone=False, needs=(f"export {main}",)))
    found.append(Phase("kernels", "kernels", {"model": main, "batches": request.batches}, 12, 40))
    for backend in request.backends:
        found += _measure(main, backend, request)
    found += [_reference(main, request), _compiled(main, request)]
    found += [_growth(main, backend, request) for backend in request.backends]
    found += [_decoders(main, backend, request) for backend in request.backends]
    for model in others:
        for backend in request.backends:
            found += _measure(model, backend, request)
        found.append(_reference(model, request))
    return found


def planned_seconds(plan: Sequence[Phase]) -> float:
    """What all should take: exports run side by side, and the tiny model and the plain decoder beside them."""
    beside = [phase.seconds for phase in plan if phase.job == "export"]
    return max(beside, default=0) + sum(p.seconds for p in plan if p.job not in ("export", "tiny", "plain"))


def with_limits(plan: Sequence[Phase], minutes: float) -> list[Phase]:
    """The same with longer limits where there is more time than usual, or than the phases should take."""
    factor = max(1.0, minutes / MINUTES, 60 * minutes / max(planned_seconds(plan), 1))
    return [replace(phase, limit=factor * phase.limit) for phase in plan]


def _export(model: str, request: Request, share: int) -> Phase:
    options = {"model": model, "precision": request.precision, "processes": share}
    small = model == TINY
    return Phase(f"export {model}", "export", options, 20 if small else 90, 60 if small else 200, alone=False)


def _tiny(backend: str) -> Phase:
    options = {"backend": backend}
    return Phase(f"tiny {backend}", "tiny", options, 15, 75, alone=False, needs=(f"export {TINY}",))


def _measure(model: str, backend: str, request: Request) -> list[Phase]:
    """Engines where the backend runs engines; parity and times; kernels."""
    options, found = {"model": model, "backend": backend}, list[Phase]()
    ready: tuple[str, ...] = (f"export {model}", f"tiny {backend}")
    if backend in TENSORRT_BACKENDS:
        build = Phase(
            f"build {backend} {model}",
            "build",
            options | {"max_batch": request.max_batch},
            70,
            150,
            alone=backend == "tensorrt",  # it chooses kernels by timing them
            needs=ready,
        )
        found, ready = [build], (build.name,)
    timed = {"batches": request.batches, "budget": request.budget}
    run = Phase(f"run {backend} {model}", "run", options | timed, 30, 90, needs=ready)
    ends = tuple(dict.fromkeys((request.batches[0], request.batches[-1])))
    profile = Phase(f"profile {backend} {model}", "profile", options | {"batches": ends}, 15, 45, needs=(run.name,))
    return [*found, run, profile]


def _reference(model: str, request: Request) -> Phase:
    budget = request.budget | {"warmup": 1, "least": 2, "most": 10}
    options = {"model": model, "batches": request.batches, "budget": budget}
    return Phase(f"reference {model}", "reference", options, 25, 60, needs=("machine",))


def _compiled(model: str, request: Request) -> Phase:
    options = {
        "model": model,
        "batches": request.batches,
        "static_batches": request.batches[:1],
        "budget": request.budget,
    }
    return Phase(f"compiled {model}", "compiled", options, 80, 150, needs=(f"export {model}",))


def _growth(model: str, backend: str, request: Request) -> Phase:
    options = {"model": model, "backend": backend, "generations": request.generations}
    return Phase(f"growth {backend} {model}", "growth", options, 20, 60, needs=(f"run {backend} {model}",))


def _decoders(model: str, backend: str, request: Request) -> Phase:
    options = {
        "model": model,
        "backend": backend,
        "batches": request.batches,
        "max_batch": request.max_batch,
        "budget": request.budget | {"seconds": 1},
    }
    needs = (f"plain {model}", f"run {backend} {model}")
    return Phase(f"decoders {backend} {model}", "decoders", options, 20, 90, needs=needs)
