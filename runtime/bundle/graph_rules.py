"""What a graph of a bundle may hold. It is checked when the bundle opens, before a library reads the graph.

Libraries read files that a graph names, run loops without end, and compute on constants while they load a graph. The
rules exclude that. They cannot bound the memory that a graph takes while it runs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import NoReturn

from ..checks import short
from ..errors import ArtifactRefused
from ..model.tensors import GraphSpec, TensorSpec
from .onnx_scan import FEW, INTEGERS, Scan, StoredTensor, scan

_DOMAINS = frozenset({"", "ai.onnx"})
_REFUSED = frozenset({"Loop", "Scan", "If", "SequenceMap"})
_RANDOM = frozenset({"Bernoulli", "Multinomial", "RandomNormal", "RandomUniform"})
_LARGEST_SIZE, _MOST_ELEMENTS = 2**20, 2**26  # in a constant that can be a shape. Exported graphs have at most 2**12
_SAME_SIZE = frozenset({"Identity", "Reshape", "Shape", "Size", "Squeeze", "Transpose", "Unsqueeze"})
NODES, NODES_A_BLOCK = 1500, 110
"""How many nodes a graph may have. Exported decoders have up to 1,218, and step graphs 22 and 107 a block.

The time that a library takes to load a graph may grow with the square of its nodes."""
_FIX = "Export the bundle again."
_BYTES = {1: 4, 2: 1, 3: 1, 4: 2, 5: 2, 6: 4, 7: 8, 9: 1, 10: 2, 11: 8, 12: 4, 13: 8, 16: 2}
"""Bytes of an element by its type, a number of the ONNX format."""


def check_graph(path: Path, spec: GraphSpec, sizes: Mapping[str, int], depth: int) -> Scan:
    """Read a graph and check it. Raises ArtifactRefused.

    spec: what the manifest says of it. sizes: the files that may hold its weights, and their sizes in bytes. depth:
    blocks of the model.
    """
    found = scan(path)
    folder = PurePosixPath(spec.file).parent
    for tensor in found.tensors:
        _check_size(spec.file, tensor)
        if tensor.external:
            _check_external(spec.file, tensor, {_relative(name, folder): size for name, size in sizes.items()})
    _check_operators(spec.file, found, NODES + NODES_A_BLOCK * depth)
    for declared_input in spec.inputs:
        _check_axes(spec.file, declared_input, found.sizes.get(declared_input.name))
    for what, names, tensors in (("inputs", found.inputs, spec.inputs), ("outputs", found.outputs, spec.outputs)):
        declared = {tensor.name for tensor in tensors}
        if not declared <= set(names) <= declared | found.constants or len(set(names)) != len(names):
            _refuse(spec.file, f"has the {what} {short(names)}", f"the {what} {', '.join(sorted(declared))}")
    return found


def _relative(name: str, folder: PurePosixPath) -> str:
    path = PurePosixPath(name)
    return str(path.relative_to(folder)) if path.is_relative_to(folder) else ""


def _check_operators(file: str, found: Scan, most: int) -> None:
    """Every node is of ONNX's own operators. Nothing is computed from constants alone, because libraries do that while
    they load the graph. Sizes of tensors that are no inputs count as constants, because libraries may know them."""
    if not 0 < len(found.nodes) <= most:
        _refuse(file, f"has {len(found.nodes):,} nodes", f"1 to {most:,} nodes for this model")
    others = found.domains - _DOMAINS
    if others:
        _refuse(file, f"uses operators of {short(min(others))}", "standard ONNX operators only")
    constants, castable = {"", *found.constants}, set[str]()
    for tensor in found.tensors:
        if tensor.kind in INTEGERS or math.prod(tensor.shape) > FEW:
            castable.add(tensor.name)  # its numbers were checked, or are too many for a shape
    for node in found.nodes:
        if node.domain not in _DOMAINS or node.operator in _REFUSED or node.operator.startswith(tuple(_RANDOM)):
            name = f"{node.domain}.{node.operator}" if node.domain else node.operator
            expected = "standard ONNX operators only, without loops, branches or random numbers"
            _refuse(file, f"uses the operator {short(name)}", expected)
        if node.operator == "Constant" and node.tensors != 1:
            _refuse(file, f"has the constant {short(node.outputs)} without a tensor", "constants that are tensors")
        fixed = constants.issuperset(node.inputs)
        allowed = node.operator in _SAME_SIZE or (node.operator == "Cast" and castable.issuperset(node.inputs))
        inner_size = node.operator in ("Shape", "Size") and not set(node.inputs) <= set(found.inputs)
        if node.operator == "Constant" or inner_size or (fixed and allowed):
            constants |= set(node.outputs)
        elif fixed:
            expected = "nodes that depend on an input of the graph"
            _refuse(file, f"has the node {short(node.name or node.operator)}, which computes on constants", expected)


def _check_axes(file: str, tensor: TensorSpec, sizes: tuple[int | None, ...] | None) -> None:
    """If the graph says the shape of an input, only axes have a size that have it in the manifest."""
    if sizes is not None and sizes != tuple(axis if isinstance(axis, int) else None for axis in tensor.axes):
        _refuse(file, f"has the input {short(tensor.name)} of shape {short(sizes)}", f"the shape {short(tensor.axes)}")


def _check_size(file: str, tensor: StoredTensor) -> None:
    """Sizes are not negative, and what could be a shape is not huge."""
    sizes = [abs(value) for value in tensor.integers if abs(value) < 2**31 - 1]  # larger ones mean "to the end"
    huge = any(value > _LARGEST_SIZE for value in sizes) or math.prod(max(1, size) for size in sizes) > _MOST_ELEMENTS
    if huge or any(size < 0 for size in tensor.shape):
        problem = f"has the constant {short(tensor.name)} with {short(tensor.integers or tensor.shape)}"
        _refuse(file, problem, f"shapes of at most {_LARGEST_SIZE:,} along an axis and {_MOST_ELEMENTS:,} elements")


def _check_external(file: str, tensor: StoredTensor, sizes: Mapping[str, int]) -> None:
    """The bytes of a tensor lie inside a file that belongs to the graph."""
    entries = dict(tensor.external)
    numbers = [entries.get(key, "0") for key in ("offset", "length")]
    plain = all(text.isascii() and text.isdigit() and len(text) <= 18 for text in numbers)
    known = len(entries) == len(tensor.external) and entries.keys() <= {"location", "offset", "length", "checksum"}
    size = sizes.get(entries.get("location", ""))
    if not (plain and known and size is not None and "length" in entries):
        problem = f"takes the weight {short(tensor.name)} from {short(entries.get('location', ''))}"
        _refuse(file, problem, f"weights with a plain offset and length in {' or '.join(sizes) or 'the graph'}")
    offset, length = map(int, numbers)
    if length != math.prod(tensor.shape) * _BYTES.get(tensor.kind, -1) or offset + length > size:
        _refuse(file, f"has the weight {short(tensor.name)} outside its file", f"weights inside {entries['location']}")


def _refuse(file: str, problem: str, expected: str) -> NoReturn:
    raise ArtifactRefused(f"{file} {problem}, but it must have {expected}.", expected=expected, fix=_FIX)
