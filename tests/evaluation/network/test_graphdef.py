"""The reader of TensorFlow graphs reads every way to write a tensor, and refuses files that are damaged or bombs."""

from __future__ import annotations

from pathlib import Path

import graphdef_file
import numpy as np
import pytest
from graphdef_file import FLOAT, INT32, GraphFile, constant_of, floats, ints, tensor, tensor_of, tiny

from flexvar_evaluation.network import graphdef
from flexvar_evaluation.network.graphdef import read_graph
from flexvar_runtime import ArtifactRefused


def read(path: Path, content: bytes | GraphFile) -> graphdef.Graph:
    (path / "graph.pb").write_bytes(content if isinstance(content, bytes) else content.to_bytes())
    return read_graph(path / "graph.pb")


def refused(path: Path, content: bytes | GraphFile) -> str:
    with pytest.raises(ArtifactRefused, match=r"graph\.pb") as refusal:
        read(path, content)
    return str(refusal.value)


def test_nodes_and_attributes(tmp_path: Path) -> None:
    graph = read(tmp_path, tiny())
    assert list(graph.nodes) == [node.name for node in tiny().nodes]
    conv, norm = graph.nodes["conv/Conv2D"], graph.nodes["conv/batchnorm"]
    assert (conv.operation, conv.inputs) == ("Conv2D", ("Mul", "conv/conv2d_params"))
    assert conv.integers("strides") == (1, 2, 2, 1) and conv.text("padding") == "VALID"
    assert conv.flag("use_cudnn_on_gpu", False) and not conv.flag("missing", False)
    assert norm.number("variance_epsilon") == np.float32(0.001)
    assert graph.nodes["conv/control_dependency"].sources == ("conv/batchnorm",)


@pytest.mark.parametrize("key", ["strides", "missing"])
def test_an_attribute_of_another_kind_is_refused(tmp_path: Path, key: str) -> None:
    node = read(tmp_path, tiny()).nodes["conv/Conv2D"]
    with pytest.raises(ArtifactRefused, match="conv/Conv2D"):
        node.number(key)


VALUES = np.array([[1.5, -2], [0, 2.0**-130]], np.float32)
NUMBERS = np.array([3, -1, 2**31 - 1, -(2**31)], np.int32)


@pytest.mark.parametrize("written", [None, floats(VALUES.ravel()), floats(VALUES.ravel(), packed=False)])
def test_floats_however_they_are_written(tmp_path: Path, written: bytes | None) -> None:
    graph = GraphFile()
    graph.nodes.append(constant_of("c", FLOAT, tensor(VALUES, values=written)))
    got = read(tmp_path, graph).nodes["c"].tensor("value")
    assert got.dtype == np.float32 and got.shape == (2, 2)
    np.testing.assert_array_equal(got, VALUES)


@pytest.mark.parametrize("written", [None, ints(NUMBERS), ints(NUMBERS, packed=False)])
def test_integers_however_they_are_written(tmp_path: Path, written: bytes | None) -> None:
    graph = GraphFile()
    graph.nodes.append(constant_of("c", INT32, tensor(NUMBERS, values=written)))
    got = read(tmp_path, graph).nodes["c"].tensor("value")
    assert got.dtype == np.int32
    np.testing.assert_array_equal(got, NUMBERS)


def test_one_number_fills_a_tensor(tmp_path: Path) -> None:
    graph = GraphFile()
    graph.nodes.append(constant_of("c", FLOAT, tensor_of(FLOAT, (2, 3), floats([0.5]))))
    np.testing.assert_array_equal(read(tmp_path, graph).nodes["c"].tensor("value"), np.full((2, 3), 0.5))


def test_a_tensor_of_texts_has_no_numbers(tmp_path: Path) -> None:
    """The real file begins with one. It is not on the way to the features."""
    node = read(tmp_path, tiny()).nodes["DecodeJpeg/contents"]
    with pytest.raises(ArtifactRefused, match="DecodeJpeg/contents"):
        node.tensor("value")


LARGE = 2**21
TENSORS = {
    "too few bytes": (FLOAT, (2, 3), tensor(VALUES)[-18:]),
    "none": (FLOAT, (2, 3), b""),
    "one number fills too much": (FLOAT, (LARGE,), floats([0])),
    "one number fills far too much": (FLOAT, (2**40, 2**40), floats([0])),
    "nothing fills far too much": (FLOAT, (2**62,), b""),
    "two numbers fill": (FLOAT, (3,), floats([0, 1])),
    "a negative size": (FLOAT, (-1,), floats([0])),
    "sizes whose product is 1": (FLOAT, (-1, -1), floats([0])),
    "too many axes": (FLOAT, (1,) * 9, floats([0])),
    "integers as floats": (INT32, (1,), floats([0])),
    "floats as integers": (FLOAT, (1,), ints([0])),
    "twice": (FLOAT, (1,), floats([0]) + b"\x22\x04\0\0\0\0"),
    "a number of 64 bits": (INT32, (1,), ints([2**31])),
    "too many single numbers": (INT32, (70_000,), ints([0] * 70_000)),
}


@pytest.mark.parametrize("case", TENSORS)
def test_tensors_that_do_not_fit(tmp_path: Path, case: str) -> None:
    graph = GraphFile()
    graph.nodes.append(constant_of("c", TENSORS[case][0], tensor_of(*TENSORS[case])))
    refused(tmp_path, graph)


def test_cut_files_are_refused(tmp_path: Path) -> None:
    """A file that ends between two nodes is a graph, so these ends are left out."""
    content = tiny().to_bytes()
    ends, at = set[int](), 0
    for node in tiny().nodes:
        at += len(node.to_bytes())
        ends.add(at)
    for end in set(range(0, len(content) - 1, 53)) - ends:
        refused(tmp_path, content[:end])


@pytest.mark.parametrize("place", ["name", "attribute", "node"])
def test_length_bombs(tmp_path: Path, place: str) -> None:
    """A length of 4 GB in place of the right one."""
    length = b"\xff\xff\xff\xff\x0f"
    bombs = {"node": b"\x0a" + length, "name": b"\x0a\x06\x0a" + length, "attribute": b"\x0a\x06\x2a" + length}
    refused(tmp_path, bombs[place] + b"rest")


def test_doubled_names_are_refused(tmp_path: Path) -> None:
    graph = tiny()
    graph.nodes.append(graph.nodes[-1])
    assert "twice" in refused(tmp_path, graph)
    graph = tiny()
    [node] = [node for node in graph.nodes if node.name == "conv/Conv2D"]
    once = node.to_bytes()
    attribute = once[once.rindex(b"\x2a") :]
    doubled = once[2:] + attribute if once[1] < 0x80 else once[3:] + attribute
    assert "twice" in refused(tmp_path, graphdef_file.field(1, doubled))


def test_too_many_nodes(tmp_path: Path) -> None:
    graph = GraphFile()
    for i in range(10_001):
        graph.node("NoOp", f"n{i}")
    assert "10,000" in refused(tmp_path, graph)


def test_too_many_inputs_and_numbers(tmp_path: Path) -> None:
    graph = GraphFile()
    graph.node("NoOp", "n", *["x"] * 1001)
    refused(tmp_path, graph)
    graph = GraphFile()
    graph.node("NoOp", "n", strides=[1] * 1001)
    refused(tmp_path, graph)


def test_a_file_that_is_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphdef, "MOST_BYTES", 1000)
    assert "too large" in refused(tmp_path, tiny())


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"no graph",
        graphdef_file.field(1, graphdef_file.field(1, b"name")),  # no operation
        graphdef_file.field(1, b"\x0a\x01\xff\x12\x01x"),  # a name that is not UTF-8
        graphdef_file.field(1, b"\x08\x01"),  # a number in place of the name
        graphdef_file.field(2, b"function"),
        graphdef_file.field(9, b""),
    ],
)
def test_other_files_are_refused(tmp_path: Path, content: bytes) -> None:
    refused(tmp_path, content)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactRefused, match=r"graph\.pb"):
        read_graph(tmp_path / "graph.pb")
