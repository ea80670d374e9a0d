"""Compares the tokens that two computations drew from their own logits, and tells rounding from errors.

Both draw with the same uniform number u from their cumulative distribution, in vocabulary order. The token of the
reference covers an interval of 0…1. If u lies farther from both ends of it than the two distributions of that row
differ, rounding cannot change the token: the row is decided, and both tokens must be equal.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray

from flexvar_runtime.model.noise import to_uniform
from flexvar_runtime.model.sampling import probabilities

_ROWS = 256  # at a time
_ROUNDING = 1e-9  # of weights to integers and of float64 sums, far below any difference of logits


@dataclass(frozen=True)
class Agreement:
    """The result of a comparison.

    rows: the number of compared tokens. equal: rows with equal tokens. decided: rows that rounding cannot change.
    broken: decided rows with different tokens, which must be 0. largest_error, median_error: over the rows, the largest
    difference of the two cumulative distributions of a row.
    """

    rows: int
    equal: int
    decided: int
    broken: int
    largest_error: float
    median_error: float

    @property
    def holds(self) -> bool:
        return self.decided > 0 and self.broken == 0

    def to_json(self) -> dict[str, int | float | bool]:
        return asdict(self) | {"holds": self.holds}


def agreement(parts: Sequence[Agreement]) -> Agreement:
    """The agreement of all scales together. Its median error is the median of theirs."""
    return Agreement(
        rows=sum(part.rows for part in parts),
        equal=sum(part.equal for part in parts),
        decided=sum(part.decided for part in parts),
        broken=sum(part.broken for part in parts),
        largest_error=max(part.largest_error for part in parts),
        median_error=float(np.median([part.median_error for part in parts])),
    )


def compare_tokens(
    reference_RV: NDArray[np.float32],
    got_RV: NDArray[np.float32],
    reference_tokens_R: NDArray[np.integer],
    got_tokens_R: NDArray[np.integer],
    draws_R: NDArray[np.uint32],
    *,
    top_k: int,
    top_p: float,
) -> Agreement:
    """Compare tokens (R,) with the reference's, given the logits (R, V) of each side and the 24-bit draws (R,)."""
    errors, distances = [], []
    for start in range(0, len(draws_R), _ROWS):
        rows = slice(start, start + _ROWS)
        reference, got = (np.cumsum(probabilities(x[rows], top_k, top_p), axis=1) for x in (reference_RV, got_RV))
        errors.append(np.abs(reference - got).max(axis=1))
        u, token = to_uniform(draws_R[rows]), reference_tokens_R[rows, None].astype(np.int64)
        upper = np.take_along_axis(reference, token, axis=1)[:, 0]
        lower = np.where(token[:, 0] > 0, np.take_along_axis(reference, np.maximum(token - 1, 0), axis=1)[:, 0], 0.0)
        distances.append(np.minimum(u - lower, upper - u))
    error, distance = np.concatenate(errors), np.concatenate(distances)
    equal, decided = reference_tokens_R == got_tokens_R, distance > error + _ROUNDING
    return Agreement(
        rows=len(equal),
        equal=int(equal.sum()),
        decided=int(decided.sum()),
        broken=int((decided & ~equal).sum()),
        largest_error=float(error.max()),
        median_error=float(np.median(error)),
    )
