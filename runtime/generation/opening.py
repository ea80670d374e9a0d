"""The choice between the two generators."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from ..backends.base import Backend, refuse_option
from ..backends.host_arrays import HostBackend
from ..bundle.opening import Bundle
from ..checks import check_whole
from .generator import Generator
from .host import HostGenerator

if TYPE_CHECKING:
    from ..backends.device_arrays import DeviceBackend


def open_generator(bundle: Bundle, backend: Backend, shapes_kept: int | None = None) -> Generator:
    """The generator for a bundle on a backend: on the host, or on the device that the backend has.

    shapes_kept: see `device.DeviceGenerator`. Raises InvalidInput for it on a CPU backend.
    """
    if backend.device is None:
        refuse_option("shapes_kept", shapes_kept, backend.name, "a GPU backend")
        return HostGenerator(bundle, cast(HostBackend, backend))
    from .device import SHAPES_KEPT, DeviceGenerator  # only where there is a device

    kept = SHAPES_KEPT if shapes_kept is None else check_whole("shapes_kept", shapes_kept, 1)
    return DeviceGenerator(bundle, cast("DeviceBackend", backend), kept)
