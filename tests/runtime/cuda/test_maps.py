"""The kernels of `maps.cu` against float64, on a CPU. Results begin as NaN."""

from __future__ import annotations

import numpy as np
import pytest
from host_kernels import device_array
from layer_numbers import HALVES, Build, Numbers, assert_close, shaped, values

from flexvar_runtime.backends.cuda.parameters import Parameter, round_to
from flexvar_runtime.cuda import layers
from flexvar_runtime.cuda.launches import Launch
from flexvar_runtime.cuda.layers import LayerConfig

MAPS = [
    (1, 1, 1, 8, 1),
    (2, 3, 5, 32, 32),
    (3, 16, 16, 64, 32),
    (1, 24, 20, 128, 32),
    (2, 4, 4, 512, 32),
    (1, 2, 3, 2048, 64),
]


@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize(("B", "H", "W", "C", "groups"), MAPS)
def test_group_norms(
    half: str, B: int, H: int, W: int, C: int, groups: int, host_kernels: Build, numbers: Numbers
) -> None:
    config = LayerConfig(half, 128, 2, 8)
    host = host_kernels(config)
    finished = np.zeros(B, np.uint32)
    for wide, silu in ((False, True), (True, False)):
        stored = round_to(numbers.rng.standard_normal((B, H, W, C)) + 2, "float32" if wide else half)
        dtype = "float32" if wide else half
        x, exact = numbers.place(stored, dtype), Parameter(stored, dtype).float32().astype(np.float64)
        (gain, g), (bias, b) = numbers.normal(C), numbers.normal(C)
        partial = shaped(numbers.nan(B, layers.MOST_CHUNKS, groups, 2, dtype="float32"), B, 256, groups, 2)
        statistics = shaped(numbers.nan(B, groups, 2, dtype="float32"), B, groups, 2)
        y = shaped(numbers.nan(B, H, W, C, dtype=half), B, H, W, C)
        host.run(layers.group_statistics(x, partial, device_array(finished), statistics))
        host.run(layers.group_normalise(x, statistics, gain, bias, y, silu=silu))
        grouped = exact.reshape(B, H * W, groups, C // groups)
        mean, variance = grouped.mean((1, 3), keepdims=True), grouped.var((1, 3), keepdims=True)
        expected = ((grouped - mean) / np.sqrt(variance + 1e-6)).reshape(B, H, W, C) * g + b
        expected = expected / (1 + np.exp(-expected)) if silu else expected
        assert_close(values(y), expected, half)
        assert not finished.any()


@pytest.mark.parametrize("half", HALVES)
def test_the_epsilon_of_group_norms(half: str, host_kernels: Build, numbers: Numbers) -> None:
    """Groups whose variance is as small as the epsilon."""
    config = LayerConfig(half, 128, 2, 8)
    source, x = numbers.normal(1, 4, 4, 64, scale=1e-3)
    ones, none = numbers.place(np.ones(64, np.float32), "float32"), numbers.place(np.zeros(64, np.float32), "float32")
    partial = shaped(numbers.nan(1, 256, 32, 2, dtype="float32"), 1, 256, 32, 2)
    statistics = shaped(numbers.nan(1, 32, 2, dtype="float32"), 1, 32, 2)
    y = shaped(numbers.nan(1, 4, 4, 64, dtype=half), 1, 4, 4, 64)
    host_kernels(config).run(layers.group_statistics(source, partial, device_array(np.zeros(1, np.uint32)), statistics))
    host_kernels(config).run(layers.group_normalise(source, statistics, ones, none, y, silu=False))
    grouped = x.reshape(16, 32, 2)
    expected = (grouped - grouped.mean((0, 2))[:, None]) / np.sqrt(grouped.var((0, 2)) + 1e-6)[:, None]
    assert_close(values(y).reshape(16, 32, 2), expected, half)


def test_the_sums_of_a_norm_do_not_depend_on_the_order_of_blocks(host_kernels: Build, numbers: Numbers) -> None:
    """A GPU ends blocks in any order. Float sums in that order would differ from run to run."""
    x, _ = numbers.normal(2, 16, 16, 64, dtype="float16")
    results = []
    for order in range(3):
        partial = shaped(numbers.nan(2, 256, 32, 2, dtype="float32"), 2, 256, 32, 2)
        statistics = shaped(numbers.nan(2, 32, 2, dtype="float32"), 2, 32, 2)
        finished = np.zeros(2, np.uint32)
        launch = layers.group_statistics(x, partial, device_array(finished), statistics)
        host_kernels(LayerConfig("float16", 128, 2, 8)).run(launch, order=order)
        results.append(values(statistics))
    assert np.array_equal(results[0], results[1]) and np.array_equal(results[0], results[2])
    alone = shaped(numbers.nan(1, 32, 2, dtype="float32"), 1, 32, 2)
    partial = shaped(numbers.nan(1, 256, 32, 2, dtype="float32"), 1, 256, 32, 2)
    second = layers.group_statistics(x[1:], partial, device_array(np.zeros(1, np.uint32)), alone)
    host_kernels(LayerConfig("float16", 128, 2, 8)).run(second)
    assert np.array_equal(values(alone)[0], results[0][1])  # nor on the other images


@pytest.mark.parametrize("half", HALVES)
def test_look_up_and_doubling(half: str, host_kernels: Build, numbers: Numbers) -> None:
    config = LayerConfig(half, 128, 2, 16)
    codebook, codes = numbers.normal(97, 16, dtype=half)
    tokens = numbers.rng.integers(0, 97, (2, 3, 5)).astype(np.int32)
    x = shaped(numbers.nan(2, 3, 5, 16, dtype=half), 2, 3, 5, 16)
    host_kernels(config).run(layers.look_up(device_array(tokens), codebook, x))
    assert np.array_equal(values(x), codes[tokens])
    y = shaped(numbers.nan(2, 6, 10, 16, dtype=half), 2, 6, 10, 16)
    host_kernels(config).run(layers.double_map(x, y))
    assert np.array_equal(values(y), codes[tokens].repeat(2, 1).repeat(2, 2))


@pytest.mark.parametrize(("columns", "stride"), [(1, 8), (15, 16), (64, 64), (300, 304)])
def test_softmax(columns: int, stride: int, host_kernels: Build, numbers: Numbers) -> None:
    for half in HALVES:
        scores, x = numbers.normal(3, 5, stride, scale=20)
        out = shaped(numbers.nan(3, 5, stride, dtype=half), 3, 5, stride)
        host_kernels(LayerConfig(half, 128, 2, 8)).run(layers.softmax_rows(scores, out, columns))
        x = x[..., :columns]
        expected = np.exp(x - x.max(-1, keepdims=True))
        assert_close(values(out)[..., :columns], expected / expected.sum(-1, keepdims=True), half)
        assert not values(out)[..., columns:].any()


@pytest.mark.parametrize(
    ("size", "kernel", "stride", "padding", "out_size"),
    [((5, 7), (3, 3), 1, (1, 1), (5, 7)), ((6, 8), (3, 3), 2, (0, 0), (3, 4)), ((4, 3), (1, 1), 1, (0, 0), (4, 3))],
)
def test_im2col(
    size: tuple[int, int],
    kernel: tuple[int, int],
    stride: int,
    padding: tuple[int, int],
    out_size: tuple[int, int],
    host_kernels: Build,
    numbers: Numbers,
) -> None:
    (H, W), (R, S), (top, left), (out_h, out_w) = size, kernel, padding, out_size
    padded = np.zeros((2, top + out_h * stride + R, left + out_w * stride + S, 8))
    for dtype, planar in (("float16", False), ("float32", True)):
        source, x = numbers.normal(*((2, 8, H, W) if planar else (2, H, W, 8)), dtype=dtype)
        padded[:, top : top + H, left : left + W] = x.transpose(0, 2, 3, 1) if planar else x
        length = R * S * 8 + 3
        columns = shaped(numbers.nan(2 * out_h * out_w, length, dtype=dtype), 2 * out_h * out_w, length)
        launch: Launch = layers.im2col(
            source, columns, kernel=kernel, stride=stride, padding=padding, out_size=out_size, planar=planar
        )
        host_kernels(LayerConfig("float16", 128, 2, 8)).run(launch)
        taps = [
            padded[:, r : r + out_h * stride : stride, s : s + out_w * stride : stride]
            for r in range(R)
            for s in range(S)
        ]
        got = values(columns)
        assert np.array_equal(got[:, :-3], np.concatenate(taps, -1).reshape(len(got), -1)) and not got[:, -3:].any()


def test_planes_and_sums_of_maps(host_kernels: Build, numbers: Numbers) -> None:
    for half in HALVES:
        host = host_kernels(LayerConfig(half, 128, 2, 8))
        for dtype in (half, "float32"):
            x, exact = numbers.normal(2, 17, 19, 8, dtype=dtype)
            planes = shaped(numbers.nan(2, 3, 17, 19, dtype="float32"), 2, 3, 17, 19)
            host.run(layers.to_planes(x, planes))
            assert np.array_equal(values(planes), exact.transpose(0, 3, 1, 2)[:, :3])
            added, b = numbers.normal(2, 17, 19, 8, dtype=half)
            for out_dtype in (half, "float32"):
                out = shaped(numbers.nan(2, 17, 19, 8, dtype=out_dtype), 2, 17, 19, 8)
                host.run(layers.add_maps(x, added, out))
                assert_close(values(out), exact + b, out_dtype)
                host.run(layers.add_maps(x, None, out))
                assert_close(values(out), exact, out_dtype)
        x, exact = numbers.normal(1, 2, 2, 8)
        host.run(layers.add_maps(x, shaped(added, 2, 17, 19, 8)[0].reshape(17 * 19 * 8)[:32].reshape(1, 2, 2, 8), x))
        assert_close(values(x), exact + b[0].reshape(-1)[:32].reshape(1, 2, 2, 8), "float32")


# --- what the comparisons notice


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("mean * mean), 0.0f)", "0.0), 0.0f)"),
        ("fast_exp2(-LOG2_E * values[k])", "fast_exp2(LOG2_E * values[k])"),
        ("for (u32 i = share; i < chunks; i += ADDERS) {", "for (u32 i = share; i < 1; i += ADDERS) {"),
        ("if (thread == 0) finished[image] = 0;", ""),
    ],
)
def test_mutants_of_the_norm_are_noticed(old: str, new: str, host_kernels: Build, numbers: Numbers) -> None:
    config = LayerConfig("float16", 128, 2, 8)
    assert config.source.count(old) == 1
    with pytest.raises(AssertionError):
        test_group_norms(
            "float16", 3, 16, 16, 64, 32, lambda c: host_kernels(c, source=c.source.replace(old, new)), numbers
        )
