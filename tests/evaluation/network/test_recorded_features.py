"""The features are those that OpenAI's evaluator computes with TensorFlow. A slightly different network is noticed.

The largest differences by norm that were measured are 3.6e-7 (pool) and 1.1e-6 (spatial). They come from the order in
which float32 numbers are added.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from recorded_images import SETS, recorded_images

from flexvar_evaluation.network.contract import Head
from flexvar_evaluation.network.conversion import Layers, convert
from flexvar_evaluation.network.features import BATCH, FeatureNetwork
from flexvar_evaluation.network.graphdef import Graph

Record = dict[str, NDArray[np.float64]]
Opener = Callable[..., FeatureNetwork]

BOUND, LARGEST_BOUND = 2e-6, 4e-6
"""Of the difference of an image's features, relative: by norm, and the largest difference to the largest feature."""
PROBABILITY_BOUND = 1e-5
"""The logits reach 29, where float32 has steps of 2e-6. The record computes them in float32."""


def difference(got: NDArray[np.float32], recorded: NDArray[np.float64]) -> float:
    """The largest relative difference of an image's features, by norm."""
    return float((np.linalg.norm(got - recorded, axis=1) / np.linalg.norm(recorded, axis=1)).max())


def largest_difference(got: NDArray[np.float32], recorded: NDArray[np.float64]) -> float:
    """The largest difference of a feature, relative to the largest feature of the image."""
    return float((np.abs(got - recorded).max(1) / np.abs(recorded).max(1)).max())


def probabilities(head: Head, pool: NDArray[np.float32]) -> NDArray[np.float64]:
    logits = pool.astype(np.float64) @ head.weights.astype(np.float64)
    logits += 0 if head.bias is None else head.bias
    grown = np.exp(logits - logits.max(1, keepdims=True))
    return np.asarray(grown / grown.sum(1, keepdims=True))


@pytest.mark.parametrize("name", SETS)
def test_features_of_the_record(name: str, recorded_network: FeatureNetwork, record: Record) -> None:
    """Images of 64 and 256 pixels are enlarged, and those of 512 are reduced."""
    pool, spatial = record[f"{name}_pool"], record[f"{name}_spatial"]
    got = recorded_network.features(recorded_images(name, len(pool)))
    assert got.spatial is not None and got.pool.dtype == got.spatial.dtype == np.float32
    assert got.pool.shape == pool.shape and got.spatial.shape == spatial.shape
    assert difference(got.pool, pool) <= BOUND and largest_difference(got.pool, pool) <= LARGEST_BOUND
    assert difference(got.spatial, spatial) <= BOUND and largest_difference(got.spatial, spatial) <= LARGEST_BOUND


def test_probabilities_of_the_record(recorded_network: FeatureNetwork, record: Record) -> None:
    """The biases in the file do not count. With them the probabilities would differ."""
    recorded = record["softmax_smp256"]
    pool = recorded_network.features(recorded_images("smp256", len(recorded))).pool
    head = recorded_network.head
    assert head.bias is None and difference(probabilities(head, pool), recorded) <= PROBABILITY_BOUND
    biased = Head(head.weights, np.random.default_rng(1).standard_normal(recorded.shape[1]).astype(np.float32))
    assert difference(probabilities(biased, pool), recorded) > 100 * PROBABILITY_BOUND


def test_another_inner_layer_differs(recorded_graph: Graph, opened: Opener, record: Record) -> None:
    with opened(convert(recorded_graph, Layers(spatial="mixed_7/conv"))) as network:
        got = network.features(recorded_images("ref256", 1))
    assert got.spatial is not None and difference(got.pool, record["ref256_pool"][:1]) <= BOUND
    assert difference(got.spatial, record["ref256_spatial"][:1]) > 100 * BOUND


@pytest.mark.parametrize(
    ("operator", "attribute", "value"),
    [("Resize", "coordinate_transformation_mode", "half_pixel"), ("AveragePool", "count_include_pad", 1)],
)
def test_another_arithmetic_differs(
    operator: str, attribute: str, value: str | int, converted: bytes, opened: Opener, record: Record
) -> None:
    """Pixels read at other places, and averages over the padding."""
    model = onnx.load_model_from_string(converted)
    for node in model.graph.node:
        if node.op_type == operator:
            kept = [each for each in node.attribute if each.name != attribute]
            del node.attribute[:]
            node.attribute.extend([*kept, onnx.helper.make_attribute(attribute, value)])
    with opened(model.SerializeToString()) as network:
        got = network.features(recorded_images("ref256", 1))
    assert got.spatial is not None
    assert difference(got.pool, record["ref256_pool"][:1]) > 100 * BOUND
    assert difference(got.spatial, record["ref256_spatial"][:1]) > 100 * BOUND


def test_features_do_not_depend_on_batch_and_threads(
    recorded_network: FeatureNetwork, converted: bytes, opened: Opener
) -> None:
    images = recorded_images("smp64", 5)
    together = recorded_network.features(images)
    alone = [recorded_network.features(images[i : i + 1]) for i in range(3)]
    with opened(converted, threads=2) as network:
        threaded = network.features(images)
    for field in ("pool", "spatial"):
        np.testing.assert_array_equal(getattr(threaded, field), getattr(together, field))
        np.testing.assert_array_equal(
            np.concatenate([getattr(each, field) for each in alone]), getattr(together, field)[:3]
        )


@pytest.mark.slow
@pytest.mark.parametrize("threads", [1, 2, 3, 4, 8])
def test_features_do_not_depend_on_any_batch(
    threads: int, recorded_network: FeatureNetwork, converted: bytes, opened: Opener
) -> None:
    images = recorded_images("smp256", BATCH + 8)
    expected = recorded_network.features(images)
    with opened(converted, threads=threads) as network:
        for size in (1, 3, 16, BATCH + 8):
            parts = [network.features(images[i : i + size]) for i in range(0, len(images), size)]
            for field in ("pool", "spatial"):
                got = np.concatenate([getattr(part, field) for part in parts])
                np.testing.assert_array_equal(got, getattr(expected, field))
