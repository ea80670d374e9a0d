"""Arrays of a kernel on the emulated device: random ones, and results that begin as NaN, with guards around them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from host_kernels import HostKernels
from numpy.typing import NDArray

from flexvar_runtime.backends.cuda.parameters import Parameter, round_to
from flexvar_runtime.cuda.array import DeviceArray

Build = Callable[..., HostKernels]
Array = NDArray[Any]
ERROR = {"float16": 6e-4, "bfloat16": 5e-3, "float32": 3e-6}  # of one rounding, and of sums in float32
HALVES = ("float16", "bfloat16")


class Numbers:
    """Random arrays, and arrays on the emulated device with guards that must not change."""

    def __init__(self, seed: int = 0) -> None:
        self.rng = np.random.default_rng(seed)
        self._guarded: list[tuple[NDArray[np.uint8], int]] = []

    def normal(self, *shape: int, dtype: str = "float32", scale: float = 1.0) -> tuple[DeviceArray, Array]:
        """An array on the device and its values in float64."""
        stored = round_to(self.rng.standard_normal(shape) * scale, dtype)
        return self.place(stored, dtype), Parameter(stored, dtype).float32().astype(np.float64)

    def place(self, stored: Array, dtype: str) -> DeviceArray:
        memory = np.full(stored.nbytes + 544, 0xAB, np.uint8)
        start = -memory.ctypes.data % 256 + 256
        part = memory[start : start + stored.nbytes]
        part[:] = stored.reshape(-1).view(np.uint8)
        self._guarded.append((memory[start + stored.nbytes :], start))
        self._guarded.append((memory[:start], start))
        return DeviceArray(part.ctypes.data, stored.shape, dtype, memory)

    def nan(self, *shape: int, dtype: str) -> DeviceArray:
        size = int(np.prod(shape)) * (4 if dtype == "float32" else 2)
        return self.place(np.full(size, 0xFF, np.uint8).view(np.uint16 if dtype != "float32" else np.float32), dtype)

    def check_guards(self) -> None:
        assert all((guard == 0xAB).all() for guard, _ in self._guarded), "a kernel wrote outside its array"


def values(array: DeviceArray, *shape: int) -> Array:
    """The numbers of an array on the emulated device, as float64."""
    start = array.address - array.memory.ctypes.data
    stored = array.memory[start : start + array.nbytes]
    kind = {"float32": np.float32, "float16": np.float16, "bfloat16": np.uint16}[array.dtype]
    return Parameter(stored.view(kind).reshape(shape or array.shape), array.dtype).float32().astype(np.float64)


def shaped(array: DeviceArray, *shape: int) -> DeviceArray:
    return DeviceArray(array.address, shape, array.dtype, array.memory)


def assert_close(got: Array, expected: Array, dtype: str) -> None:
    error = np.linalg.norm(got - expected) / np.linalg.norm(expected)
    assert error < ERROR[dtype], f"relative error {error:.2g}"
