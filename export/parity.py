"""The parity gates: compare every graph, run as the runtime runs it, with the reference."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from flexvar_runtime import Bundle, FlexVARPipeline, ParityFailed, Sampling
from flexvar_runtime.backends import create
from flexvar_runtime.bundle.certificate import compared_files
from flexvar_runtime.bundle.manifest import PSNR, ParityRecord, ParityRow
from flexvar_runtime.generation.generator import Generator
from flexvar_runtime.model.precision import Precision
from flexvar_runtime.model.signatures import (
    CONDITION,
    DECODE,
    ENCODE,
    GRAPHS,
    HEAD_MODULATION,
    MODULATION,
    PREFILL,
    STEP,
)
from flexvar_runtime.request import Request

from .emulate import emulate_bf16
from .proof import SEED, Case, Float32, Proof

PSNR_CAP = 200.0  # dB, recorded for equal images


@dataclass(frozen=True)
class Gate:
    """The bounds of one precision.

    relative: relative error ‖Δ‖ / ‖reference − row mean‖. psnr: PSNR of the decoder in dB (peak 2). logits, latent: the
    relative error of the outputs of `step` and `prefill`, and of `encode`, if other than `relative`.
    """

    relative: float
    psnr: float
    logits: float | None = None
    latent: float | None = None

    def error(self, graph: str) -> float:
        """The bound of the relative error of the outputs of a graph."""
        own = {STEP: self.logits, PREFILL: self.logits, ENCODE: self.latent}.get(graph)
        return self.relative if own is None else own


GATES: dict[str, Gate] = {
    Precision.FP32: Gate(1e-5, 80.0),
    Precision.FP16: Gate(2e-3, 50.0),
    Precision.BF16: Gate(1.5e-2, 40.0),
    Precision.INT8: Gate(1e-5, 80.0, logits=6e-2),  # a fifth above the error of the demo model (benchmarks/LOG.md)
    Precision.INT8_BF16: Gate(1e-5, 40.0, logits=6e-2, latent=1.5e-2),  # the bounds of int8 and bf16, by graph
}


def relative_error(got: NDArray[np.float32], reference: NDArray[np.float32]) -> float:
    """‖got − reference‖₂ / ‖reference − row mean‖₂, with rows along the last axis. At most 1e9, also for NaN."""
    exact = reference.astype(np.float64)
    spread = float(np.linalg.norm(exact - exact.mean(axis=-1, keepdims=True)))
    error = float(np.linalg.norm(got.astype(np.float64) - exact)) / max(spread, 1e-30)
    return min(error, 1e9) if np.isfinite(error) else 1e9


def psnr(got: NDArray[np.float32], reference: NDArray[np.float32]) -> float:
    """The PSNR in dB with peak 2, after both images are clamped to −1…1. 0 for NaN, PSNR_CAP for equal images."""
    error = np.mean((np.clip(got, -1, 1).astype(np.float64) - np.clip(reference, -1, 1)) ** 2)
    if not np.isfinite(error):
        return 0.0
    return float(min(10 * np.log10(4 / error), PSNR_CAP)) if error > 0 else PSNR_CAP


def compare(generator: Generator, proof: Proof, gate: Gate) -> Iterator[ParityRow]:
    """One row per graph, scale and output, in the order in which a generation computes them."""
    condition = joined_modulation(generator.condition(proof.labels), generator.model.depth)
    for name in ("modulation", "head_modulation", "first_input"):
        yield _relative(CONDITION, None, name, condition[name], getattr(proof, name), gate)
    for case in proof.cases:
        yield from _compare_case(generator, case, gate)
    latent, reference = (np.moveaxis(x, 1, -1) for x in (generator.encode(proof.image), proof.latent))
    yield _relative(ENCODE, None, "latent", latent, reference, gate)


def joined_modulation(condition: Mapping[str, Float32], depth: int) -> dict[str, Float32]:
    """The outputs of a condition graph in the form of a proof, which is also their form in bundles of schema version 1.

    modulation (M, depth, 6, C), head_modulation (M, 2, C), first_input (M, 1, C).
    """
    if "modulation" in condition:
        return dict(condition)
    blocks = [np.concatenate([condition[f"{part}_{i}"] for part in MODULATION], axis=1) for i in range(depth)]
    return {
        "modulation": np.stack(blocks, axis=1),
        "head_modulation": np.concatenate([condition[name] for name in HEAD_MODULATION], axis=1),
        "first_input": condition["first_input"],
    }


def _compare_case(generator: Generator, case: Case, gate: Gate) -> Iterator[ParityRow]:
    with generator.loop(Request.of(case.labels, case.schedule, case.guidance)) as loop:
        previous = None
        for i, (h, w) in enumerate(case.schedule):
            logits = loop.logits(i, previous)[:, case.rows[i]]
            yield _relative(STEP, f"{i + 1}/{len(case.schedule)} ({h}x{w})", "logits", logits, case.logits[i], gate)
            previous = case.tokens[i]
    yield from _compare_prefill(generator, case, gate)
    decoded = np.concatenate([part.copy() for part in generator.decode(case.tokens[-1])])
    h, w = case.schedule[-1]
    yield ParityRow(
        graph=DECODE,
        scale=f"{h}x{w}",
        output="image",
        metric=PSNR,
        value=psnr(decoded, case.decoded),
        bound=gate.psnr,
    )


def _compare_prefill(generator: Generator, case: Case, gate: Gate) -> Iterator[ParityRow]:
    """The row of the last scale after a prefill of all others. No row where the backend does not prefill."""
    last = len(case.schedule) - 1
    if last < 2 or not generator.prefills:
        return
    generator.graph(PREFILL)  # open it, so that it is used even if memory is short
    with generator.loop(Request.of(case.labels, case.schedule, case.guidance)) as loop:
        loop.force(case.tokens[:last])
        logits = loop.logits(last, case.tokens[last - 1])[:, case.rows[last]]
        h, w = case.schedule[last]
        yield _relative(PREFILL, f"{last + 1}/{last + 1} ({h}x{w})", "logits", logits, case.logits[last], gate)


def _relative(
    graph: str, scale: str | None, output: str, got: NDArray[np.float32], reference: NDArray[np.float32], gate: Gate
) -> ParityRow:
    error = relative_error(got, reference)
    return ParityRow(
        graph=graph, scale=scale, output=output, metric="relative_error", value=error, bound=gate.error(graph)
    )


def prove(
    bundle: Bundle,
    proof: Proof,
    backend: str = "ort-cpu",
    threads: int | None = None,
    *,
    device: str | None = None,
    engines: Path | None = None,
) -> ParityRecord:
    """Run every graph of a bundle, in schedule order and without warm-up, and compare the outputs with the proof.

    On ort-cpu, which has no bf16 kernels, bf16 graphs are emulated in float32, and the record says so.
    The record names the files of the bundle.
    `free_running_agreement` of the record is the share of tokens equal to the reference's in a generation that uses its
    own tokens. Raises ArtifactRefused for a proof of another model, BackendUnavailable.
    """
    proof.require_fit(bundle.manifest.model)
    started = create(backend, bundle, device=device, threads=threads, engines=engines)
    precision = bundle.manifest.precision
    emulated = started.name == "ort-cpu" and any(precision.of(graph) is Precision.BF16 for graph in GRAPHS)
    with tempfile.TemporaryDirectory() as scratch:
        runnable = emulate_bf16(bundle, Path(scratch)) if emulated else bundle
        with FlexVARPipeline(runnable, started) as pipeline:
            rows = tuple(compare(pipeline.generator, proof, GATES[precision]))
            agreement = _free_running(pipeline, proof.cases[0])
    return ParityRecord(
        backend=started.name,
        emulated=emulated,
        passed=all(row.holds for row in rows),
        rows=rows,
        free_running_agreement=agreement,
        files=compared_files(bundle.manifest),
    )


def _free_running(pipeline: FlexVARPipeline, case: Case) -> float:
    """The share of tokens equal to the reference's in a generation with its own tokens and the same random numbers."""
    sampling = Sampling(max_side=case.guidance.max_side)
    steps = pipeline.iter_scales(case.labels, case.schedule, case.guidance, sampling, seed=SEED)
    equal = sum(int((step.tokens == case.tokens[step.index]).sum()) for step in steps)
    return equal / (len(case.labels) * case.schedule.tokens)


def require_parity(record: ParityRecord) -> None:
    """Raise ParityFailed if a row fails. It names the first output that diverges, in the order of computation."""
    failed: Sequence[ParityRow] = [row for row in record.rows if not row.holds]
    if failed:
        first = failed[0]
        place = first.graph + (f", scale {first.scale}" if first.scale else "") + f", output {first.output}"
        rounded = first.graph in (STEP, PREFILL) and first.bound > GATES[Precision.FP32].relative
        more = ", or keep more parts in float32 with flexvar export --float32" if rounded else ""
        bound = f"{'at least' if first.metric == PSNR else 'at most'} {first.bound:g}"
        raise ParityFailed(
            f"{place}: {first.metric} is {first.value:.3g} on {record.backend}, but it must be {bound} "
            f"({len(failed)} of {len(record.rows)} checks fail).",
            expected=bound,
            fix=f"Export again with the tool versions that flexvar inspect shows{more}.",
        )
