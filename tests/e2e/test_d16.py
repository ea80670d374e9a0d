"""The smallest published size, with random weights: parity, memory and the share of sampling. Minutes, and 6 GB."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from flexvar_bench.against_reference import SCHEDULE, checkpoints, compare, exported
from flexvar_runtime import Bundle, FlexVARPipeline

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return checkpoints(tmp_path_factory.mktemp("d16"), 16)


@pytest.fixture(scope="module")
def bundle(paths: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported(tmp_path_factory.mktemp("bundle"), 16, paths)


def test_parity_is_recorded(bundle: Path) -> None:
    """An export that does not pass leaves no bundle. The record lists the comparisons."""
    record = Bundle.open(bundle).manifest.parity
    assert record.passed and not record.emulated and len(record.rows) >= 20


def test_memory_and_sampling(bundle: Path, paths: tuple[Path, Path]) -> None:
    sides = compare(bundle, paths, threads=2, repeats=2)
    runtime = sides["flexvar_runtime ort-cpu fp32"]
    assert runtime["peak_bytes"] < 2.5e9
    assert all(sample["sampling"] < 0.05 * sample["total"] for sample in runtime["samples"])


def test_alone_and_in_a_batch(bundle: Path) -> None:
    with FlexVARPipeline.from_bundle(bundle, backend="ort-cpu") as pipe:
        batch = pipe([1, 2, 3], SCHEDULE, seed=2**64 - 1, first_index=5)
        alone = pipe([2], SCHEDULE, seed=2**64 - 1, first_index=6)
    for together, single in zip(batch.tokens, alone.tokens, strict=True):
        np.testing.assert_array_equal(together[1:2], single)
