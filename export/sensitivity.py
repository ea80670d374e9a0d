"""Find the parts of a model that are most sensitive to rounding, and choose which of them to keep in float32.

Guidance subtracts two branches, which are almost equal in a trained model. So it amplifies the rounding errors of both.
A few parts can cause most of the error, such as a first MLP or an attention with a high temperature. The errors of
parts add like independent noise, in squares.
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
from .parity import relative_error
from .proof import Proof
from .teacher_forcing import teacher_forced

HEADROOM = 0.9  # share of the gate to aim for, because other hardware rounds differently
MOST_KEPT = 0.5  # largest share of the parts to keep in float32


def rounding_errors(model: FlexVAR, proof: Proof, dtype: torch.dtype = torch.bfloat16) -> dict[str, float]:
    """The largest relative error of the guided logits at any scale, for each part alone in `dtype`."""
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
    """The largest error of the step as a multiple of its bound, if only `step` and `prefill` fail, else 0."""
    failed = [row for row in record.rows if not row.holds]
    only_step = all(row.graph in (STEP, PREFILL) for row in failed)
    return max((row.value / row.bound for row in failed), default=0.0) if only_step else 0.0


def parts_to_keep(errors: Mapping[str, float], excess: float) -> Iterator[tuple[str, ...]]:
    """Sets of the parts with the largest errors, each larger by one part.

    The first is the smallest set that should reduce an error of `excess` times the bound to HEADROOM times the bound.
    """
    ranked = sorted(errors, key=lambda part: (-errors[part], part))
    total = math.fsum(error**2 for error in errors.values())
    for count in range(1, math.floor(MOST_KEPT * len(ranked)) + 1):
        rest = math.fsum(errors[part] ** 2 for part in ranked[count:])
        if excess**2 * rest <= HEADROOM**2 * total:
            yield tuple(sorted(ranked[:count]))
