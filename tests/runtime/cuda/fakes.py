"""A device and a TensorRT that compute on the host. Enqueued work runs later, as on a GPU.

Memory is host memory, kernels are `kernels.cu` compiled by a C compiler, and engines are ONNX Runtime sessions. Nothing
runs before `synchronize`. So code that reads a result too early, or changes the source of a copy too early, fails.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from host_kernels import HostKernels
from numpy.typing import NDArray

from flexvar_runtime.cuda.array import ALIGNMENT, DeviceArray
from flexvar_runtime.cuda.compilation import KernelSet
from flexvar_runtime.cuda.launches import Launch
from flexvar_runtime.errors import DeviceFailed, OutOfMemory

GUARD = 256  # bytes on either side of an allocation that must not change


@dataclass(frozen=True, eq=False)
class FakeMemory:
    """A program's hold on a block. The block is free when this is dropped."""

    address: int


class Block:
    """Memory of the device, in use or reserved."""

    def __init__(self, nbytes: int) -> None:
        self.storage: NDArray[np.uint8] = np.full(nbytes + 2 * GUARD + ALIGNMENT, 0xAB, np.uint8)
        self.address = -(-(self.storage.ctypes.data + GUARD) // ALIGNMENT) * ALIGNMENT
        self.nbytes = nbytes
        self.used = False

    def take(self) -> FakeMemory:
        start = self.address - self.storage.ctypes.data
        self.storage[start : start + self.nbytes] = 0xFF  # NaN as float32, so that reads of unwritten memory show
        memory = FakeMemory(self.address)
        weakref.finalize(memory, self._drop).atexit = False
        self.used = True
        return memory

    def _drop(self) -> None:
        self.used = False

    def check_guards(self) -> None:
        start = self.address - self.storage.ctypes.data
        for guard in (self.storage[:start], self.storage[start + self.nbytes :]):
            assert (guard == 0xAB).all(), "a kernel or a graph wrote outside its array"


@dataclass
class FakeReplay:
    device: FakeDevice
    work: list[tuple[str, Callable[[], None]]]
    closed: bool = False

    def launch(self) -> None:
        assert not self.closed
        self.device.note("replay")
        self.device.queue.extend(self.work)

    def close(self) -> None:
        assert not self.device.queue, "closed while running"
        self.closed = True


@dataclass
class FakeDevice:
    """A GPU whose work waits in a queue until `synchronize`. events: every call, in order.

    Its memory is a pool like CUDA's at its worst: a dropped block stays reserved until `trim`, and can only be used for
    a buffer of exactly its size.
    """

    kernels: Callable[[Any], HostKernels]
    name: str = "emulated GPU"
    capability: str = "8.6"
    ordinal: int = 0
    stream: int = 0x5EED
    size: int = 2**32
    refuse_capture: str | None = None
    events: list[str] = field(default_factory=list)
    queue: list[tuple[str, Callable[[], None]]] = field(default_factory=list)
    blocks: list[Block] = field(default_factory=list)
    active: bool = False
    closed: bool = False
    _captured: list[tuple[str, Callable[[], None]]] | None = None
    _compiled: dict[str, HostKernels] = field(default_factory=dict)

    def note(self, event: str) -> None:
        assert self.active and not self.closed
        self.events.append(event)

    def enqueue(self, event: str, work: Callable[[], None]) -> None:
        """Enqueue the work of a library on the stream."""
        self.note(event)
        (self.queue if self._captured is None else self._captured).append((event, work))

    def activate(self) -> None:
        self.active = True

    def _blocking(self, event: str) -> None:
        if self._captured is not None:
            raise DeviceFailed(f"{event} while capturing", expected="no such call", fix="move it out")
        self.note(event)

    def allocate(self, nbytes: int) -> FakeMemory:
        self._blocking("allocate")
        unused = [] if self.queue else [block for block in self.blocks if not block.used and block.nbytes == nbytes]
        if unused:
            return unused[0].take()
        if self.reserved + nbytes > self.size:
            raise OutOfMemory(
                f"{nbytes} bytes beside {self.reserved} that are reserved", expected="a buffer that fits", fix="none"
            )
        self.blocks.append(Block(nbytes))
        return self.blocks[-1].take()

    @property
    def used(self) -> int:
        """Bytes of all blocks in use."""
        return sum(block.nbytes for block in self.blocks if block.used)

    @property
    def reserved(self) -> int:
        """Bytes of all blocks, also of those dropped since the last `trim`."""
        return sum(block.nbytes for block in self.blocks)

    def trim(self) -> None:
        self.synchronize()
        self.note("trim")
        self.blocks = [block for block in self.blocks if block.used]

    def pinned(self, nbytes: int) -> NDArray[np.uint8]:
        self._blocking("pinned")
        return np.full(nbytes, 0xFF, np.uint8)

    def write(self, array: DeviceArray, host: NDArray[Any]) -> None:
        assert host.nbytes == array.nbytes and host.flags.c_contiguous
        kept, source = weakref.ref(host), host.ctypes.data

        def move() -> None:
            assert kept() is not None, "the host array was dropped before it was copied"
            _move(array.address, source, array.nbytes)

        self.enqueue("write", move)

    def read(self, host: NDArray[Any], array: DeviceArray) -> None:
        assert host.nbytes == array.nbytes and host.flags.c_contiguous
        self.enqueue("read", lambda: _move(host.ctypes.data, array.address, array.nbytes))

    def copy(self, target: DeviceArray, source: DeviceArray) -> None:
        assert target.nbytes == source.nbytes
        self.enqueue("copy", lambda: _move(target.address, source.address, target.nbytes))

    def zero(self, array: DeviceArray) -> None:
        self.enqueue("zero", lambda: _fill(array.address, array.nbytes))

    def load(self, kernels: KernelSet) -> None:
        self._blocking("load")
        self._compiled |= dict.fromkeys(kernels.names, self.kernels(kernels))

    def launch(self, launch: Launch) -> None:
        compiled = self._compiled[launch.name]
        self.enqueue(launch.name, lambda: compiled.run(launch))

    def capture(self, enqueue: Callable[[], None]) -> FakeReplay:
        assert self._captured is None
        self.note("capture")
        self._captured = []
        try:
            enqueue()
            if self.refuse_capture is not None:
                raise DeviceFailed(self.refuse_capture, expected="work that can be captured", fix="none")
            return FakeReplay(self, self._captured)
        finally:
            self._captured = None
            self.events.append("captured")

    def synchronize(self) -> None:
        self._blocking("synchronize")
        queue, self.queue = self.queue, []
        for _, work in queue:
            work()
        for block in self.blocks:
            block.check_guards()

    def elapsed(self, enqueue: Callable[[], None]) -> Callable[[], float]:
        enqueue()
        return lambda: 0.25

    def free_bytes(self) -> int:
        self._blocking("free_bytes")
        return self.size - self.used

    def close(self) -> None:
        assert not self.queue
        self.closed = True

    @contextmanager
    def recorded(self) -> Iterator[list[str]]:
        """The events from here to the end of the block."""
        recorded = self.events = []
        yield recorded
        self.events = []


def _move(target: int, source: int, nbytes: int) -> None:
    ctypes.memmove(target, source, nbytes)


def _fill(address: int, nbytes: int) -> None:
    ctypes.memset(address, 0, nbytes)


# TensorRT ------------------------------------------------------------------------------------------------------------


class FakeContext:
    """An execution context that has TensorRT's restrictions and runs the graph in ONNX Runtime."""

    def __init__(self, engine: FakeEngine) -> None:
        self.engine, self.profile = engine, None
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.memory: tuple[int, int] | None = None
        engine.contexts.append(self)

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        assert self.profile is None and not self.shapes and stream == self.engine.device.stream
        self.profile = index
        return 0 <= index < self.engine.num_optimization_profiles

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        assert self.profile is not None, "shapes come after the profile"
        low, _, high = self.engine.profiles[self.profile].shapes(self.engine.inputs[name])
        self.shapes[name] = shape
        return all(a <= size <= b for a, size, b in zip(low, shape, high, strict=True))

    def infer_shapes(self) -> list[str]:
        return [name for name in self.engine.inputs if name not in self.shapes]

    def update_device_memory_size_for_shapes(self) -> int:
        return 1000 + sum(map(int, np.concatenate([np.array(s) for s in self.shapes.values()])))

    def set_tensor_address(self, name: str, address: int) -> bool:
        assert address and address % ALIGNMENT == 0
        self.addresses[name] = address
        return True

    def set_device_memory(self, address: int, nbytes: int) -> None:
        assert address % ALIGNMENT == 0 and nbytes >= self.update_device_memory_size_for_shapes()
        self.memory = (address, nbytes)

    def execute_async_v3(self, stream: int) -> bool:
        assert stream == self.engine.device.stream and self.memory is not None
        assert set(self.addresses) == set(self.engine.names)
        addresses, shapes, memory = dict(self.addresses), dict(self.shapes), self.memory
        self.engine.device.enqueue(f"execute {self.engine.graph}", lambda: self.engine.run(addresses, shapes, memory))
        return True


class FakeEngine:
    """An engine. The bytes of its plan are the path of the graph."""

    def __init__(self, device: FakeDevice, plan: bytes, profiles: Any, spec: Any) -> None:
        self.device, self.profiles, self.graph = device, profiles, spec.file.removesuffix(".onnx")
        self.inputs = {tensor.name: tensor for tensor in spec.inputs}
        self.outputs = {tensor.name: tensor for tensor in spec.outputs}
        self.names = [*self.inputs, *self.outputs]
        self.num_io_tensors, self.num_optimization_profiles = len(self.names), len(profiles)
        self.contexts: list[FakeContext] = []
        import onnxruntime  # here, because the backend cuda is tested without it

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self._session = onnxruntime.InferenceSession(plan.decode(), options, providers=["CPUExecutionProvider"])

    def get_tensor_name(self, index: int) -> str:
        return self.names[index]

    def create_execution_context(self, strategy: object) -> FakeContext:
        assert strategy == "user managed"
        return FakeContext(self)

    def run(self, addresses: dict[str, int], shapes: dict[str, tuple[int, ...]], memory: tuple[int, int]) -> None:
        _fill(memory[0], memory[1])
        sizes: dict[str, int] = {}
        for name, tensor in self.inputs.items():
            sizes |= dict(zip(tensor.axes, shapes[name], strict=True))
        for axis in [str(axis) for axis in sizes if "_x" in str(axis)]:
            base, _, factor = axis.partition("_x")
            sizes[base] = sizes[axis] // int(factor)
        binding = self._session.io_binding()
        for name, tensor in self.inputs.items():
            binding.bind_input(name, "cpu", 0, np.dtype(tensor.dtype), shapes[name], addresses[name])
        for name, tensor in self.outputs.items():
            shape = [axis if isinstance(axis, int) else _size(axis, sizes) for axis in tensor.axes]
            binding.bind_output(name, "cpu", 0, np.dtype(tensor.dtype), shape, addresses[name])
        self._session.run_with_iobinding(binding)


def _size(axis: str, sizes: dict[str, int]) -> int:
    base, _, factor = axis.partition("_x")
    return sizes[axis] if axis in sizes else sizes[base] * int(factor or 1)


def fake_trt(device: FakeDevice, describe: Callable[[bytes], tuple[Any, Any]]) -> Any:
    """A module like `tensorrt`. describe: returns the profiles and the declaration of a plan."""

    class ILogger:
        Severity = SimpleNamespace(INTERNAL_ERROR=0, ERROR=1, WARNING=2, INFO=3, VERBOSE=4)

        def __init__(self) -> None:
            pass

    class Runtime:
        def __init__(self, logger: Any) -> None:
            self.logger = logger

        def deserialize_cuda_engine(self, plan: bytes) -> FakeEngine | None:
            if not Path(plan.decode(errors="replace")).is_file():
                self.logger.log(ILogger.Severity.ERROR, "IRuntime::deserializeCudaEngine: magic tag does not match")
                return None
            engine = FakeEngine(device, plan, *describe(plan))
            device.engines[engine.graph] = engine  # type: ignore[attr-defined]
            return engine

    return SimpleNamespace(
        ILogger=ILogger,
        Runtime=Runtime,
        __version__="11.4.0",
        ExecutionContextAllocationStrategy=SimpleNamespace(USER_MANAGED="user managed"),
    )
