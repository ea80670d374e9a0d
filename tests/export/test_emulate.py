"""bfloat16 emulated in float32: it rounds where the bf16 graph would, and ONNX Runtime does not undo it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from flexvar_export.emulate import emulate_bf16, widen
from flexvar_export.modules import graph_module
from flexvar_export.onnx_graphs import call_arguments
from flexvar_export.parity import joined_modulation
from flexvar_ref import FlexVAR, Tokenizer
from flexvar_runtime import ArtifactRefused, Bundle
from flexvar_runtime.model.signatures import GRAPHS, graph_specs
from flexvar_runtime.model.tensors import GraphSpec, TensorSpec

F32, BF16 = TensorProto.FLOAT, TensorProto.BFLOAT16
SIZES = {"labels": 3, "images": 2, "sequences": 4, "new": 9, "past": 5, "height": 6, "width": 7}
Arrays = dict[str, NDArray[Any]]


def run(model: str | bytes, feeds: Arrays, level: str = "ORT_ENABLE_ALL") -> list[NDArray[Any]]:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, level)
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    return list(session.run(None, feeds))


def small_graph(nodes: list[onnx.NodeProto], weight: NDArray[Any] | None, inner: list[str]) -> onnx.ModelProto:
    """A graph from x (N, 4) to y, both float32. The results in `inner` are bfloat16."""
    graph = helper.make_graph(
        nodes,
        "small",
        [helper.make_tensor_value_info("x", F32, ["N", 4])],
        [helper.make_tensor_value_info("y", F32, ["N", 4])],
        [] if weight is None else [numpy_helper.from_array(weight.astype(ml_dtypes.bfloat16), "w")],
        value_info=[helper.make_tensor_value_info(name, BF16, ["N", 4]) for name in inner],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)


def there_and_back() -> onnx.ModelProto:
    narrow = helper.make_node("Cast", ["x"], ["a"], to=BF16)
    return small_graph([narrow, helper.make_node("Cast", ["a"], ["y"], to=F32)], None, ["a"])


@pytest.fixture(scope="module")
def emulated(tiny_bundles: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return emulate_bf16(Bundle.open(tiny_bundles("bf16")), tmp_path_factory.mktemp("emulated"))


# Rounding


def test_values_are_rounded_to_nearest_even() -> None:
    ulp = 2.0**-7  # of 1 … 2 in bfloat16
    x = np.array([[1 + ulp / 2, 1 + 1.5 * ulp, 1 + 0.51 * ulp, 1 + ulp]], np.float32)  # two ties, then none
    model = there_and_back()
    widen(model)
    (y,) = run(model.SerializeToString(), {"x": x})
    assert y.tolist() == [[1.0, 1 + 2 * ulp, 1 + ulp, 1 + ulp]]

    many = np.random.default_rng(0).standard_normal((5000, 4), dtype=np.float32)
    (y,) = run(model.SerializeToString(), {"x": many})
    assert np.array_equal(y, many.astype(ml_dtypes.bfloat16).astype(np.float32))
    error = np.abs(y - many) / np.abs(many)
    assert 2.0**-10 < error.max() <= 2.0**-8  # 8 significant bits: at most half an ulp, just above a power of two
    assert 2.0**-11 < error.mean() < 2.0**-9


def test_a_float32_graph_is_not_changed() -> None:
    """Only bfloat16 results are rounded."""
    graph = helper.make_graph(
        [helper.make_node("Add", ["x", "x"], ["y"])],
        "plain",
        [helper.make_tensor_value_info("x", F32, ["N", 4])],
        [helper.make_tensor_value_info("y", F32, ["N", 4])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
    before = model.SerializeToString()
    widen(model)
    assert list(model.graph.node) == list(onnx.load_from_string(before).graph.node)


def test_every_operation_rounds_its_result_and_sums_in_float32() -> None:
    """A product of bfloat16 values accumulates in float32 and is rounded once, then a second operation rounds again."""
    rng = np.random.default_rng(1)
    weight = rng.standard_normal((4, 4), dtype=np.float32)
    nodes = [
        helper.make_node("Cast", ["x"], ["a"], to=BF16),
        helper.make_node("MatMul", ["a", "w"], ["b"]),
        helper.make_node("Add", ["b", "b"], ["c"]),
        helper.make_node("Mul", ["c", "b"], ["d"]),
        helper.make_node("Cast", ["d"], ["y"], to=F32),
    ]
    model = small_graph(nodes, weight, ["a", "b", "c", "d"])
    widen(model)
    x = rng.standard_normal((64, 4), dtype=np.float32)
    (y,) = run(model.SerializeToString(), {"x": x})

    def rounded(value: NDArray[np.float32]) -> NDArray[np.float32]:
        return value.astype(ml_dtypes.bfloat16).astype(np.float32)

    b = rounded(rounded(x) @ rounded(weight))
    assert np.array_equal(y, rounded(rounded(b + b) * b))
    assert not np.array_equal(y, rounded(2 * (rounded(x) @ rounded(weight)) ** 2))  # rounded at the end only


def test_a_graph_that_does_not_state_its_types_is_refused() -> None:
    model = there_and_back()
    del model.graph.value_info[:]
    with pytest.raises(ArtifactRefused, match=r"type of 1 tensors, such as a\."):
        widen(model)


# Whole graphs


def test_the_emulated_bundle_is_a_float32_bundle_of_the_same_model(
    tiny_bundles: Callable[[str], Path], emulated: Bundle
) -> None:
    source = Bundle.open(tiny_bundles("bf16"))  # unchanged: its hashes still hold
    again = Bundle.open(emulated.path, allow_unproved=True)
    assert again.manifest.precision == "fp32"
    assert again.manifest.graphs == graph_specs(source.manifest.model, "fp32")
    assert again.manifest.model == source.manifest.model


@pytest.mark.parametrize("graph", GRAPHS)
def test_weights_are_the_same_numbers(tiny_bundles: Callable[[str], Path], emulated: Bundle, graph: str) -> None:
    narrow = onnx.load(str(tiny_bundles("bf16") / f"{graph}.onnx")).graph
    wide = {c.name: c for c in onnx.load(str(emulated.file(f"{graph}.onnx"))).graph.initializer}
    assert len(wide) == len(narrow.initializer)
    for constant in narrow.initializer:
        assert wide[constant.name].data_type != BF16
        values = numpy_helper.to_array(constant)
        assert np.array_equal(values.astype(np.float64), numpy_helper.to_array(wide[constant.name]).astype(np.float64))


@pytest.mark.parametrize("graph", GRAPHS)
def test_every_bfloat16_tensor_is_rounded(tiny_bundles: Callable[[str], Path], emulated: Bundle, graph: str) -> None:
    source = onnx.load(str(tiny_bundles("bf16") / f"{graph}.onnx"), load_external_data=False)
    inferred = onnx.shape_inference.infer_shapes(source, strict_mode=True).graph
    narrow = {v.name for v in (*inferred.value_info, *inferred.output) if v.type.tensor_type.elem_type == BF16}
    computed = {name for node in source.graph.node for name in node.output} & narrow
    if graph == "condition":  # the input and a product for every block and the head: the rest is float32
        assert len(computed) == 1 + Bundle.open(tiny_bundles("bf16")).manifest.model.depth + 1
    else:
        assert len(computed) > 4

    nodes = onnx.load(str(emulated.file(f"{graph}.onnx")), load_external_data=False).graph.node
    made_by = {name: node for node in nodes for name in node.output}

    def target(name: str) -> int:
        node = made_by[name]
        return next((a.i for a in node.attribute if a.name == "to"), 0) if node.op_type == "Cast" else 0

    for name in computed:
        assert target(name) == F32 and target(made_by[name].input[0]) == BF16


@pytest.fixture(scope="module")
def feeds(emulated: Bundle, arrays_for: Callable[..., Arrays]) -> Callable[[str], Arrays]:
    return lambda graph: arrays_for(emulated.manifest.graphs[graph].inputs, SIZES)


def off(got: NDArray[Any], expected: NDArray[Any]) -> float:
    return float(np.linalg.norm(got - expected) / np.linalg.norm(expected))


def is_rounded_before(offset: NDArray[np.float32], total: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Whether total − offset is a bfloat16 value, up to one rounding of the float32 sum."""
    product = total.astype(np.float64) - offset
    off_by = np.abs(product - product.astype(np.float32).astype(ml_dtypes.bfloat16).astype(np.float64))
    return np.asarray(off_by <= 2.0**-24 * np.abs(total) + 1e-12)


@pytest.mark.parametrize("graph", GRAPHS)
def test_onnx_runtime_keeps_the_rounding(
    emulated: Bundle, feeds: Callable[[str], Arrays], tiny_pair: tuple[FlexVAR, Tokenizer], graph: str
) -> None:
    """Optimised or not, the same bits. Only the last level lays convolutions out in blocks of channels, which sums in
    another order: there a value may round to its neighbour, but as much is rounded as before."""
    path, spec = str(emulated.file(f"{graph}.onnx")), emulated.manifest.graphs[graph]
    literal = run(path, feeds(graph), "ORT_DISABLE_ALL")
    for level in ("ORT_ENABLE_BASIC", "ORT_ENABLE_EXTENDED"):
        assert all(map(np.array_equal, literal, run(path, feeds(graph), level)))
    optimised = run(path, feeds(graph), "ORT_ENABLE_ALL")
    if graph in ("condition", "step", "prefill"):
        assert all(map(np.array_equal, literal, optimised))
    else:
        exact = outputs(tiny_pair, graph, spec, torch.float32, feeds(graph))[0]
        # the same error against float32, to a fifth; without rounding it would be a thousandth of that
        assert off(optimised[0], exact) == pytest.approx(off(literal[0], exact), rel=0.2)
    if graph == "condition":
        condition = graph_module(graph, *tiny_pair, torch.bfloat16)
        offsets = np.stack([block.offset.numpy() for block in condition.blocks])  # type: ignore[union-attr]
        wide = outputs(tiny_pair, graph, spec, torch.float32, feeds(graph))
        names, depth = [tensor.name for tensor in spec.outputs], emulated.manifest.model.depth
        ours, exact = (joined_modulation(dict(zip(names, arrays, strict=True)), depth) for arrays in (optimised, wide))
        for name, offset in (("modulation", offsets), ("head_modulation", condition.head.offset.numpy())):  # type: ignore[union-attr]
            assert is_rounded_before(offset.reshape(ours[name].shape[1:]), ours[name]).all()
            # float32 is seen not to be
            assert is_rounded_before(offset.reshape(ours[name].shape[1:]), exact[name]).mean() < 0.1
    every = range(len(literal))
    by_half = {"condition": (), "step": every, "prefill": every, "decode": (0,), "encode": ()}[graph]
    for i in by_half:  # outputs that a bfloat16 operation computed
        assert np.array_equal(optimised[i], optimised[i].astype(ml_dtypes.bfloat16).astype(np.float32))


@pytest.mark.parametrize("graph", GRAPHS)
def test_emulated_equals_torch_in_bfloat16(
    emulated: Bundle, feeds: Callable[[str], Arrays], tiny_pair: tuple[FlexVAR, Tokenizer], graph: str
) -> None:
    """The same numbers after one product. Further on the two round a few values differently (torch fuses an activation
    or an attention and rounds it once), and all that follows from them: their errors are alike in size, no more."""
    got, spec = run(str(emulated.file(f"{graph}.onnx")), feeds(graph)), emulated.manifest.graphs[graph]
    narrow, wide = (outputs(tiny_pair, graph, spec, dtype, feeds(graph)) for dtype in (torch.bfloat16, torch.float32))
    names = [tensor.name for tensor in spec.outputs]
    for name, ours, theirs, exact in zip(names, got, narrow, wide, strict=True):
        if graph == "condition" or name in ("new_k_0", "new_v_0"):
            assert np.mean(ours != theirs) < 0.01  # none here; another processor may sum in another order
        if name == "first_input":  # has no half-precision operation
            assert off(ours, exact) < 1e-6
            continue
        rounding = off(theirs, exact)
        assert 2.0**-10 < rounding < 2.0**-5  # half an ulp is up to 2⁻⁹, and some forty operations add up
        assert off(ours, exact) == pytest.approx(rounding, rel=0.2)
        assert off(ours, theirs) < 1.2 * rounding  # errors that had nothing in common would be √2 apart


def outputs(
    pair: tuple[FlexVAR, Tokenizer], graph: str, spec: GraphSpec, dtype: torch.dtype, feeds: Arrays
) -> list[NDArray[Any]]:
    def tensor(declared: TensorSpec) -> torch.Tensor:
        value = torch.from_numpy(feeds[declared.name])
        return value.to(dtype) if declared.name.startswith("past_") else value

    with torch.inference_mode():
        results = graph_module(graph, *pair, dtype, decoder="phases")(*call_arguments(spec, tensor))
    flat: list[torch.Tensor] = []
    for result in results if isinstance(results, tuple) else (results,):
        flat += result if isinstance(result, list) else [result]
    return [tensor.float().numpy() for tensor in flat]
