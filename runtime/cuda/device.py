"""The interface of a GPU: one device and one stream, on which everything runs in order.

`gpu.CudaDevice` implements it. Only `synchronize` waits for the device.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Protocol

from numpy.typing import NDArray

from ..errors import OutOfMemory
from .array import DeviceArray
from .kernels import KernelConfig, Launch

log = logging.getLogger(__name__)


@contextmanager
def ignore_errors(what: str) -> Iterator[None]:
    """Log errors as warnings. For closing: after a device has failed, every call on it fails, and the rest must still
    be freed."""
    try:
        yield
    except Exception as error:
        log.warning("%s: %s", what, error)


class Replay(Protocol):
    """A captured sequence of work."""

    def launch(self) -> None:
        """Enqueue it as a whole."""

    def close(self) -> None:
        """Free it; it must not be running."""


class Device(Protocol):
    """One GPU and one stream of it. Used by one thread at a time, any thread: `activate` comes first."""

    name: str
    capability: str
    """Compute capability, "9.0"."""
    ordinal: int

    @property
    def stream(self) -> int:
        """Handle of the stream, for libraries."""

    def activate(self) -> None:
        """Make the device current in this thread."""

    def allocate(self, nbytes: int) -> Any:
        """Device memory with an `address`, aligned to 256 bytes, freed when dropped. Raises OutOfMemory.

        A device may keep what was dropped reserved for later; see `trim`.
        """

    def trim(self) -> None:
        """Wait for the device, then give memory that nobody uses back to the driver. Not while capturing."""

    def pinned(self, nbytes: int) -> NDArray[Any]:
        """Page-locked host memory, (nbytes,) uint8: copies to and from it do not wait."""

    def write(self, array: DeviceArray, host: NDArray[Any]) -> None:
        """Enqueue a copy to the device. `host` must stay as it is until the device has passed this point."""

    def read(self, host: NDArray[Any], array: DeviceArray) -> None:
        """Enqueue a copy to the host, into contiguous `host`."""

    def copy(self, target: DeviceArray, source: DeviceArray) -> None:
        """Enqueue a copy on the device."""

    def zero(self, array: DeviceArray) -> None:
        """Enqueue filling with zero bytes."""

    def load(self, config: KernelConfig) -> None:
        """Compile and load the kernels of a model: what `launch` runs from then on."""

    def launch(self, launch: Launch) -> None:
        """Enqueue a kernel."""

    def capture(self, enqueue: Callable[[], None]) -> Replay:
        """Record what `enqueue` enqueues, without running it. Raises what `enqueue` raises; the stream stays usable."""

    def synchronize(self) -> None:
        """Wait until everything enqueued is done. Raises DeviceFailed where it failed."""

    def elapsed(self, enqueue: Callable[[], None]) -> Callable[[], float]:
        """Enqueue between two time stamps; the result gives the seconds between them, after `synchronize`."""

    def free_bytes(self) -> int:
        """Device memory left, with what is reserved and not used: `trim` makes that available to everybody."""

    def close(self) -> None:
        """Free the stream; nothing may be running."""


def allocate(device: Device, nbytes: int) -> Any:
    """Device memory, as `Device.allocate` gives it. Where none is left, it is tried once more after a `trim`."""
    with suppress(OutOfMemory):
        return device.allocate(nbytes)
    device.trim()
    return device.allocate(nbytes)
