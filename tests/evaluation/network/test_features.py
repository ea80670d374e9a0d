"""Features of a feature network: batches, checks of the images, and checks of what the network gives."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper
from tiny_network import WIDTH, write_tiny_network

from flexvar_evaluation.network.contract import HEAD_WEIGHTS
from flexvar_evaluation.network.features import BATCH, FeatureNetwork
from flexvar_runtime import ArtifactRefused, InvalidInput

IMAGES = np.random.default_rng(2).integers(0, 256, (BATCH + 3, 12, 9, 3), np.uint8)


def test_more_images_than_a_batch(tiny_network: Path) -> None:
    with FeatureNetwork.open(tiny_network, threads=1) as network:
        together = network.features(IMAGES)
        assert together.pool.shape == (len(IMAGES), WIDTH) and together.pool.dtype == np.float32
        for i in (0, BATCH - 1, BATCH, len(IMAGES) - 1):
            alone = network.features(IMAGES[i : i + 1])
            assert together.spatial is not None and alone.spatial is not None
            np.testing.assert_array_equal(alone.pool[0], together.pool[i])
            np.testing.assert_array_equal(alone.spatial[0], together.spatial[i])


def test_images_that_are_not_contiguous(tiny_network: Path) -> None:
    with FeatureNetwork.open(tiny_network, threads=1) as network:
        turned = IMAGES[:4, ::-1, ::2]
        np.testing.assert_array_equal(network.features(turned).pool, network.features(turned.copy()).pool)


def test_a_network_without_spatial_features(tmp_path: Path) -> None:
    with FeatureNetwork.open(write_tiny_network(tmp_path / "a.onnx", spatial=False), threads=1) as network:
        assert network.features(IMAGES[:2]).spatial is None and network.widths((12, 9)) == (WIDTH, 0)
        assert network.name == "tiny" and network.size == WIDTH


@pytest.mark.parametrize("images", [IMAGES[0], IMAGES[:0], IMAGES[..., :1], IMAGES.astype(np.float32), IMAGES[:, :0]])
def test_other_arrays_are_refused(images: Any, tiny_network: Path) -> None:
    with FeatureNetwork.open(tiny_network, threads=1) as network, pytest.raises(InvalidInput, match="images"):
        network.features(images)


def test_a_closed_network_is_refused(tiny_network: Path) -> None:
    with FeatureNetwork.open(tiny_network, threads=1) as network:
        pass
    network.close()
    with pytest.raises(InvalidInput, match="closed"):
        network.features(IMAGES[:1])


def divide_by_zero(model: Any) -> None:
    model.graph.initializer.append(numpy_helper.from_array(np.zeros((), np.float32), "nothing"))
    model.graph.node.extend(
        [
            helper.make_node("Sub", ["means", "means"], ["zeros"]),
            helper.make_node("Div", ["zeros", "nothing"], ["wrong"]),
        ]
    )
    [flatten] = [node for node in model.graph.node if node.output[0] == "pool"]
    flatten.input[0] = "wrong"
    model.graph.node.remove(flatten)
    model.graph.node.append(helper.make_node("Flatten", ["wrong"], ["pool"]))


def shorten_head(model: Any) -> None:
    [head] = [tensor for tensor in model.graph.initializer if tensor.name == HEAD_WEIGHTS]
    model.graph.initializer.remove(head)
    model.graph.initializer.append(numpy_helper.from_array(np.ones((WIDTH - 1, 4), np.float32), HEAD_WEIGHTS))


@pytest.mark.parametrize("change", [divide_by_zero, shorten_head])
def test_wrong_features_are_refused(change: Callable[[Any], None], tiny_network: Path, tmp_path: Path) -> None:
    """Features that are not finite, and features of another number than the head takes."""
    model = onnx.load(str(tiny_network))
    change(model)
    path = tmp_path / "wrong.onnx"
    path.write_bytes(model.SerializeToString())
    with FeatureNetwork.open(path, threads=1) as network, pytest.raises(ArtifactRefused, match=r"wrong\.onnx"):
        network.features(IMAGES[:1])
