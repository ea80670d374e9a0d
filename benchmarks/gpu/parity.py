"""Compares a pipeline with the reference: every graph, tokens under teacher forcing, and free-running tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flexvar_export.parity import GATES, compare
from flexvar_export.proof import SEED, Case, Proof
from flexvar_runtime import FlexVARPipeline, Sampling
from flexvar_runtime.backends.device_arrays import DeviceArrays
from flexvar_runtime.model.sampling import sample
from flexvar_runtime.request import Request

from . import sampler_checks
from .token_agreement import Agreement, agreement, compare_tokens


def parity(pipeline: FlexVARPipeline, proof: Proof) -> dict[str, Any]:
    """Compare every graph with the reference, then tokens under teacher forcing, then free-running tokens."""
    proof.require_fit(pipeline.model)
    gate = GATES[pipeline.bundle.manifest.precision]
    rows = list(compare(pipeline.generator, proof, gate))
    worst = {
        name: max((row for row in rows if row.graph == name), key=lambda row: row.value / row.bound * _sign(row.metric))
        for name in dict.fromkeys(row.graph for row in rows)
    }
    case = proof.cases[0]
    request = case.labels, case.schedule, case.guidance, Sampling(max_side=case.guidance.max_side), SEED
    free, again = pipeline(*request).tokens, pipeline(*request).tokens
    stepwise = [step.tokens for step in pipeline.iter_scales(*request)]
    return {
        "passed": all(row.holds for row in rows),
        "checks": len(rows),
        "failed": [asdict(row) for row in rows if not row.holds],
        "worst": {name: asdict(row) for name, row in worst.items()},
        "teacher_forced_tokens": forced_tokens(pipeline, case).to_json(),
        "free_running_agreement": equal_share(free, case.tokens),
        "again_equal": equal_share(free, again),
        "scale_by_scale_equal": equal_share(free, stepwise),
    }


def _sign(metric: str) -> int:
    """−1 for PSNR, of which the smallest is the worst. 1 for errors, of which the largest is."""
    return -1 if metric == "psnr_db" else 1


def forced_tokens(pipeline: FlexVARPipeline, case: Case) -> Agreement:
    """Compare tokens that the backend draws from its own logits, fed with the reference's tokens at every scale."""
    sampling = Sampling(max_side=case.guidance.max_side)
    request = Request.of(case.labels, case.schedule, case.guidance, sampling, SEED)
    parts = []
    with pipeline.generator.loop(request) as loop:
        previous = None
        for i in range(len(case.schedule)):
            got = np.array(loop.logits(i, previous))
            reference, previous = case.logits[i], case.tokens[i]
            if reference.shape != got.shape:
                raise ValueError(
                    f"The proof holds logits of shape {reference.shape}, but all rows are needed: {got.shape}."
                )
            flat = got.reshape(-1, got.shape[-1])
            top_k, noise = request.top_k(i), request.noise(i)
            tokens = _draw(pipeline, got, request, i)
            parts.append(
                compare_tokens(
                    reference.reshape(flat.shape),
                    flat,
                    case.tokens[i].reshape(-1),
                    tokens,
                    noise,
                    top_k=top_k,
                    top_p=sampling.top_p,
                )
            )
    return agreement(parts)


def _draw(
    pipeline: FlexVARPipeline, logits_BLV: NDArray[np.float32], request: Request, scale: int
) -> NDArray[np.int32]:
    top_k, top_p, backend = request.top_k(scale), request.sampling.top_p, pipeline.backend
    if isinstance(backend, DeviceArrays):
        return sampler_checks.sample_on_device(
            backend, logits_BLV, (request.seeds, request.indices), scale, top_k, top_p
        )
    return sample(logits_BLV.reshape(-1, logits_BLV.shape[-1]), request.noise(scale), top_k=top_k, top_p=top_p)


def equal_share(a: Sequence[NDArray[Any]], b: Sequence[NDArray[Any]]) -> float:
    """The share of equal tokens, over all scales."""
    return sum(int((x == y).sum()) for x, y in zip(a, b, strict=True)) / sum(x.size for x in a)
