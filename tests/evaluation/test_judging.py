"""Pictures in memory are judged as files and runs are."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from flexvar_evaluation.features import ComputedFeatures, load
from flexvar_evaluation.judging import distance_to, features_of, first_of, recognised_share
from flexvar_evaluation.network.features import FeatureNetwork
from flexvar_evaluation.pictures import open_pictures
from flexvar_evaluation.reference import make_reference
from flexvar_evaluation.scoring import influences_on_fid, metrics_of
from flexvar_runtime import InvalidInput


def test_features_distances_and_shares_are_those_of_files(tiny_network: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (40, 8, 12, 3), dtype=np.uint8)
    labels = np.arange(40) % 4
    np.savez(tmp_path / "a.npz", arr_0=pixels)
    with FeatureNetwork.open(tiny_network) as network:
        pictures = open_pictures(tmp_path / "a.npz")
        stored = load(ComputedFeatures(pictures, network, labels))
        made = features_of(network, pixels, labels)
        reference = make_reference(
            features_of(network, pixels // 2),
            (None, None),
            network.head,
            source="",
            sha256="",
            size=(8, 12),
            network_name=network.name,
        )
        np.testing.assert_array_equal(made.pool, stored.pool)
        np.testing.assert_array_equal(made.moments.covariance, stored.moments.covariance)
        metrics = metrics_of(made, reference, influences_on_fid(made, reference))
        assert distance_to(reference, made) == metrics.fid.value > 0
        assert recognised_share(made, network.head) == metrics.recognised
        first = first_of(made, 10)
        np.testing.assert_array_equal(first.moments.mean, features_of(network, pixels[:10]).moments.mean)
        assert first.labels is not None and first.labels.tolist() == labels[:10].tolist()
        with pytest.raises(InvalidInput, match="labels"):
            recognised_share(features_of(network, pixels), network.head)
