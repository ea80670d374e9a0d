"""Arrays in the memory of a FakeDevice as NumPy sees them. bfloat16 is stored as its bits, in uint16."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from fakes import FakeDevice
from numpy.typing import NDArray

from flexvar_runtime.cuda.array import DeviceArray
from flexvar_runtime.model.tensors import host_dtype

Floats = NDArray[np.float32]


def make_device() -> FakeDevice:
    """A device without kernels that is current."""
    device = FakeDevice(lambda kernels: pytest.fail(f"no kernels are needed, such as {kernels}"))
    device.activate()
    return device


def strided(address: int, shape: Sequence[int], strides: Sequence[int], dtype: str) -> NDArray[Any]:
    """The numbers at an address. strides: in elements. Nothing is copied."""
    item = host_dtype(dtype)
    elements = 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    memory = (ctypes.c_uint8 * (elements * item.itemsize)).from_address(address)
    return np.ndarray(tuple(shape), item, memory, 0, tuple(stride * item.itemsize for stride in strides))


def widen(numbers: NDArray[Any], dtype: str) -> Floats:
    if dtype == "bfloat16":
        return (numbers.astype(np.uint32) << 16).view(np.float32)
    return numbers.astype(np.float32)


def narrow(numbers: NDArray[Any], dtype: str) -> NDArray[Any]:
    """Numbers rounded to the nearest of a dtype, to the even one of two."""
    wide = np.ascontiguousarray(numbers, np.float32)
    if dtype == "bfloat16":
        bits = wide.view(np.uint32)
        rounded = ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)
        return np.where(np.isnan(wide), np.uint16(0x7FFF), rounded)
    with np.errstate(over="ignore"):
        return wide.astype(host_dtype(dtype))


def upload(device: FakeDevice, numbers: NDArray[Any], dtype: str, skip: int = 0) -> DeviceArray:
    """An array on the device, rounded to the dtype. skip: elements before it, so that its address is less aligned."""
    array = empty(device, numbers.shape, dtype, skip)
    strided(array.address, (array.size,), (1,), dtype)[:] = narrow(numbers, dtype).reshape(-1)
    return array


def empty(device: FakeDevice, shape: Sequence[int], dtype: str, skip: int = 0) -> DeviceArray:
    """An array on the device that holds no numbers."""
    item = host_dtype(dtype).itemsize
    size = int(np.prod(shape))
    memory = device.allocate((size + skip) * item)
    return DeviceArray(memory.address + skip * item, tuple(shape), dtype, memory)


def numbers_of(array: DeviceArray) -> Floats:
    """A copy of the numbers of an array."""
    return widen(strided(array.address, (array.size,), (1,), array.dtype), array.dtype).reshape(array.shape)


def overlap(first: tuple[int, int], second: tuple[int, int]) -> bool:
    """Whether two ranges (address, bytes) share a byte."""
    return first[0] < second[0] + second[1] and second[0] < first[0] + first[1]


def require_device_memory(device: FakeDevice, address: int, nbytes: int, what: str) -> None:
    """Fail the test unless a range lies in one block of the device that is in use."""
    inside = any(
        block.used and block.address <= address and address + nbytes <= block.address + block.nbytes
        for block in device.blocks
    )
    refuse_unless(inside, f"{what} is not in device memory that is in use")


def refuse_unless(fits: bool, what: str) -> None:
    """Fail the test. The error is no Exception, so that no code takes it for an error of the library."""
    if not fits:
        pytest.fail(what)


def poison(address: int, nbytes: int, most: int = 2**16) -> None:
    """Overwrite a workspace with NaN, or only both ends of a large one."""
    ctypes.memset(address, 0xFF, min(nbytes, most))
    ctypes.memset(address + max(nbytes - most, 0), 0xFF, min(nbytes, most))
