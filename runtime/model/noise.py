"""Random numbers as data: the draw of every token is a pure function of (seed, image, scale, position).

Philox4x32-10 is a counter-based generator (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011):
ten rounds of integer arithmetic turn a 128-bit counter and a 64-bit key into 128 random bits. There is no state, so a
draw does not depend on the batch, the order of evaluation or the machine, and any image can be generated again alone.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..checks import check_index, check_seed, check_whole

DRAW_BITS = 24  # a draw plus one half is exact in float32 and in float64

_ROUNDS = 10
_MULTIPLIERS = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_KEY_STEPS = np.uint64(0x9E3779B9), np.uint64(0xBB67AE85)
_WORD, _LOW = np.uint64(32), np.uint64(0xFFFFFFFF)


def fresh_seed() -> int:
    """A new 64-bit seed from the operating system's entropy."""
    return int.from_bytes(os.urandom(8))


def philox4x32(counter: ArrayLike, key: ArrayLike) -> NDArray[np.uint32]:
    """Philox4x32-10 on arrays.

    counter: (..., 4) uint32, key: (..., 2) uint32, low word first; leading axes broadcast. Returns (..., 4) uint32.
    """
    # 32-bit words held in uint64: a product of two words fits, so nothing overflows
    c0, c1, c2, c3 = np.moveaxis(np.asarray(counter, dtype=np.uint32).astype(np.uint64), -1, 0)
    k0, k1 = np.moveaxis(np.asarray(key, dtype=np.uint32).astype(np.uint64), -1, 0)
    for _ in range(_ROUNDS):
        product0, product1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (product1 >> _WORD) ^ c1 ^ k0, product1 & _LOW, (product0 >> _WORD) ^ c3 ^ k1, product0 & _LOW
        k0, k1 = (k0 + _KEY_STEPS[0]) & _LOW, (k1 + _KEY_STEPS[1]) & _LOW
    return np.stack([c0, c1, c2, c3], axis=-1).astype(np.uint32)


def draws(seed: int, image_index: int, scale: int, positions: int) -> NDArray[np.uint32]:
    """The 24-bit draws of one scale of one image: (positions,) uint32, each from 0 to 2**24 - 1.

    The key is the seed, low word first. The counter is (position in the scale, scale index, low word of the image
    index, high word). A draw is the upper 24 bits of the first output word. Raises InvalidInput for a number out of its
    range.
    """
    seed, image_index = check_seed(seed), check_index(image_index)
    scale = check_whole("scale", scale, 0, 2**32 - 1)
    counter = np.empty((check_whole("positions", positions, 0, 2**32), 4), dtype=np.uint32)
    counter[:, 0] = np.arange(positions)
    counter[:, 1:] = scale, image_index & 0xFFFFFFFF, image_index >> 32
    return philox4x32(counter, (seed & 0xFFFFFFFF, seed >> 32))[:, 0] >> np.uint32(32 - DRAW_BITS)


def draws_of_images(seeds: Sequence[int], indices: Sequence[int], scale: int, positions: int) -> NDArray[np.uint32]:
    """`draws` of one scale for several images, (images · positions,). seeds, indices: one of each for every image."""
    return np.concatenate([draws(*stream, scale, positions) for stream in zip(seeds, indices, strict=True)])


def to_uniform(draw: NDArray[Any]) -> NDArray[np.float64]:
    """The uniform number of each 24-bit draw: (draw + 1/2) * 2**-24, strictly between 0 and 1, exact in float64."""
    return (draw.astype(np.float64) + 0.5) * 2.0**-DRAW_BITS


def uniforms(seed: int, image_index: int, scale: int, positions: int) -> NDArray[np.float64]:
    """(positions,) float64, strictly between 0 and 1: `to_uniform` of `draws` with the same arguments."""
    return to_uniform(draws(seed, image_index, scale, positions))
