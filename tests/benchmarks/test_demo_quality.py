"""The judge of the demo model: its distance is right, it learns, and it tells good images from bad ones."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from flexvar_bench import demo_quality
from flexvar_bench.scene_classifier import Judged, SceneClassifier, frechet, real, trained
from flexvar_ref.training import scenes
from flexvar_runtime import ScaleSchedule

DEMO = Path(__file__).parents[2] / "demo" / "model"


def test_the_frechet_distance_of_gaussians_that_are_known() -> None:
    """Along every axis (m₁ − m₂)² + (s₁ − s₂)², for samples whose moments are exact."""
    rng = np.random.default_rng(0)
    white = rng.standard_normal((4000, 3))
    white -= white.mean(0)
    white = white @ np.linalg.inv(np.linalg.cholesky(np.cov(white, rowvar=False))).T
    turn, _ = np.linalg.qr(rng.standard_normal((3, 3)))
    one = (white * [1.0, 2.0, 3.0] + [0.0, 1.0, 0.0]) @ turn
    two = (white * [1.5, 2.0, 1.0] + [2.0, 1.0, -1.0]) @ turn
    assert frechet(one, two) == pytest.approx(4 + 1 + 0.25 + 4, rel=1e-9)
    assert frechet(one, one) == pytest.approx(0, abs=1e-9)
    assert frechet(one, two) == pytest.approx(frechet(two, one), rel=1e-9)


def test_features_in_one_plane_have_a_distance() -> None:
    """Fewer samples than dimensions: the covariance is singular, the distance is finite all the same."""
    values = np.random.default_rng(1).standard_normal((5, 40))
    # 40 roots of eigenvalues that are 0 but for rounding, some 1e-16
    assert frechet(values, values[::-1]) == pytest.approx(0, abs=1e-4)
    assert np.isfinite(frechet(values, values + 1)) and frechet(values, values + 1) > 1


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> SceneClassifier:
    path = tmp_path_factory.mktemp("judge") / "classifier.safetensors"
    first = trained(path, count=1152, epochs=3)
    again = trained(path, count=0)  # read, not trained again
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in first.state_dict().items())
    return again


def test_the_judge_knows_scenes_and_nothing_else(judge: SceneClassifier) -> None:
    """0.8 with a tenth of the scenes the evaluation trains on; one in twelve for noise and for wrong labels."""
    images, labels = real(7002, 120, (64, 64))
    good = judge.judge(images, labels)
    assert good.accuracy > 0.8 and good.features.shape == (120, 128)
    assert judge.judge(images, (labels + 1) % len(scenes.CLASSES)).accuracy < 0.2
    noise = np.random.default_rng(0).integers(0, 256, images.shape, dtype=np.uint8)
    bad = judge.judge(noise, labels)
    assert bad.accuracy < 0.25
    other = judge.judge(*real(7003, 120, (64, 64)))
    assert frechet(good.features, other.features) < frechet(good.features, bad.features) / 3


@pytest.mark.parametrize("size", [(128, 128), (64, 96), (192, 128)])
def test_it_judges_other_sizes(judge: SceneClassifier, size: tuple[int, int]) -> None:
    assert judge.judge(*real(7002, 60, size)).accuracy > 0.7


def test_schedules_have_the_steps_and_sizes_that_they_are_named_after() -> None:
    assert sorted(demo_quality.STEPS) == list(range(4, 11))
    for steps, text in demo_quality.STEPS.items():
        schedule = ScaleSchedule.parse(text)
        assert len(schedule) == steps and schedule[-1] == (16, 16)
    last = {name: ScaleSchedule.parse(text)[-1] for name, text in demo_quality.SIZES.items()}
    assert last == {"twice the size": (32, 32), "3:2": (16, 24), "2:3": (24, 16)}


def test_step_counts_are_compared_on_as_many_images(monkeypatch: pytest.MonkeyPatch, tiny_bundle: Path) -> None:
    """The default steps too: a row of the first of their images, beside that of all."""

    class Sketch:
        """A classifier that sees nothing but colours."""

        def judge(self, images: NDArray[np.uint8], labels: NDArray[np.int64]) -> Judged:
            return Judged(0.5, images.mean((1, 2)))

    drawn: list[tuple[str, int]] = []

    def generated(bundle: Path, schedule: str, labels: NDArray[np.int64], options: object) -> NDArray[np.uint8]:
        drawn.append((schedule, len(labels)))
        h, w = ScaleSchedule.parse(schedule)[-1]
        return real(0, len(labels), (h, w))[0]

    def reconstructed(bundle: Path, images: NDArray[np.uint8]) -> demo_quality.Reconstruction:
        return demo_quality.Reconstruction(len(images), 20.0, 1.0, images)

    monkeypatch.setattr(demo_quality, "generated", generated)
    monkeypatch.setattr(demo_quality, "reconstructed", reconstructed)
    monkeypatch.setattr(demo_quality, "trained", lambda *_, **__: Sketch())
    monkeypatch.setattr(demo_quality, "real", lambda seed, count, size: real(seed, min(count, 12), (8, 8)))
    monkeypatch.setattr(demo_quality, "exported", lambda *_: tiny_bundle)
    monkeypatch.setattr(demo_quality, "untrained", lambda *_: tiny_bundle)
    options = demo_quality.Options(cfg=2.5, top_k=0, top_p=0.8)
    result = demo_quality.evaluate(DEMO, Path(), 12, 6, options)
    images = {row["name"]: row["images"] for row in result["rows"]}
    assert images["10 steps, 12 images"] == 12
    assert [images[f"{steps} steps"] for steps in range(4, 11)] == [6] * 7
    assert (demo_quality.DEFAULT, 6) not in drawn  # not generated again
