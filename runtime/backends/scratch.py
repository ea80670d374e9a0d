"""Working memory that the graphs of a backend share. All of them run on one stream, one after another."""

from __future__ import annotations

from ..cuda.array import DeviceArray
from ..cuda.device import Device
from .device_arrays import DeviceArrays


class Scratch:
    """A block of the size that the largest user needs. A user keeps its block, because captured work writes there."""

    def __init__(self, device: Device) -> None:
        self._arrays = DeviceArrays(device)
        self._needed, self._block = 0, DeviceArray(0, (0,), "uint8", None)

    def reserve(self, nbytes: int) -> None:
        """Make the next block at least this large."""
        self._needed = max(self._needed, nbytes)

    def missing(self, nbytes: int) -> int:
        """The bytes that a user of `nbytes` would allocate."""
        return 0 if nbytes <= self._block.nbytes else max(nbytes, self._needed)

    def take(self) -> DeviceArray:
        """A block of the reserved size, allocated if the last one is too small."""
        if self._block.nbytes < self._needed:
            self._block = self._arrays.empty((self._needed,), "uint8")
        return self._block

    def close(self) -> None:
        """Drop the block. It stays as long as a user keeps it."""
        self._block = DeviceArray(0, (0,), "uint8", None)
