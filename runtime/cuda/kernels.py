"""The kernels of `kernels.cu`: their configuration, and a function per kernel that returns a launch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..checks import check_index, check_seed
from ..errors import BackendUnavailable
from .array import DeviceArray
from .compilation import read_sources
from .launches import Launch, make_launch, require_fit

KERNEL_NAMES = ("sample_rows", "next_inputs", "gather_rows", "scatter_rows", "to_uint8", "draws")
TAPS = 4  # most inputs of one output of a bicubic resize
STATUS_WORDS = 2  # uint32

MOST_THREADS = 1024  # in a block of `sample_rows`
LARGEST_VOCABULARY = 32 * MOST_THREADS  # the registers of a thread hold 32 values
_STATUS_KINDS = {1: "logits", 2: "pixels"}


@dataclass(frozen=True)
class KernelConfig:
    """The sizes V, D and C of the model, for which the kernels are compiled. Raises BackendUnavailable."""

    vocabulary: int
    code_dim: int
    width: int

    def __post_init__(self) -> None:
        if not 0 < self.vocabulary <= LARGEST_VOCABULARY or self.code_dim < 1 or self.width < 1:
            raise BackendUnavailable(
                f"The GPU kernels do not take a vocabulary of {self.vocabulary}, codes of {self.code_dim} and width "
                f"{self.width}.",
                expected=f"positive sizes and a vocabulary of at most {LARGEST_VOCABULARY}",
                fix="Use a CPU backend for this model (see flexvar doctor).",
            )

    names = KERNEL_NAMES
    fuses = False  # because the host's results must be met exactly

    @property
    def source(self) -> str:
        return kernel_source()

    @property
    def block(self) -> int:
        """Threads in a block of `sample_rows`: one per code, rounded up to whole warps, at most 1024."""
        return _threads(self.vocabulary)

    def defines(self, block: int | None = None) -> dict[str, int]:
        """The macros of `kernels.cu`."""
        return {
            "VOCABULARY": self.vocabulary,
            "CODE_DIM": self.code_dim,
            "WIDTH": self.width,
            "BLOCK": self.block if block is None else block,
        }


@dataclass(frozen=True)
class Refusal:
    """What the status words say.

    kind "logits": scale is the index of the scale, and row = image · positions + position. kind "pixels": row is the
    image.
    """

    kind: str
    scale: int
    row: int


def stream_words(images: int) -> int:
    """Number of uint32 words in the random streams of a number of images."""
    return 4 * images


def stream_block(seeds: Sequence[int], indices: Sequence[int]) -> NDArray[np.uint32]:
    """The random streams as the kernels read them: for each image the low and high word of its seed and of its index.

    Raises InvalidInput if a seed or an index is no unsigned 64-bit number.
    """
    pairs = [(check_seed(seed), check_index(index)) for seed, index in zip(seeds, indices, strict=True)]
    return np.array(pairs, dtype="<u8").reshape(-1).view("<u4").astype(np.uint32)


def top_k_option(top_k: int, vocabulary: int) -> int:
    """top_k as `sample_rows` reads it: 0 if it keeps every token."""
    return top_k if top_k < vocabulary else 0


def drop_option(top_p: float) -> float:
    """top_p as `sample_rows` reads it: the probability mass to drop, 0 if it keeps every token."""
    return 0.0 if top_p in (0.0, 1.0) else 1.0 - top_p


def read_status(words: NDArray[np.uint32]) -> Refusal | None:
    """The first refusal, ordered by kind, scale and row; None if there is none.

    words: (STATUS_WORDS,) uint32, set to zero before the first kernel and downloaded after the last.
    """
    low, high = (int(word) for word in words)
    if not low and not high:
        return None
    code = ~(high << 32 | low) & 2**64 - 1
    return Refusal(_STATUS_KINDS[code >> 56], code >> 40 & 0xFFFF, code & 2**40 - 1)


def taps(matrix: NDArray[np.float32]) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """A resize matrix (outputs, inputs) as `next_inputs` reads it: the inputs of each output and their weights.

    Returns index (outputs, 4) int32 in ascending order, and weight (outputs, 4) float32. Unused taps have index 0 and
    weight 0. Raises ValueError for a row with more than 4 numbers other than 0.
    """
    outputs = len(matrix)
    index, weight = np.zeros((outputs, TAPS), np.int32), np.zeros((outputs, TAPS), np.float32)
    for i, row in enumerate(matrix):
        used = np.flatnonzero(row)
        if len(used) > TAPS:
            raise ValueError(f"row {i} has {len(used)} inputs, and at most {TAPS} are possible")
        index[i, : len(used)], weight[i, : len(used)] = used, row[used]
    return index, weight


def sample_rows(
    logits_BLV: DeviceArray,
    streams: DeviceArray,
    tokens: DeviceArray,
    status: DeviceArray,
    top_k: DeviceArray,
    drop: DeviceArray,
    *,
    scale: int,
) -> Launch:
    """Tokens (B, h, w) int32 of one scale from its logits (B, h·w, V), as `sampling.sample` draws them.

    streams: `stream_block` on the device. top_k, drop: one number each, `top_k_option` as int32 and `drop_option` as
    float64; the kernel reads them when it runs. status: STATUS_WORDS uint32. A row without a finite maximum gets token
    0 and sets the status. Raises ValueError if shapes do not fit, as all functions here.
    """
    B, L, V = logits_BLV.shape
    fits = streams.shape == (stream_words(B),) and tokens.size == B * L and top_k.size == drop.size == 1
    require_fit(fits, "streams, tokens or options", streams, tokens, top_k, drop)
    arrays = (logits_BLV, streams, tokens, status, top_k, drop)
    return make_launch("sample_rows", (B * L, 1, 1), _threads(V), arrays, L, scale)


def next_inputs(
    tokens_Bhw: DeviceArray,
    codebook_VD: DeviceArray,
    y_taps: tuple[DeviceArray, DeviceArray],
    x_taps: tuple[DeviceArray, DeviceArray],
    positions_LC: DeviceArray,
    codes_NLD: DeviceArray,
    offset_NLC: DeviceArray,
) -> Launch:
    """codes (N, L, D) and offset (N, L, C) of a scale (h', w'), L = h'·w', from the tokens (B, h, w) before it.

    N is B or 2·B; with 2·B the second half repeats the first. y_taps, x_taps: `taps` of the matrices (h', h) and
    (w', w). positions: `Tables.offset`.
    """
    (B, h, w), (N, L, D), C = tokens_Bhw.shape, codes_NLD.shape, positions_LC.shape[1]
    new_h, new_w = len(y_taps[0]), len(x_taps[0])
    fits = new_h * new_w == L == len(positions_LC) and N in (B, 2 * B) and codebook_VD.shape[1] == D
    require_fit(fits and offset_NLC.shape == (N, L, C), "codes, offset or taps", tokens_Bhw, codes_NLD, offset_NLC)
    arrays = (tokens_Bhw, codebook_VD, *y_taps, *x_taps, positions_LC, codes_NLD, offset_NLC)
    return make_launch("next_inputs", (L, B, 1), 128, arrays, h, w, new_w, N // B)


def gather_rows(source: DeviceArray, rows: DeviceArray, target: DeviceArray) -> Launch:
    """target[k, i] = source[k, rows[i]] for every k and i.

    source: (K, M, …) float32. target: (K, R, …) float32, with rows of the same shape. rows: (R,) int32.
    """
    fits = _same_tables(source, target) and rows.shape == target.shape[1:2]
    require_fit(fits, "rows", source, rows, target)
    columns = target[0][0].size
    grid = (-(-columns // 4096), target.shape[1], len(target))
    return make_launch("gather_rows", grid, 256, (source, rows, target), columns, source.shape[1])


def scatter_rows(source: DeviceArray, rows: DeviceArray, target: DeviceArray) -> Launch:
    """target[k, rows[i]] = source[k, i] for every k and every i below R.

    source: (K, M, …) float32 with M ≥ R. target: (K, T, …) float32, with rows of the same shape. rows: (R,) int32, all
    different.
    """
    fits = _same_tables(source, target) and len(rows.shape) == 1 and 0 < rows.shape[0] <= source.shape[1]
    require_fit(fits, "rows", source, rows, target)
    columns = target[0][0].size
    grid = (-(-columns // 4096), len(rows), len(target))
    return make_launch("scatter_rows", grid, 256, (source, rows, target), columns, source.shape[1], target.shape[1])


def to_uint8(
    image_BCHW: DeviceArray,
    pixels_BHWC: DeviceArray,
    status: DeviceArray,
    value_range: tuple[float, float] = (-1.0, 1.0),
) -> Launch:
    """Pixels (B, H, W, 3) uint8 of decoder output (B, 3, H, W) float32, as `pixels.to_uint8` computes them.

    NaN and infinities become 0 and set the status.
    """
    B, channels, H, W = image_BCHW.shape
    require_fit(channels == 3 and pixels_BHWC.shape == (B, H, W, 3), "pixels", image_BCHW, pixels_BHWC)
    low, high = value_range
    gain = np.float32(255 / (high - low))
    shift = np.float32(low) * gain
    arrays = (image_BCHW, pixels_BHWC, status)
    return make_launch("to_uint8", (-(-H * W // 1024), B, 1), 256, arrays, H * W, float(gain), float(shift))


def draws(streams: DeviceArray, out_BL: DeviceArray, *, scale: int) -> Launch:
    """The 24-bit draws (B, L) uint32 of one scale, as `noise.draws` computes them.

    Only checks run it.
    """
    B, L = out_BL.shape
    require_fit(streams.shape == (stream_words(B),), "streams", streams, out_BL)
    return make_launch("draws", (-(-B * L // 256), 1, 1), 256, (streams, out_BL), B * L, L, scale)


def _same_tables(source: DeviceArray, target: DeviceArray) -> bool:
    """Whether two arrays (K, rows, …) have the same K and rows of the same shape."""
    return len(source) == len(target) and source.shape[2:] == target.shape[2:]


def _threads(vocabulary: int) -> int:
    return min(-(-vocabulary // 32) * 32, MOST_THREADS)


def kernel_source() -> str:
    """The text of `kernels.cu` and of what it needs."""
    return read_sources("common.cu", "kernels.cu")
