"""The launch of the kernels of `attention.cu`."""

from __future__ import annotations

import ctypes

from .array import DeviceArray
from .launches import Launch

KERNEL_NAMES = ("attention", "attention_rows")

# Most tokens for which `attention_rows` is faster: above, a tile of 64 keys costs less than reading each key per query.
FEW_TOKENS = 16
_ROWS = 64  # queries of a block of `attention`
_WARPS = 4  # in a block
_NULL = 0
_ALIGNMENT = 16  # bytes


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
    _require(len(q.shape) == 4 and len(keys.shape) == 4 and min(*q.shape, *keys.shape) > 0, "sizes", arrays)
    (N, L, H, D), T = q.shape, keys.shape[0]
    _require(D % 16 == 0 and D <= 128 and N < 2**16 and H < 2**16, "sizes", arrays)
    _require(keys.shape == values.shape == (T, N, H, D), "keys or values", arrays)
    _require(out.shape == (N, L, H * D), "out", arrays)
    half = keys.dtype
    fits = half in ("float16", "bfloat16") and values.dtype == half and q.dtype == out.dtype in (half, "float32")
    _require(fits, "dtypes", arrays)
    if scale_of is not None:
        _require(scale_of.dtype == "int32" and scale_of.shape == (T,) and L == T, "scales", arrays)
    _require(all(array.address % _ALIGNMENT == 0 for array in (q, keys, values, out)), "addresses", arrays)

    wide = q.dtype == "float32"
    pointers = [array.address for array in (q, keys, values, out)] + [_NULL if scale_of is None else scale_of.address]
    args = (*pointers, ctypes.c_uint32(L), ctypes.c_uint32(T), ctypes.c_uint32(N))
    block = (32 * _WARPS, 1, 1)
    if wide or T <= FEW_TOKENS:
        grid = (-(-N * L * H // _WARPS), 1, 1)
        return Launch("attention_rows", grid, block, 0, (*args, ctypes.c_uint32(wide)))
    return Launch("attention", (-(-L // _ROWS), H, N), block, 0, args)


def _require(fits: bool, what: str, arrays: tuple[DeviceArray, ...]) -> None:
    if not fits:  # the kernel would access memory outside an array
        found = ", ".join(f"{array.shape} {array.dtype}" for array in arrays)
        raise ValueError(f"{what} of attention do not fit together: {found}")
