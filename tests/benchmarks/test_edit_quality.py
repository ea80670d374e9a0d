"""What the evaluation of edits measures, on pictures whose answers are known."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flexvar_bench.edit_quality import beyond, centred_hole, psnr, seam, sheet


def test_a_seam_is_the_step_across_the_edge_alone() -> None:
    mask = centred_hole(16)
    assert mask.sum() == 64 and mask[4, 4] and mask[11, 11] and not mask[3, 4] and not mask[12, 11]
    noise = np.random.default_rng(0).integers(100, 120, (3, 16, 16, 3), np.uint8)
    raised = noise.copy()
    raised[:, mask] += 100
    assert seam(np.full((1, 16, 16, 3), 7, np.uint8), mask) == 0
    assert seam(raised, mask) == pytest.approx(100, abs=3) and seam(noise, mask) < 10


def test_psnr_by_hand() -> None:
    zeros = np.zeros((1, 2, 2, 3), np.uint8)
    assert psnr(zeros, zeros) == 99 and psnr(zeros, zeros + np.uint8(255)) == 0
    assert psnr(zeros, zeros + np.uint8(51)) == pytest.approx(20 * np.log10(5))


def test_what_is_beyond_a_feather() -> None:
    far = beyond(centred_hole(16), 2)
    assert not far[2:14, 2:14].any() and far.sum() == 16 * 16 - 12 * 12


def test_a_sheet_shows_every_row(tmp_path: Path) -> None:
    rows = [np.full((4, 8, 8, 3), value, np.uint8) for value in (10, 200)]
    sheet(rows, 3, tmp_path / "sheet.png", zoom=1)
    shown = np.asarray(Image.open(tmp_path / "sheet.png"))
    assert shown.shape == (24, 36, 3) and shown[6, 6, 0] == 10 and shown[18, 6, 0] == 200 and shown[0, 0, 0] == 255
