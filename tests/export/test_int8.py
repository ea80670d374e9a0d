"""Products on 8-bit integers: their rounding error is bounded, and a bundle of them passes its gate."""

from __future__ import annotations

import importlib
import shutil
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.numpy_helper
import onnxruntime as ort
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from flexvar_export.bundle_writer import seal
from flexvar_export.cross_check import cross_check
from flexvar_export.int8 import LARGEST, LEVELS, LOW, MIDDLE, TRANSLATIONS, Int8Dense
from flexvar_export.modules import Step, block_parts
from flexvar_export.parity import GATES, compare
from flexvar_export.proof import Proof
from flexvar_ref import FlexVAR, Tokenizer
from flexvar_runtime import Bundle, FlexVARPipeline
from flexvar_runtime.backends import BACKENDS, create
from flexvar_runtime.backends.ort.byte_products import make_exact
from flexvar_runtime.errors import BackendUnavailable
from flexvar_runtime.generation.opening import open_generator

Pair = tuple[FlexVAR, Tokenizer]
Run = Callable[..., tuple[int, str, str]]
TEN = "1_2_3_4_5_6_8_10_13_16"


def layer(inputs: int, outputs: int, seed: int = 0, zero: int = MIDDLE) -> tuple[Int8Dense, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weight, bias = torch.randn(inputs, outputs, generator=generator), torch.randn(outputs, generator=generator)
    return Int8Dense(weight, bias, zero), weight, bias


def step_of(x: NDArray[np.float64], zero: int) -> NDArray[np.float64]:
    """The smallest step size of every row that keeps all its levels in range."""
    result: NDArray[np.float64] = np.maximum(
        x.max(-1, keepdims=True) / (LEVELS - zero), x.min(-1, keepdims=True) / -zero
    )
    return result


def rounded_product(x: NDArray[np.float64], weight: NDArray[np.float64], zero: int) -> NDArray[np.float64]:
    """The arithmetic of `Int8Dense` in float64."""
    scale, step = np.abs(weight).max(0) / LARGEST, step_of(x, zero)
    result: NDArray[np.float64] = (step * np.rint(x / step)) @ (scale * np.rint(weight / scale))
    return result


# One layer


@pytest.mark.parametrize("zero", [MIDDLE, LOW])
def test_a_layer_is_the_product_of_rounded_numbers(zero: int) -> None:
    dense, weight, bias = layer(256, 64, zero=zero)
    x = torch.randn(7, 256, generator=torch.Generator().manual_seed(1)) * torch.logspace(-2, 2, 7)[:, None]
    x = x if zero == MIDDLE else F.gelu(x, approximate="tanh")
    expected = rounded_product(x.double().numpy(), weight.double().numpy(), zero) + bias.double().numpy()
    step = step_of(x.double().numpy(), zero)[:, 0]
    flips = 2 * step * float(weight.abs().max())  # two levels may round the other way in float32
    assert (np.abs(dense(x).double().numpy() - expected).max(-1) < flips + 1e-4 * np.abs(expected).max(-1)).all()
    exact = (x.double() @ weight.double() + bias).numpy()
    large = slice(None) if zero == MIDDLE else slice(-4, None)  # LOW is coarse for the small rows: see int8.LOW
    errors = np.linalg.norm((expected - exact)[large]) / np.linalg.norm(exact[large])
    assert 3e-3 < errors < 2e-2


def test_a_low_zero_gives_finer_steps() -> None:
    x = (
        F.gelu(torch.randn(64, 256, generator=torch.Generator().manual_seed(1)) * 2, approximate="tanh")
        .double()
        .numpy()
    )
    assert step_of(x, LOW).mean() < 0.6 * step_of(x, MIDDLE).mean()


@settings(max_examples=30, deadline=None)
@given(
    st.integers(0, 2**31),
    st.sampled_from([1, 2, 33]),
    st.floats(-50, 50),
    st.sampled_from([1e-6, 1.0, 1e3]),
    st.sampled_from([MIDDLE, LOW]),
)
def test_the_error_is_at_most_half_a_step(seed: int, inputs: int, shift: float, size: float, zero: int) -> None:
    """|x·W − y| ≤ Σ |W| · step / 2 + Σ |x| · s / 2, and the product of both roundings, for any rows."""
    dense, weight, _ = layer(inputs, 4, seed, zero)
    generator = torch.Generator().manual_seed(seed)
    x = (torch.randn(3, inputs, generator=generator) * size + shift).double()
    step = torch.from_numpy(step_of(x.numpy(), zero))
    scale = weight.double().abs().amax(0) / LARGEST
    bound = step / 2 * weight.double().abs().sum(0) + scale / 2 * (x.abs() + step).sum(-1, keepdim=True)
    dense.bias.zero_()
    noise = 1e-5 * (x.abs() @ weight.double().abs())  # of float32
    assert ((dense(x.float()).double() - x @ weight.double()).abs() <= bound + noise).all()


@pytest.mark.parametrize("value", [0.0, 3.5, -2.0])
def test_rows_of_equal_values(value: float) -> None:
    dense, weight, bias = layer(16, 8)
    scale = weight.abs().amax(0) / LARGEST
    expected = value * ((weight / scale).round() * scale).sum(0) + bias
    torch.testing.assert_close(dense(torch.full((2, 16), value))[0], expected)


def test_an_output_without_weights() -> None:
    weight = torch.zeros(16, 2)
    weight[:, 1] = 1
    got = Int8Dense(weight, torch.tensor([5.0, 0.0]))(torch.ones(1, 16))
    torch.testing.assert_close(got, torch.tensor([[5.0, 16.0]]))


def test_a_row_does_not_depend_on_the_others() -> None:
    dense, _, _ = layer(64, 32)
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(1))
    together = dense(x * torch.tensor([1.0, 100, 1, 1e-3, 1])[:, None])
    torch.testing.assert_close(dense(x[2:3]), together[2:3], rtol=0, atol=0)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Int8Dense, Tensor], NDArray[np.float32]]:
    """(layer, rows) -> the result of ONNX Runtime."""

    def run(dense: Int8Dense, x: Tensor) -> NDArray[np.float32]:
        path = tmp_path_factory.mktemp("layer") / "layer.onnx"
        program = torch.onnx.export(
            dense.eval(), (x,), dynamo=True, opset_version=23, custom_translation_table=TRANSLATIONS, verbose=False
        )
        assert program is not None
        program.save(str(path))
        options = ort.SessionOptions()
        make_exact(ort, options)
        session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        result: NDArray[np.float32] = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
        return result

    return run


def test_onnx_runtime_adds_without_saturation(
    exported: Callable[[Int8Dense, Tensor], NDArray[np.float32]],
) -> None:
    """Levels and weights at the ends of their range, where sixteen bits overflow on processors without dot products of
    bytes, unless ONNX Runtime is told otherwise."""
    weight = torch.ones(512, 4)
    weight[:, 1], weight[:, 2], weight[::2, 3] = -1, torch.linspace(-1, 1, 512), -1
    dense = Int8Dense(weight, torch.zeros(4))
    x = torch.full((3, 512), 1.0)
    x[:, 0], x[1, ::3], x[2, ::2] = -1, -0.5, -1
    np.testing.assert_allclose(exported(dense, x), dense(x).numpy(), rtol=1e-5, atol=1e-3)


def test_nan_and_infinity_give_nan(
    exported: Callable[[Int8Dense, Tensor], NDArray[np.float32]],
) -> None:
    """ONNX Runtime ignores NaN in a maximum, and rounds it to some level."""
    dense, _, _ = layer(64, 8)
    x = torch.randn(8, 64, generator=torch.Generator().manual_seed(1))
    x[0, 0], x[1, 7], x[2, 63] = torch.nan, torch.nan, torch.nan
    x[3, 5], x[4, 5], x[5, 1:3] = torch.inf, -torch.inf, torch.tensor([3e36, -3e36])
    x[6] = 0.25
    for got in (exported(dense, x), dense(x).numpy()):
        assert np.isnan(got[:5]).all() and np.isfinite(got[5:]).all()
    np.testing.assert_allclose(exported(dense, x)[5:], dense(x).numpy()[5:], rtol=1e-4, atol=1e-4)


# A bundle


@pytest.fixture(scope="module")
def int8(tiny_bundles: Callable[[str], Path]) -> Bundle:
    return Bundle.open(tiny_bundles("int8"))


def graph_of(bundle: Bundle, name: str) -> onnx.GraphProto:
    return onnx.load(str(bundle.graph_file(name))).graph


@pytest.mark.parametrize(("graph", "float_products"), [("step", 2), ("prefill", 1)])
def test_only_the_layers_of_the_blocks_are_int8(int8: Bundle, graph: str, float_products: int) -> None:
    """The embedding of the codes and the head are float32. The last block of prefill has only keys and values."""
    content = graph_of(int8, graph)
    eight = [node for node in content.node if node.op_type == "MatMulInteger"]
    unused = 4 if graph == "prefill" else 0
    assert len(eight) == 6 * int8.manifest.model.depth - unused
    assert [node.op_type for node in content.node].count("MatMul") == float_products
    types = {value.name: value.type.tensor_type.elem_type for value in content.value_info}
    types |= {tensor.name: tensor.data_type for tensor in content.initializer}
    for node in eight:
        assert [types[name] for name in node.input[:2]] == [onnx.TensorProto.UINT8, onnx.TensorProto.INT8]


def test_weights_take_a_quarter(int8: Bundle, tiny_bundle: Path) -> None:
    def sizes(bundle: Bundle) -> dict[str, int]:
        tensors = [t for t in graph_of(bundle, "step").initializer if t.name.endswith(".weight")]
        return {tensor.name: onnx.numpy_helper.to_array(tensor).nbytes for tensor in tensors}

    eight, full = sizes(int8), sizes(Bundle.open(tiny_bundle))
    assert eight.keys() == full.keys() and eight.pop("head.weight") == full.pop("head.weight")
    assert all(4 * size == full[name] for name, size in eight.items())


def test_other_graphs_are_those_of_float32(int8: Bundle, tiny_bundle: Path) -> None:
    full = Bundle.open(tiny_bundle).manifest.files
    for name, record in int8.manifest.files.items():
        if name.startswith(("condition", "decode", "encode", "tables")):
            assert record == full[name]


def test_tokens_do_not_depend_on_the_batch(int8: Bundle) -> None:
    with FlexVARPipeline.from_bundle(int8.path, backend="ort-cpu") as pipe:
        together = pipe([3, 7, 1], seed=5)
        alone = pipe([7], seed=5, first_index=1)
    for scale, one in zip(together.tokens, alone.tokens, strict=True):
        np.testing.assert_array_equal(scale[1:2], one)


Edit = Callable[[NDArray[Any]], NDArray[Any]]
WRONG: dict[str, tuple[str, Edit]] = {
    "negated": (".weight", np.negative),
    "scales of other outputs": (".scale", lambda scale: np.roll(scale, 1)),
    "biases one higher": (".bias", lambda bias: bias + 1),
}


@pytest.mark.parametrize("graph", ["step", "prefill"])
@pytest.mark.parametrize("fault", WRONG)
def test_a_wrong_layer_fails_its_graph(int8: Bundle, tiny_proof: Proof, tmp_path: Path, graph: str, fault: str) -> None:
    """The layer is in the first block, because prefill does not use all layers of the last one."""
    suffix, edit = WRONG[fault]
    copy = Path(shutil.copytree(int8.path, tmp_path / "copy"))
    model = onnx.load(str(copy / f"{graph}.onnx"))
    for tensor in model.graph.initializer:
        if tensor.name.startswith("blocks.0.") and tensor.name.endswith(suffix):
            tensor.CopyFrom(onnx.numpy_helper.from_array(edit(onnx.numpy_helper.to_array(tensor)), tensor.name))
    onnx.save_model(model, str(copy / f"{graph}.onnx"))
    with closing(open_generator(seal(copy, int8.manifest), create("ort-cpu", threads=1))) as generator:
        rows = compare(generator, tiny_proof, GATES["int8"])
        assert next(row.graph for row in rows if not row.holds) == graph


def test_auto_takes_ort_cpu(int8: Bundle) -> None:
    assert create("auto", int8).name == "ort-cpu"


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "ort-cpu"])
def test_other_backends_are_not_ready_for_it(int8: Bundle, backend: str) -> None:
    module = importlib.import_module(f"flexvar_runtime.backends.{BACKENDS[backend]}")
    state = module.ready(backend, int8, device=None, engines=None)
    assert not state.available and "int8" in state.detail


def test_flexvar_build_refuses_it(int8: Bundle, run_cli: Run) -> None:
    pytest.importorskip("tensorrt_rtx_bindings")
    code, _, said = run_cli("build", int8.path, "--backend", "tensorrt-rtx", "--target", "89")
    assert code == 2 and "int8" in said and "tensorrt-rtx" in said and "--precision" in said


def test_openvino_refuses_it(int8: Bundle, tiny_proof: Proof) -> None:
    pytest.importorskip("openvino")
    with pytest.raises(BackendUnavailable, match=r"openvino .*int8"):
        FlexVARPipeline.from_bundle(int8.path, backend="openvino")
    with pytest.raises(BackendUnavailable, match=r"openvino .*int8"):
        cross_check(int8, tiny_proof, create("ort-cpu"), create("openvino"))


def test_it_agrees_with_itself(int8: Bundle, tiny_proof: Proof) -> None:
    pytest.importorskip("polygraphy")
    record = cross_check(int8, tiny_proof, create("ort-cpu"), create("ort-cpu"))
    assert record.passed and {row.bound for row in record.rows if row.graph == "step"} == {
        2 * GATES["int8"].error("step")
    }


def test_kept_parts_stay_float32(tiny_pair: Pair) -> None:
    kept = block_parts(tiny_pair[0].config.depth)[1]
    step = Step(tiny_pair[0], torch.int8, {kept})
    layers = [name for name, module in step.named_modules() if isinstance(module, Int8Dense)]
    assert "blocks.0.fc1" not in layers and {"blocks.0.q", "blocks.1.fc1"} <= set(layers)
