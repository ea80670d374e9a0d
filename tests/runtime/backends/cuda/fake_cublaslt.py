"""A module like nvmath.bindings.cublasLt that computes on the host, when a FakeDevice runs its queue.

What would be undefined on a GPU fails the test: a destroyed descriptor, a wrong size, an address that is less aligned
than was promised, memory that was freed, a workspace that overlaps an operand.
"""

from __future__ import annotations

import ctypes
import enum
import itertools
import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from device_numbers import (
    Floats,
    narrow,
    overlap,
    poison,
    refuse_unless,
    require_device_memory,
    strided,
    widen,
)
from fakes import FakeDevice
from numpy.typing import NDArray

from flexvar_runtime.model.tensors import host_dtype

DTYPES = {0: "float32", 2: "float16", 14: "bfloat16"}
NOT_INITIALIZED, NOT_SUPPORTED = 1, 15  # cublasStatus_t


class MatmulDescAttribute(enum.IntEnum):
    TRANSA = 3
    EPILOGUE = 7
    BIAS_POINTER = 8


class MatrixLayoutAttribute(enum.IntEnum):
    BATCH_COUNT = 5
    STRIDED_BATCH_OFFSET = 6


class MatmulPreferenceAttribute(enum.IntEnum):
    MAX_WORKSPACE_BYTES = 1
    REDUCTION_SCHEME_MASK = 3
    MIN_ALIGNMENT_A_BYTES = 5
    MIN_ALIGNMENT_B_BYTES = 6
    MIN_ALIGNMENT_C_BYTES = 7
    MIN_ALIGNMENT_D_BYTES = 8


class ReductionScheme(enum.IntEnum):
    COMPUTE_TYPE = 2


class Epilogue(enum.IntEnum):
    DEFAULT = 1
    BIAS = 4
    GELU_BIAS = 36


VALUE_TYPES: dict[str, type[np.generic]] = {
    "TRANSA": np.int32,
    "EPILOGUE": np.uint32,
    "BIAS_POINTER": np.int64,
    "BATCH_COUNT": np.int32,
    "STRIDED_BATCH_OFFSET": np.int64,
    "MAX_WORKSPACE_BYTES": np.uint64,
    "REDUCTION_SCHEME_MASK": np.uint32,
    **{f"MIN_ALIGNMENT_{x}_BYTES": np.uint32 for x in "ABCD"},
}


@dataclass(frozen=True)
class Layout:
    """A column-major matrix. ld: elements between columns. step: elements between the matrices of a batch."""

    dtype: str
    rows: int
    columns: int
    ld: int
    batch: int
    step: int

    def extent(self) -> int:
        """Bytes from the first to the last element."""
        elements = (self.batch - 1) * self.step + (self.columns - 1) * self.ld + self.rows
        return elements * host_dtype(self.dtype).itemsize

    def view(self, address: int) -> NDArray[Any]:
        """The batch at an address, (batch, rows, columns)."""
        return strided(address, (self.batch, self.rows, self.columns), (self.step, 1, self.ld), self.dtype)


@dataclass(frozen=True)
class Problem:
    """What an algorithm is chosen for. a, b, c, d: as cuBLASLt names them."""

    transposed: bool
    epilogue: Epilogue
    a: Layout
    b: Layout
    c: Layout
    d: Layout

    def __post_init__(self) -> None:
        a, b, c, d = self.a, self.b, self.c, self.d
        for layout in (a, b, c, d):
            refuse_unless(
                layout.ld >= layout.rows > 0 and layout.columns > 0, f"a leading dimension is wrong: {layout}"
            )
            refuse_unless(layout.batch == d.batch, "batch counts differ")
        m, k = (a.columns, a.rows) if self.transposed else (a.rows, a.columns)
        refuse_unless((b.rows, b.columns) == (k, d.columns) and d.rows == m, f"sizes do not fit: {self}")
        refuse_unless((c.rows, c.columns, c.dtype) == (d.rows, d.columns, d.dtype), f"C is not like D: {self}")
        refuse_unless(a.dtype == b.dtype and d.dtype in (a.dtype, "float32"), f"dtypes do not fit: {self}")


@dataclass(frozen=True)
class Algorithm:
    """A result of the heuristic. alignments: of A, B, C and D in bytes, as promised."""

    problem: Problem
    alignments: tuple[int, int, int, int]
    workspace: int


@dataclass
class Descriptor:
    """Something with attributes. sizes: the arguments that created it."""

    sizes: tuple[int, ...]
    attributes: dict[enum.IntEnum, int] = field(default_factory=dict)


class cuBLASLtError(Exception):
    pass


class FakeCublasLt:
    """The module. states: of the algorithms that the heuristic suggests; 0 is a usable one. needs: bytes of workspace
    of each. error: raised by the next heuristic or product. heuristics: how often an algorithm was asked for.
    executed: the problems of all products, in order."""

    MatmulDescAttribute, MatrixLayoutAttribute = MatmulDescAttribute, MatrixLayoutAttribute
    MatmulPreferenceAttribute, Epilogue, ReductionScheme = MatmulPreferenceAttribute, Epilogue, ReductionScheme
    matmul_heuristic_result_dtype = np.dtype(
        [
            ("algo", [("data_", "<u8", (8,))]),
            ("workspace_size", "<u8"),
            ("state", "<i4"),
            ("waves_count", "<f4"),
            ("reserved", "<i4", (4,)),
        ]
    )

    def __init__(self, device: FakeDevice, *, states: tuple[int, ...] = (NOT_INITIALIZED, 0), needs: int = 512) -> None:
        self.device, self.states, self.needs = device, states, needs
        self.error: Exception | None = None
        self.heuristics = 0
        self.executed: list[Problem] = []
        self.alive: dict[int, Any] = {}
        self._algorithms: list[Algorithm] = []
        self._numbers = itertools.count(0xB1A5_0000, 64)

    def _add(self, thing: Any) -> int:
        number = next(self._numbers)
        self.alive[number] = thing
        return number

    def _get(self, number: int, kind: str) -> Descriptor:
        thing = self.alive.get(number)
        refuse_unless(isinstance(thing, Descriptor) and thing.sizes[0] == KINDS[kind], f"a {kind} does not exist")
        assert isinstance(thing, Descriptor)
        return thing

    def _remove(self, number: int) -> None:
        refuse_unless(number in self.alive, "something was destroyed twice")
        del self.alive[number]

    def _set(self, target: Descriptor, attribute: enum.IntEnum, buf: int, size_in_bytes: int) -> None:
        value_type = np.dtype(VALUE_TYPES[attribute.name])
        refuse_unless(size_in_bytes == value_type.itemsize, f"{attribute.name} takes {value_type.itemsize} bytes")
        target.attributes[attribute] = int(np.frombuffer(ctypes.string_at(buf, size_in_bytes), value_type)[0])

    def _raise_error(self) -> None:
        error, self.error = self.error, None
        if error is not None:
            raise error

    # the functions of the module, with its names and parameters

    def create(self) -> int:
        refuse_unless(self.device.active, "no device is current")
        self._raise_error()
        return self._add("handle")

    def destroy(self, light_handle: int) -> None:
        self._remove(light_handle)

    def matmul_desc_create(self, compute_type: int, scale_type: int) -> int:
        refuse_unless((compute_type, scale_type) == (68, 0), "only sums in float32, without TF32, are meant")
        return self._add(Descriptor((KINDS["product"], compute_type, scale_type)))

    def matmul_desc_set_attribute(self, matmul_desc: int, attr: int, buf: int, size_in_bytes: int) -> None:
        self._set(self._get(matmul_desc, "product"), MatmulDescAttribute(attr), buf, size_in_bytes)

    def matmul_desc_destroy(self, matmul_desc: int) -> None:
        self._get(matmul_desc, "product")
        self._remove(matmul_desc)

    def matrix_layout_create(self, type: int, rows: int, cols: int, ld: int) -> int:
        return self._add(Descriptor((KINDS["layout"], type, rows, cols, ld)))

    def matrix_layout_set_attribute(self, mat_layout: int, attr: int, buf: int, size_in_bytes: int) -> None:
        self._set(self._get(mat_layout, "layout"), MatrixLayoutAttribute(attr), buf, size_in_bytes)

    def matrix_layout_destroy(self, mat_layout: int) -> None:
        self._get(mat_layout, "layout")
        self._remove(mat_layout)

    def matmul_preference_create(self) -> int:
        return self._add(Descriptor((KINDS["preference"],)))

    def matmul_preference_set_attribute(self, pref: int, attr: int, buf: int, size_in_bytes: int) -> None:
        self._set(self._get(pref, "preference"), MatmulPreferenceAttribute(attr), buf, size_in_bytes)

    def matmul_preference_destroy(self, pref: int) -> None:
        self._get(pref, "preference")
        self._remove(pref)

    def get_matmul_desc_attribute_dtype(self, attr: int) -> type[np.generic]:
        return VALUE_TYPES[MatmulDescAttribute(attr).name]

    def get_matrix_layout_attribute_dtype(self, attr: int) -> type[np.generic]:
        return VALUE_TYPES[MatrixLayoutAttribute(attr).name]

    def get_matmul_preference_attribute_dtype(self, attr: int) -> type[np.generic]:
        return VALUE_TYPES[MatmulPreferenceAttribute(attr).name]

    def matmul_algo_get_heuristic(
        self,
        light_handle: int,
        operation_desc: int,
        adesc: int,
        bdesc: int,
        cdesc: int,
        ddesc: int,
        preference: int,
        requested_algo_count: int,
        heuristic_results_array: int,
        return_algo_count: int,
    ) -> None:
        refuse_unless(self.alive.get(light_handle) == "handle", "the handle does not exist")
        self.heuristics += 1
        self._raise_error()
        problem = self._problem(operation_desc, adesc, bdesc, cdesc, ddesc)
        wanted = self._get(preference, "preference").attributes
        alignments = [wanted.get(MatmulPreferenceAttribute[f"MIN_ALIGNMENT_{x}_BYTES"], 256) for x in "ABCD"]
        scheme = wanted.get(MatmulPreferenceAttribute.REDUCTION_SCHEME_MASK)
        refuse_unless(scheme == ReductionScheme.COMPUTE_TYPE, "parts of a sum may be added in half precision")
        powers = all(value in (1, 2, 4, 8, 16, 32, 64, 128, 256) for value in alignments)
        refuse_unless(powers, f"alignments are powers of two up to 256: {alignments}")
        results = np.zeros(len(self.states), self.matmul_heuristic_result_dtype)
        for result, state in zip(results, self.states, strict=True):
            a, b, c, d = alignments
            self._algorithms.append(Algorithm(problem, (a, b, c, d), self.needs))
            result["state"], result["workspace_size"] = state, self.needs
            result["algo"]["data_"][:] = MAGIC + len(self._algorithms) - 1
        results = results[:requested_algo_count]
        refuse_unless(wanted.get(MatmulPreferenceAttribute.MAX_WORKSPACE_BYTES, 0) > 0, "there is no workspace")
        ctypes.memmove(heuristic_results_array, results.ctypes.data, results.nbytes)
        ctypes.c_int32.from_address(return_algo_count).value = len(results)

    def matmul(
        self,
        light_handle: int,
        compute_desc: int,
        alpha: int,
        a: int,
        adesc: int,
        b: int,
        bdesc: int,
        beta: int,
        c: int,
        cdesc: int,
        d: int,
        ddesc: int,
        algo: int,
        workspace: int,
        workspace_size_in_bytes: int,
        stream: int,
    ) -> None:
        device = self.device
        refuse_unless(self.alive.get(light_handle) == "handle", "the handle does not exist")
        refuse_unless(stream == device.stream, "this is not the stream of the device")
        self._raise_error()
        problem = self._problem(compute_desc, adesc, bdesc, cdesc, ddesc)
        identity = np.frombuffer(ctypes.string_at(algo, 64), np.uint64) - np.uint64(MAGIC)
        refuse_unless(bool((identity == identity[0]).all() and identity[0] < len(self._algorithms)), "no algorithm")
        algorithm = self._algorithms[int(identity[0])]
        refuse_unless(algorithm.problem == problem, f"the algorithm is for {algorithm.problem}, not {problem}")

        factors = [float(ctypes.c_float.from_address(address).value) for address in (alpha, beta)]
        operands = {"A": (a, problem.a), "B": (b, problem.b), "C": (c, problem.c), "D": (d, problem.d)}
        room = (workspace, workspace_size_in_bytes)
        require_device_memory(device, *room, "the workspace")
        refuse_unless(
            workspace % 256 == 0 and room[1] >= algorithm.workspace, "the workspace is too small or misaligned"
        )
        for (name, (address, layout)), alignment in zip(operands.items(), algorithm.alignments, strict=True):
            require_device_memory(device, address, layout.extent(), name)
            refuse_unless(address % alignment == 0, f"{name} is not aligned to {alignment} bytes")
            refuse_unless(not overlap(room, (address, layout.extent())), f"the workspace overlaps {name}")
        views = {name: layout.view(address) for name, (address, layout) in operands.items()}
        for name in "ABC":
            in_place = name == "C" and (c, cdesc) == (d, ddesc)
            shared = in_place or not np.shares_memory(views[name], views["D"])
            refuse_unless(shared or (name == "C" and not factors[1]), f"{name} overlaps the result")
        bias = self._bias(compute_desc, problem, algorithm.alignments[3])
        self.executed.append(problem)

        def work() -> None:
            poison(*room)
            left = widen(views["A"], problem.a.dtype)
            left = left.transpose(0, 2, 1) if problem.transposed else left
            result: Floats = left @ widen(views["B"], problem.b.dtype)
            result *= np.float32(factors[0])
            if factors[1]:
                result += np.float32(factors[1]) * widen(views["C"], problem.c.dtype)
            if bias is not None:
                result += widen(bias, problem.d.dtype)[:, None]
            if problem.epilogue is Epilogue.GELU_BIAS:
                result = gelu(result)
            views["D"][...] = narrow(result, problem.d.dtype)

        device.enqueue("matmul", work)

    def _problem(self, compute_desc: int, *layouts: int) -> Problem:
        wanted = self._get(compute_desc, "product").attributes
        transposed, epilogue = wanted.get(MatmulDescAttribute.TRANSA, 0), wanted.get(MatmulDescAttribute.EPILOGUE, 1)
        return Problem(bool(transposed), Epilogue(epilogue), *(self._layout(number) for number in layouts))

    def _layout(self, number: int) -> Layout:
        thing = self._get(number, "layout")
        _, kind, rows, columns, ld = thing.sizes
        attributes = thing.attributes
        batch = attributes.get(MatrixLayoutAttribute.BATCH_COUNT, 1)
        step = attributes.get(MatrixLayoutAttribute.STRIDED_BATCH_OFFSET, 0)
        return Layout(DTYPES[kind], rows, columns, ld, batch, step)

    def _bias(self, compute_desc: int, problem: Problem, alignment: int) -> NDArray[Any] | None:
        """The bias, which has the type of D. It counts for the alignment of D."""
        if problem.epilogue is Epilogue.DEFAULT:
            return None
        address = self._get(compute_desc, "product").attributes.get(MatmulDescAttribute.BIAS_POINTER, 0)
        layout = Layout(problem.d.dtype, problem.d.rows, 1, problem.d.rows, 1, 0)
        require_device_memory(self.device, address, layout.extent(), "the bias")
        refuse_unless(address % alignment == 0, f"the bias is not aligned to {alignment} bytes")
        return layout.view(address)[0, :, 0]


KINDS = {"product": 1, "layout": 2, "preference": 3}
MAGIC = 0x5EED_0000


def gelu(x: Floats) -> Floats:
    """GELU in its tanh form."""
    return np.float32(0.5) * x * (1 + np.tanh(np.float32(math.sqrt(2 / math.pi)) * (x + np.float32(0.044715) * x**3)))
