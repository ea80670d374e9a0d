"""Rewrite bfloat16 graphs as float32 graphs with rounding, to prove a bf16 bundle on a CPU without bf16 kernels.

Every bfloat16 tensor becomes a float32 tensor that holds bfloat16 values. Constants are widened. The result of a node
is rounded to bfloat16 and back. So each operation has the same inputs, and sums in float32 as hardware does.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from flexvar_runtime import Bundle
from flexvar_runtime.errors import ArtifactRefused
from flexvar_runtime.model.precision import Precision
from flexvar_runtime.model.signatures import TABLES_FILE, graph_specs

from .bundle_writer import seal

_BF16, _F32 = TensorProto.BFLOAT16, TensorProto.FLOAT
_ROUNDED = "_rounded"


def emulate_bf16(bundle: Bundle, directory: Path) -> Bundle:
    """Write a bundle into the empty `directory` that emulates the bfloat16 arithmetic of `bundle`.

    A bf16 bundle becomes an fp32 bundle, an int8-bf16 bundle becomes an int8 bundle.
    """
    manifest = bundle.manifest
    mixed = manifest.precision is Precision.INT8_BF16
    precision, kept = (Precision.INT8, manifest.float32_parts) if mixed else (Precision.FP32, ())
    for name, spec in manifest.graphs.items():
        with bundle.unchanged():
            model = onnx.load(str(bundle.file(spec.file)))
        if manifest.precision.of(name) is Precision.BF16:
            widen(model)
        onnx.save_model(model, str(directory / spec.file), save_as_external_data=True, location=f"{spec.file}.data")
    with bundle.unchanged():
        (directory / TABLES_FILE).write_bytes(bundle.file(TABLES_FILE).read_bytes())
    graphs = graph_specs(manifest.model, precision, manifest.schema_version)
    return seal(directory, replace(manifest, precision=precision, float32_parts=kept, graphs=graphs, files={}))


def widen(model: onnx.ModelProto) -> None:
    """Rewrite a bfloat16 graph in place. Its weights are loaded, and its inputs must already hold bfloat16 values.

    Raises ArtifactRefused where the graph does not state the type of every tensor. ONNX could infer the types, but
    would copy the weights, and fails above 2 GB.
    """
    graph = model.graph
    stated = (*graph.value_info, *graph.output, *graph.input)
    types = {value.name: value.type.tensor_type.elem_type for value in stated}
    unknown = [name for node in graph.node for name in node.output if name and name not in types]
    if unknown:
        raise ArtifactRefused(
            f"The graph does not state the type of {len(unknown)} tensors, such as {unknown[0]}.",
            expected="a graph that states the type of every tensor",
            fix="Export the bundle again.",
        )
    narrow = {name for name, kind in types.items() if kind == _BF16}
    for initializer in graph.initializer:
        if initializer.data_type == _BF16:
            _widen_constant(initializer)
    nodes = []
    for node in graph.node:
        for attribute in node.attribute:
            if node.op_type == "Cast" and attribute.name == "to" and attribute.i == _BF16:
                attribute.i = _F32
            if attribute.HasField("t") and attribute.t.data_type == _BF16:
                _widen_constant(attribute.t)
        rounded = [name for name in node.output if name in narrow]
        for i, name in enumerate(node.output):
            if name in narrow:
                node.output[i] = name + _ROUNDED
        nodes.append(node)
        for name in rounded:
            nodes.append(helper.make_node("Cast", [name + _ROUNDED], [name + "_bf16"], to=_BF16))
            nodes.append(helper.make_node("Cast", [name + "_bf16"], [name], to=_F32))
    del graph.node[:]
    graph.node.extend(nodes)
    del graph.value_info[:]
    for value in (*graph.input, *graph.output):
        if value.type.tensor_type.elem_type == _BF16:
            value.type.tensor_type.elem_type = _F32


def _widen_constant(tensor: TensorProto) -> None:
    bits = numpy_helper.to_array(tensor).view(np.uint16).astype(np.uint32) << 16
    tensor.CopyFrom(numpy_helper.from_array(bits.view(np.float32), tensor.name))
