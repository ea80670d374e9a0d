"""Runs our kernels on the first GPU with arrays of the host. Memory around guarded arrays must not change."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flexvar_runtime.backends.cuda.parameters import Parameter, round_to
from flexvar_runtime.backends.device_arrays import DeviceArrays
from flexvar_runtime.cuda import kernels
from flexvar_runtime.cuda.array import DeviceArray
from flexvar_runtime.cuda.compilation import KernelSet
from flexvar_runtime.cuda.launches import Launch
from flexvar_runtime.model.tensors import host_dtype

from . import first_gpu

Array = NDArray[Any]
GUARD_BYTES, GUARD = 256, 0xAB
NAN = 0xFF  # a byte of NaN in every type


@dataclass(frozen=True)
class Check:
    """An error and what it may be at most. A NaN is more than any bound."""

    name: str
    error: float
    bound: float

    @property
    def holds(self) -> bool:
        return self.error <= self.bound

    def to_json(self) -> dict[str, float | bool | None]:
        return {"error": self.error if np.isfinite(self.error) else None, "bound": self.bound, "holds": self.holds}


class KernelHarness:
    """Runs kernels on the first GPU. Arrays stay alive until `release`, because a launch holds only addresses."""

    def __init__(self, seed: int = 0) -> None:
        self.device = first_gpu.start_gpu()
        self.arrays = DeviceArrays(self.device)
        self.rng = np.random.default_rng(seed)
        self._held: list[DeviceArray] = []
        self._guarded: list[DeviceArray] = []  # with their guards, as bytes

    def load(self, config: KernelSet) -> None:
        """Compile kernels. They take the place of kernels of the same names."""
        self.device.load(config)

    def upload(self, array: Array) -> DeviceArray:
        self._held.append(self.arrays.upload(np.ascontiguousarray(array)))
        return self._held[-1]

    def upload_pair(self, two: tuple[Array, Array]) -> tuple[DeviceArray, DeviceArray]:
        return self.upload(two[0]), self.upload(two[1])

    def empty(self, shape: tuple[int, ...], dtype: str) -> DeviceArray:
        self._held.append(self.arrays.empty(shape, dtype))
        return self._held[-1]

    def status(self) -> DeviceArray:
        status = self.empty((kernels.STATUS_WORDS,), "uint32")
        self.device.zero(status)
        return status

    def run(self, launch: Launch, result: DeviceArray) -> Array:
        self.launch(launch)
        return self.download(result)

    def launch(self, launch: Launch) -> None:
        self.device.launch(launch)

    def download(self, array: DeviceArray) -> Array:
        found: Array = self.arrays.download(array)
        return found

    # --- guarded arrays

    def normal(self, *shape: int, dtype: str = "float32", scale: float = 1.0, mean: float = 0.0) -> tuple[Any, Array]:
        """An array of normally distributed numbers, and its values in float64."""
        return self.place(self.rng.standard_normal(shape) * scale + mean, dtype)

    def place(self, numbers: Array, dtype: str) -> tuple[DeviceArray, Array]:
        """An array of these numbers, rounded to a type, and its values in float64."""
        stored = round_to(numbers, dtype)
        return self._place(stored, dtype), Parameter(stored, dtype).float32().astype(np.float64)

    def nan(self, *shape: int, dtype: str) -> DeviceArray:
        """An array of NaN."""
        item = host_dtype(dtype)
        return self._place(np.full(int(np.prod(shape)) * item.itemsize, NAN, np.uint8).view(item).reshape(shape), dtype)

    def values(self, array: DeviceArray) -> Array:
        """The numbers of an array, in float64."""
        return Parameter(self.download(array), array.dtype).float32().astype(np.float64)

    def changed_guards(self) -> int:
        """How many bytes around guarded arrays have changed."""
        changed = 0
        for whole in self._guarded:
            found = self.download(whole)
            both = np.concatenate([found[:GUARD_BYTES], found[-GUARD_BYTES:]])
            changed += int((both != GUARD).sum())
        return changed

    def release(self) -> None:
        """Drop all arrays."""
        self.device.synchronize()
        self._held.clear()
        self._guarded.clear()

    def close(self) -> None:
        self.release()
        self.device.close()

    def _place(self, stored: Array, dtype: str) -> DeviceArray:
        memory = np.full(stored.nbytes + 2 * GUARD_BYTES, GUARD, np.uint8)
        memory[GUARD_BYTES:-GUARD_BYTES] = np.ascontiguousarray(stored).reshape(-1).view(np.uint8)
        whole = self.upload(memory)
        self._guarded.append(whole)
        return DeviceArray(whole.address + GUARD_BYTES, stored.shape, dtype, whole.memory)


def relative_error(got: Array, expected: Array) -> float:
    """The size of the error as a share of the size of what was expected."""
    return float(np.linalg.norm(got - expected) / np.linalg.norm(expected))


def largest_error(got: Array, expected: Array) -> float:
    return float(np.max(np.abs(got - expected)))
