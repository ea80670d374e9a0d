"""The kernels of the network's layers: their configuration, and a function per kernel that returns a launch.

Products and convolutions are not here: they come from NVIDIA's libraries. Shapes: N sequences, B images, L new and T
all tokens, C width, D code dimension, H heads of size S. Every function raises ValueError if its arrays do not fit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NoReturn

from ..errors import BackendUnavailable
from .array import FLOAT32, HALVES, DeviceArray
from .attention import KERNEL_NAMES
from .compilation import read_sources
from .launches import Launch, make_launch, require_fit

HAS_BRANCH, WIDE_BRANCH, WIDE_RESULT = 1, 2, 4  # flags of the row kernels
EMBED_ROWS, MAP_THREADS, MOST_CHANNELS, MOST_GROUPS = 8, 256, 2048, 64
MOST_CHUNKS = 256  # parts of a map that are summed by one block each
HEAD_SIZES = (16, 32, 64, 128)
MOST_WIDTH, MOST_CODE = 16384, 256
_ROW_WARPS = 8  # at most, in a block of a row kernel


@dataclass(frozen=True)
class LayerConfig:
    """The type and the sizes for which the kernels are compiled. half: "float16" or "bfloat16".

    Raises BackendUnavailable for sizes that the kernels do not have.
    """

    half: str
    width: int
    heads: int
    code_dim: int

    def __post_init__(self) -> None:
        size = self.width // self.heads
        if self.half not in HALVES:
            raise ValueError(f"the kernels compute in {' or '.join(HALVES)}, not in {self.half}")
        if self.width != size * self.heads or size not in HEAD_SIZES:
            _refuse(f"heads of size {', '.join(map(str, HEAD_SIZES))}", f"heads of size {size}")
        if self.width > MOST_WIDTH:
            _refuse(f"a width of at most {MOST_WIDTH}", f"width {self.width}")
        if self.code_dim % 8 or not 0 < self.code_dim <= MOST_CODE:
            _refuse(f"codes of 8 to {MOST_CODE} numbers in steps of 8", f"codes of {self.code_dim} numbers")

    names = (
        *KERNEL_NAMES,
        "embed",
        "modulate_rows",
        "guide_rows",
        "split_heads",
        "class_rows",
        "look_up",
        "group_statistics",
        "group_normalise",
        "double_map",
        "softmax_rows",
        "im2col",
        "to_planes",
        "add_maps",
    )
    fuses = True

    @property
    def source(self) -> str:
        return read_sources("common.cu", "half.cu", "rows.cu", "attention.cu", "maps.cu")

    def defines(self) -> dict[str, int]:
        """The macros of the sources."""
        return {
            "FLOAT16": int(self.half == "float16"),
            "WIDTH": self.width,
            "HEADS": self.heads,
            "HEAD_SIZE": self.width // self.heads,
            "CODE_DIM": self.code_dim,
            "EMBED_ROWS": EMBED_ROWS,
            "MAP_THREADS": MAP_THREADS,
            "MOST_GROUPS": MOST_GROUPS,
        }


def _refuse(needed: str, found: str) -> NoReturn:
    raise BackendUnavailable(
        f"The backend cuda needs {needed}, and this model has {found}.",
        expected=needed,
        fix="Use --backend ort-cuda for this model.",
    )


def _row_threads(width: int) -> int:
    return min(-(-width // 256), _ROW_WARPS) * 32


def embed(codes_MD: DeviceArray, weight_DC: DeviceArray, offset_MC: DeviceArray, stream_MC: DeviceArray) -> Launch:
    """stream = codes · weight + offset, all float32."""
    (M, D), C = codes_MD.shape, weight_DC.shape[1]
    arrays = (codes_MD, weight_DC, offset_MC, stream_MC)
    fits = weight_DC.shape == (D, C) and offset_MC.shape == stream_MC.shape == (M, C)
    require_fit(fits and all(array.dtype == FLOAT32 for array in arrays), "codes, weight and stream", *arrays)
    return make_launch("embed", (-(-M // EMBED_ROWS), -(-C // 512), 1), 128, arrays, M)


@dataclass(frozen=True)
class Branch:
    """What a row kernel adds to the stream first: value (N, L, C), half precision or float32, times gamma (N, 1, C)."""

    value: DeviceArray
    gamma: DeviceArray


def modulate_rows(
    stream_NLC: DeviceArray, branch: Branch | None, scale: DeviceArray, shift: DeviceArray, result_NLC: DeviceArray
) -> Launch:
    """stream += branch, then result = norm(stream) · (1 + scale) + shift. stream: float32. scale, shift: (N, 1, C).

    result: half precision or float32.
    """
    N, L, C = stream_NLC.shape
    _require_rows(stream_NLC, branch, scale, shift)
    require_fit(result_NLC.shape == stream_NLC.shape, "stream and result", stream_NLC, result_NLC)
    flags = _branch_flags(branch) | WIDE_RESULT * (result_NLC.dtype == FLOAT32)
    added = (None, None) if branch is None else (branch.value, branch.gamma)
    arrays = (stream_NLC, *added, scale, shift, result_NLC)
    return make_launch("modulate_rows", (N * L, 1, 1), _row_threads(C), arrays, L, flags)


def guide_rows(
    stream_NLC: DeviceArray,
    branch: Branch,
    scale: DeviceArray,
    shift: DeviceArray,
    rows: tuple[DeviceArray, DeviceArray],
    t: DeviceArray,
    result_BLC: DeviceArray,
) -> Launch:
    """result = c + t · (c − u) in half precision, for the sequences c and u that rows (B,), (B,) int32 name.

    Their rows are normalised and modulated as in `modulate_rows`. The stream is not changed. t: (B,) float32.
    """
    (_, L, C), B = stream_NLC.shape, len(t)
    _require_rows(stream_NLC, branch, scale, shift)
    fits = result_BLC.shape == (B, L, C) and rows[0].shape == rows[1].shape == t.shape == (B,)
    require_fit(fits and result_BLC.dtype in HALVES, "rows, t and result", *rows, t, result_BLC)
    arrays = (stream_NLC, branch.value, branch.gamma, scale, shift, *rows, t, result_BLC)
    return make_launch("guide_rows", (B * L, 1, 1), _row_threads(C), arrays, L, _branch_flags(branch))


def _branch_flags(branch: Branch | None) -> int:
    return 0 if branch is None else HAS_BRANCH | WIDE_BRANCH * (branch.value.dtype == FLOAT32)


def _require_rows(stream: DeviceArray, branch: Branch | None, scale: DeviceArray, shift: DeviceArray) -> None:
    N, _, C = stream.shape
    fits = scale.shape == shift.shape == (N, 1, C) and stream.dtype == scale.dtype == shift.dtype == FLOAT32
    if branch is not None:
        fits &= branch.value.shape == stream.shape and branch.gamma.shape == (N, 1, C)
        fits &= branch.gamma.dtype == FLOAT32
    require_fit(fits, "stream, branch and modulation", stream, scale, shift)


def split_heads(
    joined_NLX: DeviceArray,
    temperature_H: DeviceArray,
    queries_NLC: DeviceArray,
    keys_LNHS: DeviceArray,
    values_LNHS: DeviceArray,
) -> Launch:
    """Queries, keys and values from joined (N, L, 3·C). Queries and keys become unit vectors in every head.

    Queries are multiplied by the head's temperature. joined and queries: half precision, or both float32.
    """
    (N, L, C), (_, _, H, S) = queries_NLC.shape, keys_LNHS.shape
    arrays = (joined_NLX, temperature_H, queries_NLC, keys_LNHS, values_LNHS)
    fits = joined_NLX.shape == (N, L, 3 * C) and keys_LNHS.shape == values_LNHS.shape == (L, N, H, S) and H * S == C
    fits &= temperature_H.size == H and temperature_H.dtype == FLOAT32 and joined_NLX.dtype == queries_NLC.dtype
    require_fit(fits and keys_LNHS.dtype == values_LNHS.dtype in HALVES, "joined, queries and keys", *arrays)
    wide = int(joined_NLX.dtype == FLOAT32)
    return make_launch("split_heads", (N * L, 1, 1), _row_threads(C), arrays, L, N, wide)


def class_rows(
    labels_M: DeviceArray,
    embedding: DeviceArray,
    mean_C: DeviceArray,
    start: DeviceArray,
    hidden_MC: DeviceArray,
    first: DeviceArray,
) -> Launch:
    """hidden = silu(embedding[label]) − mean in half precision, and first (M, 1, C) = embedding[label] + start."""
    (M, C), arrays = hidden_MC.shape, (labels_M, embedding, mean_C, start, hidden_MC, first)
    wide = (embedding, mean_C, start, first)
    fits = (
        all(array.dtype == FLOAT32 for array in wide)
        and labels_M.shape == (M,)
        and embedding.shape[1] == C == mean_C.size == start.size
        and first.size == M * C
    )
    require_fit(fits and hidden_MC.dtype in HALVES, "labels, embedding and hidden", *arrays)
    return make_launch("class_rows", (M, 1, 1), _row_threads(C), arrays)


# --- maps: (B, H, W, C) in half precision, or float32 where it is said


def look_up(tokens: DeviceArray, codebook_VD: DeviceArray, out: DeviceArray) -> Launch:
    """out (B, h, w, D) = codebook[tokens (B, h, w)]."""
    D = codebook_VD.shape[1]
    require_fit(out.shape == (*tokens.shape, D) and out.dtype == codebook_VD.dtype, "tokens and codes", tokens, out)
    return make_launch("look_up", _blocks(tokens.size * D // 8), MAP_THREADS, (tokens, codebook_VD, out), tokens.size)


def chunks(pixels: int, channels: int) -> tuple[int, int]:
    """How the maps of an image are divided among blocks: the number of parts, and the pixels in each.

    It does not depend on the number of images, so an image does not depend on others of its batch.
    """
    lanes = MAP_THREADS // (channels // 8)
    chunk = max(-(-pixels // MOST_CHUNKS), 4 * lanes)
    return -(-pixels // chunk), chunk


def group_statistics(
    x: DeviceArray, partial: DeviceArray, finished_B: DeviceArray, statistics_BG2: DeviceArray
) -> Launch:
    """Mean and reciprocal standard deviation of every group of channels of x, a map or float32.

    partial: float32, at least B · chunks · G · 2 numbers. finished: uint32, must be 0; the kernel resets it to 0.
    """
    (B, H, W, C), G = x.shape, statistics_BG2.shape[1]
    count, chunk = chunks(H * W, C)
    fits = C % 8 == C % G == 0 and C <= MOST_CHANNELS and G <= MOST_GROUPS and statistics_BG2.shape == (B, G, 2)
    fits &= partial.size >= B * count * G * 2 and finished_B.size >= B
    arrays = (x, partial, finished_B, statistics_BG2)
    require_fit(fits, "x and statistics", *arrays)
    numbers = (H * W, C, G, chunk, int(x.dtype == FLOAT32))
    return make_launch("group_statistics", (count, B, 1), MAP_THREADS, arrays, *numbers)


def group_normalise(
    x: DeviceArray,
    statistics_BG2: DeviceArray,
    gain_C: DeviceArray,
    bias_C: DeviceArray,
    y: DeviceArray,
    *,
    silu: bool,
) -> Launch:
    """y = norm(x) · gain + bias, then silu(y) if wanted. x: a map or float32. y: a map."""
    (B, H, W, C), G = x.shape, statistics_BG2.shape[1]
    count, chunk = chunks(H * W, C)
    arrays = (x, statistics_BG2, gain_C, bias_C, y)
    fits = y.shape == x.shape and y.dtype in HALVES and gain_C.size == bias_C.size == C and C % 8 == C % G == 0
    fits &= gain_C.dtype == bias_C.dtype == statistics_BG2.dtype == FLOAT32
    require_fit(fits and statistics_BG2.shape == (B, G, 2) and C <= MOST_CHANNELS, "x, statistics and y", *arrays)
    numbers = (H * W, C, G, chunk, int(x.dtype == FLOAT32), int(silu))
    return make_launch("group_normalise", (count, B, 1), MAP_THREADS, arrays, *numbers)


def double_map(x: DeviceArray, y: DeviceArray) -> Launch:
    """y (B, 2·H, 2·W, C): every pixel of x twice along both sides."""
    B, H, W, C = x.shape
    require_fit(y.shape == (B, 2 * H, 2 * W, C) and x.dtype == y.dtype in HALVES and C % 8 == 0, "x and y", x, y)
    return make_launch("double_map", _blocks(x.size // 8), MAP_THREADS, (x, y), B * H * W, W, C // 8)


def softmax_rows(scores: DeviceArray, out: DeviceArray, columns: int) -> Launch:
    """out = softmax over the first `columns` numbers of every row of scores (…, stride) float32; the rest becomes 0."""
    fits = scores.shape == out.shape and scores.dtype == FLOAT32 and out.dtype in HALVES
    require_fit(fits and 0 < columns <= scores.shape[-1], "scores and out", scores, out)
    stride = scores.shape[-1]
    return make_launch("softmax_rows", (scores.size // stride, 1, 1), 128, (scores, out), columns, stride)


def im2col(
    x: DeviceArray,
    columns: DeviceArray,
    *,
    kernel: tuple[int, int],
    stride: int = 1,
    padding: tuple[int, int] = (0, 0),
    out_size: tuple[int, int],
    planar: bool = False,
) -> Launch:
    """columns (B·H'·W', length): what lies under the kernel for each pixel of the result, of size out_size (H', W').

    x: a map or float32, (B, C, H, W) if planar. Order: kernel row, kernel column, channel. padding: (top, left).
    """
    B, H, W, C = (x.shape[i] for i in ((0, 2, 3, 1) if planar else (0, 1, 2, 3)))
    rows, length = columns.shape
    (R, S), (out_h, out_w) = kernel, out_size
    fits = rows == B * out_h * out_w and length >= R * S * C and x.dtype == columns.dtype
    require_fit(fits, "x and columns", x, columns)
    taps = (S, R * S, stride, *padding, out_h, out_w, length, rows)
    flags = (int(x.dtype == FLOAT32), int(planar))
    return make_launch("im2col", _blocks(columns.size), MAP_THREADS, (x, columns), H, W, C, *taps, *flags)


def to_planes(x: DeviceArray, out_BCHW: DeviceArray) -> Launch:
    """out = the first channels of x, a map or float32, as float32 planes."""
    (B, C, H, W), S = out_BCHW.shape, x.shape[3]
    require_fit(x.shape == (B, H, W, S) and C <= S and out_BCHW.dtype == FLOAT32, "x and planes", x, out_BCHW)
    grid = (-(-H * W // MAP_THREADS), B, 1)
    return make_launch("to_planes", grid, MAP_THREADS, (x, out_BCHW), H * W, S, C, int(x.dtype == FLOAT32))


def add_maps(a: DeviceArray, b: DeviceArray | None, out: DeviceArray) -> Launch:
    """out = a + b, or a alone. a and out: maps or float32. b: a map. out may be a."""
    fits = a.shape == out.shape and a.size % 8 == 0 and (b is None or (b.shape == a.shape and b.dtype in HALVES))
    require_fit(fits, "a, b and out", a, out)
    wide = int(a.dtype == FLOAT32), int(out.dtype == FLOAT32)
    return make_launch("add_maps", _blocks(a.size // 8), MAP_THREADS, (a, b, out), a.size // 8, *wide)


def _blocks(threads: int) -> tuple[int, int, int]:
    return -(-threads // MAP_THREADS), 1, 1
