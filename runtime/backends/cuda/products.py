"""Products of matrices by cuBLASLt.

cuBLASLt's matrices are column-major, so a row-major matrix is its own transpose there. It therefore computes the
transpose of the result: outᵀ (N, M) = bᵀ (N, K) · aᵀ (K, M). What cuBLASLt calls A is `b`, and its B is `a`.
"""

from __future__ import annotations

import math
import weakref
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...cuda.array import ALIGNMENT, DeviceArray
from ...cuda.device import Device, ignore_errors
from ...errors import first_line
from ...model.tensors import host_dtype
from .loading import CUBLASLT, load_cublaslt, no_algorithm, translating

_TYPES = {"float32": 0, "float16": 2, "bfloat16": 14}  # cudaDataType_t
_COMPUTE_32F = 68  # cublasComputeType_t; sums in float32, and float32 inputs are not rounded to TF32
_ASKED = 8  # algorithms; asking for one takes as long
PLANS_KEPT = 1024  # a shape of ten scales has about 50


@dataclass(frozen=True)
class Matrix:
    """A row-major matrix (rows, columns) in the memory of an array, or a batch of them.

    stride: elements between the starts of two rows. batch: number of matrices. step: elements between the starts of
    two matrices. offset: elements before the first. Raises ValueError if it does not lie within the array or is not
    float32, float16 or bfloat16.
    """

    array: DeviceArray
    rows: int
    columns: int
    stride: int
    batch: int = 1
    step: int = 0
    offset: int = 0

    def __post_init__(self) -> None:
        array = self.array
        _require(array.dtype in _TYPES, f"a matrix cannot be of dtype {array.dtype}")
        positive = min(self.rows, self.columns, self.batch) > 0 and min(self.step, self.offset) >= 0
        _require(positive and self.stride >= self.columns, "a matrix cannot have these sizes", self)
        end = self.offset + (self.batch - 1) * self.step + (self.rows - 1) * self.stride + self.columns
        _require(end <= array.size, f"a matrix ends after element {end} of an array with {array.size}", self)
        _require(self.address % host_dtype(array.dtype).itemsize == 0, "the address of a matrix is misaligned", self)

    def __str__(self) -> str:
        batch = f"{self.batch} x " if self.batch > 1 else ""
        return f"{batch}({self.rows}, {self.columns}) {self.dtype}"

    @classmethod
    def of(cls, array: DeviceArray) -> Matrix:
        """An array (…, columns) as one matrix."""
        _require(bool(array.shape) and array.size > 0, f"an array of shape {array.shape} is no matrix")
        columns = array.shape[-1]
        return cls(array, array.size // columns, columns, columns)

    @property
    def dtype(self) -> str:
        return self.array.dtype

    @property
    def address(self) -> int:
        return self.array.address + self.offset * host_dtype(self.dtype).itemsize

    @property
    def sizes(self) -> tuple[str | int, ...]:
        """All that an algorithm depends on, except the address."""
        return self.dtype, self.rows, self.columns, self.stride, self.batch, self.step

    @property
    def overlaps_itself(self) -> bool:
        """Whether two matrices of the batch may share elements."""
        apart = self.step >= (self.rows - 1) * self.stride + self.columns
        interleaved = self.step >= self.columns and (self.batch - 1) * self.step + self.columns <= self.stride
        return self.batch > 1 and not apart and not interleaved


@dataclass(eq=False)
class _Plan:
    """A product of fixed sizes: cuBLASLt's descriptors and the algorithm. bias: the address that was set last. free:
    frees the descriptors; it is called when nothing uses the plan.

    layouts: of "b", "a", "c" and "out". algorithm: (1,), empty until it is found.
    """

    descriptor: int
    layouts: dict[str, int] = field(default_factory=dict)
    algorithm: NDArray[Any] = field(default_factory=lambda: np.zeros(0))
    bias: int = 0
    free: Callable[[], object] = lambda: None


@dataclass(frozen=True, eq=False)
class _Call:
    """A product of matrices, which it keeps alive. c: the addend, or `out`. factors: (2,) float32, alpha and beta."""

    products: Products
    plan: _Plan
    a: Matrix
    b: Matrix
    c: Matrix
    out: Matrix
    bias: DeviceArray | None
    factors: NDArray[np.float32]
    what: str

    def __call__(self) -> None:
        self.products.run(self)


class Products:
    """Products on one device. They share `workspace`, whose content is undefined after each of them.

    workspace: any dtype; its address must be a multiple of 256. library: nvmath.bindings.cublasLt; None loads it.
    Raises BackendUnavailable, OutOfMemory, and ValueError for a misaligned workspace.
    """

    def __init__(self, device: Device, workspace: DeviceArray, library: Any = None) -> None:
        _require(workspace.address % ALIGNMENT == 0, f"the workspace's address is no multiple of {ALIGNMENT}")
        self._device, self._workspace = device, workspace
        self._lt = load_cublaslt() if library is None else library
        self._plans: OrderedDict[tuple[Any, ...], _Plan] = OrderedDict()
        device.activate()
        with translating(CUBLASLT, device, "opening it", opening=True):
            self._handle: int | None = self._lt.create()

    def product(
        self,
        a: Matrix,
        b: Matrix,
        out: Matrix,
        *,
        bias: DeviceArray | None = None,
        gelu: bool = False,
        transposed: bool = False,
        scale: float = 1.0,
        addend: Matrix | None = None,
    ) -> Callable[[], None]:
        """A call that enqueues out (M, N) = gelu(scale · a (M, K) · b (K, N) + addend (M, N) + bias (N)).

        transposed: b is (N, K). gelu: the tanh form of GELU, only with a bias. It sums in float32 and rounds once.

        a and b have one dtype; out has the same dtype or float32; bias and addend have the dtype of out. addend may be
        the same matrix as out, but no other operand may overlap out. a, b and addend may have one matrix for a whole
        batch of out.

        The first product of its sizes, strides and alignments asks cuBLASLt for an algorithm. Make it outside of
        `Device.capture`. The call enqueues on the stream that the device then has, and keeps the arrays alive. Raises
        ValueError if the matrices do not fit together, BackendUnavailable if there is no algorithm, DeviceFailed and
        OutOfMemory.
        """
        _check(a, b, out, bias, addend, gelu, transposed)
        _require(self._handle is not None, "these products are closed")
        what = f"a product with M = {out.rows}, N = {out.columns} and K = {a.columns} in {a.dtype} to {out.dtype}"
        plan = self._plan(a, b, addend or out, out, bias, gelu, transposed, what)
        factors = np.array([scale, 1.0 if addend else 0.0], np.float32)
        return _Call(self, plan, a, b, addend or out, out, bias, factors, what)

    def run(self, call: _Call) -> None:
        """Enqueue a product."""
        plan, room, device = call.plan, self._workspace, self._device
        _require(self._handle is not None, "these products are closed")
        with translating(CUBLASLT, device, f"running {call.what}"):
            if call.bias is not None and plan.bias != call.bias.address:
                self._describe(plan.descriptor, "BIAS_POINTER", call.bias.address)
                plan.bias = call.bias.address
            self._lt.matmul(
                self._handle,
                plan.descriptor,
                call.factors.ctypes.data,  # alpha
                call.b.address,
                plan.layouts["b"],
                call.a.address,
                plan.layouts["a"],
                call.factors.ctypes.data + call.factors.itemsize,  # beta
                call.c.address,
                plan.layouts["c"],
                call.out.address,
                plan.layouts["out"],
                plan.algorithm.ctypes.data,
                room.address,
                room.nbytes,
                device.stream,
            )

    def close(self) -> None:
        """Free everything. None of the products may be called any more."""
        handle, self._handle = self._handle, None
        if handle is None:
            return
        with ignore_errors("closing cuBLASLt"):
            for plan in self._plans.values():
                plan.free()
            self._lt.destroy(handle)
        self._plans.clear()
        self._workspace = DeviceArray(0, (0,), "uint8", None)

    def _plan(
        self,
        a: Matrix,
        b: Matrix,
        c: Matrix,
        out: Matrix,
        bias: DeviceArray | None,
        gelu: bool,
        transposed: bool,
        what: str,
    ) -> _Plan:
        """The kept plan of a product, or a new one. c: the addend, or `out`."""
        epilogue = "GELU_BIAS" if gelu else "BIAS" if bias is not None else "DEFAULT"
        at_bias = ALIGNMENT if bias is None else bias.address  # it has no preference of its own, so it counts as D's
        alignments = {
            "A": _alignment(b.address),
            "B": _alignment(a.address),
            "C": _alignment(c.address),
            "D": min(_alignment(out.address), _alignment(at_bias)),
        }
        matrices = {"b": b, "a": a, "out": out} | ({} if c.address == out.address else {"c": c})
        sizes = tuple(matrix.sizes for matrix in matrices.values())
        key = (sizes, epilogue, transposed, *alignments.values())
        if key not in self._plans:
            with translating(CUBLASLT, self._device, f"planning {what}"):
                plan = _Plan(self._lt.matmul_desc_create(_COMPUTE_32F, _TYPES["float32"]))
                try:
                    self._describe(plan.descriptor, "TRANSA", int(transposed))
                    self._describe(plan.descriptor, "EPILOGUE", int(self._lt.Epilogue[epilogue]))
                    if bias is not None:
                        self._describe(plan.descriptor, "BIAS_POINTER", bias.address)
                        plan.bias = bias.address
                    for name, matrix in matrices.items():
                        plan.layouts[name] = self._layout(matrix, out.batch)
                    plan.layouts.setdefault("c", plan.layouts["out"])  # in place, both must be the same
                    plan.algorithm = self._algorithm(plan, alignments, what)
                except BaseException:
                    _destroy(self._lt, plan.descriptor, plan.layouts)
                    raise
            plan.free = weakref.finalize(plan, _destroy, self._lt, plan.descriptor, plan.layouts)
            plan.free.atexit = False
            self._plans[key] = plan
            if len(self._plans) > PLANS_KEPT:
                self._plans.popitem(last=False)
        self._plans.move_to_end(key)
        return self._plans[key]

    def _layout(self, matrix: Matrix, batch: int) -> int:
        lt = self._lt
        layout: int = lt.matrix_layout_create(_TYPES[matrix.dtype], matrix.columns, matrix.rows, matrix.stride)
        if batch > 1:
            step = matrix.step if matrix.batch > 1 else 0  # 0: the same matrix for the whole batch
            for name, value in (("BATCH_COUNT", batch), ("STRIDED_BATCH_OFFSET", step)):
                attribute = lt.MatrixLayoutAttribute[name]
                value_type = lt.get_matrix_layout_attribute_dtype(attribute)
                _set(lt.matrix_layout_set_attribute, layout, attribute, value, value_type)
        return layout

    def _describe(self, descriptor: int, name: str, value: int) -> None:
        """Set an attribute of a product."""
        attribute = self._lt.MatmulDescAttribute[name]
        value_type = self._lt.get_matmul_desc_attribute_dtype(attribute)
        _set(self._lt.matmul_desc_set_attribute, descriptor, attribute, value, value_type)

    def _algorithm(self, plan: _Plan, alignments: dict[str, int], what: str) -> NDArray[Any]:
        """The first algorithm that cuBLASLt suggests for these alignments in bytes and fits in the workspace."""
        lt = self._lt
        scheme = int(lt.ReductionScheme.COMPUTE_TYPE)  # parts of a sum are added in float32
        limits = {"MAX_WORKSPACE_BYTES": self._workspace.nbytes, "REDUCTION_SCHEME_MASK": scheme}
        limits |= {f"MIN_ALIGNMENT_{name}_BYTES": value for name, value in alignments.items() if value < ALIGNMENT}
        preference = lt.matmul_preference_create()
        try:
            for name, value in limits.items():
                attribute = lt.MatmulPreferenceAttribute[name]
                value_type = lt.get_matmul_preference_attribute_dtype(attribute)
                _set(lt.matmul_preference_set_attribute, preference, attribute, value, value_type)
            found = np.zeros(_ASKED, lt.matmul_heuristic_result_dtype)
            count = np.zeros(1, np.int32)
            layouts = [plan.layouts[name] for name in ("b", "a", "c", "out")]
            results = (_ASKED, found.ctypes.data, count.ctypes.data)
            lt.matmul_algo_get_heuristic(self._handle, plan.descriptor, *layouts, preference, *results)
        except Exception as error:
            if "NOT_SUPPORTED" in str(error):
                raise no_algorithm(CUBLASLT, what, first_line(error)) from error
            raise
        finally:
            lt.matmul_preference_destroy(preference)
        for result in found[: int(count[0])]:
            if int(result["state"]) == 0 and int(result["workspace_size"]) <= self._workspace.nbytes:
                return np.array([result["algo"]], found.dtype["algo"])
        raise no_algorithm(CUBLASLT, what, f"{self._workspace.nbytes} bytes of workspace")


def _destroy(lt: Any, descriptor: int, layouts: dict[str, int]) -> None:
    """Free what belongs to a plan, when nothing uses it any more."""
    with ignore_errors("freeing a product's plan"):
        lt.matmul_desc_destroy(descriptor)
        for layout in set(layouts.values()):
            lt.matrix_layout_destroy(layout)


def _check(
    a: Matrix,
    b: Matrix,
    out: Matrix,
    bias: DeviceArray | None,
    addend: Matrix | None,
    gelu: bool,
    transposed: bool,
) -> None:
    """Raise ValueError unless the operands of a product fit together."""
    M, N, K = out.rows, out.columns, a.columns
    like_out = [] if addend is None else [addend]
    matrices = (a, b, *like_out, out)
    fits = a.rows == M and (b.rows, b.columns) == ((N, K) if transposed else (K, N))
    fits = fits and all((c.rows, c.columns) == (M, N) for c in like_out)
    _require(fits, "matrices do not fit together", *matrices)
    _require(all(matrix.batch in (1, out.batch) for matrix in matrices), "batches do not fit together", *matrices)
    typed = a.dtype == b.dtype and out.dtype in (a.dtype, "float32") and all(c.dtype == out.dtype for c in like_out)
    _require(typed, "dtypes do not fit together", *matrices)
    _require(not out.overlaps_itself, "the matrices of a result overlap", out)
    same = all(c.address != out.address or c.sizes == out.sizes for c in like_out)
    _require(same, "the addend overlaps the result without being the same matrix", *matrices)
    _require(bias is not None or not gelu, "GELU needs a bias", out)
    if bias is not None:
        right = bias.size == N and bias.dtype == out.dtype
        _require(right, f"a bias of shape {bias.shape} and dtype {bias.dtype} does not fit", out)


def _set(setter: Callable[..., None], target: int, attribute: Any, value: int, value_type: Any) -> None:
    """Set one attribute of a descriptor, a layout or a preference. The library copies the value."""
    held = np.array([value], value_type)
    setter(target, int(attribute), held.ctypes.data, held.nbytes)


def _alignment(address: int) -> int:
    """The largest power of two that divides an address, at most 256."""
    return math.gcd(address, ALIGNMENT)


def _require(fits: bool, what: str, *matrices: Matrix) -> None:
    if not fits:  # cuBLASLt would access memory outside of a matrix
        raise ValueError(f"{what}{': ' if matrices else ''}{', '.join(map(str, matrices))}")
