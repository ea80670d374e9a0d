"""Precision and recall: the share of images that lie in the manifold of the other set of images.

Kynkäänniemi et al., "Improved precision and recall metric for assessing generative models", 2019, equations 1 and 2.
The manifold of a set is the union of balls around its images. The radius of a ball is the distance to the third nearest
other image. All distances are squared, as in OpenAI's evaluator.

Long searches can be resumed. `add_stripe` returns a small array that a caller can store after each stripe, and `inside`
works on one block of images.
"""

from __future__ import annotations

from functools import partial

import numpy as np
from numpy.typing import NDArray

from flexvar_runtime.checks import invalid

from .distances import Rounding, Tile, blocks_of, each_tile

NEIGHBOUR = 3
"""The radius is the distance to this nearest neighbour. The image itself is neighbour 0."""


def start_nearest(count: int) -> NDArray[np.float32]:
    """The state of a search for the radii of `count` images before its first stripe: (count, 4) float32, infinite.

    Raises InvalidInput for fewer than 4 images: they have no third neighbour.
    """
    if count <= NEIGHBOUR:
        raise invalid(f"the number of images is {count}", f"{NEIGHBOUR + 1} or more", "Pass more images.")
    return np.full((count, NEIGHBOUR + 1), np.inf, np.float32)


def stripes(count: int) -> int:
    """How many stripes a search for the radii of `count` images has. A stripe has up to 10,000 images."""
    return len(blocks_of(count))


def add_stripe(
    nearest: NDArray[np.float32], features: NDArray[np.float32], stripe: int, rounding: Rounding
) -> NDArray[np.float32]:
    """The state of a search for radii after one more stripe. Add every stripe once, in any order.

    The images of the stripe are compared with themselves and with all images after them. A distance counts for both of
    its images, which halves the work. nearest: the state before, which stays as it is. features: (N, D) float32, may
    be mapped from a file. Returns (N, 4) float32, the smallest squared distances found so far for each image.
    """
    nearest = nearest.copy()
    blocks = blocks_of(len(features))
    rows = blocks[stripe]
    own = each_tile(features[rows], features[rows], rounding, _nearest_to_rows)
    nearest[rows] = _smallest(nearest[rows], np.concatenate(own))
    for columns in blocks[stripe + 1 :]:
        pairs = each_tile(features[rows], features[columns], rounding, _nearest_to_both)
        nearest[rows] = _smallest(nearest[rows], np.concatenate([first for first, _ in pairs]))
        nearest[columns] = _smallest(nearest[columns], *(second for _, second in pairs))
    return nearest


def radii_of(nearest: NDArray[np.float32]) -> NDArray[np.float32]:
    """The radii once every stripe was added: (N,) float32, squared distances."""
    return np.asarray(nearest.max(1))


def radii(features: NDArray[np.float32], rounding: Rounding) -> NDArray[np.float32]:
    """The radius of every image of a set: (N,) float32, squared distances. features: (N, D) float32.

    Raises InvalidInput for fewer than 4 images.
    """
    nearest = start_nearest(len(features))
    for stripe in range(stripes(len(features))):
        nearest = add_stripe(nearest, features, stripe, rounding)
    return radii_of(nearest)


def inside(
    reference: NDArray[np.float32],
    reference_radii: NDArray[np.float32],
    samples: NDArray[np.float32],
    sample_radii: NDArray[np.float32],
    rounding: Rounding,
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Which images lie in the manifold of the other set: those of the reference, and those of the samples.

    reference: (R, D), samples: (S, D) float32. The radii: (R,), (S,) float32, squared distances. Returns (R,) and (S,)
    bool. With one block of the samples, from a multiple of 10,000 to the next, the second array is final. The first
    ones of all blocks are to be joined with "or".
    """
    reference_inside, samples_inside = np.zeros(len(reference), np.bool_), np.zeros(len(samples), np.bool_)
    for rows in blocks_of(len(reference)):
        for columns in blocks_of(len(samples)):
            work = partial(_insides, first_radii=reference_radii[rows], second_radii=sample_radii[columns])
            pairs = each_tile(reference[rows], samples[columns], rounding, work)
            reference_inside[rows] |= np.concatenate([first for first, _ in pairs])
            samples_inside[columns] |= np.any([second for _, second in pairs], axis=0)
    return reference_inside, samples_inside


def precision_recall(
    reference: NDArray[np.float32],
    reference_radii: NDArray[np.float32],
    samples: NDArray[np.float32],
    sample_radii: NDArray[np.float32],
    rounding: Rounding,
) -> tuple[float, float]:
    """Precision and recall, each from 0 to 1, in one step. The arguments are those of `inside`.

    Precision is the share of the samples in the manifold of the reference. Recall is the share of the reference in the
    manifold of the samples.
    """
    reference_inside, samples_inside = inside(reference, reference_radii, samples, sample_radii, rounding)
    return float(samples_inside.mean()), float(reference_inside.mean())


def _insides(
    tile: Tile, first_radii: NDArray[np.float32], second_radii: NDArray[np.float32]
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Which images of a tile's rows lie in a ball of the second set, (m,) bool, and the other way, (n,) bool."""
    distances = tile.forward()
    first, second = (distances <= second_radii).any(1), (distances <= first_radii[tile.rows, None]).any(0)
    return np.asarray(first), np.asarray(second)


def _nearest_to_rows(tile: Tile) -> NDArray[np.float32]:
    """The smallest distances of each image of the rows of a tile, (m, 4) float32."""
    return _smallest(tile.forward())


def _nearest_to_both(tile: Tile) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """The smallest distances of each image of the rows of a tile and of the second set: (m, 4), (n, 4) float32."""
    return _smallest(tile.forward()), _smallest(tile.backward().T)


def _smallest(*distances: NDArray[np.float32]) -> NDArray[np.float32]:
    """The four smallest values of each row of all arrays, or all values if there are fewer."""
    joined = np.concatenate(distances, axis=1)
    if joined.shape[1] <= NEIGHBOUR + 1:
        return joined
    return np.partition(joined, NEIGHBOUR, axis=1)[:, : NEIGHBOUR + 1].copy()  # a view would keep all distances
