"""The inception score, and the share of images whose class is recognised. Both read the probabilities of classes.

Salimans et al., "Improved techniques for training GANs", 2016, section 4. As OpenAI's evaluator, this works in float32
and takes the mean over consecutive splits, so the order of the images matters.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
from numpy.typing import NDArray

from flexvar_runtime.checks import invalid

from .blocks import regroup
from .threads import fixed_threads

SPLIT = 5_000
"""Images of one split."""
ROWS = 512
"""Images whose probabilities are computed at a time, as in the evaluator."""


def class_probabilities(
    features: Iterable[NDArray[np.float32]],
    weights: NDArray[np.float32],
    biases: NDArray[np.float32] | None = None,
) -> Iterator[NDArray[np.float32]]:
    """Yield softmax(features @ weights + biases) in blocks of (512, C) float32, the last one perhaps shorter.

    features: (any, D) float32, of the pooling layer. weights: (D, C) float32. biases: (C,) float32; OpenAI's evaluator
    leaves them out.
    """
    for block in regroup(features, ROWS):
        with fixed_threads():
            logits = block @ weights
        if biases is not None:
            logits += biases
        logits -= logits.max(1, keepdims=True)
        np.exp(logits, out=logits)
        logits /= logits.sum(1, keepdims=True)
        yield logits


def inception_score(probabilities: Iterable[NDArray[np.float32]], split_size: int = SPLIT) -> float:
    """The mean over the splits of exp(mean KL divergence of an image's classes from the classes of its split).

    probabilities: (any, C) float32, each row with sum 1, in the order of the images. One split is held at a time.
    split_size: images of a split. The last split may be shorter and counts as much as the others, as in the evaluator.
    A probability that is 0 in float32 adds nothing, which is the limit of p log p. The evaluator would return NaN.
    Raises InvalidInput if there are no images.
    """
    scores = [_split_score(part) for part in regroup(probabilities, split_size)]
    if not scores:
        raise invalid("the number of images is 0", "1 or more", "Pass the probabilities of some images.")
    return float(np.mean(scores))


def recognised(probabilities: Iterable[NDArray[np.float32]], labels: NDArray[np.integer]) -> float:
    """The share of images whose most likely class is their label, from 0 to 1.

    probabilities: (any, C) float32. labels: (N,) integers, the column of `probabilities` that belongs to each image.
    Raises InvalidInput unless there is one label for each image, and at least one image.
    """
    likeliest = np.concatenate([np.zeros(0, np.intp), *(block.argmax(1) for block in probabilities)])
    if len(likeliest) != len(labels) or not len(labels):
        found = f"the number of labels is {len(labels)}"
        raise invalid(found, f"the number of images, {len(likeliest)}, and 1 or more", "Pass one label for each image.")
    return float(np.mean(likeliest == labels))


def _split_score(part: NDArray[np.float32]) -> np.float32:
    with np.errstate(divide="ignore", invalid="ignore"):  # 0 * log 0
        divergence = part * (np.log(part) - np.log(part.mean(0, keepdims=True)))
    divergence[part == 0] = 0.0
    return np.float32(np.exp(divergence.sum(1).mean()))
