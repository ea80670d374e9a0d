"""The scan of an ONNX file finds its nodes and its files of weights without the onnx package."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper

from flexvar_runtime import ArtifactRefused
from flexvar_runtime.bundle.onnx_scan import Node, scan


def test_scan_of_an_exported_graph(tiny_bundles: Callable[[str], Path]) -> None:
    path = tiny_bundles("fp32") / "step.onnx"
    model, found = onnx.load(str(path), load_external_data=False), scan(path)
    assert found.nodes == tuple(
        Node(n.name, n.op_type, tuple(n.input), tuple(n.output), n.domain) for n in model.graph.node
    )
    assert found.weight_files == {"step.onnx.data"}


def test_scan_looks_into_subgraphs(tmp_path: Path) -> None:
    weight = helper.make_tensor("w", TensorProto.FLOAT, [1], [1.0])
    weight.ClearField("float_data")
    weight.data_location = TensorProto.EXTERNAL
    weight.external_data.add(key="location", value="../secret")
    inner = helper.make_graph(
        [helper.make_node("Attention", ["q", "k", "v"], ["y"], name="hidden")],
        "inner",
        [],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [weight],
    )
    branch = helper.make_node("If", ["c"], ["z"], then_branch=inner, else_branch=inner)
    graph = helper.make_graph(
        [branch, helper.make_node("Constant", [], ["k"], value=weight)],
        "outer",
        [],
        [helper.make_tensor_value_info("z", TensorProto.FLOAT, None)],
    )
    path = tmp_path / "graph.onnx"
    path.write_bytes(helper.make_model(graph).SerializeToString())
    found = scan(path)
    assert [node.operator for node in found.nodes] == ["Attention", "Attention", "If", "Constant"]
    assert found.weight_files == {"../secret"}


@pytest.mark.parametrize("content", [b"no graph", b"\x3a\xff\x01", b"\x3a" + b"\xff" * 12, b"\x39\x00", b"\x3b"])
def test_scan_refuses(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "graph.onnx").write_bytes(content)
    with pytest.raises(ArtifactRefused, match=r"graph\.onnx"):
        scan(tmp_path / "graph.onnx")
