"""FID: the Fréchet distance between the Gaussians of two sets of features, and what each image adds to it.

Heusel et al., "GANs trained by a two time-scale update rule converge to a local Nash equilibrium", 2017, equation 6.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from flexvar_runtime.checks import invalid

from .blocks import regroup
from .moments import Moments
from .threads import fixed_threads

ROWS = 1_000
"""Images whose influence is computed at a time."""


@fixed_threads()
def frechet_distance(a: Moments, b: Moments) -> float:
    """|m_a - m_b|² + tr(C_a + C_b - 2 (C_a C_b)^½), with means m and covariances C. It is never negative.

    Raises InvalidInput for different widths.
    """
    _check_widths(a, b)
    difference = a.mean - b.mean
    overlap = _trace_of_root(a.covariance, b.covariance)
    distance = difference @ difference + np.trace(a.covariance) + np.trace(b.covariance) - 2.0 * overlap
    return max(float(distance), 0.0)


def _trace_of_root(first: NDArray[np.float64], second: NDArray[np.float64]) -> float:
    """The trace of (C_a C_b)^½.

    It is the sum of the roots of the eigenvalues of R^T C_b R, where R R^T = C_a. If a covariance is singular, because
    there are fewer images than features, OpenAI's evaluator takes the root of rounding errors in place of zeros, which
    makes FID about 1e-4 too small. To give its metrics, the eigenvalues of the product are taken in that case, which
    have errors of the same size.
    """
    varying = (first.diagonal() > 0) & (second.diagonal() > 0)  # the others only add zeros
    first, second = (matrix[np.ix_(varying, varying)] for matrix in (first, second))
    root = _root(first)
    eigenvalues = np.linalg.eigvalsh(_symmetric(root.T @ second @ root))
    if _positive(eigenvalues).sum() == len(first):
        return float(np.sqrt(eigenvalues).sum())
    return float(np.sqrt(np.linalg.eigvals(first @ second).astype(np.complex128)).real.sum())


@dataclass(frozen=True)
class Influence:
    """The derivative of FID with respect to the weight of one image, for a fixed reference.

    An image with features x has the influence gradient·(x - mean) + (x - mean)^T curvature (x - mean) - offset.
    To first order, FID changes by the mean influence of the images when other images of the same distribution are
    drawn. gradient, mean: (D,) float64. curvature: (D, D) float64.
    """

    mean: NDArray[np.float64]
    gradient: NDArray[np.float64]
    curvature: NDArray[np.float64]
    offset: float

    @fixed_threads()
    def values(self, blocks: Iterable[NDArray[np.float32]]) -> NDArray[np.float64]:
        """The influence of every image, (N,) float64. blocks: (any, D) float32, the features of the images."""
        parts = [np.zeros(0)]
        for block in regroup(blocks, ROWS):
            rows = block.astype(np.float64) - self.mean
            parts.append(np.einsum("nd,nd->n", rows @ self.curvature + self.gradient, rows) - self.offset)
        return np.concatenate(parts)


@fixed_threads()
def influence_on(samples: Moments, reference: Moments) -> Influence:
    """The influence of images on the FID of `samples` against `reference`.

    With mean and covariance (m, S) of the reference and (mu, C) of the samples, the gradient is 2 (mu - m) and the
    curvature is I - T. T = S^½ (S^½ C S^½)^(-½) S^½ is the optimal transport from the Gaussian of the samples to that
    of the reference, and I - T is the derivative of FID with respect to C: Takatsu, "Wasserstein geometry of Gaussian
    measures", 2011. Where the covariances are singular, the inverse is the pseudo-inverse.
    Raises InvalidInput for different widths.
    """
    _check_widths(samples, reference)
    root = _root(reference.covariance)
    eigenvalues, vectors = np.linalg.eigh(_symmetric(root.T @ samples.covariance @ root))
    kept = _positive(eigenvalues)
    half = root @ (vectors[:, kept] * eigenvalues[kept] ** -0.25)
    curvature = np.eye(len(samples.mean)) - half @ half.T
    offset = float(np.einsum("ij,ij->", curvature, samples.covariance))
    return Influence(samples.mean, 2.0 * (samples.mean - reference.mean), curvature, offset)


def _root(covariance: NDArray[np.float64]) -> NDArray[np.float64]:
    """R with R R^T = covariance, (D, rank) float64."""
    eigenvalues, vectors = np.linalg.eigh(_symmetric(covariance))
    kept = _positive(eigenvalues)
    return np.asarray(vectors[:, kept] * np.sqrt(eigenvalues[kept]))


def _positive(eigenvalues: NDArray[np.floating]) -> NDArray[np.bool_]:
    """Which ascending eigenvalues are not rounding noise. The threshold is the one of np.linalg.matrix_rank."""
    largest = max(eigenvalues[-1], 0.0) if len(eigenvalues) else 0.0
    return np.asarray(eigenvalues > largest * len(eigenvalues) * np.finfo(np.float64).eps)


def _symmetric(matrix: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray((matrix + matrix.T) / 2)


def _check_widths(a: Moments, b: Moments) -> None:
    if a.mean.shape != b.mean.shape:
        found = f"the widths of the features are {len(a.mean)} and {len(b.mean)}"
        raise invalid(found, "equal", "Use the features of one network for both.")
