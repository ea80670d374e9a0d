"""Products in eight bits: exact in integers, as close as their rounding says, and a bundle made of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from flexvar_export.int8 import LEVELS, TRANSLATIONS, Int8Dense
from flexvar_export.modules import Step, block_parts
from flexvar_ref import FlexVAR, Tokenizer
from flexvar_runtime import Bundle, FlexVARPipeline
from flexvar_runtime.errors import BackendUnavailable
from flexvar_runtime.manifest import Manifest

Pair = tuple[FlexVAR, Tokenizer]
Run = Callable[..., tuple[int, str, str]]
TEN = "1_2_3_4_5_6_8_10_13_16"


def layer(inputs: int, outputs: int, seed: int = 0) -> tuple[Int8Dense, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weight, bias = torch.randn(inputs, outputs, generator=generator), torch.randn(outputs, generator=generator)
    return Int8Dense(weight, bias), weight, bias


def rounded_product(x: NDArray[np.float64], weight: NDArray[np.float64]) -> NDArray[np.float64]:
    """What stands in the module's file, spelt out in float64."""
    scale = np.abs(weight).max(0) / (LEVELS // 2)
    low, high = x.min(-1, keepdims=True), x.max(-1, keepdims=True)
    step = (high - low) / LEVELS
    result: NDArray[np.float64] = (low + step * np.rint((x - low) / step)) @ (scale * np.rint(weight / scale))
    return result


# One layer


def test_a_layer_is_the_product_of_rounded_numbers() -> None:
    dense, weight, bias = layer(256, 64)
    x = torch.randn(7, 256) * torch.logspace(-2, 2, 7)[:, None]
    expected = rounded_product(x.double().numpy(), weight.double().numpy()) + bias.double().numpy()
    error = np.abs(dense(x).double().numpy() - expected).max(-1) / np.abs(expected).max(-1)
    assert (error < 1e-3).all()  # a level that falls on the border may go either way in float32
    exact = (x.double() @ weight.double() + bias).numpy()
    assert 3e-3 < np.linalg.norm(expected - exact) / np.linalg.norm(exact) < 2e-2


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from([1, 2, 33]), st.floats(-50, 50), st.sampled_from([1e-6, 1.0, 1e3]))
def test_no_error_is_beyond_half_a_step(seed: int, inputs: int, shift: float, size: float) -> None:
    """|x·W − y| ≤ Σ |W| · step / 2 + Σ |x| · s / 2 and both roundings at once, whatever the rows are like."""
    dense, weight, _ = layer(inputs, 4, seed)
    generator = torch.Generator().manual_seed(seed)
    x = (torch.randn(3, inputs, generator=generator) * size + shift).double()
    step = (x.amax(-1, keepdim=True) - x.amin(-1, keepdim=True)) / LEVELS
    scale = weight.double().abs().amax(0) / (LEVELS // 2)
    bound = step / 2 * weight.double().abs().sum(0) + scale / 2 * (x.abs() + step).sum(-1, keepdim=True)
    got = dense(x.float()).double() - dense.bias
    exact = x @ weight.double()
    noise = 1e-5 * (x.abs() @ weight.double().abs() + 1)  # of float32
    assert ((got - exact).abs() <= bound + noise).all()


@pytest.mark.parametrize("value", [0.0, 3.5, -2.0])
def test_rows_in_which_all_is_equal(value: float) -> None:
    dense, weight, bias = layer(16, 8)
    scale = weight.abs().amax(0) / (LEVELS // 2)
    expected = value * ((weight / scale).round() * scale).sum(0) + bias
    torch.testing.assert_close(dense(torch.full((2, 16), value))[0], expected)


def test_an_output_without_weights() -> None:
    weight = torch.zeros(16, 2)
    weight[:, 1] = 1
    got = Int8Dense(weight, torch.tensor([5.0, 0.0]))(torch.ones(1, 16))
    torch.testing.assert_close(got, torch.tensor([[5.0, 16.0]]))


def test_a_row_does_not_depend_on_the_others() -> None:
    dense, _, _ = layer(64, 32)
    x = torch.randn(5, 64)
    together = dense(x * torch.tensor([1.0, 100, 1, 1e-3, 1])[:, None])
    torch.testing.assert_close(dense(x[2:3]), together[2:3], rtol=0, atol=0)


def test_onnx_runtime_adds_without_saturation(tmp_path: Path) -> None:
    """Levels and weights at the ends of their range, where sixteen bits would overflow."""
    weight = torch.ones(512, 4)
    weight[:, 1], weight[:, 2], weight[::2, 3] = -1, torch.linspace(-1, 1, 512), -1
    dense = Int8Dense(weight, torch.zeros(4)).eval()
    x = torch.full((3, 512), 1.0)
    x[:, 0], x[1, ::3], x[2, ::2] = -1, -0.5, -1
    program = torch.onnx.export(
        dense, (x,), dynamo=True, opset_version=23, custom_translation_table=TRANSLATIONS, verbose=False
    )
    assert program is not None
    program.save(str(tmp_path / "layer.onnx"))
    session = ort.InferenceSession(str(tmp_path / "layer.onnx"), providers=["CPUExecutionProvider"])
    (got,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    np.testing.assert_allclose(got, dense(x).numpy(), rtol=1e-5, atol=1e-3)


# A bundle


@pytest.fixture(scope="module")
def int8(tiny_bundles: Callable[[str], Path]) -> Bundle:
    return Bundle.open(tiny_bundles("int8"))


def products(bundle: Bundle, graph: str) -> list[str]:
    model = onnx.load(str(bundle.graph_file(graph)), load_external_data=False)
    return [node.op_type for node in model.graph.node if node.op_type.startswith("MatMul")]


@pytest.mark.parametrize(("graph", "float_products"), [("step", 2), ("prefill", 1)])
def test_only_the_layers_of_the_blocks_are_in_eight_bits(int8: Bundle, graph: str, float_products: int) -> None:
    """The embedding of the codes and the head are not. Of the last block prefill needs keys and values alone."""
    found = products(int8, graph)
    blocks = int8.manifest.model.depth
    unused = 4 if graph == "prefill" else 0
    assert found.count("MatMulInteger") == 6 * blocks - unused
    assert found.count("MatMul") == float_products


def test_weights_take_a_quarter(int8: Bundle, tiny_bundle: Path) -> None:
    def sizes(bundle: Bundle) -> dict[str, int]:
        graph = onnx.load(str(bundle.graph_file("step"))).graph
        return {t.name: onnx.numpy_helper.to_array(t).nbytes for t in graph.initializer if t.name.endswith(".weight")}

    eight, full = sizes(int8), sizes(Bundle.open(tiny_bundle))
    assert eight.keys() == full.keys() and eight.pop("head.weight") == full.pop("head.weight")
    assert all(4 * size == full[name] for name, size in eight.items())


def test_other_graphs_are_those_of_float32(int8: Bundle, tiny_bundle: Path) -> None:
    full = Bundle.open(tiny_bundle).manifest.files
    for name, record in int8.manifest.files.items():
        if name.startswith(("condition", "decode", "encode", "tables")):
            assert record == full[name]


def test_tokens_are_the_same_alone_in_a_batch_and_in_another_place(int8: Bundle) -> None:
    with FlexVARPipeline.from_bundle(int8.path, backend="ort-cpu") as pipe:
        together = pipe([3, 7, 1], seed=5)
        alone = pipe([7], seed=5, first_index=1)
    for scale, one in zip(together.tokens, alone.tokens, strict=True):
        np.testing.assert_array_equal(scale[1:2], one)


@pytest.mark.parametrize("backend", ["openvino", "ort-cuda", "tensorrt-rtx"])
def test_backends_without_it_say_so(int8: Bundle, backend: str) -> None:
    from flexvar_runtime.backends import precisions
    from flexvar_runtime.backends.base import runs_precision

    state = runs_precision(backend, "int8", precisions(backend))
    assert not state.available and "the bundle is int8" in state.detail


def test_no_engines_are_built_of_it(int8: Bundle, run_cli: Run) -> None:
    code, _, said = run_cli("build", int8.path, "--backend", "tensorrt-rtx")
    assert code == 2 and "the bundle is int8" in said


def test_openvino_refuses_it(int8: Bundle) -> None:
    pytest.importorskip("openvino")
    with pytest.raises(BackendUnavailable, match="int8 bundle on openvino"):
        FlexVARPipeline.from_bundle(int8.path, backend="openvino")


def test_kept_parts_stay_float32(tiny_pair: Pair) -> None:
    kept = block_parts(tiny_pair[0].config.depth)[1]
    step = Step(tiny_pair[0], torch.int8, {kept})
    layers = [name for name, module in step.named_modules() if isinstance(module, Int8Dense)]
    assert "blocks.0.fc1" not in layers and {"blocks.0.q", "blocks.1.fc1"} <= set(layers)


def test_kept_parts_are_named_in_the_manifest(int8: Bundle) -> None:
    manifest = replace(int8.manifest, float32_parts=("blocks.0.mlp",))
    assert Manifest.from_bytes(manifest.to_bytes()).float32_parts == ("blocks.0.mlp",)
