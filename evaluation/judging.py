"""Judges pictures in memory: the share whose class is recognised, and the Fréchet distance to a reference."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from flexvar_runtime.errors import InvalidInput

from .features import SHARD_SIZE, LoadedFeatures
from .network.contract import Head
from .network.features import FeatureNetwork
from .pictures import Pixels
from .reference import Reference
from .scoring import require_network
from .statistics.frechet import frechet_distance
from .statistics.inception_score import class_probabilities, recognised
from .statistics.moments import moments_of

Labels = NDArray[np.int64]


def features_of(network: FeatureNetwork, pixels: Pixels, labels: Labels | None = None) -> LoadedFeatures:
    """The pool features of pictures (N, H, W, 3) uint8, N at least 2. Spatial features are left out.

    labels: (N,) int64, classes of the network, or None if they are not known. Raises InvalidInput.
    """
    classes = None if labels is None else network.head.weights.shape[1]
    blocks = [network.features(pixels[i : i + SHARD_SIZE]).pool for i in range(0, len(pixels), SHARD_SIZE)]
    pool = np.concatenate(blocks)
    return LoadedFeatures(pool, moments_of([pool]), None, labels, network.identity, classes)


def first_of(features: LoadedFeatures, count: int) -> LoadedFeatures:
    """The features of the first `count` pictures alone, at least 2, without the spatial ones."""
    pool, labels = features.pool[:count], features.labels
    own = None if labels is None else labels[:count]
    return LoadedFeatures(pool, moments_of([pool]), None, own, features.network, features.classes)


def recognised_share(features: LoadedFeatures, head: Head) -> float:
    """The share of pictures whose most likely class is their label. Raises InvalidInput if labels are not known."""
    if features.labels is None:
        got = "The labels of the pictures are not known."
        raise InvalidInput(got, expected="labels", fix="Pass the labels with the pictures.")
    return recognised(class_probabilities([features.pool], head.weights, head.bias), features.labels)


def distance_to(reference: Reference, features: LoadedFeatures) -> float:
    """The Fréchet distance between features and a reference. Raises InvalidInput if their networks differ."""
    require_network(features.network, reference)
    return frechet_distance(features.moments, reference.moments)
