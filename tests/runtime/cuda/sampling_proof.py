"""Rows of every kind for the proof of `sample_rows`, and mutants of the kernel that the proof must notice.

As a program it prints {mutant: noticed} as JSON. Every mutant runs in its own process, because a wrong kernel may
access any memory. It forks, so it cannot run in pytest's process, which has threads.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import resource
import sys
import traceback
from pathlib import Path
from typing import Any

import numpy as np
from host_kernels import HostKernels, KernelFailed, device_array
from numpy.typing import NDArray

from flexvar_runtime.cuda import kernels
from flexvar_runtime.cuda.kernels import STATUS_WORDS, KernelConfig, Refusal, kernel_source, read_status, stream_block
from flexvar_runtime.model import noise, sampling

Float32 = NDArray[np.float32]
SEED, SCALE = 0x9E3779B97F4A7C15, 3
INF = np.inf


def config(vocabulary: int) -> KernelConfig:
    return KernelConfig(vocabulary=vocabulary, code_dim=8, width=16)


def make_rows(seed: int, B: int, L: int, V: int) -> Float32:
    """Ten kinds of rows in turn: spread, flat, many ties, masked, all equal, one finite, steep, far from 0, zeros."""
    rng = np.random.default_rng(seed)
    rows = (rng.standard_normal((B * L, V)) * 3).astype(np.float32)
    for i, row in enumerate(rows):
        match i % 10:
            case 2:
                row *= np.float32(0.01)
            case 3:
                row[:] = np.round(row * 2) / 2
            case 4:
                row[1:][rng.random(V - 1) < 0.7] = -INF
            case 5:
                row[:] = np.float32(-7.25)
            case 6:
                row[:] = -INF
                row[rng.integers(V)] = -1e30
            case 7:
                row *= 20
            case 8:
                row += np.float32(3000)  # floats are 2**-12 apart here, which gives ties and equal differences
            case 9:
                row[:] = rng.integers(-1, 1, V) * np.float32(0.0)  # 0 and -0 are equal
    return rows.reshape(B, L, V)


def seeds_of(images: list[int]) -> list[int]:
    """A seed for each image, all different. The first is SEED."""
    return [SEED - i for i in range(len(images))]


def host_tokens(
    logits_BLV: Float32, images: list[int], top_k: int, top_p: float, scale: int = SCALE, *, one_seed: bool = False
) -> Any:
    B, L, V = logits_BLV.shape
    seeds = [SEED] * B if one_seed else seeds_of(images)
    draws = np.concatenate([noise.draws(seed, index, scale, L) for seed, index in zip(seeds, images, strict=True)])
    return sampling.sample(logits_BLV.reshape(B * L, V), draws, top_k=top_k, top_p=top_p).reshape(B, L)


def option_words(top_k: int, top_p: float, vocabulary: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """top_k and top_p in memory, as the kernel reads them."""
    return (
        np.array([kernels.top_k_option(top_k, vocabulary)], np.int32),
        np.array([kernels.drop_option(top_p)], np.float64),
    )


def kernel_tokens(
    host: HostKernels,
    logits_BLV: Float32,
    images: list[int],
    top_k: int,
    top_p: float,
    *,
    scale: int = SCALE,
    order: int = 0,
    one_seed: bool = False,
) -> tuple[NDArray[np.int32], Refusal | None]:
    B, L, V = logits_BLV.shape
    guarded = np.full((B + 2, L), -1, np.int32)
    status = np.zeros(STATUS_WORDS, np.uint32)
    streams = stream_block([SEED] * B if one_seed else seeds_of(images), images)
    arrays = logits_BLV, streams, guarded[1:-1], status, *option_words(top_k, top_p, V)
    launch = kernels.sample_rows(*map(device_array, arrays), scale=scale)
    host.run(launch, order=order)
    assert (guarded[[0, -1]] == -1).all()  # nothing is written outside the tokens
    return guarded[1:-1], read_status(status)


def row_on_a_boundary(V: int, image: int) -> tuple[Float32, int]:
    """(1, 1, V) logits whose first draw equals a cumulative weight exactly, and the token that the draw must give.

    The first codes have weights with the sum A = floor(u * (A + 2**40)). The top code is the last.
    """
    u = float(noise.uniforms(SEED, image, SCALE, 1)[0])
    left = math.floor(u * 2**40 / (1 - u))
    while math.floor(u * float(left + 2**40)) != left:
        left -= 1
    assert left < 2**40
    row, code = np.full(V, -INF, np.float32), 0
    row[-1] = 0
    while left:
        row[code] = math.log(left / 2**40) * (1 - 1e-6)
        while (weight := int(sampling._scaled_exp(row[code : code + 1])[0])) > left:
            row[code] = np.nextafter(row[code], np.float32(-INF))
        left, code = left - weight, code + 1
    return row.reshape(1, 1, V), V - 1


def mutated(old: str, new: str, source: str | None = None) -> str:
    source = kernel_source() if source is None else source
    assert source.count(old) == 1, (source.count(old), old)
    return source.replace(old, new)


MUTATIONS = {
    "equal weights are dropped whatever their place": ("&& place < (int)(bound", "&& place >= (int)(bound"),
    "ties at the threshold are dropped": ("kept += (u32)__popc(__ballot_sync(ALL_LANES, (u32)ranks[i] >= threshold))",
                                          "kept += (u32)__popc(__ballot_sync(ALL_LANES, (u32)ranks[i] > threshold))"),
    "counter words swapped": ("c0 = position, c1 = scale", "c0 = scale, c1 = position"),
    "key words swapped": ("k0 = streams[4 * image], k1 = streams[4 * image + 1]",
                          "k0 = streams[4 * image + 1], k1 = streams[4 * image]"),
    "every image takes the first seed": ("k0 = streams[4 * image],", "k0 = streams[0],"),
    "a draw of 32 bits": ("return c0 >> 8;", "return c0;"),
    "bins are not emptied": ("s->bins[i / BINS][i % BINS] = 0;", ";"),
    "-0 below 0": ("key_of(__fadd_rn(value, 0.0f))", "key_of(value)"),
    "the top token can be dropped": ("if (limit >= sum) limit = sum - 1;", "if (limit >= sum) limit = sum;"),
    "top-k takes one less": ("(u64)(VOCABULARY - top_k)", "(u64)(VOCABULARY - top_k + 1)"),
    "a limb is lost": ("limb < LIMBS; limb++", "limb < LIMBS - 1; limb++"),
    "a draw on a boundary stays": ("__ballot_sync(ALL_LANES, cumulative > target)",
                                   "__ballot_sync(ALL_LANES, cumulative >= target)"),
    "bit by bit starts too low": ("weighted ? WEIGHT_BITS : 31)", "weighted ? WEIGHT_BITS - 1 : 31)"),
    "one array for all sums": ("block_sum(s, below, bit & 1)", "block_sum(s, below, 0)"),
    "no candidates beyond the first warp": ("c < count; c += BLOCK", "c < min(count, 32u); c += BLOCK"),
}  # fmt: skip


RIGHT, BARRIER = "as it is", "__syncthreads();"


def disagrees(host: HostKernels) -> bool:
    """Whether a row gets another token than on the host, or the kernel fails."""
    ties = np.tile(np.array([0.0] * 3 + [-1.0] * 250 + [-2.0] * 259, np.float32), (1, 5, 1))
    zeros = np.tile(np.array([0.0, -0.0] * 256, np.float32), (1, 4, 1))
    dense = (np.random.default_rng(0).standard_normal((1, 4, 512)) * 0.4).astype(np.float32)
    boundary, _ = row_on_a_boundary(512, image=5)
    logits = np.concatenate([boundary, make_rows(3, 1, 10, 512), ties, zeros, dense, 10 * dense], axis=1)
    logits, images = logits.reshape(2, 14, 512), [5, 6]
    steps = np.linspace(0.1, 0.9, 3)
    choices = [(0, 0.0), (0, 1e-300), (1, 0.5), *((k, float(p)) for k in (0, 2, 50, 129, 400) for p in steps)]
    for order, (top_k, top_p) in itertools.product(range(3), choices):
        try:
            tokens, _ = kernel_tokens(host, logits, images, top_k, top_p, order=order)
        except KernelFailed:
            return True
        if not np.array_equal(tokens, host_tokens(logits, images, top_k, top_p)):
            return True
    return False


def mutants() -> dict[str, str]:
    """Name to source of every mutant. The first one is the right source."""
    sources = {RIGHT: kernel_source()}
    sources |= {name: mutated(old, new) for name, (old, new) in MUTATIONS.items()}
    parts = kernel_source().split(BARRIER)
    for i in range(1, len(parts)):
        sources[f"barrier {i} removed"] = BARRIER.join(parts[:i]) + ";" + BARRIER.join(parts[i:])
    return sources


def run_apart(host: HostKernels) -> bool:
    """`disagrees` in a child process. A crash counts as true."""
    child = os.fork()
    if child == 0:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        try:
            os._exit(int(disagrees(host)))
        except BaseException:
            traceback.print_exc()
            os._exit(2)
    _, status = os.waitpid(child, 0)
    if os.WIFEXITED(status) and os.WEXITSTATUS(status) not in (0, 1):
        raise RuntimeError("the proof itself failed")
    return status != 0


if __name__ == "__main__":
    found = {}
    for number, (name, source) in enumerate(mutants().items()):
        host = HostKernels(config(512), Path(sys.argv[1]) / str(number), block=128, source=source, level="-O0")
        found[name] = run_apart(host)
    print(json.dumps(found))
