"""The judge of the demo model: it learns, it tells good images from bad ones, and its network gives its features."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import quality
import torch
from bundle_outputs import Reconstruction
from edits import sheet
from evaluation_options import DEFAULT, Options
from numpy.typing import NDArray
from PIL import Image
from scene_classifier import SceneClassifier, real, scaled, trained
from scene_network import CLASSIFIER, network_file, write_scenes

from flexvar_evaluation.features import LoadedFeatures
from flexvar_evaluation.judging import features_of, recognised_share
from flexvar_evaluation.network.features import FeatureNetwork
from flexvar_evaluation.pictures import open_pictures
from flexvar_evaluation.statistics.frechet import frechet_distance
from flexvar_ref.training import scenes
from flexvar_runtime import ScaleSchedule

DEMO = Path(__file__).parents[2] / "demo" / "model"


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a classifier that saw a tenth of the scenes, and its feature network."""
    folder = tmp_path_factory.mktemp("judge")
    network_file(folder, count=1152, epochs=3)
    return folder


@pytest.fixture(scope="module")
def network(work: Path) -> Iterator[FeatureNetwork]:
    with FeatureNetwork.open(work / "scenes.onnx") as opened:
        yield opened


@pytest.fixture(scope="module")
def classifier(work: Path) -> SceneClassifier:
    return trained(work / CLASSIFIER, count=0)  # read, not trained again


def judged(network: FeatureNetwork, images: NDArray[np.uint8], labels: NDArray[np.int64]) -> float:
    return recognised_share(features_of(network, images, labels), network.head)


def test_a_classifier_is_trained_once_and_tells_its_weights(work: Path, network: FeatureNetwork) -> None:
    before = (work / "scenes.onnx").read_bytes()
    assert network_file(work, count=0).read_bytes() == before
    weights = hashlib.sha256((work / CLASSIFIER).read_bytes()).hexdigest()
    assert network.identity.startswith(f"scenes:scenes-1:{weights}:")


@pytest.mark.parametrize(
    "size", [(64, 64), (128, 128), (96, 64), (64, 96), (192, 128), (16, 16), (100, 77), (33, 200), (8, 1000)]
)
def test_the_network_gives_the_classifiers_features(
    network: FeatureNetwork, classifier: SceneClassifier, size: tuple[int, int]
) -> None:
    """Features are below 20, so 1e-5 is some units in the last place of float32. The sizes need other scalings."""
    images = np.random.default_rng(sum(size)).integers(0, 256, (3, *size, 3), dtype=np.uint8)
    images[0] = real(7002, 1, size)[0][0]
    with torch.inference_mode():
        features, logits = classifier(scaled(images))
    ours = network.features(images)
    assert ours.spatial is None and ours.pool.shape == (3, 128)
    np.testing.assert_allclose(ours.pool, features.numpy(), rtol=0, atol=1e-5)
    assert network.head.bias is not None
    np.testing.assert_allclose(ours.pool @ network.head.weights + network.head.bias, logits.numpy(), rtol=0, atol=1e-4)


def test_the_judge_knows_scenes_and_nothing_else(network: FeatureNetwork) -> None:
    """0.8 with a tenth of the scenes the evaluation trains on; one in twelve for noise and for wrong labels."""
    images, labels = real(7002, 120, (64, 64))
    assert judged(network, images, labels) > 0.8
    assert judged(network, images, (labels + 1) % len(scenes.CLASSES)) < 0.2
    noise = np.random.default_rng(0).integers(0, 256, images.shape, dtype=np.uint8)
    assert judged(network, noise, labels) < 0.25
    good, other, bad = (features_of(network, some).moments for some in (images, real(7003, 120, (64, 64))[0], noise))
    assert frechet_distance(good, other) < frechet_distance(good, bad) / 3


@pytest.mark.parametrize("size", [(128, 128), (64, 96), (192, 128)])
def test_it_judges_other_sizes(network: FeatureNetwork, size: tuple[int, int]) -> None:
    assert judged(network, *real(7002, 60, size)) > 0.7


def test_scenes_as_a_file(tmp_path: Path) -> None:
    write_scenes(tmp_path / "scenes.npz", 7003, 5, (16, 24))
    pictures = open_pictures(tmp_path / "scenes.npz")
    assert (pictures.count, pictures.size) == (5, (16, 24))
    np.testing.assert_array_equal(np.concatenate(list(pictures.blocks(0, 2))), real(7003, 5, (16, 24))[0])


def test_schedules_have_the_steps_and_sizes_that_they_are_named_after() -> None:
    assert sorted(quality.STEPS) == list(range(4, 11))
    for steps, text in quality.STEPS.items():
        schedule = ScaleSchedule.parse(text)
        assert len(schedule) == steps and schedule[-1] == (16, 16)
    last = {name: ScaleSchedule.parse(text)[-1] for name, text in quality.SIZES.items()}
    assert last == {"twice the size": (32, 32), "3:2": (16, 24), "2:3": (24, 16)}


def test_rows_are_compared_on_equal_numbers_of_images(
    network: FeatureNetwork, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The steps on as many images each, and only the precisions with fp32, image by image."""
    drawn: list[tuple[str, int]] = []

    def sampled(
        bundle: Path, network: FeatureNetwork, schedule: str, count: int, options: Options, work: Path
    ) -> LoadedFeatures:
        drawn.append((schedule, count))
        images, labels = real(1 + (bundle.name == "fp16"), count, (16, 16))
        return features_of(network, images, labels)

    monkeypatch.setattr(quality, "sampled", sampled)
    monkeypatch.setattr(quality, "reconstructed", lambda _, images: Reconstruction(len(images), 20.0, 1.0, images))
    monkeypatch.setattr(quality, "exported", lambda model, work, precision: work / precision)
    monkeypatch.setattr(quality, "untrained", lambda model, work: work / "untrained")
    monkeypatch.setattr(quality, "pixels_of", lambda bundle, schedule: (16, 16))
    monkeypatch.setattr(quality, "HELD_OUT", 12)
    result = quality.evaluate(DEMO, tmp_path, network, 24, 12, Options(cfg=2.5, top_k=0, top_p=0.8))
    rows = {row["name"]: row for row in result["rows"]}
    assert rows["10 steps, 24 images"]["images"] == 24
    assert [rows[f"{steps} steps"]["images"] for steps in range(4, 11)] == [12] * 7
    assert (str(DEFAULT), 12) not in drawn  # not generated again
    for row in rows.values():
        low, high = row["frechet_interval"]
        assert low <= row["frechet"] <= high
    assert [name for name, row in rows.items() if "against_fp32" in row] == [
        f"10 steps, {precision}" for precision in quality.OTHER_PRECISIONS
    ]
    same, other = (rows[f"10 steps, {precision}"] for precision in ("bf16", "fp16"))
    assert same["against_fp32"] == {"difference": 0, "interval": (0, 0), "significant": False}
    expected = other["frechet"] - rows["10 steps, 24 images"]["frechet"]
    assert other["against_fp32"]["difference"] == pytest.approx(expected) != 0


def test_a_sheet_shows_every_row(tmp_path: Path) -> None:
    rows = [np.full((4, 8, 8, 3), value, np.uint8) for value in (10, 200)]
    sheet(rows, 3, tmp_path / "sheet.png", zoom=1)
    shown = np.asarray(Image.open(tmp_path / "sheet.png"))
    assert shown.shape == (24, 36, 3) and shown[6, 6, 0] == 10 and shown[18, 6, 0] == 200 and shown[0, 0, 0] == 255
