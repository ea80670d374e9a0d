"""The scan of an ONNX file finds its nodes and its files of weights without the onnx package."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx_bytes import field, model, node

from flexvar_runtime import ArtifactRefused, Bundle
from flexvar_runtime.bundle.onnx_scan import Node, scan


@pytest.fixture(params=["fp32", "fp16", "bf16", "int8", "int8-bf16", "schema 1"])
def every_precision(request: pytest.FixtureRequest, tiny_bundles: Callable[[str], Path], schema1_bundle: Path) -> Path:
    return schema1_bundle if request.param == "schema 1" else tiny_bundles(request.param)


def test_scan_of_an_exported_graph(tiny_bundles: Callable[[str], Path]) -> None:
    path = tiny_bundles("fp32") / "step.onnx"
    model, found = onnx.load(str(path), load_external_data=False), scan(path)
    assert found.nodes == tuple(
        Node(n.name, n.op_type, tuple(n.input), tuple(n.output), n.domain) for n in model.graph.node
    )
    assert found.weight_files == {"step.onnx.data"}


def test_every_exported_graph_is_read(every_precision: Path) -> None:
    """The scan agrees with onnx on all that the rules look at, and the rules let the graph pass."""
    bundle = Bundle.open(every_precision)
    for name in bundle.manifest.graphs:
        model = onnx.load(str(bundle.graph_file(name)), load_external_data=False)
        found, graph = bundle.scan(name), model.graph
        stored = [
            (t.name, t.data_type, tuple(t.dims), tuple((e.key, e.value) for e in t.external_data))
            for t in graph.initializer
        ]
        assert [(t.name, t.kind, t.shape, t.external) for t in found.tensors] == stored
        short = [t for t in graph.initializer if t.data_type in (6, 7) and not t.external_data]
        values = {t.name: tuple(numpy_helper.to_array(t).ravel().tolist()) for t in short}
        assert {t.name: t.integers for t in found.tensors if t.integers} == values
        assert (found.inputs, found.outputs) == tuple(
            tuple(v.name for v in part) for part in (graph.input, graph.output)
        )


@pytest.mark.parametrize("packed", [True, False])
def test_numbers_are_read_however_they_are_stored(tmp_path: Path, packed: bool) -> None:
    """One number a field, all in one field, or as raw bytes: protobuf reads them all."""
    values = [3, -1, 2**40]
    if packed:
        tensor = helper.make_tensor("w", TensorProto.INT64, [3], values)
        raw = helper.make_tensor("w", TensorProto.INT64, [3], np.array(values).tobytes(), raw=True)
        parts = [tensor.SerializeToString(), raw.SerializeToString()]
    else:
        singles = [field(7, value % 2**64) for value in values]
        parts = [b"".join([field(1, 3), field(2, 7), *singles, field(8, b"w")])]
    for part in parts:
        (tmp_path / "graph.onnx").write_bytes(model(node("Shape", ["w"], ["y"]) + field(5, part)))
        [found] = scan(tmp_path / "graph.onnx").tensors
        assert (found.shape, found.integers) == ((3,), tuple(values))


@pytest.mark.parametrize(
    "content",
    [b"", b"no graph", b"\x08\x0a\x3a\xff\x01", b"\x08\x0a\x3a" + b"\xff" * 12, b"\x08\x0a\x39\x00", b"\x08\x0a\x3b"],
)
def test_scan_refuses(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "graph.onnx").write_bytes(content)
    with pytest.raises(ArtifactRefused, match=r"graph\.onnx"):
        scan(tmp_path / "graph.onnx")
