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
        """The bytes that a user of `nbytes` would allocate: 0, or those of a whole new block."""
        return 0 if nbytes <= self._block.nbytes else max(nbytes, self._needed)

    def take(self, nbytes: int) -> DeviceArray:
        """A block of at least `nbytes`, and of the reserved size if one must be allocated. Raises OutOfMemory.

        After an error, nothing is reserved any more.
        """
        if self._block.nbytes < nbytes:
            wanted, self._needed = max(nbytes, self._needed), 0
            self._block = self._arrays.empty((wanted,), "uint8")
        return self._block

    def drop(self) -> None:
        """Forget the block and what is reserved. The memory stays as long as a user keeps it."""
        self._needed, self._block = 0, DeviceArray(0, (0,), "uint8", None)
