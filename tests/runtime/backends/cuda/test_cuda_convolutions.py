"""Convolutions by cuDNN, against NumPy in float64, and what takes their place if cuDNN has no plan."""

from __future__ import annotations

import gc
import logging
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import pytest
from device_numbers import empty, make_device, numbers_of, upload
from fake_cublaslt import FakeCublasLt
from fake_cudnn import FakeCudnn, Pygraph, cudnnGraphNotSupportedError, heur_mode
from fakes import FakeDevice
from host_kernels import HostKernels
from numpy.typing import NDArray

from flexvar_runtime.backends.cuda import convolutions as module
from flexvar_runtime.backends.cuda.convolutions import NO_PADDING, Convolution, Convolutions, Padding
from flexvar_runtime.backends.cuda.products import Products
from flexvar_runtime.cuda.array import DeviceArray
from flexvar_runtime.cuda.layers import LayerConfig
from flexvar_runtime.errors import BackendUnavailable, DeviceFailed, OutOfMemory

SAME = Padding(1, 1, 1, 1)
SHRINK = Padding(0, 1, 0, 1)
BOUND = {"float16": 2**-10, "bfloat16": 2**-7}
"""Relative errors of one rounding, twice as large: the sums in float32 add to it."""


@dataclass
class Bench:
    """A device with both libraries. options: of FakeCudnn."""

    device: FakeDevice
    cudnn: FakeCudnn
    convolutions: Convolutions
    cublaslt: FakeCublasLt
    random: np.random.Generator

    def normal(self, *shape: int, dtype: str) -> tuple[DeviceArray, NDArray[np.float64]]:
        array = upload(self.device, self.random.standard_normal(shape), dtype)
        return array, numbers_of(array).astype(np.float64)


def make_bench(limit: int = 2**20, **options: Any) -> Bench:
    device = make_device()
    cudnn, cublaslt, workspace = FakeCudnn(device, **options), FakeCublasLt(device), empty(device, (4096,), "uint8")
    products = Products(device, workspace, cublaslt)
    convolutions = Convolutions(device, workspace, products, cudnn, scratch_limit=limit)
    return Bench(device, cudnn, convolutions, cublaslt, np.random.default_rng(7))


@pytest.fixture
def bench() -> Bench:
    return make_bench()


@pytest.fixture
def without_plans(kernels: HostKernels) -> Callable[..., Bench]:
    """(limit) -> a device on which cuDNN has no plan. Its kernels are our own, compiled for the host."""

    def make(limit: int = 2**20) -> Bench:
        bench = make_bench(limit, plans=set())
        bench.device.kernels = lambda _: kernels
        bench.device.load(kernels.config)
        return bench

    return make


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> HostKernels:
    return HostKernels(LayerConfig("float16", 64, 4, 8), tmp_path_factory.mktemp("layers"))


@pytest.fixture(autouse=True)
def _logged() -> Iterator[None]:
    logger = logging.getLogger("flexvar_runtime")
    before, logger.propagate = logger.propagate, True
    yield
    logger.propagate = before


def convolve(
    x: NDArray[np.float64], weight: NDArray[np.float64], stride: int = 1, padding: Padding = NO_PADDING
) -> NDArray[np.float64]:
    """The definition: for every pixel of the result, the sum over what lies under the weight."""
    p, (_, R, S, _) = padding, weight.shape
    x = np.pad(x, ((0, 0), (p.top, p.bottom), (p.left, p.right), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(x, (R, S), axis=(1, 2))[:, ::stride, ::stride]
    return np.einsum("bhwirs,orsi->bhwo", windows, weight)


CASES = {
    "1x1": (1, 1, 1, NO_PADDING),
    "3x3": (3, 3, 1, SAME),
    "3x3 stride 2": (3, 3, 2, SHRINK),
    "1x3": (1, 3, 1, Padding(left=2)),
    "1x1 stride 2": (1, 1, 2, NO_PADDING),
    "1x1 padded": (1, 1, 1, SAME),
}


def run(
    bench: Bench, case: str, dtype: str = "float16", residual: bool = True, *, images: int = 2, inputs: int = 8
) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
    """What a convolution to 5 channels gives, and what it should give."""
    R, S, stride, padding = CASES[case]
    (x, X), (weight, W) = bench.normal(images, 6, 9, inputs, dtype=dtype), bench.normal(5, R, S, inputs, dtype=dtype)
    bias, v = bench.normal(5, dtype=dtype)
    wanted = convolve(X, W, stride, padding) + v
    y, added = empty(bench.device, wanted.shape, dtype), None
    if residual:
        added, Z = bench.normal(*wanted.shape, dtype=dtype)
        wanted = wanted + Z
    call = bench.convolutions.convolution(x, weight, bias, y, residual=added, stride=stride, padding=padding)
    for _ in range(2):
        call()
    bench.device.synchronize()
    return numbers_of(y), wanted


def assert_close(found: NDArray[np.float32], wanted: NDArray[np.float64], dtype: str = "float16") -> None:
    assert np.abs(found - wanted).max() <= BOUND[dtype] * np.abs(wanted).max()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_convolution(bench: Bench, case: str, dtype: str, residual: bool) -> None:
    assert_close(*run(bench, case, dtype, residual), dtype)
    assert not bench.convolutions.substituted and not bench.cublaslt.heuristics
    (operation, _) = bench.cudnn.executed
    _, _, stride, p = CASES[case]
    assert (operation.padding, operation.stride) == ((p.top, p.left, p.bottom, p.right), (stride, stride))


def test_a_plan_is_kept_per_shape_and_option(bench: Bench) -> None:
    for _ in range(2):
        assert_close(*run(bench, "3x3"))
    assert bench.cudnn.asked == [[heur_mode.A]]
    assert_close(*run(bench, "3x3", residual=False))
    assert_close(*run(bench, "3x3", "bfloat16"), "bfloat16")
    assert_close(*run(bench, "3x3", images=3))
    assert_close(*run(bench, "3x3", images=2))
    assert len(bench.cudnn.asked) == 4


def test_other_modes_are_tried_in_order() -> None:
    bench = make_bench(plans={heur_mode.FALLBACK})
    assert_close(*run(bench, "3x3"))
    assert bench.cudnn.asked == [[heur_mode.A], [heur_mode.B], [heur_mode.FALLBACK]]
    assert not bench.convolutions.substituted


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("residual", [False, True])
def test_without_a_plan_a_product_takes_its_place(
    without_plans: Callable[..., Bench], case: str, residual: bool, caplog: pytest.LogCaptureFixture
) -> None:
    bench = without_plans()
    with caplog.at_level(logging.WARNING, "flexvar_runtime"):
        for _ in range(2):
            assert_close(*run(bench, case, residual=residual))
    (record,), (described,) = caplog.records, bench.convolutions.substituted
    assert described in record.getMessage() and "(2, 6, 9, 8)" in described and "No valid engine" in record.getMessage()
    assert bench.device.events.count("im2col") == (0 if case == "1x1" else 4)
    assert len(bench.cudnn.asked) == 3, "the answer is kept"


@pytest.mark.kernels
def test_the_scratch_stays_within_its_limit(without_plans: Callable[..., Bench]) -> None:
    """Of 5 images, 2 fit at a time. A smaller limit takes one image, and a convolution that needs less reuses it."""
    image = 6 * 9 * 9 * 8 * 2
    for limit, images, launches in ((2 * image + 100, 2, 3), (10, 1, 5), (2**20, 5, 1)):
        bench = without_plans(limit)
        before = bench.device.used
        assert_close(*run(bench, "3x3", images=5))
        assert bench.device.events.count("im2col") == 2 * launches
        gc.collect()
        assert bench.device.used - before == images * image, "only the scratch is kept"
        assert_close(*run(bench, "1x3", images=1))
        gc.collect()
        assert bench.device.used - before == images * image


def test_a_plan_that_needs_too_much_workspace_is_not_taken(without_plans: Callable[..., Bench]) -> None:
    bench = without_plans()
    bench.cudnn.plans, bench.cudnn.needs = set(heur_mode), 4097
    assert_close(*run(bench, "3x3"))
    assert len(bench.convolutions.substituted) == 1
    bench.cudnn.needs = 4096
    assert_close(*run(bench, "3x3", residual=False))
    assert len(bench.convolutions.substituted) == 1


@pytest.mark.kernels
def test_a_call_keeps_its_arrays_and_their_memory_alive(without_plans: Callable[..., Bench]) -> None:
    for bench in (make_bench(), without_plans()):
        for shape in ((3, 3), (1, 1)):
            arrays = [
                upload(bench.device, np.ones(s), "float16") for s in ((1, 4, 4, 8), (8, *shape, 8), (8,), (1, 4, 4, 8))
            ]
            y = empty(bench.device, (1, 4, 4, 8), "float16")
            memories = [weakref.ref(array.memory) for array in (*arrays, y)]
            x, weight, bias, residual = arrays
            padding = SAME if shape == (3, 3) else NO_PADDING
            call = bench.convolutions.convolution(x, weight, bias, y, residual=residual, padding=padding)
            del arrays, x, weight, bias, residual, y
            gc.collect()
            assert all(memory() is not None for memory in memories)
            call()
            bench.device.synchronize()
            del call
            gc.collect()
            assert all(memory() is None for memory in memories)


def test_the_handle_follows_the_stream_of_the_device(bench: Bench) -> None:
    """The stream is another one while the device captures."""
    x, weight, bias = (upload(bench.device, np.ones(s), "float16") for s in ((1, 4, 4, 8), (8, 1, 1, 8), (8,)))
    y = empty(bench.device, (1, 4, 4, 8), "float16")
    call = bench.convolutions.convolution(x, weight, bias, y)
    bench.device.stream = 0xCAFE
    replay = bench.device.capture(call)
    assert list(bench.cudnn.handles.values()) == [0xCAFE]
    bench.device.stream = 0x5EED
    call()
    assert list(bench.cudnn.handles.values()) == [0x5EED]
    replay.launch()
    bench.device.synchronize()
    assert (numbers_of(y) == 9).all()


# failures ------------------------------------------------------------------------------------------------------------


def small(bench: Bench) -> Callable[[], None]:
    x, weight, bias = (upload(bench.device, np.ones(s), "float16") for s in ((1, 4, 4, 8), (8, 1, 1, 8), (8,)))
    return bench.convolutions.convolution(x, weight, bias, empty(bench.device, (1, 4, 4, 8), "float16"))


def test_the_errors_of_the_library(bench: Bench) -> None:
    call = small(bench)
    for error, kind in (
        (ValueError("INVALID_VARIANT_PACK"), DeviceFailed),
        (RuntimeError("ALLOC_FAILED"), OutOfMemory),
    ):
        bench.cudnn.error = error
        with pytest.raises(kind, match=f"cuDNN.*emulated GPU when running a convolution.*{error}") as refusal:
            call()
        assert refusal.value.__cause__ is error


def test_too_little_memory_for_a_plan_is_no_reason_for_another_way(bench: Bench) -> None:
    bench.cudnn.error = RuntimeError("CUDNN_STATUS_ALLOC_FAILED")
    with pytest.raises(OutOfMemory, match="planning a convolution"):
        small(bench)
    assert not bench.convolutions.substituted
    bench.cudnn.error = cudnnGraphNotSupportedError("this mode only")
    small(bench)
    assert not bench.convolutions.substituted


def test_a_library_that_does_not_start() -> None:
    bench = make_bench()
    bench.cudnn.error = RuntimeError("Unable to find symbol cudnnCreate")
    products: Any = None
    with pytest.raises(BackendUnavailable, match="cuDNN does not work on emulated GPU: Unable to find"):
        Convolutions(bench.device, empty(bench.device, (256,), "uint8"), products, bench.cudnn)


def test_a_closed_object_refuses_its_calls(bench: Bench) -> None:
    call = small(bench)
    bench.convolutions.close()
    bench.convolutions.close()
    assert not bench.cudnn.handles
    for again in (call, lambda: small(bench)):
        with pytest.raises(ValueError, match="closed"):
            again()


GOOD: dict[str, tuple[int, ...]] = {
    "x": (2, 6, 9, 8),
    "weight": (5, 3, 3, 8),
    "bias": (5,),
    "y": (2, 6, 9, 5),
    "residual": (2, 6, 9, 5),
}


@pytest.mark.parametrize(
    "wrong",
    [
        {"x": (2, 6, 9, 7)},
        {"x": (2, 6, 9)},
        {"weight": (5, 3, 3)},
        {"weight": (4, 3, 3, 8)},
        {"bias": (1, 5)},
        {"y": (2, 6, 8, 5)},
        {"residual": (1, 6, 9, 5)},
        {"stride": 2},
        {"stride": 0},
        {"padding": NO_PADDING},
        {"padding": Padding(-1, 3, 1, 1)},
    ],
)
def test_arrays_that_do_not_fit_together(bench: Bench, wrong: dict[str, Any]) -> None:
    sizes = GOOD | {name: value for name, value in wrong.items() if name in GOOD}
    options = {"padding": SAME} | {name: value for name, value in wrong.items() if name not in GOOD}
    arrays = {name: empty(bench.device, shape, "float16") for name, shape in sizes.items()}
    with pytest.raises(ValueError, match=r"arrays|axes|sizes"):
        bench.convolutions.convolution(**arrays, **options)
    assert not bench.cudnn.asked


def test_dtypes_and_addresses(bench: Bench) -> None:
    arrays = {name: empty(bench.device, shape, "float16") for name, shape in GOOD.items()}

    def refuse(text: str, **changed: DeviceArray) -> None:
        with pytest.raises(ValueError, match=text):
            bench.convolutions.convolution(**arrays | changed, padding=SAME)

    for name, array in arrays.items():
        refuse("arrays", **{name: replace(array, dtype="bfloat16")})
        refuse("multiple of 16", **{name: empty(bench.device, array.shape, "float16", skip=4)})
        if name != "y":
            refuse("overlaps", **{name: replace(arrays["y"], shape=array.shape)})
    refuse("sizes", **{name: empty(bench.device, shape, "float32") for name, shape in GOOD.items()})


# the double ----------------------------------------------------------------------------------------------------------


class Swapped(Pygraph):
    """A graph that adds the bias before the residual."""

    def add(self, a: Any, b: Any, **options: Any) -> Any:
        self.late = b
        return a

    def bias(self, input: Any, bias: Any, **options: Any) -> Any:
        return super().add(super().bias(input, bias, **options), self.late, **options)


def nchw(batch: int, height: int, width: int, channels: int) -> dict[str, list[int]]:
    strides = [channels * height * width, height * width, width, 1]
    return {"dim": [batch, channels, height, width], "stride": strides}


def nwhc(batch: int, height: int, width: int, channels: int) -> dict[str, list[int]]:
    strides = [channels * height * width, 1, channels * height, channels]
    return {"dim": [batch, channels, width, height], "stride": strides}


@pytest.mark.parametrize("change", ["bias first", "padding", "strides", "axes", "workspace"])
def test_the_double_notices_a_wrong_use(bench: Bench, change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if change == "bias first":
        monkeypatch.setattr(bench.cudnn, "pygraph", partial(Swapped, bench.cudnn))
    if change == "padding":
        monkeypatch.setattr(module, "_padding_arguments", lambda _: {"padding": [1, 0]})
    if change in ("strides", "axes"):
        monkeypatch.setattr(module, "_nhwc", nchw if change == "strides" else nwhc)
    if change == "workspace":  # its memory is freed
        monkeypatch.setattr(
            bench.convolutions, "_workspace", replace(empty(bench.device, (512,), "uint8"), memory=None)
        )
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        assert_close(*run(bench, "3x3"))


def test_a_description_names_the_sizes() -> None:
    text = str(Convolution((1, 8, 8, 3), (4, 3, 3, 3), "bfloat16", 2, SHRINK, True))
    assert text == "x (1, 8, 8, 3), weight (4, 3, 3, 3), stride 2, padding 0 1 0 1 and a residual in bfloat16"
