"""A real GPU behind the `Device` protocol, through cuda.core and, for plain copies, the driver."""

from __future__ import annotations

import ctypes
import gc
import importlib
import importlib.metadata
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import BackendUnavailable, DeviceFailed, FlexVARError, InvalidInput, OutOfMemory
from .array import DeviceArray
from .kernels import KERNEL_NAMES, KernelConfig, Launch, compile_kernels

MINIMUM = (1, 0)  # of cuda.core, whose interface is stable from there on
_INSTALL = "pip install 'flexvar-deploy[gpu]'"


@dataclass(frozen=True)
class GpuFacts:
    """What a probe says of a GPU: name, compute capability ("9.0"), and its memory in bytes."""

    ordinal: int
    name: str
    capability: str
    total_bytes: int

    def __str__(self) -> str:
        return f"{self.name}, compute capability {self.capability}, {self.total_bytes / 2**30:.0f} GiB"


def find_gpus() -> tuple[GpuFacts, ...]:
    """Every GPU of this machine, in CUDA's order. Raises BackendUnavailable where there is none."""
    first = find_gpu()
    _, driver = _libraries()
    return first, *(find_gpu(f"cuda:{i}") for i in range(1, _check(driver, driver.cuDeviceGetCount())))


def find_gpu(device: str | None = None) -> GpuFacts:
    """The GPU named "cuda", "cuda:N" or None (the first). Raises BackendUnavailable, InvalidInput."""
    ordinal = _ordinal(device)
    core, driver = _libraries()
    try:
        count = _check(driver, driver.cuInit(0)) or _check(driver, driver.cuDeviceGetCount())
    except Exception as error:  # without a driver the loader's own error, too long to show
        reason = f" ({_first_line(error)})" if isinstance(error, RuntimeError) and "CUDA_" in str(error) else ""
        raise BackendUnavailable(
            f"no working NVIDIA driver{reason}",
            expected="a GPU with its driver",
            fix="install the NVIDIA driver (nvidia-smi must list the GPU), or use --backend ort-cpu",
        ) from error
    if ordinal >= count:
        raise BackendUnavailable(
            f"device cuda:{ordinal} of {count}",
            expected="a GPU that nvidia-smi lists",
            fix="name another device, or look at CUDA_VISIBLE_DEVICES",
        )
    found = core.Device(ordinal)
    major, minor = found.compute_capability
    total = _check(driver, driver.cuDeviceTotalMem(_check(driver, driver.cuDeviceGet(ordinal))))
    return GpuFacts(ordinal, str(found.name), f"{major}.{minor}", int(total))


def _ordinal(device: str | None) -> int:
    kind, _, number = (device or "cuda").partition(":")
    if kind != "cuda" or not (number or "0").isdecimal():
        raise InvalidInput(f"device {device!r}", expected="cuda or cuda:N", fix="name a GPU, or leave it out")
    return int(number or 0)


def _libraries() -> tuple[Any, Any]:
    try:
        core, driver = importlib.import_module("cuda.core"), importlib.import_module("cuda.bindings.driver")
        version = str(core.__version__)
    except Exception as error:  # a wheel half removed fails in any way
        raise BackendUnavailable(
            f"no cuda.core ({_first_line(error)})", expected="the Python side of CUDA", fix=_INSTALL
        ) from error
    if tuple(int(part) for part in version.split(".")[:2]) < MINIMUM:
        wanted = ".".join(map(str, MINIMUM))
        raise BackendUnavailable(
            f"cuda.core {version}", expected=f"{wanted} or later", fix=f"pip install 'cuda-core>={wanted}'"
        )
    return core, driver


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:200]


def _check(driver: Any, result: tuple[Any, ...]) -> Any:
    """The value of a driver call, or its error as an exception."""
    if int(result[0]) == 0:
        return result[1] if len(result) == 2 else result[1:]
    _, name = driver.cuGetErrorName(result[0])
    raise RuntimeError(name.decode() if isinstance(name, bytes) else str(result[0]))


@dataclass(frozen=True)
class Memory:
    """Bytes of a device, given back when the last array on them is dropped."""

    buffer: Any

    @property
    def address(self) -> int:
        return int(self.buffer.handle)


class CudaReplay:
    """A CUDA graph, launched on the stream it was captured from."""

    def __init__(self, device: CudaDevice, graph: Any) -> None:
        self._device, self._graph = device, graph

    def launch(self) -> None:
        with self._device.translating("launching a captured generation"):
            self._graph.launch(self._device.core_stream)

    def close(self) -> None:
        self._graph.close()


class CudaDevice:
    """One GPU and a stream of its own."""

    def __init__(self, facts: GpuFacts) -> None:
        self._core, self._driver = _libraries()
        self.ordinal, self.name, self.capability = facts.ordinal, facts.name, facts.capability
        self._pinned: Any = None
        self._kernels: dict[str, Any] = {}
        with self.translating("starting work on the GPU"):
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
        with self.translating(f"a buffer of {nbytes / 2**20:.0f} MiB"):
            return Memory(self._device.memory_resource.allocate(max(nbytes, 1), stream=self.core_stream))

    def trim(self) -> None:
        self.synchronize()  # buffers are freed in the order of the stream
        pool = self._pool()
        if pool is not None:
            self._call("cuMemPoolTrimTo", pool.handle, 0)

    def pinned(self, nbytes: int) -> NDArray[Any]:
        with self.translating(f"{nbytes / 2**20:.0f} MiB of page-locked memory"):
            self._pinned = self._pinned or self._core.LegacyPinnedMemoryResource()
            buffer = self._pinned.allocate(max(nbytes, 1), stream=self.core_stream)
        bytes_there = (ctypes.c_uint8 * max(nbytes, 1)).from_address(int(buffer.handle))
        bytes_there.owner = buffer  # type: ignore[attr-defined]  # the array keeps the view, the view the buffer
        return np.ctypeslib.as_array(bytes_there)[:nbytes]

    def write(self, array: DeviceArray, host: NDArray[Any]) -> None:
        _require_same_size(array, host)
        if array.nbytes:
            self._call("cuMemcpyHtoDAsync", array.address, host.ctypes.data, array.nbytes, self.stream)

    def read(self, host: NDArray[Any], array: DeviceArray) -> None:
        _require_same_size(array, host)
        if array.nbytes:
            self._call("cuMemcpyDtoHAsync", host.ctypes.data, array.address, array.nbytes, self.stream)

    def copy(self, target: DeviceArray, source: DeviceArray) -> None:
        if target.nbytes != source.nbytes:
            raise ValueError(f"{source.nbytes} bytes into {target.nbytes}")
        self._call("cuMemcpyDtoDAsync", target.address, source.address, target.nbytes, self.stream)

    def zero(self, array: DeviceArray) -> None:
        self._call("cuMemsetD8Async", array.address, 0, array.nbytes, self.stream)

    def _call(self, name: str, *arguments: Any) -> None:
        with self.translating(name):
            _check(self._driver, getattr(self._driver, name)(*arguments))

    def load(self, config: KernelConfig) -> None:
        code = self._core.ObjectCode.from_cubin(compile_kernels(f"sm_{self.capability.replace('.', '')}", config))
        with self.translating("loading the kernels"):
            self._kernels = {name: code.get_kernel(name) for name in KERNEL_NAMES}

    def launch(self, launch: Launch) -> None:
        config = self._core.LaunchConfig(grid=launch.grid, block=launch.block, shmem_size=launch.shared_bytes)
        with self.translating(f"kernel {launch.name}"):
            self._core.launch(self.core_stream, config, self._kernels[launch.name], *launch.args)

    def capture(self, enqueue: Callable[[], None]) -> CudaReplay:
        gc.collect()
        with self.translating("capturing a generation"), _no_garbage_collection():
            builder = self._home.create_graph_builder().begin_building("relaxed")
            self.core_stream = builder.stream
            try:
                enqueue()
                return CudaReplay(self, builder.end_building().complete())
            except BaseException:
                with suppress(Exception):  # the first error tells; this only leaves the stream usable
                    if builder.is_building:
                        builder.end_building()
                raise
            finally:
                self.core_stream = self._home
                with suppress(Exception):
                    builder.close()

    def synchronize(self) -> None:
        with self.translating("the work on the device"):
            self.core_stream.sync()

    def elapsed(self, enqueue: Callable[[], None]) -> Callable[[], float]:
        start, end = self._events
        with self.translating("a time stamp"):
            self.core_stream.record(start)
            enqueue()
            self.core_stream.record(end)

        def seconds() -> float:
            with self.translating("a time stamp"):
                return float(end - start) / 1e3

        return seconds

    def free_bytes(self) -> int:
        self.activate()
        free, _ = _check(self._driver, self._driver.cuMemGetInfo())
        return int(free) + self._cached_bytes()

    def _cached_bytes(self) -> int:
        """What the pool holds without anyone using it: cuda.core never gives it back by itself."""
        pool = self._pool()
        if pool is None:
            return 0
        return max(int(pool.attributes.reserved_mem_current) - int(pool.attributes.used_mem_current), 0)

    def _pool(self) -> Any:
        """The memory pool that `allocate` takes from; None where the driver has no pools."""
        resource = self._device.memory_resource
        return resource if hasattr(resource, "attributes") else None

    def close(self) -> None:
        self._kernels.clear()
        self._home.close()

    @contextmanager
    def translating(self, what: str) -> Iterator[None]:
        """CUDA's errors as ours: out of memory, and everything else."""
        try:
            yield
        except (FlexVARError, ValueError):
            raise
        except Exception as error:
            if "OUT_OF_MEMORY" in str(error) or "out of memory" in str(error):
                raise OutOfMemory(
                    f"{what} that does not fit on {self.name}",
                    expected="one that fits",
                    fix="use a smaller batch or schedule, or free the GPU",
                ) from error
            raise DeviceFailed(
                f"{what}: {_first_line(error)}",
                expected=f"work that {self.name} can do",
                fix="run it again; if it persists, compute-sanitizer finds the kernel",
            ) from error


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Memory freed by a collection in between would be freed on the stream that is being captured, and end that."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _require_same_size(array: DeviceArray, host: NDArray[Any]) -> None:
    if host.nbytes != array.nbytes or not host.flags.c_contiguous:
        raise ValueError(f"{host.nbytes} host bytes, contiguous {host.flags.c_contiguous}, for {array.nbytes}")
