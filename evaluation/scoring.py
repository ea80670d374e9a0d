"""The metrics of a set of images against a reference, and the comparison of two runs."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from flexvar_runtime.errors import InvalidInput

from .features import LoadedFeatures
from .kept_radii import kept_radii
from .network.contract import Head
from .reference import Reference
from .statistics.distances import Rounding
from .statistics.frechet import frechet_distance
from .statistics.inception_score import SPLIT, class_probabilities, inception_score, recognised
from .statistics.intervals import Interval, RunInfluences, difference_of, expected_fid, influences_of, limit_fid
from .statistics.manifold import precision_recall

LIMIT_IMAGES = 20
"""Images for each feature from which the estimate for infinitely many images is reliable."""

Advance = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Metrics:
    """The metrics of a set of images.

    fid: with its 95 % confidence interval at this number of images. fid_infinity: the estimate of FID with infinitely
    many images; None if there are fewer than 20 images for each feature. sfid: None if the network has no spatial
    features. inception_score, recognised: None if the network has no classes, or, for `recognised`, if they are not
    those of the model. precision, recall: rounded to half precision as in OpenAI's evaluator; the others are not.
    """

    images: int
    fid: Interval
    fid_infinity: Interval | None
    sfid: float | None
    inception_score: float | None
    precision: float
    recall: float
    precision_float32: float
    recall_float32: float
    recognised: float | None


def metrics_of(
    features: LoadedFeatures,
    reference: Reference,
    influences: RunInfluences,
    advance: Advance = lambda message: None,
    work: Path | None = None,
) -> Metrics:
    """All metrics. influences: of `influences_on_fid`. advance: called after each of STEPS steps.

    work: a folder that keeps intermediate results of precision and recall.
    """
    images = len(features.pool)
    advance("FID")
    sfid = None
    if features.spatial is not None and reference.spatial is not None:
        sfid = frechet_distance(features.spatial, reference.spatial)
    advance("sFID")
    score, share = _of_classes(features, reference.head)
    advance("inception score")
    shares = list[float]()
    roundings: tuple[tuple[Rounding, NDArray[np.float32]], ...] = (
        ("half", reference.radii_half),
        ("float32", reference.radii_float32),
    )
    for rounding, own in roundings:
        found = kept_radii(work, features.pool, rounding)
        shares += precision_recall(reference.pool, own, features.pool, found, rounding)
        advance(f"precision and recall, {rounding}")
    return Metrics(
        images=images,
        fid=expected_fid(influences),
        fid_infinity=limit_fid(influences) if images >= LIMIT_IMAGES * features.pool.shape[1] else None,
        sfid=sfid,
        inception_score=score,
        precision=shares[0],
        recall=shares[1],
        precision_float32=shares[2],
        recall_float32=shares[3],
        recognised=share,
    )


STEPS = 5
"""How often `metrics_of` calls `advance`."""


def _of_classes(features: LoadedFeatures, head: Head | None) -> tuple[float | None, float | None]:
    """The inception score, and the share of images whose class is recognised."""
    if head is None:
        return None, None
    score = inception_score(class_probabilities(iter([features.pool]), head.weights, head.bias), SPLIT)
    labels = features.labels
    if labels is None or features.classes != head.weights.shape[1]:  # the network has other classes
        return score, None
    return score, recognised(class_probabilities(iter([features.pool]), head.weights, head.bias), labels)


def influences_on_fid(features: LoadedFeatures, reference: Reference) -> RunInfluences:
    """FID and the influence of each image on it. Without labels, all images count as one class.

    Raises InvalidInput if the features and the reference are of different networks.
    """
    require_network(features.network, reference)
    classes = np.zeros(len(features.pool), np.int64) if features.labels is None else features.labels
    return influences_of(features.pool, classes, features.moments, reference.moments)


@dataclass(frozen=True, kw_only=True)
class Paired:
    """The difference in FID between two runs with the same classes and seeds: the first minus the second.

    difference: with its 95 % confidence interval. unpaired_width: the width of the interval if the runs had nothing in
    common.
    """

    images: int
    difference: Interval
    unpaired_width: float

    @property
    def significant(self) -> bool:
        """Whether the interval leaves out 0."""
        return not self.difference.low <= 0 <= self.difference.high


def compare(first: RunInfluences, second: RunInfluences) -> Paired:
    """Compare two runs with the same classes and seeds image by image. Raises InvalidInput if their classes differ."""
    alone = expected_fid(first), expected_fid(second)
    return Paired(
        images=len(first.values),
        difference=expected_fid(difference_of(first, second)),
        unpaired_width=math.hypot(*(each.high - each.low for each in alone)),
    )


def require_network(identity: str, reference: Reference) -> None:
    """Raise InvalidInput unless a network with this identity computed the reference."""
    if identity != reference.facts.network:
        raise InvalidInput(
            f"The features come from the network {_short(identity)}, but the reference from "
            f"{_short(reference.facts.network)}.",
            expected="features of one network",
            fix="Pass a --reference that was made with the network of the features.",
        )


def _short(network: str) -> str:
    """The name of a network and the hash of its file."""
    name, _, digest = network.rpartition(":")
    return f"{name.split(':')[0]} ({digest})"
