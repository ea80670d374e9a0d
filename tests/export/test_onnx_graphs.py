"""The content of exported graphs: signatures, types, and nothing that is not declared."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from google.protobuf.message import Message
from onnx import TensorProto, helper
from torch import Tensor, nn

from flexvar_export.modules import graph_module
from flexvar_export.onnx_graphs import INLINE_BYTES, call_arguments, export_graph
from flexvar_ref import FlexVAR, Tokenizer
from flexvar_runtime import ArtifactRefused, Bundle
from flexvar_runtime.model.precision import Precision
from flexvar_runtime.model.signatures import GRAPHS, WEIGHTS_OF, graph_specs
from flexvar_runtime.model.tensors import GraphSpec, TensorSpec

FLOAT, FLOAT16, BFLOAT16 = TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16
ELEMENT_TYPES = {"float32": FLOAT, "float16": FLOAT16, "bfloat16": BFLOAT16, "int32": TensorProto.INT32}
OF_PRECISION = {"fp32": FLOAT, "fp16": FLOAT16, "bf16": BFLOAT16}
VALUES = (TensorProto.INT32, TensorProto.INT64, TensorProto.BOOL)  # shapes and positions, not weights
PRODUCTS = {"MatMul", "Gemm", "Einsum", "Conv", "ConvTranspose", "Attention", "FusedMatMul", "MultiHeadAttention"}
# Operators that sum squares, which overflow or lose their eps in half precision.
NORMS = {
    "BatchNormalization",
    "GroupNormalization",
    "InstanceNormalization",
    "LayerNormalization",
    "LpNormalization",
    "MeanVarianceNormalization",
    "RMSNormalization",
    "ReduceL2",
    "ReduceMean",
    "ReduceSumSquare",
}
HALVES = pytest.mark.parametrize("precision", ["fp16", "bf16"])
Load = Callable[[str, str], onnx.ModelProto]


def tensor_types(model: onnx.ModelProto) -> dict[str, int]:
    """The element type of every tensor, inferred from inputs and weights. The types stated in the file are ignored."""
    bare = onnx.ModelProto()
    bare.CopyFrom(model)
    del bare.graph.value_info[:]
    graph = onnx.shape_inference.infer_shapes(bare, check_type=True, strict_mode=True).graph
    values = (*graph.value_info, *graph.input, *graph.output)
    types = {value.name: value.type.tensor_type.elem_type for value in values}
    return types | {constant.name: constant.data_type for constant in graph.initializer}


def products(model: onnx.ModelProto) -> list[tuple[onnx.NodeProto, int]]:
    """Every matrix product, convolution and attention, with the element type it computes in."""
    types = tensor_types(model)
    return [(node, types[node.input[0]]) for node in model.graph.node if node.op_type in PRODUCTS]


def share_in(model: onnx.ModelProto, element_type: int) -> float:
    """The share of a graph's products that compute in a type."""
    kinds = [kind for _, kind in products(model)]
    return sum(kind == element_type for kind in kinds) / len(kinds)


def texts(message: Message) -> Iterator[str]:
    """Every string in a model, at any depth, but no weights."""
    for field, value in message.ListFields():
        for item in value if field.is_repeated else [value]:
            if isinstance(item, Message):
                yield from texts(item)
            elif isinstance(item, str) or (isinstance(item, bytes) and field.name != "raw_data"):
                yield item if isinstance(item, str) else item.decode()


@pytest.fixture(scope="module")
def load(tiny_bundles: Callable[[str], Path]) -> Load:
    """(precision, graph) -> the model, weights loaded."""

    @lru_cache
    def read(precision: str, graph: str) -> onnx.ModelProto:
        return onnx.load(str(tiny_bundles(precision) / f"{graph}.onnx"))

    return read


# Signatures


@pytest.mark.parametrize("precision", Precision)
def test_inputs_and_outputs_are_as_declared(
    load: Load, tiny_bundles: Callable[[str], Path], precision: Precision
) -> None:
    for graph in GRAPHS:
        manifest = Bundle.open(tiny_bundles(precision)).manifest
        declared = graph_specs(manifest.model, precision)[graph]
        model = load(precision, graph)

        assert manifest.graphs[graph] == declared
        for tensors, values in ((declared.inputs, model.graph.input), (declared.outputs, model.graph.output)):
            assert [value.name for value in values] == [tensor.name for tensor in tensors]
            for tensor, value in zip(tensors, values, strict=True):
                stated = value.type.tensor_type
                axes = [dim.dim_param or dim.dim_value for dim in stated.shape.dim]
                assert (tensor.name, stated.elem_type, axes) == (
                    tensor.name,
                    ELEMENT_TYPES[tensor.dtype],
                    list(tensor.axes),
                )


@pytest.mark.parametrize("precision", Precision)
def test_graphs_use_only_standard_operators(load: Load, precision: Precision) -> None:
    for graph in GRAPHS:
        model = load(precision, graph)
        assert [(imported.domain, imported.version) for imported in model.opset_import] == [("", 23)]
        assert model.ir_version <= 13  # ONNX Runtime 1.31 refuses later ones
        assert not model.functions and all(node.domain == "" for node in model.graph.node)
        assert not any(attribute.g.node for node in model.graph.node for attribute in node.attribute)  # no subgraphs


@pytest.mark.parametrize("precision", Precision)
def test_graphs_hold_no_traces_of_the_machine(load: Load, precision: Precision) -> None:
    for graph in GRAPHS:
        model = load(precision, graph)
        text = "\n".join(texts(model))
        for trace in ("site-packages", ".py", "/root", "/home", "/tmp", "/work", "\\", "torch", "File "):
            assert trace not in text
        assert {value.name for value in (*model.graph.input, *model.graph.output)} < set(text.splitlines())
        assert not model.metadata_props and not model.doc_string
        assert (model.producer_name, model.producer_version) == ("flexvar-deploy", "")


@pytest.mark.parametrize("precision", Precision)
def test_large_weights_are_beside_the_graph_and_small_ones_in_it(
    load: Load, tiny_bundles: Callable[[str], Path], precision: Precision
) -> None:
    for graph in GRAPHS:
        file = tiny_bundles(precision) / f"{graph}.onnx"
        weights = sum(len(constant.raw_data) for constant in load(precision, graph).graph.initializer)
        beside = file.with_name(f"{file.name}.data")
        outside = onnx.load(str(file), load_external_data=False).graph.initializer
        locations = {entry.value for w in outside for entry in w.external_data if entry.key == "location"}

        owner = file.with_name(f"{WEIGHTS_OF.get(graph, graph)}.onnx.data")  # prefill uses the file of step
        assert beside.exists() == (weights > INLINE_BYTES and owner == beside)
        assert locations == ({owner.name} if owner.exists() else set())
        if beside.exists():
            assert file.stat().st_size < INLINE_BYTES // 4  # the graph alone is small
            assert beside.stat().st_size >= weights // 2


# Dynamic sizes

SIZES = {
    "condition": [{"labels": 1}, {"labels": 7}],
    "step": [
        {"images": 1, "sequences": 2, "new": 1, "past": 0},
        {"images": 1, "sequences": 1, "new": 1, "past": 1},
        {"images": 3, "sequences": 6, "new": 12, "past": 17},
        {"images": 5, "sequences": 5, "new": 2, "past": 30},
    ],
    "prefill": [{"sequences": 1, "new": 1}, {"sequences": 6, "new": 12}, {"sequences": 5, "new": 30}],
    "decode": [{"images": 1, "height": 1, "width": 1}, {"images": 3, "height": 5, "width": 2}],
    "encode": [{"images": 1, "height": 1, "width": 1}, {"images": 3, "height": 2, "width": 7}],
}


@pytest.mark.parametrize("precision", ["fp32", "fp16"])  # no CPU runs bf16 graphs: see test_emulate
@pytest.mark.parametrize("graph", GRAPHS)
def test_axes_are_dynamic(
    tiny_bundles: Callable[[str], Path],
    tiny_pair: tuple[FlexVAR, Tokenizer],
    arrays_for: Callable[..., dict[str, np.ndarray]],
    precision: str,
    graph: str,
) -> None:
    bundle = Bundle.open(tiny_bundles(precision))
    spec = bundle.manifest.graphs[graph]
    reference = graph_module(graph, *tiny_pair, torch.float32)
    session = onnxruntime.InferenceSession(str(bundle.file(spec.file)), providers=["CPUExecutionProvider"])
    for sizes in SIZES[graph]:
        feeds = arrays_for(spec.inputs, sizes)
        results = session.run(None, feeds)
        with torch.inference_mode():
            expected = flat(reference(*as_arguments(spec, feeds)))
        for tensor, got, value in zip(spec.outputs, results, expected, strict=True):
            error = np.linalg.norm(got.astype(np.float32) - value.numpy()) / np.linalg.norm(value.numpy())
            # Rounding noise of some forty layers. If a size were fixed, the error would be near 1.
            assert error <= {"fp32": 1e-5, "fp16": 1e-2}[precision], (tensor.name, sizes)


def as_arguments(spec: GraphSpec, feeds: dict[str, np.ndarray]) -> tuple[Tensor | list[Tensor], ...]:
    """A module's arguments, past keys and values in float32."""

    def tensor(declared: TensorSpec) -> Tensor:
        value = torch.from_numpy(feeds[declared.name])
        return value.float() if declared.name.startswith("past_") else value

    return call_arguments(spec, tensor)


def flat(results: object) -> Iterator[Tensor]:
    if isinstance(results, Tensor):
        yield results
    else:
        assert isinstance(results, tuple | list)
        for result in results:
            yield from flat(result)


# Types


@HALVES
@pytest.mark.parametrize("graph", ["condition", "step", "decode"])
def test_products_are_in_half_precision(load: Load, precision: str, graph: str) -> None:
    wide = [node for node, kind in products(load(precision, graph)) if kind != OF_PRECISION[precision]]
    # Only the embedding of the codes, which starts the residual stream, may be float32.
    assert all(graph == "step" and node.op_type == "MatMul" and "codes" in node.input for node in wide)


@HALVES
def test_all_but_the_first_and_last_product_of_encode_are_in_half_precision(load: Load, precision: str) -> None:
    model = load(precision, "encode")
    every = products(model)
    wide = [node for node, kind in every if kind != OF_PRECISION[precision]]
    assert [node for node in wide if "image" not in node.input and "latent" not in node.output] == []
    assert len(wide) <= 2
    share = 1 - weight_elements(model, wide) / weight_elements(model, [node for node, _ in every])
    assert share >= 0.95  # of the weights; the tiny encoder has too few layers to count those


def weight_elements(model: onnx.ModelProto, nodes: list[onnx.NodeProto]) -> int:
    weights = {constant.name: int(np.prod(constant.dims)) for constant in model.graph.initializer}
    return sum(weights.get(name, 0) for node in nodes for name in node.input)


@pytest.mark.parametrize("precision", Precision)
def test_weights_are_of_the_precision(load: Load, precision: Precision) -> None:
    for graph in GRAPHS:
        weights = [
            constant for constant in load(precision, graph).graph.initializer if constant.data_type not in VALUES
        ]
        if (own := precision.of(graph)) == "int8":
            # Every matrix of the blocks. The last block of prefill has only keys and values.
            eight = {tensor.name for tensor in weights if tensor.data_type == TensorProto.INT8}
            assert {tensor.data_type for tensor in weights if tensor.dims} == {FLOAT, *[TensorProto.INT8] * bool(eight)}
            assert len(eight) == {"step": 2 * 6, "prefill": 6 + 2}.get(graph, 0)
            continue
        bytes_of: dict[int, int] = {}
        for tensor in weights:
            bytes_of[tensor.data_type] = bytes_of.get(tensor.data_type, 0) + len(tensor.raw_data)
        of_precision = bytes_of.pop(OF_PRECISION[own])
        assert set(bytes_of) <= {FLOAT}
        # Gains, biases and embeddings stay float32. They are 1 % at this size, and less in larger models.
        assert of_precision >= 0.97 * (of_precision + sum(bytes_of.values()))


@pytest.mark.parametrize("graph", GRAPHS)
def test_fp32_has_no_other_type(load: Load, graph: str) -> None:
    mask = {TensorProto.BOOL} if graph == "prefill" else set()
    assert set(tensor_types(load("fp32", graph)).values()) <= {FLOAT, TensorProto.INT32, TensorProto.INT64, *mask}


@HALVES
@pytest.mark.parametrize("graph", GRAPHS)
def test_normalisations_are_float32(load: Load, precision: str, graph: str) -> None:
    model = load(precision, graph)
    types = tensor_types(model)
    norms = [node for node in model.graph.node if node.op_type in NORMS]
    assert {types[name] for node in norms for name in (node.input[0], node.output[0])} <= {FLOAT}
    if graph == "step":  # two a block and the head's; q and k of every block
        kinds = [node.op_type for node in norms]
        assert kinds.count("LayerNormalization") == 2 * 2 + 1 and len(kinds) >= 2 * 2 + 1 + 2
    if graph in ("decode", "encode"):
        assert len(norms) >= 13


@HALVES
def test_residual_stream_is_float32(load: Load, precision: str) -> None:
    """Every normalisation reads the residual stream, which is a sum of float32 terms."""
    model = load(precision, "step")
    types, made_by = tensor_types(model), {name: node for node in model.graph.node for name in node.output}
    streams = [made_by[node.input[0]] for node in model.graph.node if node.op_type == "LayerNormalization"]
    assert len(streams) == 5  # two blocks and the head
    for node in streams:
        assert node.op_type == "Add" and [types[name] for name in node.input] == [FLOAT, FLOAT]
    for earlier, later in pairwise(streams):
        assert earlier.output[0] in later.input  # never narrowed on the way


@HALVES
def test_guidance_and_logits_are_float32(load: Load, precision: str) -> None:
    model = load(precision, "step")
    types = tensor_types(model)
    reached, guided = {"t"}, []
    for node in model.graph.node:  # in topological order: from t to the head's product
        if reached & set(node.input) and node.op_type not in PRODUCTS | {"Cast"}:
            reached |= set(node.output)
            guided.append(node)
    assert {"Mul", "Add"} <= {node.op_type for node in guided}
    assert {types[name] for node in guided for name in node.output} == {FLOAT}
    assert types["logits"] == FLOAT
    new = [value for value in model.graph.output if value.name.startswith("new_")]
    assert {value.type.tensor_type.elem_type for value in new} == {OF_PRECISION[precision]}


@pytest.mark.parametrize("precision", Precision)
def test_stated_types_are_the_inferred_ones(load: Load, precision: Precision) -> None:
    for graph in GRAPHS:
        model = load(precision, graph)
        inferred = tensor_types(model)
        stated = {value.name: value.type.tensor_type.elem_type for value in model.graph.value_info}
        assert {name for node in model.graph.node for name in node.output if name} <= inferred.keys()
        assert {name: inferred[name] for name in stated} == stated


@pytest.mark.parametrize("graph", GRAPHS)
def test_a_float32_graph_is_recognised(load: Load, graph: str) -> None:
    assert share_in(load("fp32", graph), FLOAT16) == 0
    share = share_in(load("fp16", graph), FLOAT16)
    assert share > 0.9 or (graph == "prefill" and share == 0.9)  # nine of ten: the embedding of the codes is float32

    cheat = onnx.ModelProto()  # float16 inputs, outputs and weights, but products in float32
    cheat.CopyFrom(load("fp16", graph))
    widened = widen_products(cheat)
    assert widened and share_in(cheat, FLOAT16) == 0


def widen_products(model: onnx.ModelProto) -> int:
    types, nodes = tensor_types(model), []
    widened = 0
    for node in model.graph.node:
        if node.op_type not in PRODUCTS or types[node.input[0]] != FLOAT16:
            nodes.append(node)
            continue
        widened += 1
        inner = onnx.NodeProto()
        inner.CopyFrom(node)
        for i, name in enumerate(node.input):
            inner.input[i] = f"{node.name}_in{i}"
            nodes.append(helper.make_node("Cast", [name], [inner.input[i]], to=FLOAT))
        inner.output[0] = f"{node.name}_out"
        nodes += [inner, helper.make_node("Cast", [inner.output[0]], [node.output[0]], to=FLOAT16)]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    return widened


# The exporter itself


class Double(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + x


def spec_of(output: str = "float32", axes: tuple[str | int, ...] = ("images", 3)) -> GraphSpec:
    return GraphSpec(
        file="double.onnx",
        inputs=(TensorSpec(name="x", dtype="float32", axes=("images", 3)),),
        outputs=(TensorSpec(name="y", dtype=output, axes=axes),),
    )


def test_a_graph_that_differs_from_its_declaration_is_refused(tmp_path: Path) -> None:
    export_graph(Double(), spec_of(), tmp_path)
    for wrong in (spec_of("float16"), spec_of(axes=("images", 3, 1))):
        with pytest.raises(ArtifactRefused, match=r"double\.onnx"):
            export_graph(Double(), wrong, tmp_path)


def test_exporting_leaves_logging_and_warnings_as_they_were(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    import logging

    logger = logging.getLogger("torch.onnx")
    logger.setLevel(logging.INFO)
    export_graph(Double(), spec_of(), tmp_path)
    assert logger.level == logging.INFO
    assert list(recwarn) == []
    assert [path.name for path in tmp_path.iterdir()] == ["double.onnx"]
