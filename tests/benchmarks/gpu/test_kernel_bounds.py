"""Kernels of a profile beside the bounds of the time model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest

from flexvar_bench.gpu.kernel_bounds import compare_kinds, expected_works
from flexvar_bench.gpu.kernel_classes import Kernel
from flexvar_bench.gpu.random_models import schedule_of
from flexvar_bench.time_model import Work

H200 = "NVIDIA H200"
LIBRARY = {
    "product": ["nvjet_sm90_hsh_64x8_64x16_4x1_v_bz_bias_NNT"],
    "product fc2": ["nvjet_sm90_hsh_64x8_64x16_4x1_v_bz_splitK_bias_NNT", "void cublasLt::splitKreduce_kernel<32>"],
    "convolution": ["sm90_xmma_fprop_implicit_gemm_f16f16_f16f32_f32_nhwckrsc_nhwc"],
    "copy": ["Memcpy DtoD (Device -> Device)"],
    "read": ["Memcpy DtoH (Device -> Pinned)"],
    "zero": ["Memset (Device)"],
}


def works(batch: int = 1) -> list[Work]:
    found = expected_works("d16", schedule_of("d16"), batch, H200)
    assert found is not None
    return found


def trace(expected: Sequence[Work]) -> list[Kernel]:
    """What a profiler sees of these launches, of which each takes twice its bound and 1 us."""
    found, now = list[Kernel](), 0.0
    for work in expected:
        names = LIBRARY.get(work.kind) or LIBRARY.get(work.name.split()[0]) or [work.name]
        for name in names:
            found.append(Kernel(name, now, (2 * work.bound_us + 1) / len(names)))
            now = found[-1].end + 1
    return found


def test_every_launch_is_found_by_its_place() -> None:
    expected = works()
    found = {row["kind"]: row for row in compare_kinds(trace(expected), expected)["kinds"]}
    launched = [work for work in expected if work.name not in ("copy", "read", "zero")]
    assert set(found) == {work.kind for work in launched}
    assert sum(row["launches"] for row in found.values()) == len(launched)
    assert {"product qkv", "product fc2", "modulate_rows", "attention", "group_statistics"} < set(found)
    fc2 = found["product fc2"]
    assert fc2["launches"] == 160 and fc2["us"] == pytest.approx(2 * fc2["bound_us"] + 160)
    assert fc2["times_bound"] == pytest.approx(fc2["us"] / fc2["bound_us"])
    rows = list(found.values())
    assert rows == sorted(rows, key=lambda row: -row["us"])


def test_kernels_that_cannot_be_told_apart_are_one_kind() -> None:
    expected = works()
    seen = trace(expected)
    fc1 = next(i for i, work in enumerate(expected) if work.name == "product blocks.0.fc1")
    name = expected[fc1 - 1].name
    place = next(i for i, kernel in enumerate(seen) if kernel.name == name and seen[i + 3].name.startswith("void cub"))
    seen.insert(place + 1, replace(seen[place + 1], name="nvjet_of_nobody", duration=100.0))
    found = {row["kind"]: row for row in compare_kinds(seen, expected)["kinds"]}
    assert found["product fc1 + product fc2"]["launches"] == 2 and found["product fc1"]["launches"] == 159


def test_another_order_is_a_reason() -> None:
    expected = works()
    seen = trace(expected)
    place = next(i for i, kernel in enumerate(seen) if kernel.name == "split_heads")
    other = [*seen[:place], replace(seen[place], name="add_maps"), *seen[place + 1 :]]
    assert compare_kinds(other, expected)["reason"].startswith("not measured: the profile has add_maps in the place")
    short = [kernel for kernel in seen if kernel.name != "to_uint8"]
    assert "kernels of ours, not" in compare_kinds(short, expected)["reason"]
    assert "reason" in compare_kinds([], expected)


def test_what_the_model_does_not_know_has_no_bounds() -> None:
    assert expected_works("tiny", schedule_of("tiny"), 1, H200) is None
    assert expected_works("d16", schedule_of("d16"), 1, "emulated GPU") is None
