"""The two stages for a GPU machine that is lent for a quarter of an hour, with a limit for each step.

The stage `first` shows whether everything works. The stage `measure` shows how fast it is. A packed folder holds what
the stages need. The second stage uses again what the first has made, if the machine is still the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from .plan import TINY, Phase, compiled

FIRST, MEASURE = "first", "measure"
SECONDS = {FIRST: 200.0, MEASURE: 330.0}  # limit of a whole stage
MAIN, BACKEND, PRECISION = "d16", "ort-cuda", "fp16"
BATCHES = (1, 8, 64)
COMPILED_ROWS = ((8, False), (64, False))  # exact shapes; those with dynamic shapes are in committed results
GENERATIONS = 300  # of the memory-growth test


@dataclass(frozen=True)
class StageSetup:
    """The model, the backend and the packed folder of a stage.

    A rehearsal uses the tiny model in place of d16, and a backend that works without a GPU.
    """

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
        """The time budget of one row of times, as keywords of `timing.Budget`."""
        return {"warmup": 1, "least": 2, "most": 3, "seconds": 0.2} if self.rehearsed else {"seconds": 2.5}

    @property
    def carried_bundles(self) -> tuple[str, ...]:
        """The models whose bundle and proof travel whole. In a rehearsal the tiny model is regenerated."""
        return () if self.rehearsed else (TINY,)


def rehearsal(carried: Path) -> StageSetup:
    """The setup of a rehearsal: the tiny model in float32 on the CPU."""
    return StageSetup(carried, TINY, "ort-cpu", "fp32")


def stage_plan(stage: str, setup: StageSetup) -> list[Phase]:
    """The phases of a stage, in the order of importance."""
    return _first(setup) if stage == FIRST else _measure(setup)


def _first(setup: StageSetup) -> list[Phase]:
    """The phases of `first`. Those that only compare run side by side, while the CPU makes the weights of d16."""
    small = f"regenerate {TINY}" if setup.rehearsed else "unpack"
    found = _made(setup)
    found.append(Phase("sanitize", "sanitize", {}, 20, 45, alone=False))
    found.append(_tiny(setup.backend, small))
    if setup.rehearsed:  # it must fail, because there is no GPU
        found.append(_tiny(BACKEND, small))
    else:
        found.append(_proof(TINY, (1, 2), setup, 20, 50, alone=False, needs=small))
    few = setup.batches[:2]
    kernels = setup.batches[:1] if setup.rehearsed else setup.batches  # emulated, they take seconds an image
    return [
        *found,
        Phase("kernels", "kernels", {"model": setup.model, "batches": kernels}, 12, 30),
        _proof(setup.model, setup.batches, setup, 50, 75, alone=True, needs=f"regenerate {setup.model}"),
        _on_backend("run", setup, 45, 75, batches=few, budget=setup.budget),
    ]


def _measure(setup: StageSetup) -> list[Phase]:
    run = _on_backend("run", setup, 40, 80, batches=setup.batches, budget=setup.budget)
    of_model = {"model": setup.model, "batches": setup.batches}
    eager = setup.budget | {"warmup": 1, "least": 2, "most": 10}
    rows = [compiled(setup.model, *row, setup.budget, "regenerate") for row in COMPILED_ROWS]
    return [
        *_made(setup),
        run,
        _on_backend("profile", setup, 15, 40, needs=(run.name,), batches=(setup.batches[0], setup.batches[-1])),
        Phase(f"reference {setup.model}", "reference", of_model | {"budget": eager}, 25, 55, needs=("machine",)),
        _on_backend("growth", setup, 20, 50, needs=(run.name,), generations=20 if setup.rehearsed else GENERATIONS),
        *rows,
    ]


def _made(setup: StageSetup) -> list[Phase]:
    """The phases that record facts of the machine, unpack the folder and make the model."""
    carried = str(setup.carried)
    regenerate = {"model": setup.model, "carried": carried}
    unpack = {"carried": carried, "bundles": setup.carried_bundles}
    return [
        Phase("machine", "machine", {"tiny": setup.rehearsed}, 6, 20),
        Phase("unpack", "unpack", unpack, 10, 40, alone=False),
        Phase(f"regenerate {setup.model}", "regenerate", regenerate, 35, 90, alone=False),
    ]


def _tiny(backend: str, needs: str) -> Phase:
    return Phase(f"tiny {backend}", "tiny", {"backend": backend}, 20, 60, alone=False, needs=(needs,))


def _proof(
    model: str, batches: tuple[int, ...], setup: StageSetup, seconds: float, limit: float, *, alone: bool, needs: str
) -> Phase:
    """The phase that runs the export's torch modules on the runtime's device path, captured as one CUDA graph."""
    generations = 20 if setup.rehearsed else 200
    options = {"model": model, "batches": batches, "generations": generations, "budget": setup.budget}
    return Phase(f"proof {model}", "proof", options, seconds, limit, alone=alone, needs=(needs,))


def _on_backend(
    job: str, setup: StageSetup, seconds: float, limit: float, needs: tuple[str, ...] = (), **options: object
) -> Phase:
    name = f"{job} {setup.backend} {setup.model}"
    needs = needs or ("unpack", f"regenerate {setup.model}")
    options = {"model": setup.model, "backend": setup.backend, **options}
    return Phase(name, job, options, seconds, limit, needs=needs)
