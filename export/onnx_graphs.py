"""Export a torch module to an ONNX file with the names, types and dynamic axes of its declaration."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import onnx
import torch
from torch import Tensor, nn
from torch.export import Dim

from flexvar_runtime.errors import ArtifactRefused
from flexvar_runtime.model.signatures import OPSET
from flexvar_runtime.model.tensors import GraphSpec, TensorSpec

from .int8 import TRANSLATIONS

INLINE_BYTES = 2**20  # larger weights go to a separate file, which runtimes map into memory
EXPORTER_BYTES = 2**16  # the largest constant that the exporter adds itself, such as ones that scale a normalisation
# Distinct sizes, none of them 0 or 1, so that an axis that the exporter makes static fails the check.
EXAMPLE_SIZES = {"labels": 3, "sequences": 4, "images": 2, "new": 9, "past": 5, "height": 6, "width": 7}
TORCH_DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "int32": torch.int32,
}
_TESTED_VERSIONS = "Use the tested versions of torch and onnx (constraints.txt)."
EXTERNAL = onnx.TensorProto.EXTERNAL
T = TypeVar("T")


def export_graph(module: nn.Module, spec: GraphSpec, directory: Path, weights_of: GraphSpec | None = None) -> None:
    """Write `directory / spec.file`, and `<file>.data` for large weights.

    weights_of: a graph that was written before. Its file of weights is used, and no other is written. Raises
    ArtifactRefused where the exported graph is not what `spec` declares.
    """
    axes = {name: Dim(name, min=0 if name == "past" else 1) for name in EXAMPLE_SIZES}
    with warnings.catch_warnings(), _quiet_exporter():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            module,
            call_arguments(spec, _example),
            dynamo=True,
            opset_version=OPSET,
            dynamic_shapes=call_arguments(spec, lambda tensor: _dynamic(tensor, axes)),
            input_names=[tensor.name for tensor in spec.inputs],
            output_names=[tensor.name for tensor in spec.outputs],
            custom_translation_table=TRANSLATIONS,
            verbose=False,
        )
    assert program is not None  # with dynamo=True a program is always returned
    path = directory / spec.file
    weights = sum(value.nbytes for value in module.state_dict().values())
    program.save(str(path), external_data=weights > INLINE_BYTES)
    if weights_of is not None and weights > INLINE_BYTES:
        _share_weights(path, directory / weights_of.file)
    _finish(path, spec)


def _share_weights(path: Path, owner: Path) -> None:
    """Let a graph use the weights in the file of another graph, `owner`. Constants of the exporter go into the graph.

    Raises ArtifactRefused where a large weight is not in the file of the owner.
    """
    model, other = (onnx.load(str(file), load_external_data=False) for file in (path, owner))
    shared = {tensor.name: tensor for tensor in other.graph.initializer if tensor.data_location == EXTERNAL}
    for tensor in model.graph.initializer:
        if tensor.data_location != EXTERNAL:
            continue
        twin, stored = shared.get(tensor.name), _stored_bytes(tensor, path)
        same = twin is not None and stored == _stored_bytes(twin, owner)
        del tensor.external_data[:]
        if twin is not None and same:
            tensor.external_data.extend(twin.external_data)
        elif len(stored[1]) <= EXPORTER_BYTES:
            tensor.data_location, tensor.raw_data = onnx.TensorProto.DEFAULT, stored[1]
        else:
            raise ArtifactRefused(
                f"{path.name} has the weights {tensor.name}, which {owner.name} does not have.",
                expected="the same weights in both graphs",
                fix=_TESTED_VERSIONS,
            )
    onnx.save_model(model, str(path))
    path.with_name(f"{path.name}.data").unlink()


def _stored_bytes(tensor: onnx.TensorProto, path: Path) -> tuple[int, bytes]:
    """The type and the bytes of a weight in the file beside a graph."""
    entry = {item.key: item.value for item in tensor.external_data}
    with (path.parent / entry["location"]).open("rb") as file:
        file.seek(int(entry["offset"]))
        return tensor.data_type, file.read(int(entry["length"]))


def call_arguments(spec: GraphSpec, make: Callable[[TensorSpec], T]) -> tuple[T | list[T], ...]:
    """The positional arguments of the module of a graph: `make(input)` of every input, in the declared order.

    Consecutive numbered inputs (past_k_0, past_k_1, …) become one argument, a list.
    """
    groups: list[T | list[T]] = []
    previous = ""
    for tensor in spec.inputs:
        part, _, number = tensor.name.rpartition("_")
        if not number.isdigit():
            groups.append(make(tensor))
            part = ""
        elif part == previous:
            last = groups[-1]
            assert isinstance(last, list)
            last.append(make(tensor))
        else:
            groups.append([make(tensor)])
        previous = part
    return tuple(groups)


def _example(tensor: TensorSpec) -> Tensor:
    return torch.zeros(tensor.shape(EXAMPLE_SIZES), dtype=TORCH_DTYPES[tensor.dtype])


def _dynamic(tensor: TensorSpec, axes: dict[str, Dim]) -> dict[int, Dim]:
    named = {i: axis for i, axis in enumerate(tensor.axes) if isinstance(axis, str)}
    return {i: int(axis.partition("_x")[2] or 1) * axes[axis.partition("_x")[0]] for i, axis in named.items()}


class _quiet_exporter:
    """Silences the messages that the exporter logs at every start. None of them concerns these graphs."""

    def __enter__(self) -> None:
        self._logger = logging.getLogger("torch.onnx")
        self._level = self._logger.level
        self._logger.setLevel(logging.ERROR)

    def __exit__(self, *_: object) -> None:
        self._logger.setLevel(self._level)


def _finish(path: Path, spec: GraphSpec) -> None:
    """Check names and types, name the axes as declared, and remove the metadata of the exporter."""
    model = onnx.load(str(path), load_external_data=False)
    graph = model.graph
    for node in graph.node:
        node.ClearField("metadata_props")
        node.ClearField("doc_string")
    for item in (model, graph, *graph.value_info, *graph.input, *graph.output, *graph.initializer):
        item.ClearField("metadata_props")
        item.ClearField("doc_string")
    for declared, values in ((spec.inputs, graph.input), (spec.outputs, graph.output)):
        got = [(v.name, v.type.tensor_type.elem_type, len(v.type.tensor_type.shape.dim)) for v in values]
        expected = [
            (t.name, getattr(onnx.TensorProto, t.dtype.upper().replace("FLOAT32", "FLOAT")), len(t.axes))
            for t in declared
        ]
        if got != expected:
            raise ArtifactRefused(
                f"{path.name} has the tensors {got}, but its declaration has {expected}.",
                expected=str(expected),
                fix=_TESTED_VERSIONS,
            )
        for tensor, value in zip(declared, values, strict=True):
            for axis, dim in zip(tensor.axes, value.type.tensor_type.shape.dim, strict=True):
                dim.Clear()
                if isinstance(axis, int):
                    dim.dim_value = axis
                else:
                    dim.dim_param = axis
    model.producer_name, model.producer_version = "flexvar-deploy", ""
    onnx.save_model(model, str(path))
    onnx.checker.check_model(str(path))
