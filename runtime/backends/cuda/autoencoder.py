"""The graphs `decode` and `encode` as lists of kernels, convolutions and products.

A map is (B, H, W, C) in half precision. The residual stream of the decoder has half precision, and that of the encoder
is float32. `encoder.conv_in` and `quant_conv` compute in float32.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import dataclass

from ...cuda import layers
from ...cuda.array import FLOAT32, DeviceArray
from ...cuda.device import Device
from ...model.signatures import DECODE
from ..base import Arrays
from .autoencoder_layers import Attention, Downsample, Layer, Residual, Upsample
from .autoencoder_weights import PIXEL_COLUMNS, Weights
from .convolutions import Convolutions, Padding
from .operations import Operation, Pool, launch
from .products import Matrix, Products

Made = Generator[Operation, None, DeviceArray]
"""Operations, and the array that they make."""


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
