"""Measures FlexVAR on a machine with a GPU, in one command, with that machine's own Python.

    python3 benchmarks/gpu_check.py --out DIR

It needs torch, numpy, onnx, onnxscript, safetensors, pillow, typer and rich. Everything but the peers in torch also
needs cuda-core 1.0 or later with NVRTC. The backend cuda also needs nvmath-python 1.x and nvidia-cudnn-frontend 1.24.
The network is not needed, and none of our packages has to be installed.

- It tries our own kernels (the backend cuda), ONNX Runtime CUDA, TensorRT and TensorRT-RTX. The result gives the reason
  for those that do not run.
- It compares every graph and its tokens with the reference.
- It times d16, d20 and d24 (random weights, 256 px, 10 guided steps, decoder included) against the eager reference and
  torch.compile.

It measures as much as fits in nine minutes, the most important rows first. The peer torch-modules is measured only by
--stage first.

Every phase is a process with its own time limit. The result in DIR is a complete JSON file at any moment, whatever ends
the run. This is the plan in the order of importance, in seconds, for one backend that works:

    20  machine: what is installed, and the two rates that limit everything
    90  export of the tiny model, d16, d20 and d24 side by side; meanwhile every backend tries the tiny model, or says
        why it cannot
    20  the other form of d16's decoder
    12  our kernels: draws, tokens, time of sampling
    45  d16: parity, times, memory; where the time goes
    25       the eager reference, twice
   140       torch.compile with a CUDA graph, batches 8 and 64
    20       memory over 1,000 generations
    20       the decoder in phases and plain
    70  d20: parity, times, where the time goes; reference
    70  d24: the same
    532 of 540; TensorRT builds engines first, 70 for each model; torch.compile at batch 1 comes last, 130

A phase that does not fit is recorded as not measured, because no time was left. Fewer --depths or --backends leave more
time for the others. Limits grow with --minutes, and where a run has fewer phases. A bundle that the same sources made
in --work is used again. Phases of an earlier result in --out stay, unless the run does better.

On a GPU machine that you have for only 15 minutes, run two stages instead. They measure d16 on the backend cuda
first, and its peers after it. First, on your own machine:

    python3 benchmarks/gpu_check.py --pack PACK          makes the folder that travels beside the tracked files
    python3 benchmarks/gpu_check.py --rehearse --out DIR     runs both stages without a GPU, from a copy of the checkout

Then on the GPU machine, from the root of the checkout, with the packed folder beside it:

    python3 benchmarks/gpu_check.py --stage first --carried PACK --work /tmp/work --out DIR     does it work? 200 s
    python3 benchmarks/gpu_check.py --stage measure --carried PACK --work /tmp/work --out DIR   how fast is it? 330 s

Finally, on your own machine again, with the results of the GPU machine in DIR. It prints a table for docs/gpu.md, too:

    python3 benchmarks/gpu_check.py --merge benchmarks/results --out DIR
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import runpy
import signal
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .gpu.measurement import Clock, RunSetup
    from .gpu.plan import Phase, PlanOptions

RESULT = "gpu_check.json"  # of a stage: gpu_check_first.json, gpu_check_measure.json
NEEDED = {
    "torch": "torch",
    "numpy": "numpy",
    "onnx": "onnx",
    "onnxscript": "onnxscript",
    "safetensors": "safetensors",
    "PIL": "pillow",
    "typer": "typer",
    "rich": "rich",
}  # import name: name on the package index
ROOT = Path(__file__).resolve().parent.parent


def main(argv: Sequence[str] | None = None, *, package_path: Path | None = None) -> int:
    """Run the command. Returns its exit code.

    package_path: the folder in which child processes find our packages, if they are not installed.
    """
    started = time.monotonic()
    absent = [package for module, package in NEEDED.items() if importlib.util.find_spec(module) is None]
    if absent:
        names = " ".join(absent)
        print(f"gpu_check: Packages are missing. Install them: pip install {names}", file=sys.stderr)
        return 4
    from flexvar_runtime.errors import FlexVARError

    from .gpu.command_line import parse

    try:
        mode, arguments = parse(argv, __doc__ or "")
        if mode == "merge":
            return _merge(arguments)
        if mode == "pack":
            return _pack(arguments)
        if mode == "rehearse":
            from .gpu.rehearsal import rehearse

            return rehearse(ROOT, arguments.out)
        return (_stage if mode == "stage" else _plan)(arguments, started, package_path)
    except FlexVARError as error:
        print(f"gpu_check: {error}", file=sys.stderr)
        return error.exit_code


def _merge(arguments: argparse.Namespace) -> int:
    from .gpu.markdown_table import markdown_table
    from .gpu.result_file import merge, read

    found = sorted(arguments.out.glob(f"{Path(RESULT).stem}*.json"), key=lambda path: path.stat().st_mtime)
    merged = [merge(path, arguments.merge) for path in found or [arguments.out / RESULT]]
    for path in dict.fromkeys(merged):
        print(f"{path}\n\n{markdown_table(read(path)['rows'])}\n")
    return 0


def _pack(arguments: argparse.Namespace) -> int:
    from .gpu.measurement import work_folder
    from .gpu.pack import make_pack
    from .gpu.stages import StageSetup, rehearsal

    setup = rehearsal(arguments.pack) if arguments.tiny else StageSetup(arguments.pack)
    with work_folder(arguments.work, setup.precision) as work:
        size = make_pack(arguments.pack, setup, work, ROOT, arguments.cuobjdump)
    print(f"{arguments.pack}: {size}")
    return 0


def _stage(arguments: argparse.Namespace, started: float, package_path: Path | None) -> int:
    from .gpu import emulated, processes
    from .gpu.command_line import recorded_options
    from .gpu.measurement import Clock, work_folder
    from .gpu.pack import SITE, check_pack
    from .gpu.plan import select
    from .gpu.stages import SECONDS, StageSetup, rehearsal, stage_plan

    carried = arguments.carried.resolve()
    stage = rehearsal(carried) if arguments.tiny else StageSetup(carried)
    check_pack(carried, stage)
    plan = select(stage_plan(arguments.stage, stage), arguments.only)
    clock = Clock(started, SECONDS[arguments.stage])
    with work_folder(arguments.work, stage.precision) as work:
        folders = [folder for folder in (package_path, work / SITE) if folder is not None]
        options = recorded_options("stage", arguments)
        options |= {"model": stage.model, "backend": stage.backend, "peer": stage.peer, "precision": stage.precision}
        setup = _run_setup(arguments.out / stage_result(arguments.stage), work, folders, stage.model, options)
        command = emulated.COMMAND if stage.rehearsed else processes.CHILD
        return _run(plan, replace(setup, command=command), clock)


def _plan(arguments: argparse.Namespace, started: float, package_path: Path | None) -> int:
    from .gpu.command_line import PLAN, recorded_options
    from .gpu.measurement import Clock, work_folder
    from .gpu.plan import finished_before, phases, select, with_limits
    from .gpu.sources import source_hash

    asked = _plan_options(arguments)
    plan = select(phases(asked), arguments.only)
    clock = Clock(started, 60 * arguments.minutes)
    with work_folder(arguments.work, arguments.precision) as work:
        there = finished_before(plan, work, source_hash())
        longer = with_limits([phase for phase in plan if phase.name not in there], arguments.minutes)
        limits = {phase.name: phase for phase in longer}
        plan = [limits.get(phase.name, phase) for phase in plan]
        folders = [package_path] if package_path else []
        options = recorded_options(PLAN, arguments)
        return _run(plan, _run_setup(arguments.out / RESULT, work, folders, asked.models[0], options), clock)


def _run_setup(result: Path, work: Path, folders: Sequence[Path], model: str, options: Mapping[str, str]) -> RunSetup:
    from .gpu.measurement import RunSetup, environment
    from .gpu.sources import source_hash

    return RunSetup(result, work, environment(work, folders), model, options, source_hash())


def _run(plan: Sequence[Phase], setup: RunSetup, clock: Clock) -> int:
    from .gpu.files import ModelFiles
    from .gpu.measurement import measure
    from .gpu.plan import finished_before, makers

    setup.result.parent.mkdir(parents=True, exist_ok=True)
    signal.signal(
        signal.SIGTERM, lambda *_: sys.exit(143)
    )  # so that running phases are ended and their results are written
    for phase in makers(plan):  # here, because the message would not be shown from a phase
        ModelFiles.of(setup.work, phase.options["model"]).keep_only(setup.source_sha256)
    measure(plan, setup, clock, finished_before(plan, setup.work, setup.source_sha256))
    return 0


def stage_result(stage: str) -> str:
    return f"gpu_check_{stage}.json"


def _plan_options(arguments: argparse.Namespace) -> PlanOptions:
    """What the command line asks for. Raises InvalidInput for an unknown backend."""
    from flexvar_runtime.backends import check_name

    from .gpu.plan import BATCHES, GENERATIONS, PlanOptions

    tiny = arguments.tiny
    for backend in arguments.backends:
        check_name(backend)
    return PlanOptions(
        depths=arguments.depths,
        batches=arguments.batches or ((1, 2) if tiny else BATCHES),
        backends=arguments.backends,
        tiny=tiny,
        precision=arguments.precision,
        generations=arguments.generations or (20 if tiny else GENERATIONS),
    )


def run_from_checkout() -> int:
    """Run this file as a script, where our packages are not installed or have another version."""
    sources = runpy.run_path(str(ROOT / "benchmarks" / "gpu" / "sources.py"))
    sys.path[:] = [path for path in sys.path if Path(path or ".").resolve() != ROOT / "benchmarks"]
    with tempfile.TemporaryDirectory(prefix="gpu-check-packages-") as folder:
        sources["link_packages"](ROOT, Path(folder))
        sys.path.insert(0, folder)
        package = next(name for name, source in sources["PACKAGES"].items() if source == "benchmarks")
        again = importlib.import_module(f"{package}.{Path(__file__).stem}")  # this file, with its package around it
        return int(again.main(package_path=Path(folder)))


if __name__ == "__main__":
    sys.exit(main() if __package__ else run_from_checkout())
