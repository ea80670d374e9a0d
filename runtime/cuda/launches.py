"""A launch of a kernel as a value, and how one is made from arrays and numbers."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .array import DeviceArray


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel. grid, block: number of blocks and threads along x, y, z.

    args: the arguments in order; pointers are int, all others ctypes values of the kernel's types.
    """

    name: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared_bytes: int
    args: tuple[Any, ...]


def make_launch(
    name: str,
    grid: tuple[int, int, int],
    threads: int,
    arrays: Sequence[DeviceArray | None],
    *numbers: int | float,
) -> Launch:
    """A launch in blocks of `threads`. The kernel takes pointers to the arrays, then uint32 and float numbers.

    None is a null pointer.
    """
    values = (ctypes.c_float(n) if isinstance(n, float) else ctypes.c_uint32(n) for n in numbers)
    pointers = (0 if array is None else array.address for array in arrays)
    return Launch(name, grid, (threads, 1, 1), 0, (*pointers, *values))


def require_fit(fits: bool, what: str, *arrays: DeviceArray) -> None:
    """Raise ValueError unless arrays fit together. The kernel would access memory outside of one."""
    if not fits:
        shapes = ", ".join(f"{array.shape} {array.dtype}" for array in arrays)
        raise ValueError(f"{what} do not fit together: {shapes}")
