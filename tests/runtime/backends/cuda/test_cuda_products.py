"""Products by cuBLASLt, against NumPy in float64: sizes, strides, batches, epilogues, and kept algorithms."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from device_numbers import Floats, empty, make_device, numbers_of, upload
from fake_cublaslt import Epilogue, FakeCublasLt, MatmulDescAttribute, cuBLASLtError, gelu
from fakes import FakeDevice
from numpy.typing import NDArray

from flexvar_runtime.backends.cuda import products as module
from flexvar_runtime.backends.cuda.products import Matrix, Products
from flexvar_runtime.cuda.array import DeviceArray
from flexvar_runtime.errors import BackendUnavailable, DeviceFailed, OutOfMemory

BOUND = {"float32": 1e-6, "float16": 2**-10, "bfloat16": 2**-7}
"""Relative errors of one rounding to a dtype, twice as large: the sums in float32 add to it."""


@dataclass
class Bench:
    device: FakeDevice
    library: FakeCublasLt
    products: Products
    random: np.random.Generator

    def normal(self, *shape: int, dtype: str, skip: int = 0) -> tuple[DeviceArray, NDArray[np.float64]]:
        """Random numbers on the device, and as they are there."""
        array = upload(self.device, self.random.standard_normal(shape), dtype, skip)
        return array, numbers_of(array).astype(np.float64)

    def result(self, call: Callable[[], None], out: DeviceArray) -> Floats:
        call()
        self.device.synchronize()
        return numbers_of(out)


@pytest.fixture
def bench() -> Bench:
    return make_bench()


def make_bench(size: int = 4096, **options: Any) -> Bench:
    device = make_device()
    library = FakeCublasLt(device, **options)
    return Bench(device, library, Products(device, empty(device, (size,), "uint8"), library), np.random.default_rng(7))


def assert_close(found: Floats, wanted: NDArray[np.float64], dtype: str) -> None:
    """Errors are relative to the largest number, since a sum may cancel."""
    assert np.abs(found - wanted).max() <= BOUND[dtype] * np.abs(wanted).max()


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize(("M", "N", "K"), [(1, 1, 1), (1, 64, 32), (7, 5, 3), (64, 48, 7), (7, 1, 64)])
@pytest.mark.parametrize("transposed", [False, True])
def test_a_product(bench: Bench, M: int, N: int, K: int, dtype: str, transposed: bool) -> None:
    (a, A), (b, B) = bench.normal(M, K, dtype=dtype), bench.normal(*((N, K) if transposed else (K, N)), dtype=dtype)
    out = empty(bench.device, (M, N), dtype)
    call = bench.products.product(Matrix.of(a), Matrix.of(b), Matrix.of(out), transposed=transposed)
    assert_close(bench.result(call, out), A @ (B.T if transposed else B), dtype)


@pytest.mark.parametrize(
    ("dtype", "result"), [("float16", "float16"), ("bfloat16", "bfloat16"), ("float16", "float32")]
)
@pytest.mark.parametrize("activation", [False, True])
@pytest.mark.parametrize("added", [False, True])
def test_what_is_done_to_a_product(bench: Bench, dtype: str, result: str, activation: bool, added: bool) -> None:
    """Scale, addend, bias and GELU, in this order, and one rounding."""
    (a, A), (b, B) = bench.normal(6, 16, dtype=dtype), bench.normal(16, 8, dtype=dtype)
    (bias, v), (addend, C) = bench.normal(8, dtype=result), bench.normal(6, 8, dtype=result)
    out = empty(bench.device, (6, 8), result)
    call = bench.products.product(
        Matrix.of(a),
        Matrix.of(b),
        Matrix.of(out),
        bias=bias,
        gelu=activation,
        scale=0.25,
        addend=Matrix.of(addend) if added else None,
    )
    wanted = 0.25 * (A @ B) + v + (C if added else 0)
    wanted = gelu(wanted.astype(np.float32)).astype(np.float64) if activation else wanted
    assert_close(bench.result(call, out), wanted, result)


def test_a_sum_in_place(bench: Bench) -> None:
    (a, A), (b, B), (out, C) = (bench.normal(*shape, dtype="float16") for shape in ((3, 8), (8, 5), (3, 5)))
    call = bench.products.product(Matrix.of(a), Matrix.of(b), Matrix.of(out), addend=Matrix.of(out))
    assert_close(bench.result(call, out), A @ B + C, "float16")


def test_parts_of_larger_matrices(bench: Bench) -> None:
    """The middle columns of each operand. What lies beside the result stays as it was."""
    (a, A), (b, B) = bench.normal(6, 24, dtype="float16"), bench.normal(16, 40, dtype="float16")
    (out, before), (addend, C) = bench.normal(6, 20, dtype="float16"), bench.normal(6, 32, dtype="float16")
    call = bench.products.product(
        Matrix(a, 5, 8, 24, offset=24 + 8),  # rows 1 to 5, columns 8 to 15
        Matrix(b, 8, 10, 40, offset=4 * 40 + 3),  # rows 4 to 11, columns 3 to 12
        Matrix(out, 5, 10, 20, offset=6),
        addend=Matrix(addend, 5, 10, 32, offset=1),
    )
    found = bench.result(call, out)
    assert_close(found[:5, 6:16], A[1:, 8:16] @ B[4:12, 3:13] + C[:5, 1:11], "float16")
    found[:5, 6:16] = before[:5, 6:16]
    assert (found == before).all()


@pytest.mark.parametrize("shared", [False, True])
def test_heads_that_lie_side_by_side(bench: Bench, shared: bool) -> None:
    """Scores of 3 heads of size 8 in rows of q, k and v, and the values that they weight. shared: one v for all."""
    (qkv, numbers), heads, L = bench.normal(5, 3 * 24, dtype="float16"), 3, 5
    q, k, v = (numbers[:, i * 24 : (i + 1) * 24].reshape(L, heads, 8).transpose(1, 0, 2) for i in range(3))
    scores, out = empty(bench.device, (heads, L, L), "float32"), empty(bench.device, (L, heads, 8), "float16")
    part = Matrix(qkv, L, 8, 72, batch=heads, step=8)
    each = Matrix(scores, L, L, L, batch=heads, step=L * L)
    bench.products.product(part, replace(part, offset=24), each, transposed=True, scale=8**-0.5)()
    weights, W = bench.normal(heads, L, L, dtype="float16")
    values = replace(part, offset=48, batch=1) if shared else replace(part, offset=48)
    rows = Matrix(weights, L, L, L, batch=heads, step=L * L)
    bench.products.product(rows, values, Matrix(out, L, 8, 24, batch=heads, step=8))()
    bench.device.synchronize()
    assert_close(numbers_of(scores), q @ k.transpose(0, 2, 1) * 8**-0.5, "float32")
    assert_close(numbers_of(out).transpose(1, 0, 2), W @ (v[:1] if shared else v), "float16")


def test_of_takes_the_last_axis_as_columns(bench: Bench) -> None:
    array = empty(bench.device, (2, 3, 4), "float16")
    assert Matrix.of(array) == Matrix(array, 6, 4, 4)
    assert Matrix.of(array[1]).address == array.address + 24


# plans ---------------------------------------------------------------------------------------------------------------


def test_an_algorithm_is_asked_for_once_per_shape(bench: Bench) -> None:
    def product(rows: int, **options: Any) -> None:
        (a, A), (b, B) = bench.normal(rows, 8, dtype="float16"), bench.normal(8, 8, dtype="float16")
        (bias, v), out = bench.normal(8, dtype="float16"), empty(bench.device, (rows, 8), "float16")
        call = bench.products.product(Matrix.of(a), Matrix.of(b), Matrix.of(out), bias=bias, **options)
        wanted = A @ (B.T if options.get("transposed") else B) + v
        found = bench.result(call, out)
        assert_close(found, wanted, "float16") if "gelu" not in options else None

    for _ in range(3):  # other weights and another bias each time
        product(4)
    assert bench.library.heuristics == 1
    for options in ({"transposed": True}, {"gelu": True}):
        product(4, **options)
        product(4, **options)
    product(5)
    product(4)
    assert bench.library.heuristics == 4


def test_other_strides_and_steps_are_another_plan(bench: Bench) -> None:
    (a, A), (b, B) = bench.normal(64, dtype="float16"), bench.normal(4, 4, dtype="float16")
    places = [(4, 8), (8, 8), (4, 16)]
    for stride, step in places:
        out = empty(bench.device, (2, 2, 4), "float16")
        part = np.array([[A[i * step + j * stride :][:4] for j in range(2)] for i in range(2)])
        left = Matrix(a, 2, 4, stride, batch=2, step=step)
        call = bench.products.product(left, Matrix.of(b), Matrix(out, 2, 4, 4, batch=2, step=8))
        assert_close(bench.result(call, out), part @ B, "float16")
    assert bench.library.heuristics == len(places)


def test_two_products_of_one_plan_have_their_own_bias_scale_and_addend(bench: Bench) -> None:
    """The second is made before the first is called, and both are called twice."""
    calls, wanted, results = [], [], []
    for scale in (1.0, 0.5):
        (a, A), (b, B), (C, c) = (bench.normal(*shape, dtype="float16") for shape in ((4, 8), (8, 8), (4, 8)))
        (bias, v), out = bench.normal(8, dtype="float16"), empty(bench.device, (4, 8), "float16")
        matrices = (Matrix.of(a), Matrix.of(b), Matrix.of(out))
        calls.append(bench.products.product(*matrices, bias=bias, scale=scale, addend=Matrix.of(C)))
        wanted.append(scale * (A @ B) + c + v)
        results.append(out)
    for i in (1, 0, 0, 1):
        assert_close(bench.result(calls[i], results[i]), wanted[i], "float16")
    assert bench.library.heuristics == 1


def test_a_less_aligned_address_is_another_plan(bench: Bench) -> None:
    """The double refuses an address that is less aligned than was promised, also of the bias."""
    (b, B), (bias, v) = bench.normal(16, 16, dtype="float16"), bench.normal(16, dtype="float16")
    skips = [(0, 0, 0), (1, 0, 0), (0, 8, 0), (0, 0, 1), (3, 5, 7)]
    for skip_a, skip_out, skip_bias in skips:
        a, A = bench.normal(4, 16, dtype="float16", skip=skip_a)
        bias, v = bench.normal(16, dtype="float16", skip=skip_bias)
        out = empty(bench.device, (4, 16), "float16", skip=skip_out)
        call = bench.products.product(Matrix.of(a), Matrix.of(b), Matrix.of(out), bias=bias)
        assert_close(bench.result(call, out), A @ B + v, "float16")
    assert bench.library.heuristics == len(skips)
    aligned = [algorithm.alignments for algorithm in bench.library._algorithms[1::2]]
    assert aligned == [(256, 256, 256, 256), (256, 2, 256, 256), (256, 256, 16, 16), (256, 256, 256, 2), (256, 2, 2, 2)]


def test_the_first_usable_algorithm_is_taken() -> None:
    """Not one with a status, and none that needs more than the workspace."""
    bench = make_bench(states=(15, 1, 0, 0), needs=4096)
    (a, A), (b, B) = bench.normal(4, 8, dtype="float16"), bench.normal(8, 8, dtype="float16")
    out = empty(bench.device, (4, 8), "float16")
    call = bench.products.product(Matrix.of(a), Matrix.of(b), Matrix.of(out))
    assert_close(bench.result(call, out), A @ B, "float16")
    (plan,) = bench.products._plans.values()
    assert bytes(plan.algorithm.tobytes()) == (0x5EED_0000 + 2).to_bytes(8, "little") * 8


@pytest.mark.parametrize("options", [{"needs": 4097}, {"states": (15,)}, {"states": ()}])
def test_without_an_algorithm_the_error_names_the_sizes(options: dict[str, Any]) -> None:
    bench = make_bench(**options)
    a, b, out = (empty(bench.device, shape, "float16") for shape in ((4, 8), (8, 16), (4, 16)))
    with pytest.raises(BackendUnavailable, match=r"M = 4, N = 16 and K = 8 in float16.*Use another backend"):
        bench.products.product(Matrix.of(a), Matrix.of(b), Matrix.of(out))
    bench.products.close()
    assert not bench.library.alive


# failures ------------------------------------------------------------------------------------------------------------

STATUS = "CUBLAS_STATUS_{} ({})"


@pytest.mark.parametrize(
    ("name", "planning", "running"),
    [
        ("NOT_SUPPORTED", BackendUnavailable, DeviceFailed),
        ("EXECUTION_FAILED", DeviceFailed, DeviceFailed),
        ("ALLOC_FAILED", OutOfMemory, OutOfMemory),
    ],
)
def test_the_errors_of_the_library(bench: Bench, name: str, planning: type, running: type) -> None:
    a, b, out = (empty(bench.device, shape, "float16") for shape in ((4, 8), (8, 16), (4, 16)))
    error = cuBLASLtError(f"CUBLAS_STATUS_{name} (13)")
    bench.library.error = error
    with pytest.raises(planning, match=f"cuBLASLt.*M = 4, N = 16 and K = 8.*{name}") as refusal:
        bench.products.product(Matrix.of(a), Matrix.of(b), Matrix.of(out))
    assert refusal.value.__cause__ is error
    call = bench.products.product(Matrix.of(a), Matrix.of(b), Matrix.of(out))
    bench.library.error = error
    with pytest.raises(running, match=f"cuBLASLt.*emulated GPU.*{name}"):
        call()


def test_a_library_that_does_not_start() -> None:
    device = make_device()
    library = FakeCublasLt(device)
    library.error = RuntimeError("CUDA driver is not found (libcuda.so.1: cannot open shared object file)")
    with pytest.raises(BackendUnavailable, match=r"cuBLASLt does not work on emulated GPU: CUDA driver is not found"):
        Products(device, empty(device, (256,), "uint8"), library)


def test_a_closed_object_refuses_its_calls(bench: Bench) -> None:
    a, b, out = (empty(bench.device, shape, "float16") for shape in ((4, 8), (8, 16), (4, 16)))
    call = bench.products.product(Matrix.of(a), Matrix.of(b), Matrix.of(out), addend=Matrix.of(out))
    bench.products.close()
    bench.products.close()
    assert not bench.library.alive, "handles, descriptors, layouts and preferences are destroyed"
    for again in (call, lambda: bench.products.product(Matrix.of(a), Matrix.of(b), Matrix.of(out))):
        with pytest.raises(ValueError, match="closed"):
            again()


def test_plans_that_were_not_used_lately_are_freed(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """As soon as no call uses them: a server with ever new sizes must not grow."""
    monkeypatch.setattr("flexvar_runtime.backends.cuda.products.PLANS_KEPT", 2)
    arrays = [
        [empty(bench.device, shape, "float16") for shape in ((rows, 8), (8, 16), (rows, 16))] for rows in (1, 2, 3)
    ]
    calls = [bench.products.product(*map(Matrix.of, three)) for three in arrays]
    alive = len(bench.library.alive)
    calls[0]()
    bench.device.synchronize()
    del calls[0]
    gc.collect()
    assert len(bench.library.alive) < alive
    calls[1]()
    bench.device.synchronize()
    heuristics = bench.library.heuristics
    bench.products.product(*map(Matrix.of, arrays[2]))
    assert bench.library.heuristics == heuristics
    bench.products.product(*map(Matrix.of, arrays[0]))
    assert bench.library.heuristics == heuristics + 1


def test_a_call_keeps_its_arrays_and_their_memory_alive(bench: Bench) -> None:
    arrays = [upload(bench.device, np.ones(s), "float16") for s in ((4, 8), (8, 16), (4, 16), (4, 16), (16,))]
    memories = [weakref.ref(array.memory) for array in arrays]
    a, b, out, addend, bias = arrays
    call = bench.products.product(Matrix.of(a), Matrix.of(b), Matrix.of(out), addend=Matrix.of(addend), bias=bias)
    del a, b, out, addend, bias, arrays
    gc.collect()
    assert all(memory() is not None for memory in memories)
    call()
    bench.device.synchronize()
    del call
    gc.collect()
    assert all(memory() is None for memory in memories)


def test_a_call_uses_the_stream_that_the_device_has_then(bench: Bench) -> None:
    (a, A), (b, B) = bench.normal(4, 8, dtype="float16"), bench.normal(8, 8, dtype="float16")
    out = empty(bench.device, (4, 8), "float16")
    call = bench.products.product(Matrix.of(a), Matrix.of(b), Matrix.of(out))
    bench.device.stream = 0xCAFE
    replay = bench.device.capture(call)
    bench.device.stream = 0x5EED
    replay.launch()
    bench.device.synchronize()
    assert_close(numbers_of(out), A @ B, "float16")


def refuse(bench: Bench, text: str, *shapes: tuple[int, ...], **options: Any) -> None:
    dtypes = options.pop("dtypes", ("float16",) * len(shapes))
    arrays = [empty(bench.device, s, dtype) for s, dtype in zip(shapes, dtypes, strict=True)]
    if len(arrays) == 4:
        options["addend"] = Matrix.of(arrays.pop())
    if isinstance(options.get("bias"), tuple):
        options["bias"] = empty(bench.device, *options["bias"])
    with pytest.raises(ValueError, match=text):
        bench.products.product(*map(Matrix.of, arrays), **options)


def test_operands_that_do_not_fit_together(bench: Bench) -> None:
    good = ((4, 8), (8, 16), (4, 16))
    refuse(bench, "matrices", (4, 8), (7, 16), (4, 16))
    refuse(bench, "matrices", (4, 8), (8, 16), (4, 15))
    refuse(bench, "matrices", (5, 8), (8, 16), (4, 16))
    refuse(bench, "matrices", *good, transposed=True)
    refuse(bench, "matrices", *good, (4, 15))
    refuse(bench, "dtypes", *good, dtypes=("float16", "bfloat16", "float16"))
    refuse(bench, "dtypes", *good, dtypes=("float16", "float16", "bfloat16"))
    refuse(bench, "dtypes", *good, dtypes=("float32", "float32", "float16"))
    refuse(bench, "dtypes", *good, (4, 16), dtypes=("float16", "float16", "float16", "float32"))
    refuse(bench, "GELU needs a bias", *good, gelu=True)
    refuse(bench, "bias", *good, bias=((15,), "float16"))
    refuse(bench, "bias", *good, bias=((16,), "float16"), dtypes=("float16", "float16", "float32"))
    assert not bench.library.heuristics


def test_batches_that_do_not_fit_together(bench: Bench) -> None:
    array, out = empty(bench.device, (4, 8, 8), "float16"), empty(bench.device, (4, 8, 8), "float16")
    batch, result = Matrix(array, 8, 8, 8, batch=4, step=64), Matrix(out, 8, 8, 8, batch=4, step=64)
    for wrong in (replace(batch, batch=3), replace(batch, batch=2)):
        with pytest.raises(ValueError, match="batches"):
            bench.products.product(batch, wrong, result)
    for step in (0, 8, 63):
        with pytest.raises(ValueError, match="overlap"):
            bench.products.product(batch, batch, replace(result, step=step))
    with pytest.raises(ValueError, match="addend"):
        bench.products.product(batch, batch, result, addend=replace(result, batch=1))


@pytest.mark.parametrize(
    "sizes",
    [(9, 8, 8), (8, 9, 8), (8, 8, 9), (8, 8, 7), (0, 8, 8), (8, 8, 8, 2, 1), (8, 8, 8, 1, 0, 1), (8, 8, 8, 0)],
)
def test_a_matrix_lies_within_its_array(bench: Bench, sizes: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="matrix"):
        Matrix(empty(bench.device, (8, 8), "float16"), *sizes)


def test_arrays_that_are_no_matrices(bench: Bench) -> None:
    for array in (empty(bench.device, (8, 8), "int32"), empty(bench.device, (), "float16")):
        with pytest.raises(ValueError, match=r"dtype int32|no matrix"):
            Matrix.of(array)
    odd = replace(empty(bench.device, (9,), "float16"), shape=(8,))
    with pytest.raises(ValueError, match="misaligned"):
        Matrix.of(replace(odd, address=odd.address + 1))


def test_a_workspace_is_aligned(bench: Bench) -> None:
    with pytest.raises(ValueError, match="256"):
        Products(bench.device, empty(bench.device, (4096,), "uint8", skip=16), bench.library)


# the double ----------------------------------------------------------------------------------------------------------


class Mutant(FakeCublasLt):
    """A library that is told something else than the code under test says."""

    def __init__(self, device: FakeDevice, change: str) -> None:
        super().__init__(device)
        self.change = change

    def matmul_desc_set_attribute(self, matmul_desc: int, attr: int, buf: int, size_in_bytes: int) -> None:
        drop = {"not transposed": MatmulDescAttribute.TRANSA, "no epilogue": MatmulDescAttribute.EPILOGUE}
        if attr != drop.get(self.change):
            super().matmul_desc_set_attribute(matmul_desc, attr, buf, size_in_bytes)

    def matrix_layout_create(self, type: int, rows: int, cols: int, ld: int) -> int:
        if self.change == "rows and columns exchanged":
            rows, cols = cols, rows
        if self.change == "leading dimension":
            ld = rows
        return super().matrix_layout_create(type, rows, cols, ld)

    def matmul_preference_set_attribute(self, pref: int, attr: int, buf: int, size_in_bytes: int) -> None:
        if self.change != "alignment" or attr == 1:
            super().matmul_preference_set_attribute(pref, attr, buf, size_in_bytes)

    def matmul(self, *arguments: Any) -> None:
        values = list(arguments)
        if self.change == "operands exchanged":
            values[3], values[5] = values[5], values[3]
        if self.change == "workspace":
            values[13] = values[10]
        if self.change == "stream":
            values[15] = 0
        super().matmul(*values)


CHANGES = [
    "not transposed",
    "no epilogue",
    "rows and columns exchanged",
    "leading dimension",
    "alignment",
    "operands exchanged",
    "workspace",
    "stream",
    "destroyed",
    "dropped",
]


def run_mutant(change: str) -> FakeCublasLt:
    """A product of parts of matrices, the second transposed, with a bias. Fails if the result is wrong."""
    device = make_device()
    library, rng = Mutant(device, change), np.random.default_rng(3)
    products = Products(device, empty(device, (4096,), "uint8"), library)
    a, b = (upload(device, rng.standard_normal((rows, 12)), "float16", skip=1) for rows in (6, 10))
    bias, out = upload(device, np.ones(10), "float16"), empty(device, (6, 10), "float16")
    A, B = (numbers_of(array)[:, :8].astype(np.float64) for array in (a, b))
    if change == "dropped":
        out = replace(out, memory=None)
    call: Any = products.product(Matrix(a, 6, 8, 12), Matrix(b, 10, 8, 12), Matrix.of(out), bias=bias, transposed=True)
    if change == "destroyed":
        library.matmul_desc_destroy(call.plan.descriptor)
        call.plan.free.detach()
    call()
    device.synchronize()
    assert_close(numbers_of(out), A @ B.T + 1, "float16")
    return library


@pytest.mark.parametrize("change", CHANGES)
def test_the_double_notices_a_wrong_use(change: str) -> None:
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        run_mutant(change)


def test_the_double_agrees_without_a_change() -> None:
    (problem,) = run_mutant("none").executed
    assert problem.transposed and problem.epilogue is Epilogue.BIAS and problem.a.ld == 12


def test_the_types_are_cudas() -> None:
    assert (module._TYPES, module._COMPUTE_32F) == ({"float32": 0, "float16": 2, "bfloat16": 14}, 68)
