"""The graph `condition`: the modulation of every block and of the head, and the first input, for some labels."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ...bundle.opening import Bundle
from ...cuda import layers
from ...cuda.array import DeviceArray
from ...cuda.device import Device
from ...model.signatures import CONDITION, HEAD_MODULATION, MODULATION
from ..base import Arrays
from .operations import Operation, Pool, launch
from .parameters import match, read, require
from .products import Matrix, Products
from .upload import upload


def parameter_names(depth: int) -> tuple[str, ...]:
    """The parameters of the graph in the order of their use."""
    layers_of = [f"blocks.{i}" for i in range(depth)]
    names = [f"{layer}.{part}" for layer in (*layers_of, "head") for part in ("weight", "offset")]
    return ("class_embedding", "mean", *names, "start")


@dataclass(frozen=True)
class Weights:
    """The parameters on a device, by name. half: the type of the products."""

    arrays: dict[str, DeviceArray]
    half: str
    depth: int
    width: int


def load(device: Device, bundle: Bundle) -> Weights:
    """Copy the parameters to a device. Raises ArtifactRefused, OutOfMemory."""
    model, half = bundle.manifest.model, bundle.manifest.precision.dtype
    found = read(bundle, CONDITION, match(bundle, CONDITION, parameter_names(model.depth)))
    C = model.width
    shapes = {"class_embedding": (model.null_class + 1, C), "mean": (C,), "start": (1, 1, C)}
    for i in range(model.depth):
        shapes |= {f"blocks.{i}.weight": (C, 6 * C), f"blocks.{i}.offset": (6 * C,)}
    shapes |= {"head.weight": (C, 2 * C), "head.offset": (2 * C,)}
    for name, shape in shapes.items():
        require(bundle, CONDITION, name, found[name], shape, half if name.endswith("weight") else "float32")
    with bundle.unchanged():
        return Weights(upload(device, found), half, model.depth, C)


def operations(
    weights: Weights, device: Device, products: Products, inputs: Arrays, outputs: Arrays, pool: Pool
) -> Iterator[Operation]:
    """One product for each output. It writes directly into that output."""
    M, C, arrays = len(inputs["labels"]), weights.width, weights.arrays
    hidden, first = pool.take((M, C), weights.half), outputs["first_input"]
    if pool.measures:
        return
    rows = layers.class_rows(
        inputs["labels"], arrays["class_embedding"], arrays["mean"], arrays["start"], hidden, first
    )
    yield launch(device, rows)
    modulations = [(f"blocks.{i}", [f"{part}_{i}" for part in MODULATION]) for i in range(weights.depth)]
    for name, parts in (*modulations, ("head", list(HEAD_MODULATION))):
        weight, offset = arrays[f"{name}.weight"], arrays[f"{name}.offset"]
        for k, part in enumerate(parts):
            columns = Matrix(weight, C, C, stride=len(parts) * C, offset=k * C)
            out = Matrix.of(outputs[part].reshape(M, C))
            product = products.product(Matrix.of(hidden), columns, out, bias=offset[k * C : (k + 1) * C])
            yield Operation(f"product {part}", product)
