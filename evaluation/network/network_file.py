"""Reads the file of a feature network, and checks it before a library sees it.

The file must keep the contract in `contract.py`. It must be made of common operators that all depend on the images, and
hold all its weights.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NoReturn

import numpy as np
from numpy.typing import NDArray

from flexvar_runtime.bundle.onnx_scan import Scan, StoredTensor, scan_bytes
from flexvar_runtime.checks import short
from flexvar_runtime.errors import ArtifactRefused
from flexvar_runtime.files.parsing import refuse_failures
from flexvar_runtime.files.reading import read_small

from .contract import HEAD_BIAS, HEAD_WEIGHTS, IMAGES, POOL, SPATIAL, Head, NetworkFacts

MOST_BYTES = 2**29
FIX = "Pass a file that flexvar evaluate import wrote."
EXPECTED = "the ONNX file of a feature network"
_FLOAT, _UINT8 = 1, 2  # element types of the ONNX format
_BYTES = {_FLOAT: 4, _UINT8: 1, 6: 4, 7: 8, 9: 1}  # of an element; 6 and 7 are integers of 32 and 64 bits, 9 is bool
_MOST_NODES, _LARGEST_SIZE, _MOST_ELEMENTS = 2000, 2**16, 2**26
_TO_THE_END = 2**31 - 1  # ends of a slice from here on mean "to the end"
_OPERATORS = frozenset(
    [
        "Abs",
        "Add",
        "ArgMax",
        "AveragePool",
        "BatchNormalization",
        "Cast",
        "Clip",
        "Concat",
        "Constant",
        "Conv",
        "Div",
        "Elu",
        "Erf",
        "Exp",
        "Flatten",
        "Gather",
        "Gelu",
        "Gemm",
        "GlobalAveragePool",
        "GlobalMaxPool",
        "HardSigmoid",
        "HardSwish",
        "Identity",
        "LayerNormalization",
        "LeakyRelu",
        "Log",
        "MatMul",
        "Max",
        "MaxPool",
        "Min",
        "Mish",
        "Mul",
        "Neg",
        "Pad",
        "PRelu",
        "Pow",
        "Reciprocal",
        "ReduceMax",
        "ReduceMean",
        "ReduceSum",
        "Relu",
        "Reshape",
        "Resize",
        "Shape",
        "Sigmoid",
        "Slice",
        "Softmax",
        "Softplus",
        "Split",
        "Sqrt",
        "Squeeze",
        "Sub",
        "Tanh",
        "Transpose",
        "Unsqueeze",
    ]
)
"""Operators of image classifiers. None reads files, repeats without end, draws random numbers, or makes a tensor whose
size is a number in the file, except Reshape, Resize and Pad. For these, the sizes in constants are limited."""


@dataclass(frozen=True)
class NetworkFile:
    """A checked file. content: its bytes. scan: its nodes, without tensors."""

    path: Path
    content: bytes = field(repr=False)
    scan: Scan = field(repr=False)
    facts: NetworkFacts
    head: Head = field(repr=False)


def read_network(path: Path) -> NetworkFile:
    """Read and check the file of a feature network. Raises ArtifactRefused, OutOfMemory."""
    with refuse_failures(f"{path.name} cannot be read", expected=EXPECTED, fix=FIX):
        return check_network(read_small(path, fix=FIX, most=MOST_BYTES), path)


def check_network(content: bytes, path: Path) -> NetworkFile:
    """Check the bytes of a feature network. path: of its file, for messages. Raises ArtifactRefused, OutOfMemory."""
    with refuse_failures(f"{path.name} is no feature network", expected=EXPECTED, fix=FIX):
        found = scan_bytes(content, path.name, fix=FIX)
        if len(dict(found.metadata)) != len(found.metadata):
            _refuse(path, "has an entry of its metadata twice", "entries of different names")
        try:
            facts = NetworkFacts.from_entries(dict(found.metadata))
        except ArtifactRefused as error:
            got = f"{path.name} has no metadata of a feature network: {error.got}"
            raise ArtifactRefused(got, expected=error.expected, fix=FIX) from error
        tensors = {tensor.name: tensor for tensor in found.tensors if tensor.name in found.constants}
        if len(tensors) != sum(tensor.name in found.constants for tensor in found.tensors):
            _refuse(path, "has a constant twice", "constants of different names")
        for tensor in found.tensors:
            _check_tensor(path, tensor)
        _check_ends(path, found)
        _check_nodes(path, found)
        return NetworkFile(path, content, replace(found, tensors=()), facts, _head(path, tensors))


def _check_tensor(path: Path, tensor: StoredTensor) -> None:
    """A constant is in the file, its bytes fit its shape, and no number that could be a size is huge."""
    size = _BYTES.get(tensor.kind)
    fits = size is not None and len(tensor.raw) == math.prod(tensor.shape) * size
    if tensor.external or not fits or any(axis < 0 for axis in tensor.shape):
        expected = "constants of float32 or integers, stored as raw bytes in the file"
        _refuse(path, f"has the constant {short(tensor.name)}, whose bytes do not fit or are elsewhere", expected)
    sizes = [abs(number) for number in tensor.integers if abs(number) < _TO_THE_END]
    if max(sizes, default=0) > _LARGEST_SIZE or math.prod(max(1, size) for size in sizes) > _MOST_ELEMENTS:
        expected = f"sizes of at most {_LARGEST_SIZE:,}"
        _refuse(path, f"has the constant {short(tensor.name)} of {short(tensor.integers)}", expected)


def _check_ends(path: Path, found: Scan) -> None:
    """The inputs and outputs are those of the contract."""
    if found.inputs != (IMAGES,) or found.kinds.get(IMAGES) != _UINT8:
        _refuse(path, f"has the inputs {short(found.inputs)}", f"one input, {IMAGES}, of type uint8")
    if found.sizes.get(IMAGES) != (None, None, None, 3):
        _refuse(path, f"has images of the shape {short(found.sizes.get(IMAGES))}", "the shape (N, H, W, 3)")
    if found.outputs not in ((POOL,), (POOL, SPATIAL)) or any(
        found.kinds.get(name) != _FLOAT for name in found.outputs
    ):
        _refuse(path, f"has the outputs {short(found.outputs)}", f"{POOL}, and {SPATIAL} if any, of type float32")


def _check_nodes(path: Path, found: Scan) -> None:
    """The operators are common ones. All nodes but constants depend on the images, so a library computes none early."""
    others = found.domains - {"ai.onnx"}
    if others:
        _refuse(path, f"uses operators of {short(min(others))}", "ONNX's own operators only")
    if not 0 < len(found.nodes) <= _MOST_NODES:
        _refuse(path, f"has {len(found.nodes):,} nodes", f"1 to {_MOST_NODES:,}")
    depending = {IMAGES}
    for node in found.nodes:
        if node.operator not in _OPERATORS or node.domain not in ("", "ai.onnx"):
            expected = f"operators out of {', '.join(sorted(_OPERATORS))}"
            _refuse(path, f"uses the operator {short(node.operator)}", expected)
        if node.operator == "Constant":
            constant = node.tensors == 1
        else:
            constant = not depending.isdisjoint(node.inputs)
            depending.update(node.outputs)
        if not constant or {HEAD_WEIGHTS, HEAD_BIAS} & set(node.inputs):
            expected = "nodes that depend on the images and do not use the head"
            _refuse(path, f"has the node {short(node.name or node.operator)}", expected)


def _head(path: Path, tensors: dict[str, StoredTensor]) -> Head:
    weights = _stored(path, tensors.get(HEAD_WEIGHTS), HEAD_WEIGHTS, 2)
    bias = _stored(path, tensors[HEAD_BIAS], HEAD_BIAS, 1) if HEAD_BIAS in tensors else None
    if bias is not None and bias.shape != weights.shape[1:]:
        _refuse(path, f"has {HEAD_BIAS} of shape {bias.shape}", f"{weights.shape[1]:,} numbers")
    return Head(weights, bias)


def _stored(path: Path, tensor: StoredTensor | None, name: str, axes: int) -> NDArray[np.float32]:
    """A constant of the contract as a read-only array."""
    if tensor is None or tensor.kind != _FLOAT or len(tensor.shape) != axes or 0 in tensor.shape:
        problem = f"has no constant {name}" if tensor is None else f"has {name} of shape {tensor.shape}"
        _refuse(path, problem, f"a {name} of float32 with {axes} axes")
    array = np.frombuffer(tensor.raw, "<f4").reshape(tensor.shape)
    if not np.isfinite(array).all():
        _refuse(path, f"has numbers in {name} that are not finite", "finite numbers")
    return array


def _refuse(path: Path, problem: str, expected: str) -> NoReturn:
    raise ArtifactRefused(f"{path.name} {problem}, but a feature network has {expected}.", expected=expected, fix=FIX)
