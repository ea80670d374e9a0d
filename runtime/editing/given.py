"""The given tokens of an edit: the picture's own tokens at every scale, and which of them are kept.

The rules are those of `flexvar_ref.editing`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ..model.resize import area_matrix
from ..model.schedule import ScaleSchedule
from ..model.tables import Tables
from ..request import Given

Tokens = NDArray[np.int32]
Float32 = NDArray[np.float32]
Mask = NDArray[np.bool_]


def refined(tables: Tables, latent_BDhw: Float32, schedule: ScaleSchedule, forced: int) -> Given:
    """Given tokens that keep all of the first `forced` scales and nothing of the others."""
    tokens = tuple(tables.quantize(latent_BDhw, size) for size in schedule)
    return Given(tokens, tuple(np.full(scale.shape, i < forced) for i, scale in enumerate(tokens)))


def masked(tables: Tables, latent_BDhw: Float32, mask_BHW: Mask, schedule: ScaleSchedule) -> Given:
    """Given tokens that keep the part of the image outside a mask of pixels, true where it is generated."""
    kept = np.float32(1) - _share(mask_BHW, latent_BDhw.shape[2:]).astype(np.float32)
    tokens = tuple(tables.quantize(latent_BDhw, size, kept) for size in schedule)
    return Given(tokens, keep_maps(mask_BHW, schedule))


def keep_maps(mask_BHW: Mask, schedule: Sequence[tuple[int, int]] | ScaleSchedule) -> tuple[Mask, ...]:
    """Masks (B, h, w) of the tokens that are kept, one for each scale.

    A token is kept if at most half of it is masked. In the last scale it is kept if nothing of it is masked.
    """
    last = len(schedule) - 1
    return tuple(_share(mask_BHW, size) <= (0.5 if i < last else 0.0) for i, size in enumerate(schedule))


def _share(mask_BHW: Mask, size: tuple[int, ...]) -> NDArray[np.float64]:
    """Masked share of every cell of an (h, w) grid. It is a ratio of whole numbers, so one half is exact."""
    rows, columns = (area_matrix(side, cells) > 0 for side, cells in zip(mask_BHW.shape[1:], size, strict=True))
    counts = rows.astype(np.float64) @ mask_BHW.astype(np.float64) @ columns.T.astype(np.float64)
    share: NDArray[np.float64] = counts / (rows.sum(1)[:, None] * columns.sum(1)[None, :])
    return share
