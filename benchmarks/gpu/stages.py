"""The two stages for a GPU machine that is lent by the quarter of an hour, with a limit for each step.

`first` asks whether everything works, `measure` how fast it is. What a stage needs lies in a packed folder; what the
first has made, the second uses again where the machine is still the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from .plan import TINY, Phase, compiled

FIRST, MEASURE = "first", "measure"
SECONDS = {FIRST: 200.0, MEASURE: 330.0}  # for everything, the end included
MAIN, BACKEND, PRECISION = "d16", "ort-cuda", "fp16"
BATCHES = (1, 8, 64)
COMPILED_ROWS = ((8, False), (64, False))  # not known yet; more rows do not fit
GENERATIONS = 300  # watched for growth


@dataclass(frozen=True)
class Target:
    """What a stage runs: a model on a backend, from a packed folder. A rehearsal has the tiny model in place of d16,
    and a backend that works without a GPU."""

    carried: Path
    model: str = MAIN
    backend: str = BACKEND
    precision: str = PRECISION

    @property
    def rehearsed(self) -> bool:
        return self.model == TINY

    @property
    def batches(self) -> tuple[int, ...]:
        return (1, 2) if self.rehearsed else BATCHES

    @property
    def budget(self) -> dict[str, float]:
        """Of one row of times."""
        return {"warmup": 1, "least": 2, "most": 3, "seconds": 0.2} if self.rehearsed else {"seconds": 2.5}

    @property
    def carried_bundles(self) -> tuple[str, ...]:
        """Models whose bundle and proof travel whole. In a rehearsal the tiny one is regenerated."""
        return () if self.rehearsed else (TINY,)


def rehearsal(carried: Path) -> Target:
    """On CPUs in float32, as `pack` packs it for a rehearsal."""
    return Target(carried, TINY, "ort-cpu", "fp32")


def stage_plan(stage: str, target: Target) -> list[Phase]:
    """In the order in which they are wanted."""
    return _first(target) if stage == FIRST else _measure(target)


def _first(target: Target) -> list[Phase]:
    """Steps that only compare run beside one another and beside the weights of d16, which processors make."""
    small = f"regenerate {TINY}" if target.rehearsed else "unpack"
    found = _made(target)
    found.append(Phase("sanitize", "sanitize", {}, 20, 45, alone=False))
    found.append(_tiny(target.backend, small))
    if target.rehearsed:  # it is refused here, with the reason
        found.append(_tiny(BACKEND, small))
    else:
        found.append(_proof(TINY, (1, 2), target, 20, 50, alone=False, needs=small))
    few = target.batches[:2]
    kernels = target.batches[:1] if target.rehearsed else target.batches  # emulated, they take seconds an image
    return [
        *found,
        Phase("kernels", "kernels", {"model": target.model, "batches": kernels}, 12, 30),
        _proof(target.model, target.batches, target, 50, 75, alone=True, needs=f"regenerate {target.model}"),
        _on_backend("run", target, 45, 75, batches=few, budget=target.budget),
    ]


def _measure(target: Target) -> list[Phase]:
    run = _on_backend("run", target, 40, 80, batches=target.batches, budget=target.budget)
    of_model = {"model": target.model, "batches": target.batches}
    eager = target.budget | {"warmup": 1, "least": 2, "most": 10}
    rows = [compiled(target.model, *row, target.budget, "regenerate") for row in COMPILED_ROWS]
    return [
        *_made(target),
        run,
        _on_backend("profile", target, 15, 40, needs=(run.name,), batches=(target.batches[0], target.batches[-1])),
        Phase(f"reference {target.model}", "reference", of_model | {"budget": eager}, 25, 55, needs=("machine",)),
        _on_backend("growth", target, 20, 50, needs=(run.name,), generations=20 if target.rehearsed else GENERATIONS),
        *rows,
    ]


def _made(target: Target) -> list[Phase]:
    """The machine's facts, then what is made of the packed folder."""
    carried = str(target.carried)
    regenerate = {"model": target.model, "carried": carried}
    unpack = {"carried": carried, "bundles": target.carried_bundles}
    return [
        Phase("machine", "machine", {"tiny": target.rehearsed}, 6, 20),
        Phase("unpack", "unpack", unpack, 10, 40, alone=False),
        Phase(f"regenerate {target.model}", "regenerate", regenerate, 35, 90, alone=False),
    ]


def _tiny(backend: str, needs: str) -> Phase:
    return Phase(f"tiny {backend}", "tiny", {"backend": backend}, 20, 60, alone=False, needs=(needs,))


def _proof(
    model: str, batches: tuple[int, ...], target: Target, seconds: float, limit: float, *, alone: bool, needs: str
) -> Phase:
    """The export's torch modules behind the runtime's device path, captured as one CUDA graph."""
    generations = 20 if target.rehearsed else 200
    options = {"model": model, "batches": batches, "generations": generations, "budget": target.budget}
    return Phase(f"proof {model}", "proof", options, seconds, limit, alone=alone, needs=(needs,))


def _on_backend(
    job: str, target: Target, seconds: float, limit: float, needs: tuple[str, ...] = (), **options: object
) -> Phase:
    name = f"{job} {target.backend} {target.model}"
    needs = needs or ("unpack", f"regenerate {target.model}")
    options = {"model": target.model, "backend": target.backend, **options}
    return Phase(name, job, options, seconds, limit, needs=needs)
