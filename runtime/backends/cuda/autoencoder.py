"""The graphs `decode` and `encode` as lists of kernels, convolutions and products.

Maps are (B, H, W, C) in half precision. The decoder's residual stream is a map, too. The encoder's is float32, as are
its first and its last convolution.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ...bundle.manifest import PHASES, PLAIN, TRANSPOSED
from ...bundle.onnx_scan import StoredTensor
from ...bundle.opening import Bundle
from ...cuda import layers
from ...cuda.array import DeviceArray
from ...cuda.device import Device
from ...errors import ArtifactRefused
from ...model.signatures import DECODE
from ..base import EXPORT_AGAIN, Arrays
from .convolutions import Convolutions, Padding
from .operations import Operation, Pool, launch
from .parameters import Parameter, match, read, used_parameters
from .products import Matrix, Products
from .upload import upload

FLOAT32 = "float32"
OUTPUT_CHANNELS = 8  # of the last convolution of the decoder, of which 3 are used: faster than 3
PIXEL_COLUMNS = 28  # numbers under a 3x3 kernel over 3 channels, rounded up to whole vectors


@dataclass(frozen=True)
class Residual:
    """Two normalised 3x3 convolutions, added to the input. shortcut: whether a convolution changes the channels."""

    name: str
    shortcut: bool


@dataclass(frozen=True)
class Attention:
    """Attention with one head over all positions, added to the input."""

    name: str


@dataclass(frozen=True)
class Upsample:
    """Doubles the sides. form: how the bundle stores its convolution (`upsampling` of the exporter)."""

    name: str
    form: str


@dataclass(frozen=True)
class Downsample:
    """Halves the sides by a 3x3 convolution."""

    name: str


Layer = Residual | Attention | Upsample | Downsample
Made = Generator[Operation, None, DeviceArray]
"""Operations, and the array that they make."""


def find_layers(root: str, names: Collection[str], form: str) -> tuple[Layer, ...]:
    """The layers between the first and the last convolution, in their order, as the names of parameters tell.

    root: "decoder" or "encoder". form: of upsampling.
    """
    middle: list[Layer] = [
        Residual(f"{root}.mid.0", False),
        Attention(f"{root}.mid.1"),
        Residual(f"{root}.mid.2", False),
    ]
    levels: list[Layer] = []
    i = 0
    while _has(names, f"{root}.conv_blocks.{i}."):
        level, j = f"{root}.conv_blocks.{i}", 0
        while _has(names, f"{level}.res.{j}."):
            levels.append(Residual(f"{level}.res.{j}", _has(names, f"{level}.res.{j}.nin_shortcut.")))
            if _has(names, f"{level}.attn.{j}."):
                levels.append(Attention(f"{level}.attn.{j}"))
            j += 1
        if _has(names, f"{level}.downsample."):
            levels.append(Downsample(f"{level}.downsample"))
        if _has(names, f"{level}.upsample."):
            levels.append(Upsample(f"{level}.upsample", form))
        i += 1
    return tuple(middle + levels if root == "decoder" else levels + middle)


def _has(names: Collection[str], prefix: str) -> bool:
    return any(name.startswith(prefix) for name in names)


def parameter_names(graph: str, layer_list: Sequence[Layer]) -> tuple[str, ...]:
    """The parameters of a graph in the order of their use.

    The exporter wraps the convolutions of the encoder that compute in half precision, which adds ".conv" to a name.
    """
    decodes = graph == DECODE
    inner = "" if decodes else ".conv"

    def conv(name: str, part: str = inner) -> list[str]:
        return [f"{name}{part}.weight", f"{name}{part}.bias"]

    def norm(name: str) -> list[str]:
        return [f"{name}.gain", f"{name}.bias"]

    root = "decoder" if decodes else "encoder"
    names = ["codebook", *conv("post_quant_conv")] if decodes else []
    names += conv(f"{root}.conv_in", "")
    for layer in layer_list:
        match layer:
            case Residual(name, shortcut):
                for part in ("1", "2"):
                    names += norm(f"{name}.norm{part}") + conv(f"{name}.conv{part}")
                names += conv(f"{name}.nin_shortcut") if shortcut else []
            case Attention(name):
                names += norm(f"{name}.norm")
                names += [each for part in ("q", "k", "v", "proj_out") for each in conv(f"{name}.{part}")]
            case Upsample(name, form) if form == PHASES:
                names += [each for a in "01" for b in "01" for each in (f"{name}.weight_{a}{b}", f"{name}.bias")]
            case Upsample(name, form):
                names += conv(name if form == TRANSPOSED else f"{name}.conv")
            case Downsample(name):
                names += conv(f"{name}.conv")
    names += norm(f"{root}.norm_out") + conv(f"{root}.conv_out")
    return tuple(names if decodes else [*names, *conv("quant_conv", "")])


@dataclass(frozen=True)
class Weights:
    """The parameters of a graph on a device, by the name of their layer.

    `NAME.weight` of a convolution is (O, R, S, I), `NAME.gain` and `NAME.bias` of a norm (C,) float32.
    """

    arrays: dict[str, DeviceArray]
    layers: tuple[Layer, ...]
    groups: int
    half: str


def match_layers(bundle: Bundle, graph: str) -> tuple[tuple[Layer, ...], dict[str, StoredTensor]]:
    """The layers of a graph and its stored parameters. Raises ArtifactRefused for a graph that has others."""
    used = {tensor.name for tensor in used_parameters(bundle, graph)}
    found = find_layers("decoder" if graph == DECODE else "encoder", used, bundle.manifest.decoder)
    return found, match(bundle, graph, parameter_names(graph, found))


def load(device: Device, bundle: Bundle, graph: str) -> Weights:
    """Lay out the parameters of a graph on a device. Raises ArtifactRefused, OutOfMemory."""
    found_layers, stored = match_layers(bundle, graph)
    found = read(bundle, graph, stored)
    parts: dict[str, Parameter] = {}
    groups = {parameter.value.shape[0] for name, parameter in found.items() if name.endswith(".gain")}
    for layer in found_layers:
        if isinstance(layer, Upsample):
            parts[f"{layer.name}.weight"] = Parameter(_plain_kernel(found, layer), found[_stored(layer)].dtype)
            bias = f"{layer.name}.conv.bias" if layer.form == PLAIN else f"{layer.name}.bias"
            parts[f"{layer.name}.bias"] = found[bias]
        elif isinstance(layer, Attention):
            for part in ("weight", "bias"):
                three = [found[_found_name(found, f"{layer.name}.{each}", part)] for each in "qkv"]
                value = np.concatenate([each.value for each in three])
                parts[f"{layer.name}.qkv.{part}"] = Parameter(value, three[0].dtype)
    for name, parameter in found.items():
        plain = re.sub(r"\.conv\.(weight|bias)$", r".\1", name)
        if ".upsample." not in name:
            parts.setdefault(plain, parameter)
    if graph == DECODE:
        for part in ("weight", "bias"):
            parts[f"decoder.conv_out.{part}"] = _padded(parts[f"decoder.conv_out.{part}"], OUTPUT_CHANNELS)
    laid_out = {name: _lay_out(name, parameter) for name, parameter in parts.items()}
    if len(groups) != 1:
        _refuse(bundle, graph, f"its norms have {sorted(groups)} groups")
    with bundle.unchanged():
        return Weights(upload(device, laid_out), found_layers, groups.pop(), bundle.manifest.precision.dtype)


def _lay_out(name: str, parameter: Parameter) -> Parameter:
    value = parameter.value
    if value.ndim == 4:
        value = value.transpose(0, 2, 3, 1)
    if name == "encoder.conv_in.weight":  # a matrix of products, because its columns are gathered by `im2col`
        value = value.reshape(len(value), -1)
        value = np.pad(value, ((0, 0), (0, PIXEL_COLUMNS - value.shape[1])))
    if name.endswith(".gain") or value.ndim == 3:  # of norms
        value = value.reshape(-1)
    return Parameter(np.ascontiguousarray(value), parameter.dtype)


def _padded(parameter: Parameter, outputs: int) -> Parameter:
    value = parameter.value
    missing = ((0, outputs - len(value)), *((0, 0) for _ in value.shape[1:]))
    return Parameter(np.pad(value, missing), parameter.dtype)


def _found_name(found: Mapping[str, Parameter], name: str, part: str) -> str:
    return f"{name}.conv.{part}" if f"{name}.conv.{part}" in found else f"{name}.{part}"


def _stored(layer: Upsample) -> str:
    """The name of a stored weight of an upsampling layer."""
    part = {PLAIN: "conv.weight", PHASES: "weight_00", TRANSPOSED: "weight"}[layer.form]
    return f"{layer.name}.{part}"


def _plain_kernel(found: Mapping[str, Parameter], layer: Upsample) -> NDArray[np.generic]:
    """The 3x3 kernel (O, I, 3, 3) of an upsampling layer.

    In the other forms the exporter has added taps that read the same pixel. Along a side, one phase has tap 0 and the
    sum of 1 and 2, the other the sum of 0 and 1 and tap 2. So tap 1 is a difference, and rounded once more.
    """
    stored = found[_stored(layer)]
    if layer.form == PLAIN:
        return stored.value
    if layer.form == PHASES:  # (O, I, phase of the row, tap of the row, phase of the column, tap of the column)
        kernels = [[found[f"{layer.name}.weight_{a}{b}"].float32() for b in range(2)] for a in range(2)]
        taps = np.array(kernels).transpose(2, 3, 0, 4, 1, 5)
        rows = _three(taps[:, :, 0, 0], taps[:, :, 0, 1], taps[:, :, 1, 1], axis=2)
        plain = _three(rows[..., 0, 0], rows[..., 0, 1], rows[..., 1, 1], axis=3)
    else:  # (O, I, 4, 4), along a side: tap 2, taps 1 and 2, taps 0 and 1, tap 0
        taps = stored.float32().transpose(1, 0, 2, 3)
        rows = _three(taps[:, :, 3], taps[:, :, 1], taps[:, :, 0], axis=2)
        plain = _three(rows[..., 3], rows[..., 1], rows[..., 0], axis=3)
    return stored.rounded(plain).value


def _three(
    first: NDArray[np.float32], last_two: NDArray[np.float32], last: NDArray[np.float32], axis: int
) -> NDArray[np.float32]:
    """Three taps along an axis, from the first, the sum of the last two, and the last."""
    return np.stack([first, last_two - last, last], axis)


def _refuse(bundle: Bundle, graph: str, problem: str) -> None:
    file = bundle.graph(graph).file
    raise ArtifactRefused(f"{file}: {problem}.", expected="the layers of a tokenizer", fix=EXPORT_AGAIN)


def operations(
    weights: Weights,
    device: Device,
    products: Products,
    convolutions: Convolutions,
    graph: str,
    inputs: Arrays,
    outputs: Arrays,
    pool: Pool,
) -> Iterator[Operation]:
    """The operations of `decode` or `encode`."""
    maps = Maps(weights, device, products, convolutions, pool)
    if graph == DECODE:
        return maps.decode(inputs["tokens"], outputs["image"])
    return maps.encode(inputs["image"], outputs["latent"])


@dataclass(frozen=True)
class Maps:
    """Makes the operations of a graph. pool: working memory. Where it only measures, none is made."""

    weights: Weights
    device: Device
    products: Products
    convolutions: Convolutions
    pool: Pool

    def decode(self, tokens: DeviceArray, image: DeviceArray) -> Iterator[Operation]:
        """From tokens (B, h, w) to image (B, 3, H, W) float32."""
        codebook = self.weights.arrays["codebook"]
        yield from self._start(len(tokens))
        x = self.pool.take((*tokens.shape, codebook.shape[1]), self.weights.half)
        if not self.pool.measures:
            yield launch(self.device, layers.look_up(tokens, codebook, x))
        for name in ("post_quant_conv", "decoder.conv_in"):
            x = yield from self._replace(x, self._convolve(name, x))
        for layer in self.weights.layers:
            x = yield from self._layer(layer, x)
        x = yield from self._replace(x, self._norm("decoder.norm_out", x, silu=True))
        x = yield from self._replace(x, self._convolve("decoder.conv_out", x))
        if not self.pool.measures:
            yield launch(self.device, layers.to_planes(x, image))
        self.pool.release(x)

    def encode(self, image: DeviceArray, latent: DeviceArray) -> Iterator[Operation]:
        """From image (B, 3, H, W) float32 to latent (B, D, h, w) float32."""
        B, _, H, W = image.shape
        yield from self._start(B)
        columns = self.pool.take((B * H * W, PIXEL_COLUMNS), FLOAT32)
        x = self.pool.take((B, H, W, len(self.weights.arrays["encoder.conv_in.weight"])), FLOAT32)
        if not self.pool.measures:
            gathered = layers.im2col(image, columns, kernel=(3, 3), padding=(1, 1), out_size=(H, W), planar=True)
            yield launch(self.device, gathered)
            yield self._product("encoder.conv_in", columns, x)
        self.pool.release(columns)
        for layer in self.weights.layers:
            x = yield from self._layer(layer, x)
        x = yield from self._replace(x, self._norm("encoder.norm_out", x, silu=True))
        x = yield from self._replace(x, self._convolve("encoder.conv_out", x))
        x = yield from self._replace(x, self._convert(x, FLOAT32))
        out = self.pool.take((*x.shape[:3], latent.shape[1]), FLOAT32)
        if not self.pool.measures:
            yield self._product("quant_conv", x, out)
            yield launch(self.device, layers.to_planes(out, latent))
        self.pool.release(x)
        self.pool.release(out)

    def _start(self, images: int) -> Iterator[Operation]:
        finished = self.pool.take((images,), "uint32")
        self.pool.name("finished", finished)
        groups = self.weights.groups
        self.pool.name("partial", self.pool.take((images, layers.MOST_CHUNKS, groups, 2), FLOAT32))
        self.pool.name("statistics", self.pool.take((images, groups, 2), FLOAT32))
        if not self.pool.measures:
            yield Operation("zero", lambda: self.device.zero(finished))

    def _replace(self, x: DeviceArray, made: Made) -> Made:
        """The result of some operations. x is released after them."""
        result = yield from made
        self.pool.release(x)
        return result

    def _layer(self, layer: Layer, x: DeviceArray) -> Made:
        """The operations of a layer. x is released."""
        match layer:
            case Residual(name, shortcut):
                return (yield from self._residual(name, shortcut, x))
            case Attention(name):
                return (yield from self._attention(name, x))
            case Upsample(name):
                B, H, W, C = x.shape
                doubled = self.pool.take((B, 2 * H, 2 * W, C), x.dtype)
                if not self.pool.measures:
                    yield launch(self.device, layers.double_map(x, doubled))
                self.pool.release(x)
                return (yield from self._replace(doubled, self._convolve(name, doubled)))
            case Downsample(name):
                x = yield from self._replace(x, self._convert(x, self.weights.half))
                x = yield from self._replace(x, self._convolve(f"{name}.conv", x, stride=2))
                return (yield from self._replace(x, self._convert(x, FLOAT32)))

    def _residual(self, name: str, shortcut: bool, x: DeviceArray) -> Made:
        h = yield from self._norm(f"{name}.norm1", x, silu=True)
        h = yield from self._replace(h, self._convolve(f"{name}.conv1", h))
        h = yield from self._replace(h, self._norm(f"{name}.norm2", h, silu=True))
        wide = x.dtype == FLOAT32
        if shortcut:
            if wide:
                x = yield from self._replace(x, self._convert(x, self.weights.half))
            x = yield from self._replace(x, self._convolve(f"{name}.nin_shortcut", x))
        return (yield from self._add(f"{name}.conv2", h, x, wide))

    def _attention(self, name: str, x: DeviceArray) -> Made:
        B, H, W, C = x.shape
        L, dtype = H * W, self.weights.half
        h = yield from self._norm(f"{name}.norm", x, silu=False)
        joined = yield from self._replace(h, self._convolve(f"{name}.qkv", h))
        stride = -(-L // 8) * 8  # whole vectors
        scores = self.pool.take((B, L, stride), FLOAT32)
        shares = self.pool.take((B, L, stride), dtype)
        query, key, value = (
            None if self.pool.measures else Matrix(joined, L, C, 3 * C, batch=B, step=L * 3 * C, offset=k * C)
            for k in range(3)
        )
        if query and key:
            out = Matrix(scores, L, L, stride, batch=B, step=L * stride)
            product = self.products.product(query, key, out, transposed=True, scale=C**-0.5)
            yield Operation(f"product {name}.scores", product)
            yield launch(self.device, layers.softmax_rows(scores, shares, L))
        self.pool.release(scores)
        result = self.pool.take((B, H, W, C), dtype)
        if value:
            weights = Matrix(shares, L, L, stride, batch=B, step=L * stride)
            product = self.products.product(weights, value, Matrix(result, L, C, C, batch=B, step=L * C))
            yield Operation(f"product {name}.values", product)
        self.pool.release(shares)
        self.pool.release(joined)
        return (yield from self._add(f"{name}.proj_out", result, x, x.dtype == FLOAT32))

    def _add(self, name: str, h: DeviceArray, x: DeviceArray, wide: bool) -> Made:
        """x + convolution of h. Both are released. wide: the sum is float32."""
        if not wide:
            y = yield from self._convolve(name, h, residual=x)
            self.pool.release(h)
            self.pool.release(x)
            return y
        h = yield from self._replace(h, self._convolve(name, h))
        y = x if x.dtype == FLOAT32 else self.pool.take(h.shape, FLOAT32)
        if not self.pool.measures:
            yield launch(self.device, layers.add_maps(x, h, y))
        self.pool.release(h)
        if y is not x:
            self.pool.release(x)
        return y

    def _norm(self, name: str, x: DeviceArray, *, silu: bool) -> Made:
        y, arrays, pool = self.pool.take(x.shape, self.weights.half), self.weights.arrays, self.pool
        if not pool.measures:
            statistics = pool.named("statistics")
            sums = layers.group_statistics(x, pool.named("partial"), pool.named("finished"), statistics)
            yield launch(self.device, sums)
            gain, bias = arrays[f"{name}.gain"], arrays[f"{name}.bias"]
            yield launch(self.device, layers.group_normalise(x, statistics, gain, bias, y, silu=silu))
        return y

    def _convolve(self, name: str, x: DeviceArray, *, residual: DeviceArray | None = None, stride: int = 1) -> Made:
        """A convolution with zeros around x: as many on all sides for stride 1, only at the end for stride 2."""
        weight, (B, H, W, _) = self.weights.arrays[f"{name}.weight"], x.shape
        outputs, kernel = weight.shape[:2]
        y = self.pool.take((B, H // stride, W // stride, outputs), x.dtype)
        around = kernel // 2
        padding = Padding(around, around, around, around) if stride == 1 else Padding(0, 1, 0, 1)
        if not self.pool.measures:
            bias = self.weights.arrays[f"{name}.bias"]
            call = self.convolutions.convolution(x, weight, bias, y, residual=residual, stride=stride, padding=padding)
            yield Operation(f"convolution {name}", call)
        return y

    def _convert(self, x: DeviceArray, dtype: str) -> Made:
        y = self.pool.take(x.shape, dtype)
        if not self.pool.measures:
            yield launch(self.device, layers.add_maps(x, None, y))
        return y

    def _product(self, name: str, x: DeviceArray, out: DeviceArray) -> Operation:
        """out = x · weightᵀ + bias for a weight (O, I), or (O, 1, 1, I)."""
        weight = self.weights.arrays[f"{name}.weight"]
        matrix = Matrix.of(weight.reshape(len(weight), weight.size // len(weight)))
        bias = self.weights.arrays[f"{name}.bias"]
        product = self.products.product(Matrix.of(x), matrix, Matrix.of(out), bias=bias, transposed=True)
        return Operation(f"product {name}", product)
