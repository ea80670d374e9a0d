"""Blocks of rows. The metrics read features block by block, so that they never hold all of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
from numpy.typing import NDArray

from flexvar_runtime.checks import invalid


def regroup(blocks: Iterable[NDArray[np.float32]], rows: int) -> Iterator[NDArray[np.float32]]:
    """Yield the same rows in the same order, in blocks of exactly `rows`. The last block may be shorter.

    A metric that regroups first does not depend on how the caller cut the blocks.
    blocks: (any, D) float32. Raises InvalidInput for other shapes, other dtypes and blocks of different widths.
    """
    held: list[NDArray[np.float32]] = []
    missing, width = rows, None
    for block in blocks:
        if block.ndim != 2 or block.dtype != np.float32 or block.shape[1] != (width or block.shape[1]):
            found = f"a block of features has shape {block.shape} and type {block.dtype}"
            raise invalid(found, f"float32 of shape (images, {width or 'D'})", "Pass features of one network.")
        width = block.shape[1]
        while len(block) >= missing:
            held.append(block[:missing])
            yield _joined(held)
            block, held, missing = block[missing:], [], rows
        if len(block):
            held.append(block)
            missing -= len(block)
    if held:
        yield _joined(held)


def _joined(parts: list[NDArray[np.float32]]) -> NDArray[np.float32]:
    return parts[0] if len(parts) == 1 else np.concatenate(parts)
