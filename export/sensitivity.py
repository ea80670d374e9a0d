"""Which parts of a trained model half precision or int8 hurts most, and which of them to keep in float32.

Guidance subtracts two branches that a trained model makes almost equal, so what rounding adds to either is amplified;
a few parts can carry most of it (a first MLP, an attention with a high temperature). Their errors add like independent
noise: in squares.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch

from flexvar_ref import FlexVAR
from flexvar_runtime.bundle.manifest import ParityRecord
from flexvar_runtime.model.signatures import PREFILL, STEP

from .activations import SummedInFloat32
from .modules import Step, block_parts
from .parity import holds, relative_error
from .proof import Proof
from .teacher_forcing import teacher_forced

HEADROOM = 0.9  # of the gate: other hardware rounds elsewhere
MOST_KEPT = 0.5  # of the parts: beyond that the bundle is not worth its name


def rounding_errors(model: FlexVAR, proof: Proof, dtype: torch.dtype = torch.bfloat16) -> dict[str, float]:
    """What each part alone in `dtype` does to the guided logits: the largest relative error of any scale."""
    parts = frozenset(block_parts(model.config.depth))
    return {part: _worst_error(Step(model, dtype, parts - {part}).eval(), model, proof) for part in parts}


def _worst_error(step: Step, model: FlexVAR, proof: Proof) -> float:
    rounded = SummedInFloat32()  # type: ignore[no-untyped-call]
    return max(
        relative_error(logits.numpy()[:, rows], reference)
        for case in proof.cases
        for logits, rows, reference in zip(
            teacher_forced(step, model, case, rounded), case.rows, case.logits, strict=True
        )
    )


def step_excess(record: ParityRecord) -> float:
    """The largest error of the step as a multiple of its bound, if that is why the proof failed; else 0."""
    failed = [row for row in record.rows if not holds(row)]
    ours = all(row.graph in (STEP, PREFILL) for row in failed)
    return max((row.value / row.bound for row in failed), default=0.0) if ours else 0.0


def parts_to_keep(errors: Mapping[str, float], excess: float) -> Iterator[tuple[str, ...]]:
    """Growing sets of the parts with the largest errors, from the first that should bring an error of `excess` times
    the bound within HEADROOM of it."""
    ranked = sorted(errors, key=lambda part: (-errors[part], part))
    total = math.fsum(error**2 for error in errors.values())
    for count in range(1, math.floor(MOST_KEPT * len(ranked)) + 1):
        rest = math.fsum(errors[part] ** 2 for part in ranked[count:])
        if excess**2 * rest <= HEADROOM**2 * total:
            yield tuple(sorted(ranked[:count]))
