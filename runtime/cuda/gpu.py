"""The `Device` protocol on a real GPU, through cuda.core and, for copies, the CUDA driver."""

from __future__ import annotations

import ctypes
import gc
import importlib
import importlib.metadata
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..checks import invalid, version_numbers
from ..errors import BackendUnavailable, DeviceFailed, FlexVARError, OutOfMemory, first_line
from .array import DeviceArray
from .compilation import KernelSet, compile_kernels
from .launches import Launch

MINIMUM = (1, 0)  # the first version of cuda.core with a stable interface


@dataclass(frozen=True)
class GpuFacts:
    """A GPU: its number, name, compute capability ("9.0") and memory in bytes."""

    ordinal: int
    name: str
    capability: str
    total_bytes: int

    def __str__(self) -> str:
        return f"{self.name}, compute capability {self.capability}, {self.total_bytes / 2**30:.0f} GiB"


def find_gpus() -> tuple[GpuFacts, ...]:
    """Every GPU of this machine, in CUDA's order. Raises BackendUnavailable if there is none."""
    first = find_gpu()
    _, driver = _libraries()
    return first, *(find_gpu(f"cuda:{i}") for i in range(1, _check(driver, driver.cuDeviceGetCount())))


def find_gpu(device: str | None = None) -> GpuFacts:
    """The GPU that `device` names: "cuda:N"; "cuda" or None is the first. Raises BackendUnavailable, InvalidInput."""
    ordinal = _ordinal(device)
    core, driver = _libraries()
    try:
        count = _check(driver, driver.cuInit(0)) or _check(driver, driver.cuDeviceGetCount())
    except Exception as error:  # without a driver it is a long error of the dynamic loader
        reason = f" ({first_line(error)})" if isinstance(error, RuntimeError) and "CUDA_" in str(error) else ""
        raise BackendUnavailable(
            f"CUDA found no working NVIDIA driver{reason}.",
            expected="a GPU with its driver",
            fix="Install the NVIDIA driver, so that nvidia-smi lists the GPU, or leave out --backend.",
        ) from error
    if ordinal >= count:
        raise BackendUnavailable(
            f"device is cuda:{ordinal}, but CUDA found only {count} GPU{'s' if count != 1 else ''}.",
            expected="a GPU that nvidia-smi lists",
            fix="Name another device, or check the environment variable CUDA_VISIBLE_DEVICES.",
        )
    found = core.Device(ordinal)
    major, minor = found.compute_capability
    total = _check(driver, driver.cuDeviceTotalMem(_check(driver, driver.cuDeviceGet(ordinal))))
    return GpuFacts(ordinal, str(found.name), f"{major}.{minor}", int(total))


def _ordinal(device: str | None) -> int:
    named = re.fullmatch(r"cuda(:[0-9]*)?", device or "cuda:0")
    if named is None:
        expected = "cuda or cuda:N for this backend"
        raise invalid(f"device is {device!r}", expected, "Name a GPU, or leave out device.")
    return int((named[1] or "").lstrip(":") or 0)


def _libraries() -> tuple[Any, Any]:
    try:
        core, driver = importlib.import_module("cuda.core"), importlib.import_module("cuda.bindings.driver")
        version = str(core.__version__)
    except Exception as error:  # a damaged wheel can raise any error
        raise BackendUnavailable(
            f"cuda.core cannot be imported ({first_line(error)}).",
            expected="the package cuda-core",
            fix="Run: pip install 'cuda-python>=13' 'nvidia-cuda-nvrtc>=13'",
        ) from error
    if version_numbers(version) < MINIMUM:
        wanted = ".".join(map(str, MINIMUM))
        raise BackendUnavailable(
            f"cuda.core {version} is older than {wanted}.",
            expected=f"{wanted} or later",
            fix=f"Run: pip install 'cuda-core>={wanted}'",
        )
    return core, driver


def _check(driver: Any, result: tuple[Any, ...]) -> Any:
    """The value that a driver call returned. Raises its error as RuntimeError."""
    if int(result[0]) == 0:
        return result[1] if len(result) == 2 else result[1:]
    _, name = driver.cuGetErrorName(result[0])
    raise RuntimeError(name.decode() if isinstance(name, bytes) else str(result[0]))


@dataclass(frozen=True)
class Memory:
    """Device memory. It is freed when the last array that uses it is dropped."""

    buffer: Any

    @property
    def address(self) -> int:
        return int(self.buffer.handle)


class CudaReplay:
    """A CUDA graph. It is launched on the stream that it was captured from."""

    def __init__(self, device: CudaDevice, graph: Any) -> None:
        self._device, self._graph = device, graph

    def launch(self) -> None:
        with self._device.translating("launching a captured generation"):
            self._graph.launch(self._device.core_stream)

    def close(self) -> None:
        self._graph.close()


class CudaDevice:
    """One GPU and one stream on it. See `device.Device`."""

    def __init__(self, facts: GpuFacts) -> None:
        self._core, self._driver = _libraries()
        self.ordinal, self.name, self.capability = facts.ordinal, facts.name, facts.capability
        self._pinned: Any = None
        self._kernels: dict[str, Any] = {}
        with self.translating("creating a stream"):
            self._device = self._core.Device(facts.ordinal)
            self._device.set_current()
            self.core_stream: Any = self._device.create_stream()
            self._events: list[Any] = [self._device.create_event({"timing_enabled": True}) for _ in range(2)]
        self._home = self.core_stream

    @property
    def stream(self) -> int:
        return int(self.core_stream.handle)

    def activate(self) -> None:
        self._device.set_current()

    def allocate(self, nbytes: int) -> Memory:
        with self.translating(f"allocating {nbytes / 2**20:.0f} MiB"):
            return Memory(self._device.memory_resource.allocate(max(nbytes, 1), stream=self.core_stream))

    def trim(self) -> None:
        self.synchronize()  # buffers are freed in stream order
        if self._has_pool():
            self._call("cuMemPoolTrimTo", self._device.memory_resource.handle, 0)

    def pinned(self, nbytes: int) -> NDArray[Any]:
        with self.translating(f"allocating {nbytes / 2**20:.0f} MiB of page-locked memory"):
            self._pinned = self._pinned or self._core.LegacyPinnedMemoryResource()
            buffer = self._pinned.allocate(max(nbytes, 1), stream=self.core_stream)
        memory = (ctypes.c_uint8 * max(nbytes, 1)).from_address(int(buffer.handle))
        memory.owner = buffer  # type: ignore[attr-defined]  # keeps the buffer alive as long as the array
        return np.ctypeslib.as_array(memory)[:nbytes]

    def write(self, array: DeviceArray, host: NDArray[Any]) -> None:
        _require_same_size(array, host)
        self._copy("cuMemcpyHtoDAsync", array.address, host.ctypes.data, array.nbytes)

    def read(self, host: NDArray[Any], array: DeviceArray) -> None:
        _require_same_size(array, host)
        self._copy("cuMemcpyDtoHAsync", host.ctypes.data, array.address, array.nbytes)

    def copy(self, target: DeviceArray, source: DeviceArray) -> None:
        if target.nbytes != source.nbytes:
            raise ValueError(f"the source has {source.nbytes} bytes, but the target has {target.nbytes}")
        self._copy("cuMemcpyDtoDAsync", target.address, source.address, target.nbytes)

    def _copy(self, name: str, target: int, source: int, nbytes: int) -> None:
        if nbytes:
            self._call(name, target, source, nbytes, self.stream)

    def zero(self, array: DeviceArray) -> None:
        self._call("cuMemsetD8Async", array.address, 0, array.nbytes, self.stream)

    def _call(self, name: str, *arguments: Any) -> None:
        with self.translating(f"calling {name}"):
            _check(self._driver, getattr(self._driver, name)(*arguments))

    def load(self, kernels: KernelSet) -> None:
        code = self._core.ObjectCode.from_cubin(compile_kernels(f"sm_{self.capability.replace('.', '')}", kernels))
        with self.translating("loading the kernels"):
            self._kernels |= {name: code.get_kernel(name) for name in kernels.names}

    def launch(self, launch: Launch) -> None:
        config = self._core.LaunchConfig(grid=launch.grid, block=launch.block, shmem_size=launch.shared_bytes)
        with self.translating(f"launching the kernel {launch.name}"):
            self._core.launch(self.core_stream, config, self._kernels[launch.name], *launch.args)

    def capture(self, enqueue: Callable[[], None]) -> CudaReplay:
        gc.collect()
        with self.translating("capturing a generation"), _no_garbage_collection():
            builder = self._home.create_graph_builder().begin_building("relaxed")
            self.core_stream = builder.stream
            try:
                enqueue()
                return CudaReplay(self, builder.end_building().complete())
            finally:
                self.core_stream = self._home
                with suppress(Exception):
                    if builder.is_building:  # `enqueue` failed; ends the capture, so that the stream stays usable
                        builder.end_building()
                with suppress(Exception):
                    builder.close()

    def synchronize(self) -> None:
        with self.translating("running the enqueued work"):
            self.core_stream.sync()

    def elapsed(self, enqueue: Callable[[], None]) -> Callable[[], float]:
        start, end = self._events
        with self.translating("recording a time stamp"):
            self.core_stream.record(start)
            enqueue()
            self.core_stream.record(end)

        def seconds() -> float:
            with self.translating("reading a time stamp"):
                return float(end - start) / 1e3

        return seconds

    def free_bytes(self) -> int:
        self.activate()
        free, _ = _check(self._driver, self._driver.cuMemGetInfo())
        if not self._has_pool():
            return int(free)
        pool = self._device.memory_resource.attributes  # cuda.core never returns unused memory by itself
        return int(free) + max(int(pool.reserved_mem_current) - int(pool.used_mem_current), 0)

    def _has_pool(self) -> bool:
        """Whether `allocate` takes memory from a pool. Some drivers have none."""
        return hasattr(self._device.memory_resource, "attributes")

    def close(self) -> None:
        self._kernels.clear()
        self._home.close()

    @contextmanager
    def translating(self, what: str) -> Iterator[None]:
        """Raise CUDA's errors as OutOfMemory or DeviceFailed. what: what is done, for the message."""
        try:
            yield
        except (FlexVARError, ValueError):
            raise
        except Exception as error:
            if "OUT_OF_MEMORY" in str(error) or "out of memory" in str(error):
                raise OutOfMemory(
                    f"{self.name} ran out of memory when {what}.",
                    expected="a request that fits in its memory",
                    fix="Use a smaller batch or schedule, or end other programs that use the GPU.",
                ) from error
            raise DeviceFailed(
                f"{self.name} failed when {what} ({first_line(error)}).",
                expected=f"work that {self.name} can do",
                fix="Run it again. If it fails again, run it under compute-sanitizer, which names the kernel at fault.",
            ) from error


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Switch garbage collection off. Memory that it frees on a capturing stream would end the capture."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _require_same_size(array: DeviceArray, host: NDArray[Any]) -> None:
    if host.nbytes != array.nbytes or not host.flags.c_contiguous:
        raise ValueError(f"a contiguous host array of {array.nbytes} bytes is needed, not one of {host.nbytes} bytes")
