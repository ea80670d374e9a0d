"""From logits to tokens: top-k, top-p and an inverse-CDF draw, all in integers.

The rules, per row of V float32 logits:

1. weight = floor(2**40 * exp(float64(l - max))). l - max is subtracted in float32; exp is that of `_scaled_exp`.
2. top-k keeps every logit >= the k-th largest. Ties at the threshold are kept, so more than k may remain.
3. top-p acts on what top-k kept. S is the sum of its weights. In ascending order of (weight, index), tokens are dropped
   while their cumulative weight <= floor((1 - p) * S). Among equal weights the lower index is dropped first. The last
   of that order, the top token, always stays.
4. draw: r = floor(u * S'), where S' is the sum of the weights that are left. The token is the first index whose
   cumulative weight, in vocabulary order, exceeds r.

Top-k 0 or >= V, top-p 0 and top-p 1 mean off.

Why integers: their sum is the same in every order of summation, so equal logits give equal tokens on every backend.
Libraries and processors disagree on the last bit of exp. So `_scaled_exp` uses only additions and multiplications of
IEEE doubles, which give the same bits everywhere if no compiler fuses them.

Why every row has a token: the maximum has weight 2**40, hence S' >= 2**40. u <= 1 - 2**-25, so u * S' is at least 2**15
below S'. Two float64 roundings of a number < 2**62 move it by less, hence r < S'. The token drawn has a weight > 0, so
-inf is never drawn.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..checks import check_array, check_keys, check_number, check_whole, invalid, shown
from ..errors import InvalidInput
from .noise import DRAW_BITS, to_uniform
from .schedule import scale_text

# The published implementation samples square scales of all other sides greedily
UPSTREAM_SAMPLED_SIDES = frozenset({1, 2, 3, 4, 5, 6, 8, 10, 13, 16, 23, 24, 32})

WEIGHT_BITS = 40
_INDEX_BITS = 22  # (weight, index) packs into one int64: 2**40 << 22 | index < 2**63
_ROWS_PER_BLOCK = 16  # small enough for the cache; results do not depend on it

# The constants of exp. cuda/kernels.cu has them too, with the same bits.
_LOWEST = -28.0  # 2**40 * exp(-28) < 1: below it every weight is 0
_LOG2_E = 1.4426950408889634
_ROUND = 1.5 * 2.0**52  # added and subtracted: rounds to a whole number, ties to even
_LN2_HIGH = float.fromhex("0x1.62e42feep-1")  # 21 zero bits at its end: its multiples up to 41 are exact
_LN2_LOW = float.fromhex("0x1.a39ef35793c76p-33")  # ln 2 - _LN2_HIGH
_COEFFICIENTS = tuple(1.0 / math.factorial(n) for n in range(13, 1, -1))  # Taylor: error < 2**-57 for |r| <= ln(2) / 2
_EXP_BLOCK = 16384  # elements

_SIDE = r"([1-9][0-9]{0,3})"
_SCALE = re.compile(rf"{_SIDE}(?:x{_SIDE})?")


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn from logits. The defaults are those of the published evaluation. Raises InvalidInput.

    top_k: number of tokens to keep; 0 keeps all. top_p: probability mass to keep; 0 or 1 keeps all.
    greedy_scales: scales that are sampled with top_k = 1. "upstream" is the published rule. Other values are "none",
    text such as "7,12x20", or a tuple of sides and (h, w) pairs. The field then holds a sorted tuple of (h, w).
    max_side: the published rule is greedy at square scales above this side.
    """

    top_k: int = 900
    top_p: float = 0.95
    greedy_scales: str | tuple[int | tuple[int, int], ...] = "upstream"
    max_side: int = 16

    def __post_init__(self) -> None:
        object.__setattr__(self, "top_k", _check_top_k(self.top_k))
        object.__setattr__(self, "top_p", _check_top_p(self.top_p))
        object.__setattr__(self, "greedy_scales", _parse_greedy(self.greedy_scales))
        object.__setattr__(self, "max_side", check_whole("max_side", self.max_side, 1))

    def greedy(self, h: int, w: int) -> bool:
        """Whether a scale of h x w tokens is sampled with top_k = 1. The published rule never holds for non-squares."""
        h, w = check_whole("height of a scale", h, 1), check_whole("width of a scale", w, 1)
        if self.greedy_scales == "upstream":
            return h == w and (h not in UPSTREAM_SAMPLED_SIDES or h > self.max_side)
        return self.greedy_scales != "none" and (h, w) in self.greedy_scales

    def top_k_at(self, h: int, w: int) -> int:
        """The top_k in force at a scale of h x w tokens."""
        return 1 if self.greedy(h, w) else self.top_k

    @property
    def filters(self) -> str:
        """The filters that are on, which decide how long drawing takes: "top-k, top-p", "top-k", "top-p" or "none"."""
        on = [name for name, acts in (("top-k", self.top_k > 0), ("top-p", 0 < self.top_p < 1)) if acts]
        return ", ".join(on) or "none"

    def to_json(self) -> dict[str, int | float | str]:
        """The options as JSON values, greedy scales as text."""
        scales = self.greedy_scales
        text = scales if isinstance(scales, str) else ",".join(scale_text(*s) for s in scales if isinstance(s, tuple))
        return asdict(self) | {"greedy_scales": text}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Sampling:
        """The options that `to_json` wrote. A missing key means its default; an unknown one raises InvalidInput."""
        return cls(**check_keys("sampling", values, [field.name for field in fields(cls)]))


def _parse_greedy(value: Any) -> str | tuple[tuple[int, int], ...]:
    """The field that `Sampling.greedy_scales` describes; "none" for an empty tuple. Raises InvalidInput."""
    if isinstance(value, str) and value in ("upstream", "none"):
        return value
    matches = [_SCALE.fullmatch(part.strip()) for part in value.split(",")] if isinstance(value, str) else []
    if isinstance(value, tuple):
        pairs = [side if isinstance(side, tuple) else (side, side) for side in value]
    elif matches and all(matches):
        pairs = [(int(m[1]), int(m[2] or m[1])) for m in matches if m]
    else:
        pairs = [()]
    if any(len(pair) != 2 for pair in pairs):
        fix = "Separate scales with commas: 7 is a square, 12x20 is height and width."
        raise invalid(f"greedy_scales is {shown(value)}", '"upstream", "none" or scales such as "7,12x20"', fix)
    return tuple(sorted({(_check_side(h), _check_side(w)) for h, w in pairs})) or "none"


def _check_side(side: Any) -> int:
    return check_whole("side in greedy_scales", side, 1, 9999)


def _check_top_k(value: Any) -> int:
    """top_k as an int. A float that is a whole number is allowed."""
    whole = isinstance(value, (float, np.floating)) and float(value).is_integer()
    return check_whole("top_k", int(value) if whole else value, 0)


def _check_top_p(value: Any) -> float:
    return check_number("top_p", value, 0, 1, "Pass the probability mass to keep, such as 0.95.")


def probabilities(logits: ArrayLike, top_k: int, top_p: float) -> NDArray[np.float64]:
    """The distribution that `sample` draws from.

    logits: (..., V) float32; other number types are rounded to float32 first. Returns (..., V) float64: the weight of
    each token over the sum of the weights that are kept, and 0 for tokens that cannot be drawn. Raises InvalidInput for
    options out of range, and for rows with NaN, +inf or only -inf.
    """
    logits_RV, shape = _as_rows(logits)
    out_RV = np.empty(logits_RV.shape, dtype=np.float64)
    for block, columns, weights in _kept(logits_RV, _check_top_k(top_k), _check_top_p(top_p)):
        dense = np.zeros((len(columns), shape[-1] + 1))  # the last column takes the padding
        np.put_along_axis(dense, columns, weights / weights.sum(axis=1, keepdims=True), axis=1)
        out_RV[block] = dense[:, :-1]
    return out_RV.reshape(shape)


def sample(logits: ArrayLike, draws: ArrayLike, *, top_k: int, top_p: float) -> NDArray[np.int32]:
    """One token for each row.

    logits: (rows, V) float32. draws: (rows,) 24-bit integers from `noise.draws`. Returns (rows,) int32. The token of a
    row depends only on that row and its draw. Raises InvalidInput as `probabilities` does, and for draws out of range.
    """
    logits_RV, shape = _as_rows(logits)
    draws_R = check_array("draws", draws)
    fits = len(shape) == 2 and draws_R.shape == shape[:1] and draws_R.dtype.kind in "iu"
    low, high = (draws_R.min(), draws_R.max()) if fits and draws_R.size else (0, 0)
    if not fits or low < 0 or high >= 2**DRAW_BITS:
        span = f", from {low} to {high}," if fits else ""
        raise invalid(
            f"draws for logits {shape} has shape {draws_R.shape} and dtype {draws_R.dtype}{span}",
            f"one integer from 0 to 2**{DRAW_BITS} - 1 for each row of logits (rows, V)",
            "Pass the draws of flexvar_runtime.model.noise.draws.",
        )
    tokens_R = np.empty(shape[0], dtype=np.int32)
    for block, columns, weights in _kept(logits_RV, _check_top_k(top_k), _check_top_p(top_p)):
        cumulative = np.cumsum(weights, axis=1)
        r = (to_uniform(draws_R[block]) * cumulative[:, -1].astype(np.float64)).astype(np.int64)
        first = np.count_nonzero(cumulative <= r[:, None], axis=1)
        tokens_R[block] = np.take_along_axis(columns, first[:, None], axis=1)[:, 0]
    return tokens_R


def _as_rows(logits: ArrayLike) -> tuple[NDArray[np.float32], tuple[int, ...]]:
    array = check_array("logits", logits)
    if array.ndim == 0 or array.dtype.kind not in "fiu" or not 0 < array.shape[-1] < 2**_INDEX_BITS:
        raise invalid(
            f"logits has shape {array.shape} and dtype {array.dtype}",
            f"real numbers of shape (..., V), with V from 1 to 2**{_INDEX_BITS} - 1",
            "Pass float32 logits with the vocabulary as the last axis.",
        )
    with np.errstate(over="ignore"):  # a float64 beyond float32 becomes inf, which `_kept` refuses
        array = np.ascontiguousarray(array, dtype=np.float32)
    return array.reshape(math.prod(array.shape[:-1]), array.shape[-1]), array.shape


_Kept = tuple[slice, NDArray[np.int64], NDArray[np.int64]]


def _kept(logits_RV: NDArray[np.float32], top_k: int, top_p: float) -> Iterator[_Kept]:
    """For each block of rows: its slice, ascending vocabulary indices (rows, N), and weights (rows, N) after top-p.

    N is the largest number of tokens that top-k keeps in a row of the block. Shorter rows are padded with index V and
    weight 0.
    """
    for start in range(0, len(logits_RV), _ROWS_PER_BLOCK):
        block = slice(start, start + _ROWS_PER_BLOCK)
        top_R1 = logits_RV[block].max(axis=1, keepdims=True)
        bad = np.flatnonzero(~np.isfinite(top_R1))  # NaN, +inf, or -inf alone
        if bad.size:
            raise InvalidInput(
                f"The maximum of row {start + bad[0]} of the logits is {top_R1[bad[0], 0]}, but it must be finite.",
                expected="no NaN, no +inf and at least one finite logit in every row",
                fix="Look for an overflow in the model: try a bundle exported in bf16 or fp32.",
            )
        columns, logits_RN = _top_k(logits_RV[block], top_R1, top_k)
        with np.errstate(over="ignore", under="ignore"):  # a difference beyond float32 is -inf: weight 0
            weights = _scaled_exp(logits_RN - top_R1).astype(np.int64)
        yield block, columns, weights if top_p in (0.0, 1.0) else _top_p(columns, weights, top_p)


def _scaled_exp(differences: NDArray[np.float32]) -> NDArray[np.float64]:
    """2**40 * exp(x) of every x <= 0, by additions and multiplications only. x below -28 counts as -28.

    exp(x) = 2**k * exp(r). k is the whole number nearest to x / ln 2, and r = x - k * ln 2 is computed in two steps.
    exp(r) = 1 + (r + r * r * (1/2! + r/3! + ... + r**11/13!)) by Horner's rule. The result is within 1 ulp of the exact
    value, and exact at 0.
    """
    flat = np.ascontiguousarray(differences).reshape(-1)
    scaled = np.empty(flat.shape)
    buffers = np.empty((3, min(len(flat), _EXP_BLOCK)))
    for start in range(0, len(flat), _EXP_BLOCK):
        block = slice(start, start + _EXP_BLOCK)
        p = scaled[block]
        x, k, r = buffers[:, : len(p)]
        np.maximum(flat[block], np.float32(_LOWEST), out=x)
        np.multiply(x, _LOG2_E, out=k)
        k += _ROUND
        power = k.view(np.uint64) + np.uint64(1023 + WEIGHT_BITS)  # its last bits hold the whole number;
        power <<= np.uint64(52)  # as an exponent, that is 2**(k + 40)
        k -= _ROUND
        np.multiply(k, _LN2_HIGH, out=r)
        np.subtract(x, r, out=r)
        k *= _LN2_LOW
        r -= k
        p.fill(_COEFFICIENTS[0])
        for coefficient in _COEFFICIENTS[1:]:
            p *= r
            p += coefficient
        p *= r
        p *= r
        p += r
        p += 1.0
        p *= power.view(np.float64)
    return scaled.reshape(differences.shape)


def _top_k(
    logits_RV: NDArray[np.float32], top_R1: NDArray[np.float32], top_k: int
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Vocabulary indices and logits of each row that are >= its k-th largest, padded with index V and logit -inf."""
    rows, V = logits_RV.shape
    if top_k == 0 or top_k >= V:
        return np.broadcast_to(np.arange(V), (rows, V)), logits_RV
    threshold = top_R1 if top_k == 1 else np.partition(logits_RV, V - top_k, axis=1)[:, V - top_k, None]
    keep = logits_RV >= threshold
    counts = np.count_nonzero(keep, axis=1)
    flat = np.flatnonzero(keep)
    filled = np.arange(counts.max()) < counts[:, None]
    columns = np.full(filled.shape, V)
    columns[filled] = flat - np.repeat(np.arange(rows) * V, counts)
    logits_RN = np.full(filled.shape, -np.inf, dtype=np.float32)
    logits_RN[filled] = logits_RV.reshape(-1)[flat]
    return columns, logits_RN


def _top_p(columns: NDArray[np.int64], weights: NDArray[np.int64], top_p: float) -> NDArray[np.int64]:
    """The weights, with 0 for the tokens that top-p drops."""
    keys = weights << _INDEX_BITS | columns  # one integer orders by (weight, index)
    ascending = np.sort(keys, axis=1)
    cumulative = np.cumsum(ascending >> _INDEX_BITS, axis=1)
    limit = ((1.0 - top_p) * cumulative[:, -1:].astype(np.float64)).astype(np.int64)
    dropped = np.minimum(np.count_nonzero(cumulative <= limit, axis=1), keys.shape[1] - 1)  # never the last one
    return np.where(keys >= np.take_along_axis(ascending, dropped[:, None], axis=1), weights, 0)
