"""What the machine does at best: which of the rates counts."""

from __future__ import annotations

import pytest

from flexvar_bench import machine


@pytest.mark.parametrize(
    ("small", "large", "expected", "timed"),
    [
        (5.0, 20.0, 20.0, [("float32", 2048), ("bfloat16", 256), ("bfloat16", 2048)]),
        (
            5.0,
            8.0,
            10.0,
            [("float32", 2048), ("bfloat16", 256), ("bfloat16", 2048)],
        ),  # converted: float32's rate counts
        (1.0, 1.0, 10.0, [("float32", 2048), ("bfloat16", 256)]),  # a large product would take minutes
    ],
)
def test_the_rate_in_bfloat16(
    monkeypatch: pytest.MonkeyPatch, small: float, large: float, expected: float, timed: list[tuple[str, int]]
) -> None:
    asked = []

    def rate(threads: int, dtype: str, side: int = 2048) -> float:
        asked.append((dtype, side))
        return 10.0 if dtype == "float32" else {256: small, 2048: large}[side]

    monkeypatch.setattr(machine, "_torch_flops_per_second", rate)
    monkeypatch.setattr(machine, "measured_flops_per_second", lambda seconds: 9.0)
    monkeypatch.setattr(machine, "measured_copy_bytes_per_second", lambda seconds: 1.0)
    assert machine.ceiling(1).flops_per_second == {"fp32": 10.0, "bf16": expected}
    assert asked == timed
