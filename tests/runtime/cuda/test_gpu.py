"""`CudaDevice` on recorders of cuda.core and of the driver, so no GPU is needed.

Every name that is called on a recorder must exist in the real library.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import weakref
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from flexvar_runtime import BackendUnavailable, InvalidInput, OutOfMemory
from flexvar_runtime.backends.device_arrays import probe_gpu
from flexvar_runtime.cuda import gpu, kernels
from flexvar_runtime.cuda.array import DeviceArray
from flexvar_runtime.cuda.gpu import CudaDevice, GpuFacts, find_gpu, find_gpus
from flexvar_runtime.errors import DeviceFailed

core = pytest.importorskip("cuda.core", reason="cuda-python is not installed")


class Recorder:
    """In place of an object of cuda.core. Records calls, and fails for names that the real class does not have."""

    def __init__(self, log: list[str], kind: str, answers: dict[str, Any] | None = None) -> None:
        self._log, self._kind, self._answers = log, kind, answers or {}

    def __getattr__(self, name: str) -> Any:
        module, _, real = self._kind.rpartition(".")
        assert hasattr(getattr(importlib.import_module(module or "cuda.core"), real), name), f"{self._kind}.{name}"
        if name in self._answers and not callable(self._answers[name]):
            return self._answers[name]

        def call(*arguments: Any, **options: Any) -> Any:
            self._log.append(f"{real}.{name}")
            answer = self._answers.get(name)
            return answer(*arguments, **options) if callable(answer) else None

        return call


class Buffer:
    def __init__(self, nbytes: int) -> None:
        self.storage = (ctypes.c_uint8 * nbytes)()
        self.handle = ctypes.addressof(self.storage)


class Driver:
    """A driver that copies on the host. Every name must exist in the real driver."""

    def __init__(self, log: list[str]) -> None:
        self._log, self.failure = log, 0
        self.trimmed: list[tuple[Any, ...]] = []

    def __getattr__(self, name: str) -> Any:
        assert hasattr(importlib.import_module("cuda.bindings.driver"), name), name

        def call(*arguments: Any) -> tuple[Any, ...]:
            self._log.append(name)
            if name == "cuGetErrorName":
                return 0, {2: b"CUDA_ERROR_OUT_OF_MEMORY", 700: b"CUDA_ERROR_ILLEGAL_ADDRESS"}[int(arguments[0])]
            if self.failure:
                return (self.failure,)
            if name == "cuMemPoolTrimTo":
                self.trimmed.append(arguments)
            if name.startswith("cuMemcpy"):
                ctypes.memmove(arguments[0], arguments[1], arguments[2])
            return (0, 1000, 9000) if name == "cuMemGetInfo" else (0,)

        return call


@pytest.fixture
def log() -> list[str]:
    return []


@pytest.fixture
def device(log: list[str], monkeypatch: pytest.MonkeyPatch) -> CudaDevice:
    stream = Recorder(log, "Stream", {"handle": 77})
    built = Recorder(log, "cuda.core.graph.Graph")
    state = {"building": False}

    def begin(mode: str) -> Any:
        state["building"] = True
        return builder

    def end() -> Any:
        state["building"] = False
        return builder

    builder: Any = Recorder(
        log,
        "cuda.core.graph.GraphBuilder",
        {"begin_building": begin, "end_building": end, "complete": lambda: built},
    )
    builder.__dict__["stream"] = Recorder(log, "Stream", {"handle": 78})
    type(builder).is_building = property(lambda _: state["building"])  # type: ignore[attr-defined]
    stream._answers["create_graph_builder"] = lambda: builder
    pool = Recorder(
        log,
        "DeviceMemoryResource",
        {
            "allocate": lambda nbytes, *, stream: Buffer(nbytes),
            "attributes": SimpleNamespace(reserved_mem_current=500, used_mem_current=100),
            "handle": 4242,
        },
    )
    event = Recorder(log, "Event")
    answers = {"create_stream": lambda: stream, "memory_resource": pool, "create_event": lambda options: event}
    module = SimpleNamespace(
        __version__="1.2.2",
        Device=lambda ordinal: Recorder(log, "Device", answers),
        LegacyPinnedMemoryResource=lambda: Recorder(
            log, "LegacyPinnedMemoryResource", {"allocate": lambda nbytes, *, stream: Buffer(nbytes)}
        ),
        LaunchConfig=core.LaunchConfig,
    )
    driver = Driver(log)
    monkeypatch.setattr(gpu, "_libraries", lambda: (module, driver))
    made = CudaDevice(GpuFacts(0, "A GPU", "9.0", 2**34))
    made.__dict__["driver"] = driver
    log.clear()
    return made


def test_without_a_driver() -> None:
    state = probe_gpu()
    if state.available:
        pytest.skip("the test needs a machine without a GPU")
    assert "NVIDIA driver" in state.detail and "nvidia-smi" in (state.fix or "")


def test_a_driver_without_a_device(device: CudaDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    module, _ = gpu._libraries()
    refusing = SimpleNamespace(cuInit=lambda _: (100,), cuGetErrorName=lambda _: (0, b"CUDA_ERROR_NO_DEVICE"))
    monkeypatch.setattr(gpu, "_libraries", lambda: (module, refusing))
    assert "(CUDA_ERROR_NO_DEVICE)" in probe_gpu().detail


def test_names_of_devices() -> None:
    for name in ("gpu", "cuda:x", "cuda:-1", "0", "cpu"):
        with pytest.raises(InvalidInput, match=f"device is '{name}'"):
            find_gpu(name)


def test_a_library_that_is_missing_or_old(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu.importlib, "import_module", lambda _: (_ for _ in ()).throw(ImportError("no cuda")))
    with pytest.raises(BackendUnavailable, match=r"cuda\.core .*\(no cuda\).*pip install 'cuda-python>=13'"):
        find_gpu()
    monkeypatch.setattr(gpu.importlib, "import_module", lambda _: SimpleNamespace(__version__="0.5.1"))
    with pytest.raises(BackendUnavailable, match=r"cuda\.core 0\.5\.1 .*1\.0"):
        find_gpu()


def test_a_device_that_is_not_there(device: CudaDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    module, _ = gpu._libraries()
    counted = SimpleNamespace(cuInit=lambda _: (0,), cuDeviceGetCount=lambda: (0, 1))
    monkeypatch.setattr(gpu, "_libraries", lambda: (module, counted))
    with pytest.raises(BackendUnavailable, match=r"cuda:3.* 1 GPU\."):
        find_gpu("cuda:3")


def test_every_gpu_is_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    capabilities = [(9, 0), (12, 1)]
    module = SimpleNamespace(
        Device=lambda i: SimpleNamespace(name=f"GPU {i}", compute_capability=capabilities[i]), __version__="1.2.2"
    )
    driver = SimpleNamespace(
        cuInit=lambda _: (0,),
        cuDeviceGetCount=lambda: (0, 2),
        cuDeviceGet=lambda i: (0, i),
        cuDeviceTotalMem=lambda i: (0, 2**34 * (i + 1)),
    )
    monkeypatch.setattr(gpu, "_libraries", lambda: (module, driver))
    assert find_gpus() == (GpuFacts(0, "GPU 0", "9.0", 2**34), GpuFacts(1, "GPU 1", "12.1", 2**35))
    assert str(find_gpus()[1]) == "GPU 1, compute capability 12.1, 32 GiB"


def test_memory_is_moved_in_the_order_of_the_stream(device: CudaDevice, log: list[str]) -> None:
    memory = device.allocate(64)
    array = DeviceArray(memory.address, (8,), "int64", memory)
    host, back = device.pinned(64).view(np.int64), np.zeros(8, np.int64)
    host[:] = np.arange(8)
    device.write(array, host)
    device.read(back, array)
    np.testing.assert_array_equal(back, np.arange(8))
    device.zero(array)
    device.copy(array[:4], array[4:])
    device.synchronize()
    assert log[-5:] == ["cuMemcpyHtoDAsync", "cuMemcpyDtoHAsync", "cuMemsetD8Async", "cuMemcpyDtoDAsync", "Stream.sync"]
    with pytest.raises(ValueError, match="64 bytes"):
        device.write(array[:4], host)
    with pytest.raises(ValueError, match=r"32 bytes.* 64"):
        device.copy(array, array[:4])


def test_pinned_memory_lives_as_long_as_its_views(device: CudaDevice) -> None:
    whole = device.pinned(100)
    owner = weakref.ref(whole.base if isinstance(whole.base, ctypes.Array) else whole.base.base.obj)  # type: ignore[union-attr]
    view = whole[10:20]
    del whole
    gc.collect()
    view[:] = 1
    assert owner() is not None
    del view
    gc.collect()
    assert owner() is None


def test_a_captured_graph_is_launched_on_the_stream_of_the_device(device: CudaDevice, log: list[str]) -> None:
    seen = []
    replay = device.capture(lambda: seen.append(device.stream))
    assert seen == [78] and device.stream == 77
    steps = ("begin_building", "end_building", "complete", "close")
    assert log == ["Stream.create_graph_builder", *(f"GraphBuilder.{step}" for step in steps)]
    replay.launch()
    replay.close()
    assert log[-2:] == ["Graph.launch", "Graph.close"]


def test_a_capture_that_fails_leaves_the_stream_usable(device: CudaDevice, log: list[str]) -> None:
    def fail() -> None:
        raise DeviceFailed("no", expected="yes", fix="none")

    with pytest.raises(DeviceFailed):
        device.capture(fail)
    assert device.stream == 77 and log[-2:] == ["GraphBuilder.end_building", "GraphBuilder.close"]


def test_a_capture_that_the_driver_ends_is_an_error_of_ours(device: CudaDevice, log: list[str]) -> None:
    """If a library breaks a capture, cuda.core raises its own exception at the end of the capture."""
    builder = device.core_stream.create_graph_builder()
    builder._answers["end_building"] = lambda: (_ for _ in ()).throw(
        RuntimeError("CUDA_ERROR_STREAM_CAPTURE_INVALIDATED")
    )
    with pytest.raises(DeviceFailed, match="CUDA_ERROR_STREAM_CAPTURE_INVALIDATED"):
        device.capture(lambda: None)
    assert device.stream == 77 and gc.isenabled()


@pytest.mark.parametrize(
    ("code", "kind", "named"),
    [
        (2, OutOfMemory, r"^A GPU .*cuMemsetD8Async"),
        (700, DeviceFailed, r"cuMemsetD8Async.*CUDA_ERROR_ILLEGAL_ADDRESS"),
    ],
)
def test_errors_of_the_driver(device: CudaDevice, code: int, kind: type[Exception], named: str) -> None:
    array = DeviceArray(256, (4,), "int32", None)
    device.__dict__["driver"].failure = code
    with pytest.raises(kind, match=named):
        device.zero(array)


def test_free_memory_counts_what_the_pool_holds(device: CudaDevice) -> None:
    assert device.free_bytes() == 1000 + 400


def test_the_pool_is_trimmed_after_the_device_is_done(device: CudaDevice, log: list[str]) -> None:
    device.trim()
    assert log == ["Stream.sync", "cuMemPoolTrimTo"] and device.__dict__["driver"].trimmed == [(4242, 0)]


def test_without_a_pool_nothing_is_reserved(device: CudaDevice, log: list[str]) -> None:
    """If the driver has no pools, cuda.core gives a resource without attributes."""
    real = importlib.import_module("cuda.core.cu13._memory._legacy")._SynchronousMemoryResource
    assert not hasattr(real, "attributes")
    device._device._answers["memory_resource"] = SimpleNamespace()
    device.trim()
    assert log == ["Stream.sync"] and device.free_bytes() == 1000


def test_a_pool_that_cannot_be_trimmed_is_an_error_of_ours(device: CudaDevice) -> None:
    device.__dict__["driver"].failure = 700
    with pytest.raises(DeviceFailed, match=r"cuMemPoolTrimTo.*CUDA_ERROR_ILLEGAL_ADDRESS"):
        device.trim()


def test_arguments_are_packed_as_the_kernels_take_them() -> None:
    """cuda.core packs pointers from int, and all other arguments from ctypes values."""
    handler = importlib.import_module("cuda.core.cu13._kernel_arg_handler")
    streams = DeviceArray(0x7F0000000100, (kernels.stream_words(3),), "uint32", None)
    launch = kernels.draws(streams, DeviceArray(0x7F0000000200, (3, 5), "uint32", None), scale=4)
    holder = handler.ParamHolder(launch.args)
    slots = (ctypes.c_void_p * len(launch.args)).from_address(holder.ptr)
    assert [ctypes.c_uint64.from_address(slots[i] or 0).value for i in range(2)] == [0x7F0000000100, 0x7F0000000200]
    assert [ctypes.c_uint32.from_address(slots[i] or 0).value for i in range(2, 5)] == [15, 5, 4]
    config = core.LaunchConfig(grid=launch.grid, block=launch.block, shmem_size=launch.shared_bytes)
    assert tuple(config.grid) == launch.grid and tuple(config.block) == launch.block
