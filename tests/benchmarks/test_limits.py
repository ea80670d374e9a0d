"""The limit of a generation: the published table, and laws."""

from __future__ import annotations

import pytest

from flexvar_bench.gpu.rows_and_goals import published
from flexvar_bench.limits import Limit, decoder_flops, generation_limit, transformer_flops
from flexvar_runtime import ScaleSchedule

SCHEDULE = ScaleSchedule.parse("1_2_3_4_5_6_8_10_13_16")
# H200: 4.3 TB/s, 790 TFLOP/s; milliseconds for 1, 8 and 64 images, three digits of which were kept
STRICT = {16: (1.48, 8.4, 66.7), 20: (2.57, 14.0, 111), 24: (4.18, 22.3, 176)}
SERIAL = {16: (2.5, 13.8, 104), 20: (4.2, 21.7, 162), 24: (6.7, 32.9, 243)}


def limit(depth: int, images: int, bandwidth: float = 4.3e12, rate: float = 790e12, guided: bool = True) -> Limit:
    model = published(f"d{depth}")
    assert model is not None
    return generation_limit(model, SCHEDULE, images, guided=guided, bytes_per_second=bandwidth, flops_per_second=rate)


@pytest.mark.parametrize("depth", STRICT)
def test_the_published_table(depth: int) -> None:
    """Within two percent: the table was made with the same arithmetic, and rounded."""
    for images, strict, serial in zip((1, 8, 64), STRICT[depth], SERIAL[depth], strict=True):
        found = limit(depth, images)
        assert 1e3 * found.strict_s == pytest.approx(strict, rel=0.02)
        assert 1e3 * found.serial_s == pytest.approx(serial, rel=0.02)


def test_arithmetic_that_is_saved_is_small() -> None:
    """Against everything that a straightforward generation computes: one scale and a tenth of the decoder less."""
    model = published("d16")
    assert model is not None
    everything = transformer_flops(model, SCHEDULE, guided=True) + decoder_flops(SCHEDULE)
    assert 0.95 * everything < limit(16, 1).flops < everything


def test_one_image_is_bound_by_bytes_and_many_by_arithmetic() -> None:
    assert limit(16, 1, bandwidth=8.6e12).strict_s < 0.85 * limit(16, 1).strict_s
    assert limit(16, 64, bandwidth=8.6e12).strict_s == limit(16, 64).strict_s
    assert limit(16, 64, rate=1580e12).strict_s == pytest.approx(limit(16, 64).strict_s / 2, rel=0.02)


def test_without_guidance_half_the_blocks() -> None:
    guided, single = limit(24, 64), limit(24, 64, guided=False)
    assert single.kv_bytes == guided.kv_bytes / 2
    assert single.weight_bytes == guided.weight_bytes
    assert guided.strict_s / 2 < single.strict_s < 0.6 * guided.strict_s
