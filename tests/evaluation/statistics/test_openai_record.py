"""The figures are those of OpenAI's evaluator. Each comparison fails for a mistake that is easily made."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from graphdef_file import inception
from numpy.typing import NDArray

from flexvar_evaluation.statistics.distances import Rounding
from flexvar_evaluation.statistics.frechet import frechet_distance
from flexvar_evaluation.statistics.inception_score import class_probabilities, inception_score
from flexvar_evaluation.statistics.manifold import precision_recall, radii
from flexvar_evaluation.statistics.moments import moments_of

Features = NDArray[np.float32]
Record = dict[str, Any]


@pytest.fixture(scope="module")
def weights() -> Features:
    """The weights of the classes of the recorded network, (2048, 1008)."""
    [node] = [node for node in inception().nodes if node.name == "softmax/weights"]
    return np.frombuffer(node.attributes["value"][-2048 * 1008 * 4 :], np.float32).reshape(2048, 1008)


def test_fid(record: Record, reference: Features, samples: Features) -> None:
    """The evaluator computes the mean in float32, which makes 1e-8 of the difference."""
    a, b = moments_of([samples]), moments_of([reference])
    distance, recorded = frechet_distance(a, b), pytest.approx(float(record["fid"]), rel=1e-6)
    assert distance == recorded
    # with a covariance that divides by n instead of n - 1, by the formula of FID
    traces = np.trace(a.covariance), np.trace(b.covariance)
    means = ((a.mean - b.mean) ** 2).sum()
    root, ratio = (means + sum(traces) - distance) / 2, 5999 / 6000
    assert means + ratio * traces[0] + traces[1] - 2 * ratio**0.5 * root != recorded


@pytest.mark.slow
def test_fid_of_singular_covariances(record: Record, reference: Features, samples: Features) -> None:
    """The evaluator's root of a product of singular matrices is 4.2e-5 off, and so is ours."""
    distance = frechet_distance(moments_of([samples[:1500]]), moments_of([reference[:1500]]))
    assert distance == pytest.approx(float(record["fid_singular"]), abs=1e-5)


@pytest.mark.parametrize(("name", "split_size"), [("is", 5000), ("is_4000", 4000)])
def test_inception_score(record: Record, samples: Features, weights: Features, name: str, split_size: int) -> None:
    probabilities = list(class_probabilities([samples], weights))
    recorded = pytest.approx(float(record[name]), rel=1e-6)
    assert inception_score(probabilities, split_size) == recorded
    assert inception_score(probabilities, 9000 - split_size) != recorded
    by_class = np.argsort(np.arange(6000) % 1000, kind="stable")
    assert inception_score([np.concatenate(probabilities)[by_class]], split_size) != recorded


def test_inception_score_is_without_biases(record: Record, samples: Features, weights: Features) -> None:
    biases = np.random.default_rng(0).standard_normal(1008).astype(np.float32)
    score = inception_score(class_probabilities([samples], weights, biases))
    assert score != pytest.approx(float(record["is"]), rel=1e-3)


@pytest.mark.parametrize(
    ("name", "rounding", "references", "count"),
    [("pr", "half", 1500, 3000), ("pr32", "float32", 1500, 3000), ("pr32_big", "float32", 2000, 6000)],
)
def test_precision_and_recall(
    record: Record, reference: Features, samples: Features, name: str, rounding: Rounding, references: int, count: int
) -> None:
    """Half precision: TensorFlow adds the products in another order, which moves one image of 3,000 to the outside."""
    sets = reference[:references], samples[:count]
    own, other = radii(sets[0], rounding), radii(sets[1], rounding)
    recorded = pytest.approx(record[name].tolist(), abs=1e-3 if rounding == "half" else 1e-12)
    precision, recall = precision_recall(sets[0], own, sets[1], other, rounding)
    assert [precision, recall] == recorded
    assert [recall, precision] != recorded


def test_the_roundings_differ_in_the_record(record: Record) -> None:
    """So the tolerance of the test above tells them apart."""
    assert record["pr32"].tolist() != pytest.approx(record["pr"].tolist(), abs=1e-3)
