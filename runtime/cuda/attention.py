"""The launch of the kernels of `attention.cu`."""

from __future__ import annotations

from .array import FLOAT32, HALVES, DeviceArray
from .launches import Launch, make_launch, require_fit

FEW_TOKENS = 16  # `attention_rows` is used up to so many tokens: an estimate, not measured
_ROWS = 64  # queries of a block of `attention`
_WARPS = 4  # in a block
_ALIGNMENT = 16  # bytes

KERNEL_NAMES = ("attention", "attention_rows")


def attention(
    q: DeviceArray,
    keys: DeviceArray,
    values: DeviceArray,
    out: DeviceArray,
    scale_of: DeviceArray | None = None,
) -> Launch:
    """softmax(q · keysᵀ) · values over all T tokens, for every sequence and head.

    q: (N, L, H, D), of unit length times the temperature. keys, values: (T, N, H, D) float16 or bfloat16. out:
    (N, L, H·D). q and out have the dtype of keys, or float32: then the weights are not rounded to half precision.
    scale_of: (T,) int32 for a sequence of L = T tokens, where token i attends to token j only if
    scale_of[j] <= scale_of[i]. Scales are not negative. D is a multiple of 16 up to 128. The kernels must be compiled
    for H, D and the dtype of keys. Raises ValueError if arrays do not fit together.
    """
    arrays = (q, keys, values, out) if scale_of is None else (q, keys, values, out, scale_of)
    require_fit(len(q.shape) == 4 and len(keys.shape) == 4 and min(*q.shape, *keys.shape) > 0, "sizes", *arrays)
    (N, L, H, D), T = q.shape, keys.shape[0]
    require_fit(D % 16 == 0 and D <= 128 and N < 2**16 and H < 2**16, "sizes of attention", *arrays)
    require_fit(keys.shape == values.shape == (T, N, H, D), "keys or values", *arrays)
    require_fit(out.shape == (N, L, H * D), "queries and out", *arrays)
    half = keys.dtype
    fits = half in HALVES and values.dtype == half and q.dtype == out.dtype in (half, FLOAT32)
    require_fit(fits, "dtypes of attention", *arrays)
    if scale_of is not None:
        require_fit(scale_of.dtype == "int32" and scale_of.shape == (T,) and L == T, "scales", *arrays)
    require_fit(all(array.address % _ALIGNMENT == 0 for array in (q, keys, values, out)), "addresses", *arrays)
    pointers, wide = (q, keys, values, out, scale_of), q.dtype == FLOAT32
    if wide or T <= FEW_TOKENS:
        grid = (-(-N * L * H // _WARPS), 1, 1)
        return make_launch("attention_rows", grid, 32 * _WARPS, pointers, L, T, N, int(wide))
    return make_launch("attention", (-(-L // _ROWS), H, N), 32 * _WARPS, pointers, L, T, N)
