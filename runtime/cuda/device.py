"""The protocol of a GPU: one device and one stream, which runs all work in order.

`gpu.CudaDevice` implements it. Only `synchronize` and `trim` wait for the device.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Protocol

from numpy.typing import NDArray

from ..errors import OutOfMemory
from .array import DeviceArray
from .compilation import KernelSet
from .launches import Launch

log = logging.getLogger(__name__)


@contextmanager
def ignore_errors(what: str) -> Iterator[None]:
    """Log errors as warnings. what: what is done, for the log.

    For closing: after a failure of the device every call fails, but everything must still be freed.
    """
    try:
        yield
    except Exception as error:
        log.warning("%s: %s", what, error)


class Replay(Protocol):
    """A captured CUDA graph."""

    def launch(self) -> None:
        """Enqueue the whole graph."""

    def close(self) -> None:
        """Free the graph. It must not be running."""


class Device(Protocol):
    """One GPU and one stream. One thread at a time may use it; a thread calls `activate` first."""

    name: str
    capability: str
    """Compute capability, such as "9.0"."""
    ordinal: int

    @property
    def stream(self) -> int:
        """The handle of the stream, for libraries."""

    def activate(self) -> None:
        """Make the device the current one of this thread."""

    def allocate(self, nbytes: int) -> Any:
        """Device memory with an `address` that is aligned to 256 bytes. It is freed when dropped. Raises OutOfMemory.

        A device may keep freed memory reserved; see `trim`.
        """

    def trim(self) -> None:
        """Wait for the device, then return reserved memory to the driver. Must not be called while capturing."""

    def pinned(self, nbytes: int) -> NDArray[Any]:
        """Page-locked host memory, (nbytes,) uint8. Copies to and from it are asynchronous."""

    def write(self, array: DeviceArray, host: NDArray[Any]) -> None:
        """Enqueue a copy to the device. `host` must not change until the copy is done."""

    def read(self, host: NDArray[Any], array: DeviceArray) -> None:
        """Enqueue a copy to the host. `host` must be contiguous."""

    def copy(self, target: DeviceArray, source: DeviceArray) -> None:
        """Enqueue a copy on the device."""

    def zero(self, array: DeviceArray) -> None:
        """Enqueue filling the array with zero bytes."""

    def load(self, kernels: KernelSet) -> None:
        """Compile and load kernels, beside those loaded before. Raises BackendUnavailable, DeviceFailed."""

    def launch(self, launch: Launch) -> None:
        """Enqueue a kernel."""

    def capture(self, enqueue: Callable[[], None]) -> Replay:
        """Capture the work that `enqueue` enqueues, without running it.

        Raises what `enqueue` raises. The stream stays usable.
        """

    def synchronize(self) -> None:
        """Wait until all enqueued work is done. Raises DeviceFailed if it failed."""

    def elapsed(self, enqueue: Callable[[], None]) -> Callable[[], float]:
        """Time the work that `enqueue` enqueues. The returned function gives the seconds, after `synchronize`."""

    def free_bytes(self) -> int:
        """Free device memory in bytes, including memory that is reserved but unused."""

    def close(self) -> None:
        """Free the stream. No work may be running."""


def allocate(device: Device, nbytes: int) -> Any:
    """Device memory from `Device.allocate`. If there is too little, it trims the device and tries once more."""
    with suppress(OutOfMemory):
        return device.allocate(nbytes)
    device.trim()
    return device.allocate(nbytes)
