"""A module like cudnn, NVIDIA's frontend, that computes on the host, when a FakeDevice runs its queue.

It knows convolutions to which a residual and then a bias are added. What would be undefined on a GPU fails the test: a
missing or misaligned address, memory that was freed, a workspace that overlaps a tensor, calls in another order.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
from device_numbers import (
    Floats,
    narrow,
    overlap,
    poison,
    refuse_unless,
    require_device_memory,
    strided,
    widen,
)
from fakes import FakeDevice

from flexvar_runtime.model.tensors import host_dtype

ALIGNMENT = 16  # bytes, of every tensor


class data_type(enum.Enum):
    FLOAT = "float32"
    HALF = "float16"
    BFLOAT16 = "bfloat16"
    NOT_SET = "none"


class heur_mode(enum.Enum):
    A = 0
    B = 1
    FALLBACK = 2


class build_plan_policy(enum.Enum):
    HEURISTICS_CHOICE = 0


class cudnnGraphNotSupportedError(Exception):
    pass


@dataclass(eq=False)
class Tensor:
    """A tensor of a graph. made_by: the operation and its inputs; None for an input of the graph."""

    name: str
    dim: list[int] = field(default_factory=list)
    stride: list[int] = field(default_factory=list)
    data_type: data_type = data_type.NOT_SET
    uid: int | None = None
    output: bool = False
    made_by: tuple[Any, ...] | None = None

    def set_output(self, arg0: bool) -> Tensor:
        self.output = arg0
        return self

    def set_data_type(self, data_type: data_type) -> Tensor:
        self.data_type = data_type
        return self

    def set_dim(self, arg0: list[int]) -> Tensor:
        self.dim = arg0
        return self

    def set_stride(self, arg0: list[int]) -> Tensor:
        self.stride = arg0
        return self

    def set_uid(self, arg0: int) -> Tensor:
        self.uid = arg0
        return self

    @property
    def nbytes(self) -> int:
        last = sum((size - 1) * stride for size, stride in zip(self.dim, self.stride, strict=True))
        return (last + 1) * host_dtype(self.data_type.value).itemsize

    def numbers(self, address: int) -> Floats:
        """The numbers at an address as (B, C, H, W)."""
        return widen(strided(address, self.dim, self.stride, self.data_type.value), self.data_type.value)


@dataclass(frozen=True)
class Convolved:
    """The operation of a graph: its tensors and options. padding: top, left, bottom, right."""

    x: Tensor
    weight: Tensor
    y: Tensor
    residual: Tensor | None
    bias: Tensor | None
    padding: tuple[int, int, int, int]
    stride: tuple[int, int]

    @property
    def tensors(self) -> list[Tensor]:
        return [t for t in (self.x, self.weight, self.y, self.residual, self.bias) if t is not None]

    def run(self, addresses: dict[int, int]) -> None:
        (B, outputs, height, width), (_, _, R, S) = self.y.dim, self.weight.dim
        x, weight = (tensor.numbers(addresses[tensor.uid or 0]) for tensor in (self.x, self.weight))
        top, left, bottom, right = self.padding
        x = np.pad(x.transpose(0, 2, 3, 1), ((0, 0), (top, bottom), (left, right), (0, 0)))
        down, across = self.stride
        result = np.zeros((B * height * width, outputs), np.float32)
        for r in range(R):
            for s in range(S):
                part = x[:, r : r + (height - 1) * down + 1 : down, s : s + (width - 1) * across + 1 : across]
                result += part.reshape(B * height * width, -1) @ weight[:, :, r, s].T
        image = result.reshape(B, height, width, outputs).transpose(0, 3, 1, 2)
        for added in (self.residual, self.bias):
            if added is not None:
                image = image + added.numbers(addresses[added.uid or 0])
        kind = self.y.data_type.value
        strided(addresses[self.y.uid or 0], self.y.dim, self.y.stride, kind)[...] = narrow(image, kind)


STEPS = (
    "validate",
    "build_operation_graph",
    "create_execution_plans",
    "deselect_workspace_greater_than",
    "check_support",
    "build_plans",
)


class Pygraph:
    """A graph. done: the steps that were taken to build it."""

    def __init__(
        self,
        library: FakeCudnn,
        name: str = "test_graph",
        io_data_type: data_type = data_type.NOT_SET,
        intermediate_data_type: data_type = data_type.NOT_SET,
        compute_data_type: data_type = data_type.NOT_SET,
        handle: int | None = None,
    ) -> None:
        library.require_handle(handle)
        refuse_unless(intermediate_data_type is compute_data_type is data_type.FLOAT, "it must compute in float32")
        self.library, self.handle, self.done = library, handle, 0
        self._tensors: list[Tensor] = []
        self._modes: list[heur_mode] = []
        self._most_workspace: int | None = None
        self.operation: Convolved | None = None

    def tensor(
        self, dim: list[int], stride: list[int], data_type: data_type = data_type.NOT_SET, name: str = "", uid: int = -1
    ) -> Tensor:
        self._tensors.append(Tensor(name, dim, stride, data_type, uid))
        return self._tensors[-1]

    def _made(self, *made_by: Any, name: str) -> Tensor:
        self._tensors.append(Tensor(name, made_by=made_by))
        return self._tensors[-1]

    def conv_fprop(
        self,
        image: Tensor,
        weight: Tensor,
        padding: list[int] | None = None,
        pre_padding: list[int] | None = None,
        post_padding: list[int] | None = None,
        stride: list[int] | None = None,
        dilation: list[int] | None = None,
        compute_data_type: data_type = data_type.NOT_SET,
        name: str = "",
    ) -> Tensor:
        one = padding is not None and pre_padding is None and post_padding is None
        both = padding is None and pre_padding is not None and post_padding is not None
        refuse_unless(one or both, "padding, or pre_padding and post_padding")
        refuse_unless(dilation == [1, 1] and compute_data_type is data_type.FLOAT, "options of a convolution")
        before, after = padding or pre_padding, padding or post_padding
        return self._made("convolution", image, weight, before, after, stride, name=name)

    def add(self, a: Tensor, b: Tensor, compute_data_type: data_type = data_type.NOT_SET, name: str = "") -> Tensor:
        refuse_unless(compute_data_type is data_type.FLOAT, "it must add in float32")
        return self._made("add", a, b, name=name)

    def bias(
        self, input: Tensor, bias: Tensor, compute_data_type: data_type = data_type.NOT_SET, name: str = ""
    ) -> Tensor:
        refuse_unless(compute_data_type is data_type.FLOAT, "it must add in float32")
        return self._made("bias", input, bias, name=name)

    def _step(self, name: str) -> None:
        refuse_unless(self.done < len(STEPS) and STEPS[self.done] == name, f"{name} is called out of order")
        self.done += 1

    def validate(self) -> None:
        self._step("validate")
        self.library.raise_error()
        (y,) = (tensor for tensor in self._tensors if tensor.output)
        chain, tensor = [], y
        while tensor.made_by is not None:
            chain.append(tensor)
            tensor = tensor.made_by[1]
        added = {made.made_by[0]: made.made_by[2] for made in chain[:-1] if made.made_by is not None}
        order = [made.made_by[0] for made in chain if made.made_by is not None]
        if order not in (["bias", "convolution"], ["bias", "add", "convolution"]):
            refuse_unless(False, f"cuDNN has no fast kernel for {order[::-1]}")
        refuse_unless(all(made.data_type is data_type.FLOAT for made in chain[1:]), "sums must be in float32")
        _, x, weight, before, after, stride = chain[-1].made_by or ()
        (top, left), (bottom, right) = before, after
        self.operation = Convolved(
            x, weight, y, added.get("add"), added.get("bias"), (top, left, bottom, right), tuple(stride)
        )
        self._check(self.operation)

    def _check(self, operation: Convolved) -> None:
        tensors, y = operation.tensors, operation.y
        (B, C, H, W), (outputs, inputs, R, S) = operation.x.dim, operation.weight.dim
        (top, left, bottom, right), (down, across) = operation.padding, operation.stride
        height, width = (H + top + bottom - R) // down + 1, (W + left + right - S) // across + 1
        refuse_unless(inputs == C and y.dim == [B, outputs, height, width], f"sizes do not fit: {operation}")
        refuse_unless(operation.bias is None or operation.bias.dim == [1, outputs, 1, 1], "the bias does not fit")
        refuse_unless(operation.residual is None or operation.residual.dim == y.dim, "the residual is not like y")
        refuse_unless(len({tensor.uid for tensor in tensors}) == len(tensors), "uids must differ")
        half = {tensor.data_type for tensor in tensors}
        refuse_unless(len(half) == 1 and half <= {data_type.HALF, data_type.BFLOAT16}, "dtypes do not fit")
        for tensor in tensors:
            _, channels, rows, columns = tensor.dim
            nhwc = [channels * rows * columns, 1, channels * columns, channels]
            refuse_unless(tensor.stride == nhwc, f"{tensor.name} is not in the order of its channels last")

    def build_operation_graph(self) -> None:
        self._step("build_operation_graph")

    def create_execution_plans(self, arg0: list[heur_mode]) -> None:
        self._step("create_execution_plans")
        self.library.asked.append(arg0)
        self._modes = arg0

    def deselect_workspace_greater_than(self, arg0: int) -> None:
        self._step("deselect_workspace_greater_than")
        self._most_workspace = arg0

    def check_support(self) -> None:
        self._step("check_support")
        found = set(self._modes) & self.library.plans and self.library.needs <= (self._most_workspace or 0)
        if not found:
            raise cudnnGraphNotSupportedError("No valid engine configs returned from heuristics.")

    def build_plans(self, policy: build_plan_policy) -> None:
        self._step("build_plans")
        refuse_unless(policy is build_plan_policy.HEURISTICS_CHOICE, "a policy")

    def get_workspace_size(self) -> int:
        return self.library.needs

    def execute(self, tensor_to_device_buffer: dict[int, int], workspace: int, handle: int | None = None) -> None:
        library, operation, device = self.library, self.operation, self.library.device
        refuse_unless(operation is not None and self.done == len(STEPS), "the graph is not built")
        assert operation is not None
        library.require_handle(handle)
        refuse_unless(handle == self.handle, "another handle than that of the graph")
        refuse_unless(library.handles[handle or 0] == device.stream, "the handle is not on the stream of the device")
        library.raise_error()
        addresses = dict(tensor_to_device_buffer)
        refuse_unless(set(addresses) == {tensor.uid for tensor in operation.tensors}, "addresses of other tensors")
        room = (workspace, library.needs)
        require_device_memory(device, *room, "the workspace")
        for tensor in operation.tensors:
            place = (addresses[tensor.uid or 0], tensor.nbytes)
            refuse_unless(type(place[0]) is int and place[0] % ALIGNMENT == 0, f"{tensor.name} is misaligned")
            require_device_memory(device, *place, tensor.name)
            refuse_unless(not overlap(room, place), f"the workspace overlaps {tensor.name}")
            result = (addresses[operation.y.uid or 0], operation.y.nbytes)
            refuse_unless(tensor is operation.y or not overlap(result, place), f"{tensor.name} overlaps the result")
        library.executed.append(operation)

        def work() -> None:
            poison(*room)
            operation.run(addresses)

        device.enqueue("convolution", work)


class FakeCudnn:
    """The module. plans: the modes that have a plan; none of them for no plan. needs: bytes of workspace of a plan.

    error: raised by the next validation or execution. asked: the modes of every request for plans. executed: the
    operations, in order. handles: the streams of all handles.
    """

    data_type, heur_mode, build_plan_policy = data_type, heur_mode, build_plan_policy
    cudnnGraphNotSupportedError = cudnnGraphNotSupportedError
    __version__ = "1.24.1"

    def __init__(self, device: FakeDevice, *, plans: set[heur_mode] | None = None, needs: int = 512) -> None:
        self.device, self.needs = device, needs
        self.plans = set(heur_mode) if plans is None else plans
        self.error: Exception | None = None
        self.asked: list[list[heur_mode]] = []
        self.executed: list[Convolved] = []
        self.handles: dict[int, int] = {}
        self.pygraph = partial(Pygraph, self)
        self.datatypes = SimpleNamespace(is_torch_available=lambda: False)

    def create_handle(self) -> int:
        refuse_unless(self.device.active, "no device is current")
        self.raise_error()
        self.handles[0xCD00 + len(self.handles)] = 0
        return 0xCD00 + len(self.handles) - 1

    def set_stream(self, handle: int, stream: int) -> None:
        self.require_handle(handle)
        self.handles[handle] = stream

    def destroy_handle(self, arg0: int) -> None:
        self.require_handle(arg0)
        del self.handles[arg0]

    def require_handle(self, handle: int | None) -> None:
        refuse_unless(handle in self.handles, "the handle does not exist")

    def raise_error(self) -> None:
        error, self.error = self.error, None
        if error is not None:
            raise error
