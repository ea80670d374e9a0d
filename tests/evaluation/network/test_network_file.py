"""A file that does not keep the contract of feature networks is refused before a library reads it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from tiny_network import WIDTH, write_tiny_network

from flexvar_evaluation.network import network_file
from flexvar_evaluation.network.contract import HEAD_BIAS, HEAD_WEIGHTS, NetworkFacts
from flexvar_evaluation.network.network_file import check_network, read_network
from flexvar_runtime import ArtifactRefused

Change = Callable[[Any], object]


@pytest.fixture
def model(tiny_network: Path) -> Any:
    """The model of a network that keeps the contract."""
    return onnx.load_model_from_string(tiny_network.read_bytes())


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("spatial", [True, False])
def test_networks_that_keep_the_contract(bias: bool, spatial: bool, tmp_path: Path) -> None:
    path = write_tiny_network(tmp_path / "network.onnx", bias=bias, spatial=spatial, classes=5)
    file = read_network(path)
    assert file.content == path.read_bytes() and file.head.weights.shape == (WIDTH, 5)
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(str(path)).graph.initializer}
    np.testing.assert_array_equal(file.head.weights, stored[HEAD_WEIGHTS])
    assert (file.head.bias is not None) == bias
    if file.head.bias is not None:
        np.testing.assert_array_equal(file.head.bias, stored[HEAD_BIAS])
    assert file.facts == NetworkFacts(name="tiny", source_sha256="0" * 64, conversion="test-1")
    assert file.facts.identity == f"tiny:test-1:{'0' * 64}"


def constant(model: Any, name: str) -> Any:
    [found] = [tensor for tensor in model.graph.initializer if tensor.name == name]
    return found


def entry(model: Any, key: str) -> Any:
    [found] = [each for each in model.metadata_props if each.key == key]
    return found


def add_entry(model: Any, key: str, value: str) -> None:
    model.metadata_props.add(key=key, value=value)


def put_head(model: Any, name: str, array: Any) -> None:
    kept = [tensor for tensor in model.graph.initializer if tensor.name != name]
    del model.graph.initializer[:]
    model.graph.initializer.extend([*kept, numpy_helper.from_array(array, name)])


def store_elsewhere(model: Any) -> None:
    tensor = constant(model, "kernel")
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="/etc/passwd")


def add_node(model: Any, *arguments: Any, **attributes: Any) -> None:
    model.graph.node.append(helper.make_node(*arguments, **attributes))


def add_sizes(model: Any, sizes: list[int]) -> None:
    model.graph.initializer.append(numpy_helper.from_array(np.array(sizes, np.int64), "sizes"))


CHANGES: dict[str, Change] = {
    "no version": lambda m: m.metadata_props.remove(entry(m, "flexvar_network")),
    "another version": lambda m: setattr(entry(m, "flexvar_network"), "value", "2"),
    "no name": lambda m: m.metadata_props.remove(entry(m, "name")),
    "a name of two lines": lambda m: setattr(entry(m, "name"), "value", "a\nb"),
    "a wrong sha256": lambda m: setattr(entry(m, "source_sha256"), "value", "abc"),
    "no conversion": lambda m: m.metadata_props.remove(entry(m, "conversion")),
    "wrong operations": lambda m: add_entry(m, "operations_per_image", "-1"),
    "endless operations": lambda m: add_entry(m, "operations_per_image", "9" * 5000),
    "an entry twice": lambda m: add_entry(m, "name", "other"),
    "no head": lambda m: m.graph.initializer.remove(constant(m, HEAD_WEIGHTS)),
    "a head of one axis": lambda m: put_head(m, HEAD_WEIGHTS, np.ones(WIDTH, np.float32)),
    "a head without classes": lambda m: put_head(m, HEAD_WEIGHTS, np.ones((WIDTH, 0), np.float32)),
    "a head of float64": lambda m: put_head(m, HEAD_WEIGHTS, np.ones((WIDTH, 4))),
    "a head that is not finite": lambda m: put_head(m, HEAD_WEIGHTS, np.full((WIDTH, 4), np.nan, np.float32)),
    "a bias of another length": lambda m: put_head(m, HEAD_BIAS, np.ones(5, np.float32)),
    "a head that is used": lambda m: add_node(m, "MatMul", ["means", HEAD_WEIGHTS], ["logits"]),
    "a constant twice": lambda m: m.graph.initializer.append(constant(m, "kernel")),
    "weights elsewhere": store_elsewhere,
    "weights that are cut": lambda m: setattr(constant(m, "kernel"), "raw_data", b"\0" * 8),
    "weights that are huge": lambda m: constant(m, "kernel").dims.__setitem__(0, 2**40),
    "a negative size": lambda m: constant(m, "kernel").dims.__setitem__(slice(0, 2), [-WIDTH, -3]),
    "huge sizes": lambda m: add_sizes(m, [1, 3, 2**20, 1]),
    "huge sizes together": lambda m: add_sizes(m, [2**14, 2**14]),
    "another input": lambda m: setattr(m.graph.input[0], "name", "pixels"),
    "images of float32": lambda m: setattr(m.graph.input[0].type.tensor_type, "elem_type", TensorProto.FLOAT),
    "images of one size": lambda m: setattr(m.graph.input[0].type.tensor_type.shape.dim[1], "dim_value", 64),
    "images of four channels": lambda m: setattr(m.graph.input[0].type.tensor_type.shape.dim[3], "dim_value", 4),
    "no output": lambda m: m.graph.output.__delitem__(slice(None)),
    "outputs in another order": lambda m: m.graph.output.reverse(),
    "features of float64": lambda m: setattr(m.graph.output[0].type.tensor_type, "elem_type", TensorProto.DOUBLE),
    "an operator of another set": lambda m: add_node(m, "Relu", ["means"], ["more"], domain="com.microsoft"),
    "another set of operators": lambda m: m.opset_import.append(helper.make_opsetid("com.microsoft", 1)),
    "an operator that is not allowed": lambda m: add_node(m, "Expand", ["means", "shift"], ["more"]),
    "random numbers": lambda m: add_node(m, "RandomNormalLike", ["means"], ["more"]),
    "a node of constants": lambda m: add_node(m, "Relu", ["kernel"], ["more"]),
    "a constant that is no tensor": lambda m: add_node(m, "Constant", [], ["more"], value_int=3),
    "no nodes": lambda m: m.graph.node.__delitem__(slice(None)),
    "too many nodes": lambda m: [add_node(m, "Relu", ["means"], [f"more{i}"]) for i in range(2000)],
}


@pytest.mark.parametrize("case", CHANGES)
def test_networks_that_break_the_contract(case: str, model: Any) -> None:
    check_network(model.SerializeToString(), Path("network.onnx"))
    CHANGES[case](model)
    with pytest.raises(ArtifactRefused) as refusal:
        check_network(model.SerializeToString(), Path("network.onnx"))
    assert "network.onnx" in refusal.value.got and "flexvar evaluate import" in refusal.value.fix


def test_cut_files(tiny_network: Path) -> None:
    content = tiny_network.read_bytes()
    for end in range(0, len(content), 97):
        with pytest.raises(ArtifactRefused):
            check_network(content[:end], Path("network.onnx"))


def test_files_that_are_missing_or_too_large(tiny_network: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ArtifactRefused, match="none"):
        read_network(tiny_network.with_name("none.onnx"))
    monkeypatch.setattr(network_file, "MOST_BYTES", 1000)
    with pytest.raises(ArtifactRefused, match="too large"):
        read_network(tiny_network)
