"""Byte products: the built-in graph is one product, and a processor whose sums saturate gets the exact option."""

from __future__ import annotations

import importlib
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper

from flexvar_runtime.backends.base import runs_precision
from flexvar_runtime.backends.ort.byte_products import PRODUCT, make_exact
from flexvar_runtime.backends.ort.cpu import runs_exactly
from flexvar_runtime.errors import BackendUnavailable
from flexvar_runtime.model.precision import Precision


def test_the_graph_is_one_product() -> None:
    values = [
        helper.make_tensor_value_info(name, kind, shape)
        for name, kind, shape in (
            ("a", TensorProto.UINT8, [2, 64]),
            ("b", TensorProto.INT8, [64, 16]),
            ("c", TensorProto.INT32, [2, 16]),
        )
    ]
    graph = helper.make_graph([helper.make_node("MatMulInteger", ["a", "b"], ["c"])], "", values[:2], values[2:])
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 10)], ir_version=5)
    assert onnx.load_model_from_string(PRODUCT) == made


class Saturating:
    """ONNX Runtime, as far as it is used, on a processor that adds pairs of products in 16 bits."""

    __version__ = "1.31.1"
    SessionOptions = SimpleNamespace

    class InferenceSession:
        def __init__(self, *_: object, **__: object) -> None:
            pass

        def run(self, _: None, feeds: dict[str, NDArray[Any]]) -> list[NDArray[Any]]:
            a, b = (feeds[name].astype(np.int64) for name in "ab")
            pairs = (a[:, :, None] * b[None]).reshape(len(a), -1, 2, b.shape[1]).sum(2)
            return [pairs.clip(-(2**15), 2**15 - 1).sum(1).astype(np.int32)]


class Exact(Saturating):
    """ONNX Runtime on a processor with VNNI."""

    class InferenceSession(Saturating.InferenceSession):
        def run(self, _: None, feeds: dict[str, NDArray[Any]]) -> list[NDArray[Any]]:
            return [feeds["a"].astype(np.int32) @ feeds["b"].astype(np.int32)]


@pytest.mark.parametrize(("library", "expected"), [(Saturating, {"session.x64quantprecision": "1"}), (Exact, {})])
def test_the_option_is_set_only_where_sums_saturate(library: Any, expected: dict[str, str]) -> None:
    entries: dict[str, str] = {}
    make_exact(library, SimpleNamespace(add_session_config_entry=entries.__setitem__))
    assert entries == expected


class Old(Saturating):
    __version__ = "1.30.2"


def test_a_version_without_a_safe_option_is_refused() -> None:
    with pytest.raises(BackendUnavailable, match=r"onnxruntime 1\.30\.2.*Run: pip install 'onnxruntime>=1\.31'"):
        make_exact(Old, SimpleNamespace())


def test_bundles_that_cannot_be_exact_are_refused_before_they_are_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    every = frozenset(Precision)
    for library, exact in ((Exact, True), (Saturating, True), (Old, False)):
        monkeypatch.setattr(importlib, "import_module", lambda name, library=library: library)
        for precision in (Precision.FP32, Precision.INT8, Precision.INT8_BF16):
            result = runs_exactly("ort-cpu", precision, every)
            usual = runs_precision("ort-cpu", precision, every)
            assert result.available == (exact or precision is Precision.FP32)
            assert result == usual or result.fix == "pip install 'onnxruntime>=1.31'"


@pytest.mark.parametrize("forced", [False, True])
def test_products_are_exact_here(forced: bool) -> None:
    """On this processor, with many rows, a zero point, and weights in the graph as in a bundle.

    forced: with the option, as on a processor whose sums saturate.
    """
    generator = np.random.default_rng(0)
    weights = generator.choice([-127, 127, 5], (512, 32)).astype(np.int8)
    rows = generator.choice([0, 255], (33, 512)).astype(np.uint8)
    weights[:, 0], rows[0] = 127, 255
    graph = helper.make_graph(
        [helper.make_node("MatMulInteger", ["a", "b", "zero"], ["c"])],
        "product",
        [helper.make_tensor_value_info("a", TensorProto.UINT8, rows.shape)],
        [helper.make_tensor_value_info("c", TensorProto.INT32, [33, 32])],
        [onnx.numpy_helper.from_array(weights, "b"), onnx.numpy_helper.from_array(np.array(128, np.uint8), "zero")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
    options = ort.SessionOptions()
    if forced:
        options.add_session_config_entry("session.x64quantprecision", "1")
    else:
        make_exact(ort, options)
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    expected = (rows.astype(np.int32) - 128) @ weights.astype(np.int32)
    np.testing.assert_array_equal(session.run(None, {"a": rows})[0], expected)
