"""What is measured by comparing pixels, on pictures whose answers are known."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from flexvar_evaluation.editing.pixel_measures import beyond, centred_hole, psnr, resized, seam


def test_a_hole_is_centred_and_half_as_large() -> None:
    mask = centred_hole(16, 16)
    assert mask.sum() == 64 and mask[4, 4] and mask[11, 11] and not mask[3, 4] and not mask[12, 11]
    wide = centred_hole(8, 32)
    assert wide.shape == (8, 32) and wide[2:6, 8:24].all() and wide.sum() == 4 * 16


def test_a_seam_is_the_step_across_the_edge_alone() -> None:
    mask = centred_hole(16, 16)
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
    far = beyond(centred_hole(16, 16), 2)
    assert not far[2:14, 2:14].any() and far.sum() == 16 * 16 - 12 * 12


def test_resizing_takes_the_height_first() -> None:
    images = np.zeros((2, 4, 8, 3), np.uint8)
    images[:, :, 4:] = 200
    small = resized(images, (2, 4), Image.Resampling.BOX)
    assert small.shape == (2, 2, 4, 3) and (small[:, :, :2] == 0).all() and (small[:, :, 2:] == 200).all()
