"""Laws of the inception score, and the share of recognised images."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from flexvar_evaluation.statistics.inception_score import class_probabilities, inception_score, recognised
from flexvar_runtime.errors import InvalidInput

CLASSES = 10


@pytest.fixture
def probabilities() -> NDArray[np.float32]:
    random = np.random.default_rng(0)
    features = random.standard_normal((1300, 6)).astype(np.float32)
    return np.concatenate([*class_probabilities([features], random.standard_normal((6, CLASSES)).astype(np.float32))])


def test_softmax() -> None:
    random = np.random.default_rng(0)
    features, weights = (random.standard_normal(shape).astype(np.float32) for shape in ((1300, 6), (6, CLASSES)))
    biases = random.standard_normal(CLASSES).astype(np.float32)
    powers = np.exp(features.astype(np.float64) @ weights + biases)
    blocks = [*class_probabilities(np.split(features, [7, 900]), weights, biases)]
    assert [len(block) for block in blocks] == [512, 512, 276]
    np.testing.assert_allclose(np.concatenate(blocks), powers / powers.sum(1, keepdims=True), rtol=1e-5)


def test_large_logits_do_not_overflow() -> None:
    [block] = class_probabilities([np.array([[1000]], np.float32)], np.array([[1, -1]], np.float32))
    assert block.tolist() == [[1, 0]]


def test_certain_and_varied_images_score_the_number_of_classes() -> None:
    """Every other probability is 0, where OpenAI's evaluator returns NaN."""
    certain = np.eye(CLASSES, dtype=np.float32)
    assert inception_score([certain]) == pytest.approx(CLASSES, rel=1e-6)


@pytest.mark.parametrize("row", [np.full(CLASSES, 0.1), np.eye(CLASSES)[3]], ids=["undecided", "one class"])
def test_images_that_do_not_vary_score_1(row: NDArray[np.float64]) -> None:
    assert inception_score([np.tile(row.astype(np.float32), (50, 1))]) == pytest.approx(1, rel=1e-5)


def test_the_last_split_counts_as_much_as_the_others(probabilities: NDArray[np.float32]) -> None:
    parts = [inception_score([probabilities[i : i + 500]]) for i in (0, 500, 1000)]
    assert inception_score(np.split(probabilities, [3, 777]), 500) == pytest.approx(np.mean(parts), rel=1e-6)


def test_blocks_of_the_caller_do_not_matter(probabilities: NDArray[np.float32]) -> None:
    assert inception_score([probabilities], 500) == inception_score(np.split(probabilities, range(1, 1300, 9)), 500)


def test_recognised(probabilities: NDArray[np.float32]) -> None:
    labels = probabilities.argmax(1)
    assert recognised([probabilities], labels) == 1
    assert recognised([probabilities], (labels + 1) % CLASSES) == 0
    labels[:130] = (labels[:130] + 1) % CLASSES
    assert recognised(np.split(probabilities, [77]), labels) == pytest.approx(0.9)


def test_no_images_or_other_labels_are_refused(probabilities: NDArray[np.float32]) -> None:
    with pytest.raises(InvalidInput):
        inception_score([])
    with pytest.raises(InvalidInput):
        recognised([], np.zeros(0, np.int64))
    with pytest.raises(InvalidInput, match="1299"):
        recognised([probabilities], np.zeros(1299, np.int64))
