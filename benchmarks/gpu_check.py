"""Everything a machine with a GPU can tell, in one command of at most nine minutes, under that machine's own Python:

    python3 benchmarks/gpu_check.py --out "$OUT"

needs torch, numpy, onnx, onnxscript, safetensors, pillow, typer and rich there, and for everything but the peers in
torch cuda-core 1.0 or later with NVRTC; no network, and nothing of ours installed. It says which of TensorRT,
TensorRT-RTX and ONNX Runtime CUDA runs, and why the others do not; holds every graph and its tokens against the
reference; and times d16, d20 and d24 with random weights at 256 px in 10 guided steps, decoder included, against the
eager reference and torch.compile.

Every phase is a process with a limit of its own; DIR/gpu_check.json is complete, up to there, after each of them. The
plan, in the order of importance, in seconds, for one backend that works:

    20  machine: what is installed, and the two rates that limit everything
    90  export of the tiny model, d16, d20 and d24 side by side; meanwhile every backend tries the tiny model, or says
        why it cannot
    12  our kernels: draws, tokens, time of sampling
    45  d16: parity, times, memory; where the time goes
    25       the eager reference, twice
    80       torch.compile with a CUDA graph
    20       memory over 1,000 generations
    20       the decoder in phases and plain
    70  d20: parity, times, where the time goes; reference
    70  d24: the same
    452 of 540; TensorRT builds engines first, 70 for each model

What does not fit says that no time was left: fewer --depths, or one of the --backends, leaves more of it. Limits grow
with --minutes, and where less is asked for.

    python3 benchmarks/gpu_check.py --merge benchmarks/results --out DIR    puts a run that is over among the results
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .gpu.plan import Phase, Request

PACKAGES = {
    "flexvar_ref": "flexvar_ref",
    "flexvar_runtime": "runtime",
    "flexvar_export": "export",
    "flexvar_bench": "benchmarks",
}
RESULT = "gpu_check.json"
NEEDED = {
    "torch": "torch",
    "numpy": "numpy",
    "onnx": "onnx",
    "onnxscript": "onnxscript",
    "safetensors": "safetensors",
    "PIL": "pillow",
    "typer": "typer",
    "rich": "rich",
}  # as they are imported and as they are installed
CUDA_PROBE = """
import cuda.core
from cuda.bindings import nvrtc
nvrtc.nvrtcVersion()
print(cuda.core.__version__)
"""
RESERVE_SECONDS = 6.0  # for the last process to end and the table to be printed


def main(argv: Sequence[str] | None = None, *, package_path: Path | None = None) -> int:
    """package_path: folder that children find our packages in, where they are not installed."""
    started = time.monotonic()
    absent = [package for module, package in NEEDED.items() if importlib.util.find_spec(module) is None]
    if absent:
        names = " ".join(absent)
        print(f"gpu_check: no {names} here: nothing can be measured; fix: pip install {names}", file=sys.stderr)
        return 4
    arguments = _parse(argv)
    from .gpu.plan import phases, with_limits
    from .gpu.report import merge

    if arguments.merge is not None:
        print(merge(arguments.out / RESULT, arguments.merge))
        return 0
    try:
        request = _request(arguments)
        plan = with_limits(select(phases(request), arguments.only), arguments.minutes)
    except ValueError as error:
        print(f"gpu_check: {error}", file=sys.stderr)
        return 2
    arguments.out.mkdir(parents=True, exist_ok=True)
    deadline = started + 60 * arguments.minutes - RESERVE_SECONDS
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what runs is ended and what is known is written
    with _work(arguments.work, arguments.precision) as work:
        return _measure(arguments, request, plan, work, deadline, started, package_path)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    from .gpu.plan import BATCHES, GENERATIONS, GPU_BACKENDS, MODELS

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help=f"folder for {RESULT}")
    parser.add_argument("--depths", type=_numbers, default=MODELS, help="comma-separated; the first is measured first")
    parser.add_argument("--batches", type=_numbers, default=None, help=f"comma-separated, by default {BATCHES}")
    parser.add_argument("--backends", type=lambda text: tuple(text.split(",")), default=GPU_BACKENDS)
    parser.add_argument("--precision", choices=("fp16", "bf16"), default="fp16", help="of the exported graphs")
    parser.add_argument("--minutes", type=float, default=9.0, help="for everything")
    parser.add_argument("--generations", type=int, default=None, help=f"watched for growth, by default {GENERATIONS}")
    parser.add_argument("--only", nargs="+", metavar="PHASE", help="phases or kinds of phases, with all they need")
    parser.add_argument(
        "--tiny", action="store_true", help="the tiny model only; on a machine without a GPU, a rehearsal"
    )
    parser.add_argument(
        "--work", type=Path, help="folder for bundles and engines, kept and used again; by default a temporary one"
    )
    parser.add_argument("--merge", type=Path, metavar="DIR", help=f"measure nothing: put {RESULT} of --out into DIR")
    return parser.parse_args(argv)


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def _measure(
    arguments: argparse.Namespace,
    request: Request,
    plan: Sequence[Phase],
    work: Path,
    deadline: float,
    started: float,
    package_path: Path | None,
) -> int:
    from rich.console import Console

    from flexvar_runtime import __version__

    from .gpu.report import document, headline, show, write
    from .gpu.runner import Record, Runner

    console = Console(width=None if sys.stdout.isatty() else 140)
    options = {key: str(value) for key, value in vars(arguments).items() if key not in ("out", "work", "merge")}
    missing = without_cuda()
    if missing:
        print(
            f"gpu_check: {missing}: our kernels and backends on a GPU will not be measured, only the peers in torch; "
            "fix: pip install 'cuda-python>=13' 'nvidia-cuda-nvrtc>=13'",
            file=sys.stderr,
            flush=True,
        )
    facts: dict[str, Any] = {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "options": options,
        "version": __version__,
        "source_sha256": source_hash(),
        "model": request.models[0],
        "missing": missing,
    }
    seen: dict[str, str] = {}

    def result(records: dict[str, Record]) -> dict[str, Any]:
        minutes = round((time.monotonic() - started) / 60, 2)
        as_json = {name: record.to_json() for name, record in records.items()}
        return document(facts | {"minutes_taken": minutes}, as_json, request.models[0])

    def report(records: dict[str, Record]) -> None:
        write(arguments.out / RESULT, result(records))
        for name, record in records.items():
            if record.seconds is not None and name not in seen:
                seen[name] = record.status
                print(
                    f"{time.monotonic() - started:6.1f} s  {name}: {record.status}, {record.seconds:.1f} s", flush=True
                )

    records = Runner(plan, work, deadline, _environment(work, package_path), report).run()
    final = result(records)
    write(arguments.out / RESULT, final)
    show(final, console)
    print(json.dumps(headline(final)), flush=True)
    return 0


def without_cuda() -> str | None:
    """Why our kernels cannot run for want of cuda.core or NVRTC; None where both are there. Loaded in a process of its
    own: a broken library may end it."""
    from flexvar_runtime.cuda.gpu import MINIMUM

    try:
        done = subprocess.run([sys.executable, "-c", CUDA_PROBE], capture_output=True, text=True, timeout=20)
    except subprocess.TimeoutExpired:
        return "cuda.core or NVRTC does not load within 20 s"
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        return f"no cuda.core with NVRTC ({reason:.200})"
    version = done.stdout.strip()
    old = tuple(int(part) for part in re.findall("[0-9]+", version)[:2]) < MINIMUM
    return f"cuda.core {version}, older than {'.'.join(map(str, MINIMUM))}" if old else None


def _request(arguments: argparse.Namespace) -> Request:
    """Raises InvalidInput for a backend that nobody knows."""
    from flexvar_runtime.backends import check_name

    from .gpu.plan import BATCHES, GENERATIONS, Request

    tiny = arguments.tiny
    for backend in arguments.backends:
        check_name(backend)
    return Request(
        depths=arguments.depths,
        batches=arguments.batches or ((1, 2) if tiny else BATCHES),
        backends=arguments.backends,
        tiny=tiny,
        precision=arguments.precision,
        generations=arguments.generations or (20 if tiny else GENERATIONS),
    )


def select(plan: Sequence[Phase], only: Sequence[str] | None) -> list[Phase]:
    """Phases of these names or jobs, and all that they need. Raises ValueError for a name that is neither."""
    if not only:
        return list(plan)
    known = {phase.name for phase in plan} | {phase.job for phase in plan}
    strange = sorted(set(only) - known)
    if strange:
        raise ValueError(f"got phase {strange[0]!r}; expected one of {', '.join(sorted(known))}; fix: name one of them")
    wanted = {phase.name for phase in plan if {phase.name, phase.job} & {*only, "machine"}}
    for phase in reversed(plan):  # what is needed comes before
        if phase.name in wanted:
            wanted |= set(phase.needs)
    return [phase for phase in plan if phase.name in wanted]


def source_hash() -> str:
    """One hash of all our source files: what was measured."""
    digest, root = hashlib.sha256(), Path(__file__).resolve().parent.parent
    for folder in sorted(PACKAGES.values()):
        for path in sorted((root / folder).rglob("*")):
            if path.suffix in (".py", ".cu"):
                digest.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()


def _environment(work: Path, package_path: Path | None) -> dict[str, str]:
    """Of the phases: our packages first, and receipts and caches of their own, so that nobody else's are touched."""
    path = [str(package_path)] if package_path else []
    path += [part for part in os.environ.get("PYTHONPATH", "").split(os.pathsep) if part]
    folders = {
        "XDG_STATE_HOME": "state",
        "XDG_CACHE_HOME": "cache",
        "TORCHINDUCTOR_CACHE_DIR": "inductor",
        "TRITON_CACHE_DIR": "triton",
    }
    own = {name: str(work / folder) for name, folder in folders.items()}
    return {**os.environ, **own, "PYTHONPATH": os.pathsep.join(path)}


@contextmanager
def _work(folder: Path | None, precision: str) -> Iterator[Path]:
    """A folder that is kept has one inside for each precision."""
    if folder is not None:
        (folder / precision).mkdir(parents=True, exist_ok=True)
        yield (folder / precision).resolve()
        return
    temporary = Path(tempfile.mkdtemp(prefix="gpu-check-"))
    try:
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def link_packages(root: Path, folder: Path) -> None:
    """Our folders under the names they are imported by."""
    for name, source in PACKAGES.items():
        (folder / name).symlink_to(root / source, target_is_directory=True)


def run_from_checkout() -> int:
    """Run as a script, with nothing of ours installed, or another version of it."""
    root = Path(__file__).resolve().parent.parent
    sys.path[:] = [path for path in sys.path if Path(path or ".").resolve() != root / "benchmarks"]
    with tempfile.TemporaryDirectory(prefix="gpu-check-packages-") as folder:
        link_packages(root, Path(folder))
        sys.path.insert(0, folder)
        package = next(name for name, source in PACKAGES.items() if root / source == Path(__file__).resolve().parent)
        again = importlib.import_module(f"{package}.{Path(__file__).stem}")  # this file, with its package around it
        return int(again.main(package_path=Path(folder)))


if __name__ == "__main__":
    sys.exit(main() if __package__ else run_from_checkout())
