"""Masks, and what is measured by comparing pixels."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..pictures import Pixels

Mask = NDArray[np.bool_]
EXACT = 99.0
"""The PSNR of equal pictures, in dB."""


def psnr(one: Pixels, other: Pixels) -> float:
    """PSNR of two arrays of one shape in dB, with a peak of 255."""
    error = float(((one.astype(np.float64) - other.astype(np.float64)) ** 2).mean())
    return EXACT if error == 0 else 10 * math.log10(255**2 / error)


def centred_hole(height: int, width: int) -> Mask:
    """A mask (height, width) with a centred hole of half the height and half the width."""
    mask = np.zeros((height, width), bool)
    mask[height // 4 : 3 * height // 4, width // 4 : 3 * width // 4] = True
    return mask


def seam(images: Pixels, mask: Mask) -> float:
    """The mean absolute difference between neighbouring pixels across the edge of a mask, of images (N, H, W, 3)."""
    values = images.astype(np.float64)
    across = [
        np.abs(np.diff(values, axis=axis))[:, np.diff(mask.astype(np.int8), axis=axis - 1) != 0] for axis in (1, 2)
    ]
    return float(np.concatenate([part.reshape(-1) for part in across]).mean())


def beyond(mask: Mask, feather: int) -> Mask:
    """A mask of the pixels farther than `feather` from a rectangular mask."""
    far = np.ones_like(mask)
    ranges = []
    for axis in (1, 0):
        inside = np.where(mask.any(axis))[0]
        ranges.append(slice(max(0, int(inside[0]) - feather), int(inside[-1]) + feather + 1))
    far[tuple(ranges)] = False
    return far


def resized(images: Pixels, size: tuple[int, int], how: Image.Resampling) -> Pixels:
    """Images (N, H, W, 3) scaled to `size` (height, width)."""
    height, width = size
    return np.stack([np.asarray(Image.fromarray(image).resize((width, height), how)) for image in images])
