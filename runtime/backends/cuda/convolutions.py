"""Convolutions by cuDNN, on images in the order (B, H, W, C).

If cuDNN has no plan for a convolution, its input is rearranged into a matrix (im2col) and multiplied by cuBLASLt.
"""

from __future__ import annotations

import logging
import math
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ...cuda.array import HALVES, DeviceArray
from ...cuda.device import Device, allocate, ignore_errors
from ...cuda.launches import Launch
from ...cuda.layers import im2col
from ...errors import first_line
from ...model.tensors import host_dtype
from .loading import CUDNN, is_out_of_memory, load_cudnn, translating
from .products import Matrix, Products

log = logging.getLogger(__name__)

ALIGNMENT = 16  # bytes; cuDNN expects it of every address
GRAPHS_KEPT = 512  # a decoder has about 25 for each size
SCRATCH_BYTES = 2**28  # by default im2col takes as many images at a time as fit into this
_X, _WEIGHT, _BIAS, _RESIDUAL, _Y = range(1, 6)  # how a graph names its tensors


@dataclass(frozen=True)
class Padding:
    """Rows and columns of zeros around an image."""

    top: int = 0
    bottom: int = 0
    left: int = 0
    right: int = 0


NO_PADDING = Padding()


@dataclass(frozen=True)
class Convolution:
    """The sizes of a convolution: x (B, H, W, I), weight (O, R, S, I), y (B, H', W', O). Raises ValueError."""

    image: tuple[int, int, int, int]
    weight: tuple[int, int, int, int]
    dtype: str
    stride: int
    padding: Padding
    residual: bool

    def __post_init__(self) -> None:
        padding = self.padding
        edges = (padding.top, padding.bottom, padding.left, padding.right)
        positive = min(*self.image, *self.weight, self.stride) > 0 and min(edges) >= 0 and min(self.output) > 0
        fits = positive and self.weight[3] == self.image[3]
        _require(fits and self.dtype in HALVES, f"a convolution cannot have these sizes: {self}")

    @property
    def output(self) -> tuple[int, int, int, int]:
        """The shape of y."""
        (B, H, W, _), (outputs, R, S, _), padding = self.image, self.weight, self.padding
        height = (H + padding.top + padding.bottom - R) // self.stride + 1
        width = (W + padding.left + padding.right - S) // self.stride + 1
        return B, height, width, outputs

    @property
    def is_product(self) -> bool:
        """Whether x is the matrix that im2col would make."""
        return self.weight[1:3] == (1, 1) and self.stride == 1 and self.padding == NO_PADDING

    @property
    def image_bytes(self) -> int:
        """Bytes that im2col needs for one image."""
        _, height, width, _ = self.output
        return 0 if self.is_product else height * width * math.prod(self.weight[1:]) * host_dtype(self.dtype).itemsize

    def __str__(self) -> str:
        p = self.padding
        options = f"stride {self.stride}, padding {p.top} {p.bottom} {p.left} {p.right}"
        residual = " and a residual" if self.residual else ""
        return f"x {self.image}, weight {self.weight}, {options}{residual} in {self.dtype}"


@dataclass(frozen=True, eq=False)
class _Call:
    """A convolution of arrays, which it keeps alive, by a plan of cuDNN."""

    convolutions: Convolutions
    graph: Any
    arrays: dict[int, DeviceArray]
    addresses: dict[int, int]

    def __call__(self) -> None:
        self.convolutions.run(self)


@dataclass(frozen=True, eq=False)
class _Substitute:
    """A convolution as launches of im2col and products, in parts. It keeps `x` alive; the products keep the others."""

    device: Device
    x: DeviceArray
    parts: tuple[tuple[Launch | None, Callable[[], None]], ...]

    def __call__(self) -> None:
        for launch, product in self.parts:
            if launch is not None:
                self.device.launch(launch)
            product()


class Convolutions:
    """Convolutions on one device. They share `workspace`, whose content is undefined after each of them.

    workspace: any dtype; `products` may have the same. library: the module cudnn; None loads it. scratch_limit: bytes,
    see `scratch_bytes`. substituted: descriptions of the convolutions that cuDNN has no plan for. Raises
    BackendUnavailable, OutOfMemory.
    """

    def __init__(
        self,
        device: Device,
        workspace: DeviceArray,
        products: Products,
        library: Any = None,
        *,
        scratch_limit: int = SCRATCH_BYTES,
    ) -> None:
        self._device, self._workspace, self._products = device, workspace, products
        self._limit, self._scratch = scratch_limit, DeviceArray(0, (0,), "uint8", None)
        self._cudnn = load_cudnn() if library is None else library
        self._graphs: OrderedDict[Convolution, Any] = OrderedDict()  # None: no plan
        self._stream = device.stream
        self.substituted: list[str] = []
        device.activate()
        with translating(CUDNN, device, "opening it", opening=True):
            self._handle: int | None = self._cudnn.create_handle()
            self._cudnn.set_stream(handle=self._handle, stream=self._stream)

    def convolution(
        self,
        x: DeviceArray,
        weight: DeviceArray,
        bias: DeviceArray,
        y: DeviceArray,
        *,
        residual: DeviceArray | None = None,
        stride: int = 1,
        padding: Padding = NO_PADDING,
    ) -> Callable[[], None]:
        """A call that enqueues y (B, H', W', O) = x (B, H, W, I) * weight (O, R, S, I) + residual + bias (O).

        The operation is a cross-correlation, as in torch. residual: like y. y must not overlap another array. All have
        one dtype, float16 or bfloat16, and addresses that are multiples of 16. It sums in float32 and rounds once.

        The first convolution of its sizes asks cuDNN for a plan. Make it outside of `Device.capture`. If there is no
        plan, the call runs im2col and a product, which is logged as a warning. Then the kernel `im2col` must be loaded.

        The call enqueues on the stream that the device then has, and keeps the arrays alive. Raises ValueError if the
        arrays do not fit together, BackendUnavailable, DeviceFailed, OutOfMemory.
        """
        arrays = {_X: x, _WEIGHT: weight, _BIAS: bias, _Y: y} | ({} if residual is None else {_RESIDUAL: residual})
        shapes = ", ".join(f"{array.shape} {array.dtype}" for array in arrays.values())
        wanted = Convolution(_four(x.shape), _four(weight.shape), x.dtype, stride, padding, residual is not None)
        fits = bias.shape == (weight.shape[0],) and y.shape == wanted.output
        fits = fits and (residual is None or residual.shape == y.shape)
        _require(fits and {array.dtype for array in arrays.values()} == {x.dtype}, f"arrays do not fit: {shapes}")
        aligned = all(array.address % ALIGNMENT == 0 for array in arrays.values())
        _require(aligned, f"an address of a convolution is no multiple of {ALIGNMENT}: {shapes}")
        apart = all(array is y or not _overlap(array, y) for array in arrays.values())
        _require(apart, f"the result of a convolution overlaps another array: {shapes}")
        _require(self._handle is not None, "these convolutions are closed")
        if wanted not in self._graphs:
            self._graphs[wanted] = self._plan(wanted)
            if len(self._graphs) > GRAPHS_KEPT:
                self._graphs.popitem(last=False)  # calls that use it keep it
        self._graphs.move_to_end(wanted)
        graph = self._graphs[wanted]
        if graph is None:
            return self._product(wanted, x, weight, bias, y, residual)
        return _Call(self, graph, arrays, {name: array.address for name, array in arrays.items()})

    def run(self, call: _Call) -> None:
        """Enqueue a convolution."""
        _require(self._handle is not None, "these convolutions are closed")
        with translating(CUDNN, self._device, "running a convolution"):
            if self._stream != self._device.stream:
                self._cudnn.set_stream(handle=self._handle, stream=self._device.stream)
                self._stream = self._device.stream
            call.graph.execute(call.addresses, self._workspace.address, self._handle)

    def close(self) -> None:
        """Free everything. None of the convolutions may be called any more. The products stay open."""
        handle, self._handle = self._handle, None
        self._graphs.clear()
        self._scratch = self._workspace = DeviceArray(0, (0,), "uint8", None)
        if handle is not None:
            with ignore_errors("closing cuDNN"):
                self._cudnn.destroy_handle(handle)

    def _plan(self, wanted: Convolution) -> Any:
        """A graph of cuDNN that is ready to run; None if there is none. Raises OutOfMemory."""
        modes, reasons = self._cudnn.heur_mode, []
        for mode in (modes.A, modes.B, modes.FALLBACK):
            try:
                return self._build(wanted, mode)
            except Exception as error:  # cuDNN has a type for unsupported graphs, but does not always use it
                if is_out_of_memory(error):
                    with translating(CUDNN, self._device, "planning a convolution"):
                        raise
                reasons.append(first_line(error))
        self.substituted.append(str(wanted))
        reason = "; ".join(dict.fromkeys(reasons))
        log.warning("cuDNN has no plan for a convolution, so a slower product takes its place: %s (%s)", wanted, reason)
        return None

    def _build(self, wanted: Convolution, mode: Any) -> Any:
        """A graph that is ready to run. It adds the residual before the bias, as cuDNN's compiled kernels do."""
        types = self._cudnn.data_type
        half, wide = types.HALF if wanted.dtype == "float16" else types.BFLOAT16, types.FLOAT
        (B, H, W, C), (outputs, R, S, _), output = wanted.image, wanted.weight, wanted.output
        graph = self._cudnn.pygraph(
            name="convolution",
            io_data_type=half,
            intermediate_data_type=wide,
            compute_data_type=wide,
            handle=self._handle,
        )
        x = graph.tensor(name="x", **_nhwc(B, H, W, C), data_type=half, uid=_X)
        weight = graph.tensor(name="weight", **_nhwc(outputs, R, S, C), data_type=half, uid=_WEIGHT)
        sums = graph.conv_fprop(
            image=x,
            weight=weight,
            **_padding_arguments(wanted.padding),
            stride=[wanted.stride] * 2,
            dilation=[1, 1],
            compute_data_type=wide,
            name="convolution",
        )
        if wanted.residual:
            sums.set_data_type(wide)
            residual = graph.tensor(name="residual", **_nhwc(*output), data_type=half, uid=_RESIDUAL)
            sums = graph.add(a=sums, b=residual, compute_data_type=wide, name="add")
        sums.set_data_type(wide)
        bias = graph.tensor(name="bias", **_nhwc(1, 1, 1, outputs), data_type=half, uid=_BIAS)
        y = graph.bias(input=sums, bias=bias, compute_data_type=wide, name="bias")
        y.set_output(True).set_data_type(half)
        shape = _nhwc(*output)
        y.set_dim(shape["dim"])
        y.set_stride(shape["stride"])
        y.set_uid(_Y)
        graph.validate()
        graph.build_operation_graph()
        graph.create_execution_plans([mode])
        graph.deselect_workspace_greater_than(self._workspace.nbytes)
        graph.check_support()
        graph.build_plans(self._cudnn.build_plan_policy.HEURISTICS_CHOICE)
        needed = int(graph.get_workspace_size())
        if needed > self._workspace.nbytes:
            raise RuntimeError(f"the plan needs {needed} bytes of workspace")
        return graph

    def _images_at_once(self, convolution: Convolution) -> int:
        images = self._limit // convolution.image_bytes if convolution.image_bytes else convolution.image[0]
        return min(max(images, 1), convolution.image[0])

    def _product(
        self,
        wanted: Convolution,
        x: DeviceArray,
        weight: DeviceArray,
        bias: DeviceArray,
        y: DeviceArray,
        residual: DeviceArray | None,
    ) -> Callable[[], None]:
        """The convolution as im2col and a product, for some images at a time."""
        (outputs, R, S, _), (B, height, width, _) = wanted.weight, wanted.output
        weights = Matrix.of(weight.reshape(outputs, weight.size // outputs))
        corner = (wanted.padding.top, wanted.padding.left)
        together = B if wanted.is_product else self._images_at_once(wanted)
        columns = None if wanted.is_product else self._columns(wanted, together)
        parts: list[tuple[Launch | None, Callable[[], None]]] = []
        for start in range(0, B, together):
            part = slice(start, min(start + together, B))
            launch, rows = None, x
            if columns is not None:
                rows = columns[: (part.stop - part.start) * height * width]
                out_size = (height, width)
                launch = im2col(x[part], rows, kernel=(R, S), stride=wanted.stride, padding=corner, out_size=out_size)
            addend = None if residual is None else Matrix.of(residual[part])
            product = self._products.product(
                Matrix.of(rows), weights, Matrix.of(y[part]), bias=bias, transposed=True, addend=addend
            )
            parts.append((launch, product))
        return _Substitute(self._device, x, tuple(parts))

    def _columns(self, wanted: Convolution, images: int) -> DeviceArray:
        """The memory of im2col as an array (images·H'·W', R·S·I). Calls that were made before keep older memory.

        No estimate counts this memory, because only cuDNN knows whether it is needed.
        """
        nbytes = images * wanted.image_bytes
        if self._scratch.nbytes < nbytes:
            memory = allocate(self._device, nbytes)
            self._scratch = DeviceArray(memory.address, (nbytes,), "uint8", memory)
        rows = images * math.prod(wanted.output[1:3])
        shape = (rows, math.prod(wanted.weight[1:]))
        return DeviceArray(self._scratch.address, shape, wanted.dtype, self._scratch.memory)


def _nhwc(batch: int, height: int, width: int, channels: int) -> dict[str, list[int]]:
    """The sizes and strides of an array (batch, height, width, channels), in cuDNN's order of the axes."""
    dim = [batch, channels, height, width]
    return {"dim": dim, "stride": [channels * height * width, 1, channels * width, channels]}


def _four(shape: tuple[int, ...]) -> tuple[int, int, int, int]:
    _require(len(shape) == 4, f"an array of shape {shape} has not four axes")
    a, b, c, d = shape
    return a, b, c, d


def _overlap(a: DeviceArray, b: DeviceArray) -> bool:
    return a.address < b.address + b.nbytes and b.address < a.address + a.nbytes


def _padding_arguments(padding: Padding) -> dict[str, list[int]]:
    """How `conv_fprop` takes a padding."""
    before, after = [padding.top, padding.left], [padding.bottom, padding.right]
    return {"padding": before} if before == after else {"pre_padding": before, "post_padding": after}


def _require(fits: bool, what: str) -> None:
    if not fits:  # cuDNN would access memory outside of an array
        raise ValueError(what)
