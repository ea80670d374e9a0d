"""The graphs `step` and `prefill` as lists of kernels and products.

    embed ─> [ modulate ─> qkv ─> split ─> attention ─> proj ─> modulate ─> fc1 ─> fc2 ] per block ─> guide ─> head

Shapes: N sequences, B images, L new and P past tokens, C width, H heads of size S, V vocabulary. The residual stream is
float32. Parts of blocks that a bundle keeps in float32 compute in float32 here, too.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from ...bundle.onnx_scan import StoredTensor
from ...bundle.opening import Bundle
from ...cuda import attention, layers
from ...cuda.arena import Fields, carve, nbytes
from ...cuda.array import FLOAT32, DeviceArray
from ...cuda.device import Device
from ...cuda.launches import Launch
from ...cuda.layers import Branch
from ...errors import ArtifactRefused, InvalidInput
from ...model.facts import ModelFacts
from ...model.signatures import PREFILL, STEP
from ..base import EXPORT_AGAIN, Arrays
from .operations import Operation, Pool, launch
from .parameters import Parameter, match, read, require
from .products import Matrix, Products
from .upload import upload

_PARTS = ("q", "k", "v", "proj", "fc1", "fc2")


def parameter_names(depth: int, prefill: bool = False) -> tuple[str, ...]:
    """The parameters of the graph `step` in the order of their use, or those of `prefill`.

    The last block of `prefill` only computes keys and values.
    """
    names = ["embed"]
    for i in range(depth):
        last = prefill and i == depth - 1
        for part in ("k", "v") if last else _PARTS:
            names += [f"blocks.{i}.{part}.weight", f"blocks.{i}.{part}.bias"]
            if part == "v" and not last:
                names.append(f"blocks.{i}.temperature")
    return tuple(names if prefill else [*names, "head.weight", "head.bias"])


@dataclass(frozen=True)
class Dense:
    """weight: (I, O). bias: (O,)."""

    weight: DeviceArray
    bias: DeviceArray


@dataclass(frozen=True)
class Block:
    """The parameters of a block. qkv: (C, 3·C). temperature: (H,) float32."""

    qkv: Dense
    temperature: DeviceArray
    proj: Dense
    fc1: Dense
    fc2: Dense


@dataclass(frozen=True)
class Weights:
    """The parameters of the transformer on a device. embed: (D, C) float32. The bias of the head is float32."""

    model: ModelFacts
    half: str
    embed: DeviceArray
    blocks: tuple[Block, ...]
    head: Dense

    @property
    def wide(self) -> bool:
        """Whether a part of a block computes in float32."""
        return any(dense.weight.dtype != self.half for block in self.blocks for dense in (block.qkv, block.fc1))


def match_graphs(bundle: Bundle) -> dict[str, StoredTensor]:
    """The stored parameters of `step`. Raises ArtifactRefused if a graph has other layers.

    `prefill` must have the same parameters as `step`, because both run on one copy.
    """
    depth = bundle.manifest.model.depth
    stored = match(bundle, STEP, parameter_names(depth))
    if PREFILL in bundle.manifest.graphs:
        for name, tensor in match(bundle, PREFILL, parameter_names(depth, prefill=True)).items():
            if _content(tensor) != _content(stored[name]):
                prefill, step = (bundle.graph(graph).file for graph in (PREFILL, STEP))
                raise ArtifactRefused(
                    f"{prefill}: {name} differs from the one in {step}.",
                    expected="the same parameters in both graphs",
                    fix=EXPORT_AGAIN,
                )
    return stored


def _content(tensor: StoredTensor) -> tuple[object, ...]:
    return tensor.kind, tensor.shape, tensor.external, tensor.raw


def load(device: Device, bundle: Bundle) -> Weights:
    """Lay out the parameters of the transformer on a device. Raises ArtifactRefused, OutOfMemory."""
    model, half, wide = bundle.manifest.model, bundle.manifest.precision.dtype, bundle.manifest.float32_parts
    found, C, V = read(bundle, STEP, match_graphs(bundle)), model.width, model.vocabulary
    parts: dict[str, Parameter] = {}

    def take(name: str, shape: tuple[int, ...], dtype: str) -> Parameter:
        require(bundle, STEP, name, found[name], shape, dtype)
        return found[name]

    parts["embed"] = take("embed", (model.code_dim, C), FLOAT32)
    for i in range(model.depth):
        name = f"blocks.{i}"
        attention_dtype, mlp_dtype = (FLOAT32 if f"{name}.{part}" in wide else half for part in ("attention", "mlp"))
        for part, shape in (("weight", (C, C)), ("bias", (C,))):
            three = [take(f"{name}.{each}.{part}", shape, attention_dtype).value for each in "qkv"]
            parts[f"{name}.qkv.{part}"] = Parameter(np.concatenate(three, axis=-1), attention_dtype)
        parts[f"{name}.temperature"] = take(f"{name}.temperature", (model.heads, 1), FLOAT32)
        for part, inputs, outputs, dtype in (
            ("proj", C, C, attention_dtype),
            ("fc1", C, 4 * C, mlp_dtype),
            ("fc2", 4 * C, C, mlp_dtype),
        ):
            parts[f"{name}.{part}.weight"] = take(f"{name}.{part}.weight", (inputs, outputs), dtype)
            parts[f"{name}.{part}.bias"] = take(f"{name}.{part}.bias", (outputs,), dtype)
    parts["head.weight"] = take("head.weight", (C, V), half)
    parts["head.bias"] = Parameter(take("head.bias", (V,), half).float32(), FLOAT32)
    with bundle.unchanged():  # weights are mapped from their file
        arrays = upload(device, parts)

    def dense(name: str) -> Dense:
        return Dense(arrays[f"{name}.weight"], arrays[f"{name}.bias"])

    blocks = (
        Block(dense(f"{name}.qkv"), arrays[f"{name}.temperature"], *(dense(f"{name}.{part}") for part in _PARTS[3:]))
        for name in (f"blocks.{i}" for i in range(model.depth))
    )
    return Weights(model, half, arrays["embed"], tuple(blocks), dense("head"))


def scratch_fields(model: ModelFacts, half: str, wide: bool, sequences: int, tokens: int) -> Fields:
    """The working memory of a pass over `tokens` new tokens of each sequence."""
    rows, C = (sequences, tokens), model.width
    widest = FLOAT32 if wide else half
    return {
        "stream": ((*rows, C), FLOAT32),
        "hidden": ((*rows, C), widest),  # normalised rows, then the result of attention; in the head the guided rows
        "branch": ((*rows, C), widest),
        "inner": ((*rows, 4 * C), widest),  # queries, keys and values, and queries apart; or the inner part of the MLP
    }


def operations(
    weights: Weights, device: Device, products: Products, graph: str, inputs: Arrays, outputs: Arrays, pool: Pool
) -> Iterator[Operation]:
    """The operations of `step` or `prefill`."""
    N, L, _ = inputs["offset"].shape
    fields = scratch_fields(weights.model, weights.half, weights.wide, N, L)
    block = pool.take((nbytes(fields),), "uint8")
    if pool.measures:
        return
    made = Pass(weights, device, products, inputs, outputs, carve(block, fields))
    yield from made.prefill() if graph == PREFILL else made.step()


@dataclass(frozen=True)
class Pass:
    """One pass over new tokens. inputs, outputs: of the graph. scratch: arrays of `scratch_fields`."""

    weights: Weights
    device: Device
    products: Products
    inputs: Arrays
    outputs: Arrays
    scratch: Mapping[str, DeviceArray]

    def step(self) -> Iterator[Operation]:
        """The operations of the graph `step`."""
        inputs, (_, L, C) = self.inputs, self.inputs["offset"].shape
        branch = None
        yield self._embed()
        for i in range(self.weights.model.depth):
            branch = yield from self._block(i, branch)
        assert branch is not None  # a model has a block
        B, V = len(inputs["t"]), self.weights.model.vocabulary
        guided = self._view("hidden", (B, L, C), self.weights.half)
        scale, shift, rows = inputs["head_scale"], inputs["head_shift"], (inputs["cond_rows"], inputs["uncond_rows"])
        yield self._launch(layers.guide_rows(self._stream, branch, scale, shift, rows, inputs["t"], guided))
        yield self._dense("head", self.weights.head, guided, self.outputs["logits"].reshape(B, L, V))

    def prefill(self) -> Iterator[Operation]:
        """The operations of the graph `prefill`."""
        branch, depth = None, self.weights.model.depth
        yield self._embed()
        for i in range(depth - 1):
            branch = yield from self._block(i, branch)
        yield from self._keys(depth - 1, branch)

    def _embed(self) -> Operation:
        N, L, C = self.inputs["offset"].shape
        codes = self.inputs["codes"].reshape(N * L, self.weights.model.code_dim)
        offset = self.inputs["offset"].reshape(N * L, C)
        return self._launch(layers.embed(codes, self.weights.embed, offset, self._stream.reshape(N * L, C)))

    def _block(self, i: int, branch: Branch | None) -> Generator[Operation, None, Branch]:
        """The operations of a block. branch: of the block before, which is added first. Returns that of this block."""
        block = self.weights.blocks[i]
        queries, keys, values = yield from self._keys(i, branch)
        N, L, C = self._stream.shape
        H, S = keys.shape[2:]
        out = self._view("hidden", (N, L, C), queries.dtype)
        yield self._launch(
            attention.attention(queries.reshape(N, L, H, S), keys, values, out, self.inputs.get("scale"))
        )
        result = self._view("branch", (N, L, C), queries.dtype)
        yield self._dense(f"blocks.{i}.proj", block.proj, out, result)
        dtype = block.fc1.weight.dtype
        hidden = self._view("hidden", (N, L, C), dtype)
        scale, shift = self._modulation("scale2", i), self._modulation("shift2", i)
        attended = Branch(result, self._modulation("gamma1", i))
        yield self._launch(layers.modulate_rows(self._stream, attended, scale, shift, hidden))
        inner, result = self._view("inner", (N, L, 4 * C), dtype), self._view("branch", (N, L, C), dtype)
        yield self._dense(f"blocks.{i}.fc1", block.fc1, hidden, inner, gelu=True)
        yield self._dense(f"blocks.{i}.fc2", block.fc2, inner, result)
        return Branch(result, self._modulation("gamma2", i))

    def _keys(
        self, i: int, branch: Branch | None
    ) -> Generator[Operation, None, tuple[DeviceArray, DeviceArray, DeviceArray]]:
        """The operations up to new keys and values. Returns queries (N, L, C) and the keys and values of all tokens."""
        block, (N, L, C) = self.weights.blocks[i], self._stream.shape
        dtype = block.qkv.weight.dtype
        hidden, inner = self._view("hidden", (N, L, C), dtype), self._view("inner", (N, L, 4 * C), dtype)
        scale, shift = self._modulation("scale1", i), self._modulation("shift1", i)
        yield self._launch(layers.modulate_rows(self._stream, branch, scale, shift, hidden))
        flat = inner.reshape(N * L * 4 * C)
        joined = flat[: N * L * 3 * C].reshape(N, L, 3 * C)
        queries = flat[N * L * 3 * C :].reshape(N, L, C)
        yield self._dense(f"blocks.{i}.qkv", block.qkv, hidden, joined)
        new = [self.outputs[f"new_{part}_{i}"] for part in "kv"]
        yield self._launch(layers.split_heads(joined, block.temperature, queries, *new))
        return queries, self._cache("k", i), self._cache("v", i)

    def _cache(self, part: str, i: int) -> DeviceArray:
        """Past and new keys or values of a block as one array (P + L, N, H, S)."""
        new: DeviceArray = self.outputs[f"new_{part}_{i}"]
        past = self.inputs.get(f"past_{part}_{i}")
        if past is None or not len(past):
            return new
        if past.address + past.nbytes != new.address:
            raise InvalidInput(
                f"new_{part}_{i} does not follow past_{part}_{i} in memory.",
                expected="one buffer whose tail receives the new keys or values",
                fix="Bind two parts of one buffer.",
            )
        return DeviceArray(past.address, (len(past) + len(new), *new.shape[1:]), new.dtype, (past.memory, new.memory))

    def _dense(self, name: str, dense: Dense, x: DeviceArray, out: DeviceArray, *, gelu: bool = False) -> Operation:
        product = self.products.product(
            Matrix.of(x), Matrix.of(dense.weight), Matrix.of(out), bias=dense.bias, gelu=gelu
        )
        return Operation(f"product {name}", product)

    def _modulation(self, part: str, i: int) -> DeviceArray:
        array: DeviceArray = self.inputs[f"{part}_{i}"]
        return array

    @property
    def _stream(self) -> DeviceArray:
        return self.scratch["stream"]

    def _view(self, name: str, shape: tuple[int, ...], dtype: str) -> DeviceArray:
        """A buffer as an array of another shape and type that fits in it."""
        buffer = self.scratch[name]
        array = DeviceArray(buffer.address, shape, dtype, buffer.memory)
        if array.nbytes > buffer.nbytes:
            raise ValueError(f"{name} has {buffer.nbytes} bytes, and {array.nbytes} are needed")
        return array

    def _launch(self, work: Launch) -> Operation:
        return launch(self.device, work)
