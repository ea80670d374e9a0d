"""A proof backend: the torch modules of the export, run by the runtime's own device path.

It needs no engine and no ONNX Runtime. A GPU with torch can therefore run, capture and replay everything around the
graphs: buffers, kernels, the CUDA graph. Tests run the same code on an emulated device.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn

from flexvar_export.bundle import TORCH_PRECISIONS
from flexvar_export.modules import graph_module
from flexvar_export.onnx_graphs import TORCH_DTYPES, call_arguments
from flexvar_ref import FlexVAR, Tokenizer
from flexvar_runtime import Bundle
from flexvar_runtime.backends.base import Array, Graph, check_bindings
from flexvar_runtime.backends.device_arrays import DeviceBackend
from flexvar_runtime.cuda.array import DeviceArray
from flexvar_runtime.cuda.device import Device
from flexvar_runtime.cuda.gpu import CudaDevice
from flexvar_runtime.errors import DeviceFailed, InvalidInput
from flexvar_runtime.model.tensors import GraphSpec, TensorSpec

# Types of `__cuda_array_interface__`. It has no bfloat16, so its bits are passed as int16.
TYPE_STRINGS = {"float32": "<f4", "float16": "<f2", "bfloat16": "<i2", "int32": "<i4"}


class EmulatedDevice(Device, Protocol):
    """A device whose memory is the host's and whose stream is a queue."""

    def enqueue(self, event: str, work: Callable[[], None]) -> None:
        """Call `work` after everything that was enqueued before. event: its name in the record of the device."""


class TorchBackend(DeviceBackend):
    """Opens a graph as the torch module it was exported from.

    device: a GPU, or an emulated one. model and tokenizer: the float32 models, on the CPU, that the bundle was exported
    from. dtype: the type that the graphs compute in. A bundle of another precision raises BackendUnavailable.
    """

    def __init__(
        self, device: CudaDevice | EmulatedDevice, model: FlexVAR, tokenizer: Tokenizer, dtype: torch.dtype
    ) -> None:
        super().__init__("torch-modules", device)
        self.precisions = frozenset(name for name in DeviceBackend.precisions if TORCH_PRECISIONS[name] == dtype)
        self._model, self._tokenizer, self._dtype = model, tokenizer, dtype
        self._executor: Executor = GpuExecutor(device) if isinstance(device, CudaDevice) else HostExecutor(device)

    def prepared(self, bundle: Bundle, graph: str) -> bool:
        return True

    def open(self, bundle: Bundle, graph: str, *, once: bool = False) -> TorchGraph:
        """The module of a graph, its weights on the device. `once` makes no difference."""
        kept, decoder = bundle.manifest.float32_parts, bundle.manifest.decoder
        module = graph_module(graph, self._model, self._tokenizer, self._dtype, kept, decoder)
        return TorchGraph(graph, bundle.graph(graph), self._executor.load(module), self._executor)

    def close(self) -> None:
        self.device.close()


class TorchGraph(Graph):
    """One opened graph. A run only enqueues it on the stream of the device."""

    most_images = None  # any number

    def __init__(self, name: str, spec: GraphSpec, module: nn.Module, executor: Executor) -> None:
        self.name, self.spec, self.executor = name, spec, executor
        self._module: nn.Module | None = module

    @property
    def module(self) -> nn.Module:
        if self._module is None:
            raise InvalidInput(
                f"The graph {self.name} is closed.", expected="an open graph", fix="Open the bundle again."
            )
        return self._module

    def holds(self, size: tuple[int, int]) -> bool:
        return True

    def bind(self, inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> TorchBound:
        """Raises InvalidInput for arrays that are not what the graph declares."""
        check_bindings(self.spec, inputs, outputs)
        return TorchBound(self, inputs, outputs)

    def run(self, inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> None:
        self.bind(inputs, outputs).run()

    def close(self) -> None:
        self._module = None


class TorchBound:
    """A graph with tensors on the memory of the bound arrays: inputs are not copied, results are written in place."""

    def __init__(self, graph: TorchGraph, inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> None:
        def view(tensor: TensorSpec) -> Tensor:
            array = inputs[tensor.name] if tensor.name in inputs else outputs[tensor.name]
            return graph.executor.view(array, tensor.dtype)

        self.graph = graph
        self.arguments = call_arguments(graph.spec, view)
        self.results = [view(tensor) if tensor.name in outputs else None for tensor in graph.spec.outputs]
        self._arrays: object = (inputs, outputs)  # keep their memory alive

    def run(self) -> None:
        """Enqueue `forward`. Raises InvalidInput for a closed graph, OutOfMemory and DeviceFailed."""
        self.graph.executor.run(self.graph.name, partial(self.forward, self.graph.module))

    @torch.inference_mode()
    def forward(self, module: nn.Module) -> None:
        """Call the module and copy its results to the outputs that are bound."""
        found = flatten(module(*self.arguments))
        for target, result in zip(self.results, found, strict=True):
            if target is not None:
                target.copy_(result)

    def close(self) -> None:
        self.arguments, self.results, self._arrays = (), [], None


def flatten(results: Tensor | list[Tensor] | tuple[Tensor | list[Tensor], ...]) -> Iterator[Tensor]:
    """The tensors that a module returns, in the order in which the outputs of its graph are declared."""
    if isinstance(results, Tensor):
        yield results
    else:
        for part in results:
            yield from flatten(part)


class Executor(Protocol):
    """Runs torch modules on a device."""

    def load(self, module: nn.Module) -> nn.Module:
        """The module with its weights on the device."""

    def view(self, array: DeviceArray, dtype: str) -> Tensor:
        """A tensor on the memory of an array. dtype: the declared one."""

    def run(self, graph: str, work: Callable[[], None]) -> None:
        """Enqueue the work that `work` does. graph: named in errors."""


class GpuExecutor:
    """Torch on the stream of a GPU. While a generation is captured that is the stream of the capture."""

    def __init__(self, device: CudaDevice) -> None:
        self._device, self._place = device, torch.device("cuda", device.ordinal)
        torch.cuda.init()  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.MemPool()  # keeps the memory between layers that captured graphs refer to

    def load(self, module: nn.Module) -> nn.Module:
        with self._device.translating("weights for torch"):
            loaded = module.to(self._place)
            torch.cuda.synchronize(self._place)  # the copy ran on torch's own stream
        return loaded

    def view(self, array: DeviceArray, dtype: str) -> Tensor:
        if array.size == 0:
            return torch.empty(array.shape, dtype=TORCH_DTYPES[dtype], device=self._place)
        tensor = torch.as_tensor(_CudaArray(array, dtype), device=self._place)
        if tensor.data_ptr() != array.address:
            raise DeviceFailed(
                "torch copied a bound array.", expected="a view of it", fix="Install the tested version of torch."
            )
        return tensor.view(TORCH_DTYPES[dtype])

    def run(self, graph: str, work: Callable[[], None]) -> None:
        stream = torch.cuda.ExternalStream(self._device.stream, self._place)  # type: ignore[no-untyped-call]
        pool = torch.cuda.use_mem_pool(self._pool, device=self._place)
        with self._device.translating(f"{graph} in torch"), torch.cuda.stream(stream), pool:
            work()


class _CudaArray:
    """An array as torch accepts it without a copy. It keeps the memory alive."""

    def __init__(self, array: DeviceArray, dtype: str) -> None:
        self._array = array
        self.__cuda_array_interface__ = {
            "shape": array.shape,
            "typestr": TYPE_STRINGS[dtype],
            "data": (array.address, False),
            "strides": None,
            "version": 3,
        }


class HostExecutor:
    """Torch on the memory of an emulated device. Work waits in its queue, as on a GPU."""

    def __init__(self, device: EmulatedDevice) -> None:
        self._device = device

    def load(self, module: nn.Module) -> nn.Module:
        return module

    def view(self, array: DeviceArray, dtype: str) -> Tensor:
        if array.size == 0:
            return torch.empty(array.shape, dtype=TORCH_DTYPES[dtype])
        memory = (ctypes.c_uint8 * array.nbytes).from_address(array.address)
        return torch.frombuffer(memory, dtype=TORCH_DTYPES[dtype]).view(array.shape)

    def run(self, graph: str, work: Callable[[], None]) -> None:
        self._device.enqueue(f"run {graph}", work)
