"""Compares the runtime on a CPU with the eager reference: whole images, decoder included, in alternating calls.

    python -m flexvar_bench.against_reference --depth 16 --repeats 7 --work DIR

Each side runs in its own process, so that its peak of memory is known. Only one of them computes at a time. Weights are
random, because time depends on sizes only. It prints a table, and writes JSON with --json FILE.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import multiprocessing as mp
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from flexvar_runtime import Bundle, ScaleSchedule
from flexvar_runtime.bundle.manifest import PLAIN, Manifest
from flexvar_runtime.files.atomic import atomic_write

from .limits import PHASE_SAVING, decoder_flops, measured_flops_per_second, transformer_flops

SCHEDULE = "1_2_3_4_5_6_8_10_13_16"
console = Console()


@dataclass(frozen=True)
class Sample:
    """Seconds of one image, decoder included, and of its parts. The reference computes its condition in every step."""

    total: float
    condition: float | None = None
    steps: float | None = None
    sampling: float | None = None
    decode: float | None = None


def checkpoints(work: Path, depth: int) -> tuple[Path, Path]:
    """The paths of transformer and tokenizer with random weights of a published size. They are written once."""
    from flexvar_ref.config import TokenizerConfig, TransformerConfig
    from flexvar_ref.synthetic import write_checkpoints

    directory = work / f"d{depth}"
    paths = directory / "transformer.pth", directory / "vae.pth"
    if not all(path.exists() for path in paths):
        write_checkpoints(directory, TransformerConfig.published(depth), TokenizerConfig())
    return paths


def exported(work: Path, depth: int, paths: tuple[Path, Path]) -> Path:
    """The bundle of a checkpoint. It is exported once."""
    from flexvar_export.bundle import export_bundle

    bundle = work / f"d{depth}.bundle"
    if not bundle.exists():
        export_bundle(*paths, bundle, progress=lambda step: console.print(f"export: {step}", highlight=False))
    return bundle


def unavoidable_flops(manifest: Manifest, schedule: ScaleSchedule) -> float:
    """The least operations of one guided image, with the decoder of the bundle."""
    saving = 0.0 if manifest.decoder == PLAIN else PHASE_SAVING
    return transformer_flops(manifest.model, schedule, guided=True) + decoder_flops(schedule) * (1 - saving)


def serve_reference(pipe: Connection, transformer: Path, vae: Path, threads: int) -> None:
    import torch

    import flexvar_ref
    from flexvar_ref.sampling import draw, probabilities

    torch.set_num_threads(threads)
    model, tokenizer = flexvar_ref.load(transformer, vae)

    def generate(label: int) -> Sample:
        start = time.perf_counter()
        scales = list(flexvar_ref.iter_scales(model, [label], SCHEDULE))
        decoding = time.perf_counter()
        with torch.inference_mode():
            tokenizer.decode(scales[-1].tokens)
        end = time.perf_counter()
        for scale in scales:  # sample again to measure its share; this time is not counted
            draw(probabilities(scale.logits, 900, 0.95), torch.rand(scale.logits.shape[:2]))
        sampling = time.perf_counter() - end
        return Sample(end - start, steps=decoding - start - sampling, sampling=sampling, decode=end - decoding)

    _serve(pipe, generate)


def serve_runtime(pipe: Connection, bundle: Path, threads: int) -> None:
    from flexvar_runtime import FlexVARPipeline

    with FlexVARPipeline.from_bundle(bundle, backend="ort-cpu", threads=threads) as pipeline:

        def generate(label: int) -> Sample:
            times = pipeline([label], SCHEDULE, seed=label).timings
            steps = sum(scale.step for scale in times.scales)
            return Sample(times.total, times.condition, steps, times.sampling, times.decode)

        _serve(pipe, generate)


def _serve(pipe: Connection, generate: Callable[[int], Sample]) -> None:
    """Answer each label with a sample. Answer None with this process's peak of resident memory in bytes, and return.

    ru_maxrss cannot be used, because it includes the size of the parent before this program was loaded.
    """
    while (label := pipe.recv()) is not None:
        pipe.send(generate(label))
    status = Path("/proc/self/status").read_text().splitlines()
    pipe.send(next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM:")))


def compare(bundle: Path, paths: tuple[Path, Path], threads: int, repeats: int) -> dict[str, Any]:
    """Time one image of each side in turns, each turn with a new class. The first turn warms up and is not counted."""
    context = mp.get_context("spawn")
    sides: dict[str, tuple[Callable[..., None], tuple[Path, ...]]] = {
        "flexvar_ref eager fp32": (serve_reference, paths),
        "flexvar_runtime ort-cpu fp32": (serve_runtime, (bundle,)),
    }
    ends, workers = {}, []
    for name, (serve, arguments) in sides.items():
        ends[name], theirs = context.Pipe()
        workers.append(context.Process(target=serve, args=(theirs, *arguments, threads), daemon=True))
        workers[-1].start()
        theirs.close()  # so that the end of a worker is noticed
    samples: dict[str, list[Sample]] = {name: [] for name in ends}
    for turn in range(repeats + 1):
        for name, pipe in ends.items():
            pipe.send(turn)
            sample = pipe.recv()
            if turn:
                samples[name].append(sample)
    peaks = {}
    for name, pipe in ends.items():
        pipe.send(None)
        peaks[name] = pipe.recv()
    for worker in workers:
        worker.join()
    return {
        name: {
            "median_s": statistics.median(sample.total for sample in samples[name]),
            "min_s": min(sample.total for sample in samples[name]),
            "peak_bytes": peaks[name],
            "samples": [asdict(sample) for sample in samples[name]],
        }
        for name in ends
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--depth", type=int, default=16, help="Depth of the transformer. Its width is 64 times the depth."
    )
    parser.add_argument("--repeats", type=int, default=7, help="Counted turns. One more turn warms up.")
    parser.add_argument("--threads", type=int, default=2, help="Threads of each side.")
    parser.add_argument(
        "--work",
        type=Path,
        required=True,
        help="Folder for the checkpoint and the bundle, which a later run uses again.",
    )
    parser.add_argument("--json", type=Path, help="File for the result.")
    arguments = parser.parse_args()

    paths = checkpoints(arguments.work, arguments.depth)
    bundle = exported(arguments.work, arguments.depth, paths)
    schedule = ScaleSchedule.parse(SCHEDULE)
    flops = unavoidable_flops(Bundle.open(bundle).manifest, schedule)
    rate = measured_flops_per_second()
    limit = flops / rate
    console.print(f"limit: {flops / 1e9:.0f} GFLOP at {rate / 1e9:.0f} GFLOP/s (NumPy's BLAS) = {limit:.2f} s")

    sides = compare(bundle, paths, arguments.threads, arguments.repeats)
    (_, reference), (_, runtime) = sides.items()
    ratios = [r["total"] / m["total"] for r, m in zip(reference["samples"], runtime["samples"], strict=True)]
    sampling = statistics.median(sample["sampling"] / sample["total"] for sample in runtime["samples"])
    result = {
        "scenario": f"d{arguments.depth}, random weights, 256 px, 10 steps, guidance, batch 1, decoder included, warm",
        "machine": {"platform": platform.platform(), "threads": arguments.threads},
        "versions": {
            name: importlib.metadata.version(name) for name in ("flexvar-deploy", "torch", "onnxruntime", "numpy")
        },
        "limit": {"flops": flops, "flops_per_second": rate, "seconds": limit},
        "sides": sides,
        "speedup_median_of_turns": statistics.median(ratios),
        "speedup_of_turns": ratios,
        "sampling_share": sampling,
    }
    table = Table("side", "median s", "min s", "peak GB", title=str(result["scenario"]))
    for name, side in sides.items():
        table.add_row(name, f"{side['median_s']:.2f}", f"{side['min_s']:.2f}", f"{side['peak_bytes'] / 1e9:.2f}")
    console.print(table)
    for name, side in sides.items():
        keys = [key for key in ("condition", "steps", "sampling", "decode") if side["samples"][0][key] is not None]
        parts = {key: statistics.median(sample[key] for sample in side["samples"]) for key in keys}
        console.print(f"{name}: " + ", ".join(f"{k} {v:.3f} s" for k, v in parts.items()), highlight=False)
    spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
    console.print(
        f"speed-up {result['speedup_median_of_turns']:.2f} (turns {spread}), sampling {sampling:.1%} of the time"
    )
    if arguments.json:
        with atomic_write(arguments.json, force=True) as partial:
            partial.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
