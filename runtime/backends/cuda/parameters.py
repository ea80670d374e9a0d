"""The parameters of a graph, read from a bundle without a library.

A backend that has its own kernels runs the layers that it knows. It must not run them where a graph computes something
else. So the nodes of the graph must use the parameters of these layers, and no others, in the order of the layers.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn

import numpy as np
from numpy.typing import NDArray

from ...bundle.onnx_scan import StoredTensor
from ...bundle.opening import Bundle
from ...checks import short
from ...errors import ArtifactRefused
from ..base import EXPORT_AGAIN

_KINDS = {1: "float32", 10: "float16", 16: "bfloat16"}  # element types of the ONNX format
_FEW = 4  # factors of a resize of four axes
_STORED = {"float32": np.float32, "float16": np.float16, "bfloat16": np.uint16}
_CONSTANTS = re.compile(r"val_\d+|scalar_tensor_default(_\d+)?")  # that the exporter adds: ones, epsilons


@dataclass(frozen=True)
class Parameter:
    """A parameter on the host. value: an array of its type, bfloat16 as its bits in uint16."""

    value: NDArray[np.generic]
    dtype: str

    def float32(self) -> NDArray[np.float32]:
        """The numbers as float32, exactly."""
        if self.dtype == "bfloat16":
            return (self.value.astype(np.uint32) << np.uint32(16)).view(np.float32)
        return self.value.astype(np.float32)

    def rounded(self, value: NDArray[np.floating]) -> Parameter:
        """A parameter of this type with other numbers, rounded to the nearest."""
        return Parameter(round_to(value, self.dtype), self.dtype)


def round_to(value: NDArray[np.floating], dtype: str) -> NDArray[np.generic]:
    """Numbers in another type, rounded to the nearest. bfloat16 as its bits in uint16."""
    if dtype != "bfloat16":
        return value.astype(dtype)
    bits = np.ascontiguousarray(value, np.float32).view(np.uint32)
    return ((bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))) >> np.uint32(16)).astype(np.uint16)


def used_parameters(bundle: Bundle, graph: str) -> tuple[StoredTensor, ...]:
    """The parameters that the nodes of a graph use, in the order of the nodes. One that is used twice comes twice."""
    scan, files = bundle.scan(graph), _Files(bundle, graph)
    stored = {tensor.name: tensor for tensor in scan.tensors if tensor.name in scan.constants}
    with bundle.unchanged():
        parameters = {
            name for name, tensor in stored.items() if tensor.kind in _KINDS and not _is_constant(tensor, files)
        }
    return tuple(stored[name] for node in scan.nodes for name in node.inputs if name in parameters)


def _is_constant(tensor: StoredTensor, files: _Files) -> bool:
    """Whether a tensor is one that the exporter adds. It has few numbers, or all are equal."""
    if not _CONSTANTS.fullmatch(tensor.name):
        return False
    size, data = np.dtype(_STORED[_KINDS[tensor.kind]]).itemsize, files.bytes_of(tensor).tobytes()
    return len(data) <= _FEW * size or data == data[:size] * (len(data) // size)


class _Files:
    """The bytes of the stored tensors of a graph. Files of weights are mapped when they are first needed.

    A map must be read while the bundle is unchanged. Places in a file were checked when the bundle was scanned.
    """

    def __init__(self, bundle: Bundle, graph: str) -> None:
        self._folder = bundle.graph_file(graph).parent
        self._maps: dict[str, NDArray[np.uint8]] = {}

    def bytes_of(self, tensor: StoredTensor) -> NDArray[np.uint8]:
        place = dict(tensor.external)
        if not place:
            return np.frombuffer(tensor.raw, np.uint8)
        file, start = place["location"], int(place.get("offset", "0"))
        if file not in self._maps:
            self._maps[file] = np.memmap(self._folder / file, np.uint8, "r")
        return self._maps[file][start : start + int(place["length"])]


def match(bundle: Bundle, graph: str, layers: Sequence[str]) -> dict[str, StoredTensor]:
    """The stored tensor of every parameter of the layers. layers: names in the order of use.

    The exporter stores equal parameters once, under the name of the first. Raises ArtifactRefused for a graph that has
    other layers.
    """
    used = used_parameters(bundle, graph)
    own, file = {tensor.name for tensor in used}, bundle.graph(graph).file
    for i, name in enumerate(layers):
        found = used[i].name if i < len(used) else "nothing"
        if found != name and (name in own or found not in layers[:i]):
            _refuse(file, f"it uses {short(found)} where {name} is expected")
    if len(used) != len(layers):
        _refuse(file, f"it uses {short(used[len(layers)].name)} after its last layer")
    return dict(zip(layers, used, strict=True))


def read(bundle: Bundle, graph: str, stored: dict[str, StoredTensor]) -> dict[str, Parameter]:
    """The values of stored tensors. Large ones are mapped from their file, and must be copied while it is unchanged."""
    files, values = _Files(bundle, graph), {}
    with bundle.unchanged():
        for name, tensor in stored.items():
            data, dtype = files.bytes_of(tensor), _KINDS[tensor.kind]
            size = int(np.prod(tensor.shape)) * np.dtype(_STORED[dtype]).itemsize
            if data.nbytes != size:
                file = bundle.graph(graph).file
                _refuse(file, f"{short(tensor.name)} has {data.nbytes} bytes, and its shape needs {size}")
            values[name] = Parameter(np.frombuffer(data, _STORED[dtype]).reshape(tensor.shape), dtype)
    return values


def require(bundle: Bundle, graph: str, name: str, found: Parameter, shape: tuple[int, ...], dtype: str) -> None:
    """Raise ArtifactRefused unless a parameter has a shape and a type. A kernel would read outside of it."""
    if (found.value.shape, found.dtype) != (shape, dtype):
        _refuse(bundle.graph(graph).file, f"{name} is {found.dtype} {found.value.shape}, not {dtype} {shape}")


def _refuse(file: str, problem: str) -> NoReturn:
    raise ArtifactRefused(
        f"The backend cuda does not know {file}: {problem}.",
        expected="a graph as flexvar export writes it",
        fix=f"{EXPORT_AGAIN} Or use --backend ort-cuda.",
    )
