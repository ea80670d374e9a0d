"""Radii that are kept: those of one go, wherever the computation was stopped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flexvar_evaluation import kept_radii as module
from flexvar_evaluation.kept_radii import kept_radii
from flexvar_evaluation.statistics import distances
from flexvar_evaluation.statistics.manifold import radii


@pytest.fixture(autouse=True)
def small_stripes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distances, "BLOCK", 16)


def test_a_stopped_computation_continues(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    features = np.random.default_rng(0).standard_normal((50, 8)).astype(np.float32)
    expected, made, original = radii(features, "float32"), list[int](), module.add_stripe

    def stopping(nearest: Any, features: Any, stripe: int, rounding: Any) -> Any:
        if stripe == 2 and stripe not in made:
            made.append(stripe)
            raise KeyboardInterrupt
        made.append(stripe)
        return original(nearest, features, stripe, rounding)

    monkeypatch.setattr(module, "add_stripe", stopping)
    with pytest.raises(KeyboardInterrupt):
        kept_radii(tmp_path, features, "float32")
    assert np.array_equal(kept_radii(tmp_path, features, "float32"), expected)
    assert np.array_equal(kept_radii(tmp_path, features, "float32"), expected)
    assert made == [0, 1, 2, 2, 3]


def test_other_features_and_roundings_have_files_of_their_own(tmp_path: Path) -> None:
    for seed in (0, 1):
        features = np.random.default_rng(seed).standard_normal((20, 8)).astype(np.float32)
        for rounding in ("half", "float32"):
            assert np.array_equal(kept_radii(tmp_path, features, rounding), radii(features, rounding))  # type: ignore[arg-type]
    assert len(list(tmp_path.iterdir())) == 4


def test_a_damaged_file_is_computed_again(tmp_path: Path) -> None:
    features = np.random.default_rng(0).standard_normal((20, 8)).astype(np.float32)
    expected = kept_radii(tmp_path, features, "half")
    [file] = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:60])
    assert np.array_equal(kept_radii(tmp_path, features, "half"), expected)
