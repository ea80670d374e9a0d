"""All kernels but `sample_rows` against the host, launches that do not fit, and compilation by NVRTC."""

from __future__ import annotations

import ctypes
import importlib
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from host_kernels import HostKernels, device_array, parameters
from numpy.typing import NDArray

from flexvar_runtime.cuda import compilation, kernels
from flexvar_runtime.cuda.kernels import STATUS_WORDS, KernelConfig, Refusal, kernel_source, read_status, stream_block
from flexvar_runtime.cuda.launches import Launch
from flexvar_runtime.errors import BackendUnavailable, InvalidInput
from flexvar_runtime.model import noise
from flexvar_runtime.model.resize import bicubic_matrix
from flexvar_runtime.model.tables import Tables
from flexvar_runtime.pictures import pixels as images

Build = Callable[..., HostKernels]
TINY = KernelConfig(vocabulary=64, code_dim=8, width=64)


# --- the source and its launches


def test_the_names_are_those_of_the_source() -> None:
    assert set(kernels.KERNEL_NAMES) == set(parameters(kernel_source()))


def test_arguments_of_another_type_are_refused(host_kernels: Build) -> None:
    """A GPU would read garbage if the arguments of a launch were not the parameters of the kernel."""
    array = device_array(np.zeros((1, 4), np.uint32))
    launch = kernels.draws(device_array(stream_block([0], [0])), array, scale=0)
    for args in [launch.args[:-1], (*launch.args[:-1], ctypes.c_uint64(0)), (ctypes.c_uint32(0), *launch.args[1:])]:
        with pytest.raises(TypeError):
            host_kernels(TINY).run(Launch("draws", launch.grid, launch.block, 0, args))


def test_vocabularies_too_large_are_refused() -> None:
    with pytest.raises(BackendUnavailable, match="vocabulary of 40000"):
        KernelConfig(vocabulary=40000, code_dim=32, width=64)


def test_arrays_that_do_not_fit_are_refused() -> None:
    def array(*shape: int) -> Any:
        return device_array(np.zeros(shape, np.float32))

    calls: list[Callable[[], object]] = [
        lambda: kernels.draws(array(4), array(2, 9), scale=0),
        lambda: kernels.sample_rows(array(2, 4, 9), array(8), array(2, 2, 3), array(2), array(1), array(1), scale=0),
        lambda: kernels.gather_rows(array(1, 3, 5), array(4), array(1, 5, 5)),
        lambda: kernels.gather_rows(array(2, 3, 5), array(4), array(1, 4, 5)),
        lambda: kernels.scatter_rows(array(1, 3, 5), array(4), array(1, 9, 5)),
        lambda: kernels.scatter_rows(array(1, 3, 5), array(2), array(1, 9, 6)),
        lambda: kernels.to_uint8(array(2, 3, 4, 4), array(2, 4, 4, 4), array(2)),
        lambda: kernels.next_inputs(
            array(1, 2, 2),
            array(9, 8),
            (array(3, 4),) * 2,
            (array(3, 4),) * 2,
            array(9, 5),
            array(1, 8, 8),
            array(1, 9, 5),
        ),
    ]
    for call in calls:
        with pytest.raises(ValueError, match="do not fit"):
            call()


# --- noise


@pytest.mark.parametrize(("seed", "scale"), [(0, 0), (2**64 - 1, 13), (0x0123456789ABCDEF, 2**32 - 1)])
def test_a_million_draws_equal_the_host(seed: int, scale: int, host_kernels: Build) -> None:
    indices = [0, 1, 2**32, 2**64 - 1]
    out = np.zeros((4, 10**6 // 12), np.uint32)
    host_kernels(TINY).run(
        kernels.draws(device_array(stream_block([seed] * 4, indices)), device_array(out), scale=scale)
    )
    for index, row in zip(indices, out, strict=True):
        assert np.array_equal(row, noise.draws(seed, index, scale, out.shape[1]))


def test_streams_that_are_no_64_bit_numbers_are_refused() -> None:
    assert stream_block([2**32 + 5, 7], [2**63 + 1, 0]).tolist() == [5, 1, 1, 2**31, 7, 0, 0, 0]
    for seed, index in [(-1, 0), (0, 2**64), (0, 0.5)]:
        with pytest.raises(InvalidInput):
            stream_block([seed], [index])  # type: ignore[arg-type]


# --- inputs


def test_taps_are_the_whole_matrix() -> None:
    for inputs in range(1, 24):
        for outputs in range(1, 24):
            matrix = bicubic_matrix(inputs, outputs)
            index, weight = kernels.taps(matrix)
            assert (index.dtype, weight.dtype, index.shape) == (np.int32, np.float32, (outputs, 4))
            again = np.zeros_like(matrix)
            np.add.at(again, (np.arange(outputs)[:, None], index), weight)
            assert np.array_equal(again, matrix)
    with pytest.raises(ValueError, match="row 1 has 5 inputs"):
        kernels.taps(np.array([[0] * 6, [1, 1, 0, 1, 1, 1]], np.float32))


SIZES = [
    ((1, 1), (2, 2)),
    ((2, 2), (3, 5)),
    ((3, 5), (12, 20)),
    ((13, 13), (16, 16)),
    ((9, 4), (5, 3)),
    ((4, 4), (1, 1)),
]


@pytest.mark.parametrize("copies", [1, 2])
@pytest.mark.parametrize(("D", "C"), [(8, 64), (32, 70), (130, 6)])
def test_next_inputs_equal_the_tables(D: int, C: int, copies: int, host_kernels: Build) -> None:
    rng, V, B = np.random.default_rng(D), 97, 3
    codebook = rng.standard_normal((V, D)).astype(np.float32)
    codebook /= np.linalg.norm(codebook, axis=1, keepdims=True)
    tables = Tables(codebook, rng.standard_normal((C, 4, 4)).astype(np.float32), np.ones(C, np.float32))
    host = host_kernels(KernelConfig(vocabulary=V, code_dim=D, width=C))
    for (h, w), (new_h, new_w) in SIZES:
        L = new_h * new_w
        tokens = rng.integers(0, V, (B, h, w)).astype(np.int32)
        positions = tables.offset(new_h, new_w)
        codes, offset = np.full((copies * B, L, D), 9, np.float32), np.full((copies * B, L, C), 9, np.float32)
        y_taps, x_taps = kernels.taps(bicubic_matrix(h, new_h)), kernels.taps(bicubic_matrix(w, new_w))
        host.run(
            kernels.next_inputs(
                device_array(tokens),
                device_array(codebook),
                (device_array(y_taps[0]), device_array(y_taps[1])),
                (device_array(x_taps[0]), device_array(x_taps[1])),
                device_array(positions),
                device_array(codes),
                device_array(offset),
            )
        )
        expected = tables.next_codes(tokens, (new_h, new_w))
        # sums of 16 products of unit codes, in another order than a matrix product's
        assert np.abs(codes - np.concatenate([expected] * copies)).max() < 1e-6
        assert np.array_equal(offset, np.broadcast_to(positions, offset.shape))


@pytest.mark.parametrize("tables", [1, 3])
def test_gathered_rows(tables: int, host_kernels: Build) -> None:
    rng, rows = np.random.default_rng(0), np.array([4, 0, 0, 2, 3, 4, 1], np.int32)
    for columns in ((1,), (24,), (3, 5), (4097,), (2, 6, 1024)):
        source = rng.standard_normal((tables, 5, *columns)).astype(np.float32)
        target = np.zeros((tables, 7, *columns), np.float32)
        host_kernels(TINY).run(kernels.gather_rows(device_array(source), device_array(rows), device_array(target)))
        assert np.array_equal(target, source[:, rows])
        # an address off by 4 bytes
        memory = np.zeros(target.size + 2, np.float32)
        shifted = memory[1:-1].reshape(target.shape)
        host_kernels(TINY).run(kernels.gather_rows(device_array(source), device_array(rows), device_array(shifted)))
        assert np.array_equal(shifted, source[:, rows]) and memory[0] == memory[-1] == 0


@pytest.mark.parametrize("tables", [1, 3])
def test_scattered_rows(tables: int, host_kernels: Build) -> None:
    """Row i of every source goes to row `rows[i]` of its target. All other rows stay."""
    rng, rows = np.random.default_rng(0), np.array([5, 0, 3], np.int32)
    for columns in ((1,), (3, 5), (4097,)):
        source = rng.standard_normal((tables, 4, *columns)).astype(np.float32)
        target = rng.standard_normal((tables, 6, *columns)).astype(np.float32)
        expected = target.copy()
        expected[:, rows] = source[:, :3]
        host_kernels(TINY).run(kernels.scatter_rows(device_array(source), device_array(rows), device_array(target)))
        assert np.array_equal(target, expected)


# --- pixels


def pixels_of(host: HostKernels, image: NDArray[np.float32], value_range: tuple[float, float]) -> Any:
    B, _, H, W = image.shape
    memory = np.full(B * H * W * 3 + 2, 77, np.uint8)
    pixels, status = memory[1:-1].reshape(B, H, W, 3), np.zeros(STATUS_WORDS, np.uint32)
    whole = np.zeros((B, H, W, 3), np.uint8)
    for target in (pixels, whole):  # at an odd address, and at an aligned one
        arrays = device_array(image), device_array(target), device_array(status)
        host.run(kernels.to_uint8(*arrays, value_range))
    assert memory[0] == memory[-1] == 77 and np.array_equal(pixels, whole)
    return pixels, read_status(status)


def edges(value_range: tuple[float, float]) -> NDArray[np.float32]:
    """(1, 3, 100, 50): every value at which a pixel changes, eight floats to both sides of it, and values far away."""
    low, high = value_range
    exact = (low + (np.arange(-3, 259) - 0.5) / 255 * (high - low)).astype(np.float32)
    near = (exact + np.arange(-8, 9, dtype=np.float32)[:, None] * np.spacing(exact)).reshape(-1)
    far = np.array([1e36, -1e36, 0, -0.0, 1e-45], np.float32)
    spread = np.linspace(low - 1, high + 1, 15000 - len(near) - len(far), dtype=np.float32)
    return np.concatenate([near, far, spread]).reshape(1, 3, 100, 50)


RANGES = [(-1.0, 1.0), (0.0, 1.0), (-0.9, 1.1)]


@pytest.mark.parametrize("value_range", RANGES)
def test_pixels_equal_the_host_at_every_edge(value_range: tuple[float, float], host_kernels: Build) -> None:
    image = edges(value_range)
    pixels, refusal = pixels_of(host_kernels(TINY), image, value_range)
    assert refusal is None
    assert np.array_equal(pixels, images.to_uint8(image, value_range))
    assert set(np.unique(pixels)) == set(range(256))


def test_planes_of_any_size(host_kernels: Build) -> None:
    for plane in ((1, 1), (3, 3), (5, 7), (16, 65)):
        image = np.random.default_rng(0).uniform(-1.2, 1.2, (3, 3, *plane)).astype(np.float32)
        pixels, refusal = pixels_of(host_kernels(TINY), image, (-1.0, 1.0))
        assert refusal is None and np.array_equal(pixels, images.to_uint8(image))


def test_pixels_that_are_not_finite_are_refused(host_kernels: Build) -> None:
    for bad in (np.nan, -np.nan, np.inf, -np.inf):
        image = np.zeros((4, 3, 3, 5), np.float32)
        image[3, 0, 0, 0] = image[2, 1, 2, 4] = bad
        pixels, refusal = pixels_of(host_kernels(TINY), image, (-1.0, 1.0))
        assert refusal == Refusal("pixels", 0, 2)
        assert pixels[2, 2, 4].tolist() == [128, 0, 128]


def test_another_rounding_is_noticed(host_kernels: Build) -> None:
    """A compiler that fuses operations would give this kernel."""
    source = kernel_source().replace("__fsub_rn(__fmul_rn(value, gain), shift)", "fmaf(value, gain, -shift)")
    host = host_kernels(TINY, source=source)
    pairs = [(pixels_of(host, edges(r), r)[0], images.to_uint8(edges(r), r)) for r in RANGES]
    assert not all(np.array_equal(got, expected) for got, expected in pairs)


def test_the_status_is_the_first_refusal() -> None:
    assert read_status(np.zeros(2, np.uint32)) is None
    code = ~(1 << 56 | 13 << 40 | 2**40 - 2) & 2**64 - 1
    assert read_status(np.array([code & 0xFFFFFFFF, code >> 32], np.uint32)) == Refusal("logits", 13, 2**40 - 2)


# --- NVRTC

FUNCTION = re.compile(
    r"entry function '(\w+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers", re.S
)


TARGETS = ["sm_80", "sm_86", "sm_89", "sm_90", "sm_120"]


@pytest.mark.parametrize(
    ("target", "vocabulary"), [*((target, 8912) for target in TARGETS), ("sm_90", 512), ("sm_80", 16384)]
)
def test_every_kernel_compiles(target: str, vocabulary: int) -> None:
    pytest.importorskip("cuda.core", reason="needs cuda.core and NVRTC, no GPU: pip install 'flexvar-deploy[gpu]'")
    config = KernelConfig(vocabulary=vocabulary, code_dim=32, width=1536)
    cubin, log = compilation.compile_source(kernel_source(), target, config)
    assert cubin.startswith(b"\x7fELF") and b"warning" not in log.lower().encode()
    found = {name: (int(stores), int(loads), int(used)) for name, stores, loads, used in FUNCTION.findall(log)}
    assert set(found) == set(kernels.KERNEL_NAMES)
    for name, (stores, loads, registers) in found.items():
        assert registers <= 64  # a multiprocessor has registers for 1024 threads with 64 each
        assert max(stores, loads) <= (32 if name == "sample_rows" and vocabulary > 8912 else 0)


def test_a_source_that_does_not_compile_is_an_error_with_the_log() -> None:
    pytest.importorskip("cuda.core", reason="needs cuda.core and NVRTC, no GPU: pip install 'flexvar-deploy[gpu]'")
    with pytest.raises(BackendUnavailable, match=r"kernels.cu\(1\): error") as refusal:
        compilation.compile_source("nonsense", "sm_90", TINY)
    assert "pip install --upgrade 'cuda-python>=13' 'nvidia-cuda-nvrtc>=13'" in str(refusal.value)
    with pytest.raises(BackendUnavailable, match=r"(?s)sm_10 .*--gpu-architecture"):
        compilation.compile_kernels("sm_10", TINY)


def test_without_cuda_there_is_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str, package: str | None = None) -> Any:
        if name == "cuda.core":
            raise ModuleNotFoundError(f"No module named {name!r}")
        return real(name, package)

    real = importlib.import_module
    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(BackendUnavailable, match=r"No module named 'cuda\.core'.*pip install"):
        compilation.compile_kernels("sm_90", TINY)
