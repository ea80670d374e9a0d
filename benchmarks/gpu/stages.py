"""The two stages for a GPU machine that is available for only 15 minutes, with a limit for each step.

The stage `first` shows whether everything works. The stage `measure` shows how fast it is. Both measure the backend
`cuda` first, and its peers after it. A packed folder holds what the stages need. The second stage uses again what the
first has made, if the machine is still the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from .files import carried_folder
from .plan import TINY, Phase, compiled

FIRST, MEASURE = "first", "measure"
SECONDS = {FIRST: 200.0, MEASURE: 330.0}  # limit of a whole stage
MAIN, BACKEND, PEER, PRECISION = "d16", "cuda", "ort-cuda", "fp16"
CARRIED = ("fp16", "bf16")  # precisions of the tiny bundles that travel whole
BATCHES = (1, 8, 64)
COMPILED_ROWS = ((8, False), (64, False))  # exact shapes; those with dynamic shapes are in committed results
GENERATIONS = 300  # of the memory-growth test


@dataclass(frozen=True)
class StageSetup:
    """The model, the backends and the packed folder of a stage. peer: the backend of ours that is measured beside it.

    A rehearsal uses the tiny model in place of d16, and a peer that works without a GPU.
    """

    carried: Path
    model: str = MAIN
    backend: str = BACKEND
    peer: str = PEER
    precision: str = PRECISION

    @property
    def rehearsed(self) -> bool:
        return self.model == TINY

    @property
    def batches(self) -> tuple[int, ...]:
        return (1, 2) if self.rehearsed else BATCHES

    def few(self, most: int) -> tuple[int, ...]:
        """The first batches. In a rehearsal only one, because an emulated generation takes seconds."""
        return self.batches[: 1 if self.rehearsed else most]

    @property
    def budget(self) -> dict[str, float]:
        """The time budget of one row of times, as keywords of `timing.Budget`."""
        return {"warmup": 1, "least": 2, "most": 3, "seconds": 0.2} if self.rehearsed else {"seconds": 2.5}

    @property
    def carried_bundles(self) -> tuple[str, ...]:
        """Precisions of the tiny model whose bundle travels whole. In a rehearsal the tiny model is regenerated."""
        return () if self.rehearsed else CARRIED


def rehearsal(carried: Path) -> StageSetup:
    """The setup of a rehearsal: the tiny model in float16, on the emulated device and on the CPU."""
    return StageSetup(carried, TINY, peer="ort-cpu")


def stage_plan(stage: str, setup: StageSetup) -> list[Phase]:
    """The phases of a stage, in the order of importance."""
    return _first(setup) if stage == FIRST else _measure(setup)


def _first(setup: StageSetup) -> list[Phase]:
    """The phases of `first`. Those that only compare run side by side, while the CPU makes the weights of d16."""
    found = _made(setup)
    found.append(Phase("sanitize", "sanitize", {"small": setup.rehearsed}, 25, 60, alone=False))
    for precision in setup.carried_bundles or (setup.precision,):
        found.append(_tiny(BACKEND, setup, precision))
    found.append(_tiny(PEER, setup, setup.precision))  # in a rehearsal it must fail, because there is no GPU
    of_kernels = {"model": setup.model, "batches": setup.few(3), "quick": setup.rehearsed}
    return [
        *found,
        _on_backend("run", setup, 40, 75, batches=setup.few(2), budget=setup.budget),
        Phase("kernels", "kernels", of_kernels, 15, 30),
        _proof(setup),
    ]


def _measure(setup: StageSetup) -> list[Phase]:
    run, peer = (
        _on_backend("run", setup, seconds, limit, backend, batches=setup.batches, budget=setup.budget)
        for backend, seconds, limit in ((setup.backend, 40, 80), (setup.peer, 35, 70))
    )
    eager = setup.budget | {"warmup": 1, "least": 2, "most": 10}
    of_model = {"model": setup.model, "batches": setup.batches, "budget": eager}
    rows = [compiled(setup.model, *row, setup.budget, "regenerate") for row in COMPILED_ROWS]
    return [
        *_made(setup),
        run,
        _on_backend("profile", setup, 20, 45, needs=(run.name,), batches=setup.few(3)),
        _on_backend("growth", setup, 15, 50, needs=(run.name,), generations=5 if setup.rehearsed else GENERATIONS),
        peer,
        Phase(f"reference {setup.model}", "reference", of_model, 30, 55, needs=("machine",)),
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


def _tiny(backend: str, setup: StageSetup, precision: str) -> Phase:
    """The phase that checks a backend on the tiny model, which was carried or, in a rehearsal, regenerated."""
    folder = carried_folder(precision) if precision in setup.carried_bundles else ""
    needs = "unpack" if folder else f"regenerate {TINY}"
    options = {"backend": backend, "folder": folder}
    return Phase(f"tiny {backend} {precision}", "tiny", options, 20, 60, alone=False, needs=(needs,))


def _proof(setup: StageSetup) -> Phase:
    """The phase that runs the export's torch modules on the runtime's device path, captured as one CUDA graph."""
    generations, seeds = (5, (0,)) if setup.rehearsed else (200, (0, 1, 2))
    options = {"model": setup.model, "batches": setup.few(3), "generations": generations, "seeds": seeds}
    options |= {"budget": setup.budget}
    return Phase(f"proof {setup.model}", "proof", options, 50, 75, needs=(f"regenerate {setup.model}",))


def _on_backend(
    job: str,
    setup: StageSetup,
    seconds: float,
    limit: float,
    backend: str | None = None,
    needs: tuple[str, ...] = (),
    **options: object,
) -> Phase:
    """A phase of the model on a backend. backend: that of the setup if None."""
    backend = backend or setup.backend
    needs = needs or ("unpack", f"regenerate {setup.model}")
    options = {"model": setup.model, "backend": backend, **options}
    return Phase(f"{job} {backend} {setup.model}", job, options, seconds, limit, needs=needs)
