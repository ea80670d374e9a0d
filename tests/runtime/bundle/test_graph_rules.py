"""A graph that could harm is refused before a library reads it."""

from __future__ import annotations

from pathlib import Path

import pytest
from onnx_bytes import field, model, node, plain_graph

from flexvar_runtime import ArtifactRefused
from flexvar_runtime.bundle.graph_rules import NODES, NODES_A_BLOCK, check_graph
from flexvar_runtime.model.tensors import GraphSpec, TensorSpec

SPEC = GraphSpec(
    file="decode.onnx",
    inputs=(TensorSpec(name="tokens", dtype="int32", axes=("images", "height", "width")),),
    outputs=(TensorSpec(name="image", dtype="float32", axes=("images", 3, "h", "w")),),
)
DEPTH = 2
SIZES = {"decode.onnx": 1000, "decode.onnx.data": 64}


def packed(values: list[int]) -> bytes:
    return b"".join(field(0, value % 2**64)[1:] for value in values)


def tensor(name: str, shape: list[int], kind: int = 1, **entries: object) -> bytes:
    """A constant; with entries, in another file."""
    external = [field(13, field(1, key.encode()) + field(2, str(text).encode())) for key, text in entries.items()]
    where = [*external, field(14, 1)] if entries else []
    return b"".join([field(1, packed(shape)), field(2, kind), field(8, name.encode()), *where])


def integers(name: str, values: list[int]) -> bytes:
    return b"".join([field(1, packed([len(values)])), field(2, 7), field(7, packed(values)), field(8, name.encode())])


def constant(part: bytes) -> bytes:
    return field(5, part)


def check(folder: Path, content: bytes) -> None:
    (folder / "decode.onnx").write_bytes(content)
    check_graph(folder / "decode.onnx", SPEC, SIZES, DEPTH)


def refusal(folder: Path, content: bytes) -> str:
    with pytest.raises(ArtifactRefused) as refused:
        check(folder, content)
    assert refused.value.exit_code == 5 and refused.value.got.startswith("decode.onnx ")
    return refused.value.got


GOOD = {"location": "decode.onnx.data", "offset": 16, "length": 48}


@pytest.mark.parametrize("entries", [GOOD, GOOD | {"checksum": "ab"}, {"location": "decode.onnx.data", "length": 48}])
def test_weights_inside_their_file(tmp_path: Path, entries: dict[str, object]) -> None:
    check(tmp_path, plain_graph(SPEC, constant(tensor("w", [3, 4], **entries))))


@pytest.mark.parametrize(
    "entries",
    [
        *(
            GOOD | {"location": name}
            for name in (
                *("*/_ORT_MEM_ADDR_/*", "/etc/passwd", "../secret", "engines/w.bin", "a/../engines/w.bin"),
                *("step.onnx.data", "./decode.onnx.data", ""),
            )
        ),
        *(GOOD | {"offset": text} for text in (17, -1, "0x10", "1e1", " 16", "١٦", 2**63, "")),
        *(GOOD | {"length": text} for text in (47, 49, -48, 2**62, "")),
        {"location": "decode.onnx.data", "offset": 0},
        GOOD | {"basepath": "/tmp"},
    ],
)
def test_weights_elsewhere(tmp_path: Path, entries: dict[str, object]) -> None:
    assert "the weight 'w'" in refusal(tmp_path, plain_graph(SPEC, constant(tensor("w", [3, 4], **entries))))


def test_weights_whose_place_is_not_clear(tmp_path: Path) -> None:
    external = tensor("w", [3, 4], **GOOD)
    twice = external + field(13, field(1, b"location") + field(2, b"/etc/passwd"))
    for part in (twice, external + field(14, 0), external + field(14, 2), tensor("w", [3, 4]) + field(14, 1)):
        refusal(tmp_path, plain_graph(SPEC, constant(part)))
    attribute = field(5, field(1, b"value") + field(5, tensor("w", [3, 4], location="/etc/passwd", length=48)))
    refusal(tmp_path, plain_graph(SPEC, node("Constant", [], ["k"], attribute)))


@pytest.mark.parametrize("operator", ["Loop", "Scan", "If", "SequenceMap", "RandomNormal", "RandomUniformLike"])
def test_operators_that_loop_branch_or_draw(tmp_path: Path, operator: str) -> None:
    assert operator in refusal(tmp_path, plain_graph(SPEC, node(operator, ["tokens"], ["x"])))


@pytest.mark.parametrize("domain", ["com.microsoft", "ai.onnx.ml", "org.openvinotoolkit", "f"])
def test_operators_of_others(tmp_path: Path, domain: str) -> None:
    assert domain in refusal(tmp_path, plain_graph(SPEC, node("Add", ["tokens"], ["x"], field(7, domain.encode()))))
    assert domain in refusal(tmp_path, plain_graph(SPEC) + field(8, field(1, domain.encode()) + field(2, 1)))


@pytest.mark.parametrize("number", [6, 11, 22, 23])
def test_graphs_and_sparse_tensors_in_attributes(tmp_path: Path, number: int) -> None:
    hidden = field(5, field(1, b"body") + field(number, field(2, b"inner")))
    refusal(tmp_path, plain_graph(SPEC, node("Add", ["tokens"], ["x"], hidden)))


@pytest.mark.parametrize("number", [1, 2, 4, 7])
def test_numbers_in_the_place_of_texts(tmp_path: Path, number: int) -> None:
    """Other readers ignore them, and use the text before."""
    part = node("RandomNormal", ["tokens"], ["x"], field(7, b"f"), field(number, 0))
    assert "a number where" in refusal(tmp_path, plain_graph(SPEC, part))


@pytest.mark.parametrize("number", [20, 25, 26])
def test_training_functions_and_devices(tmp_path: Path, number: int) -> None:
    refusal(tmp_path, plain_graph(SPEC) + field(number, field(1, b"F")))
    refusal(tmp_path, plain_graph(SPEC, field(15, b"")))  # sparse weights


@pytest.mark.parametrize("operator", ["ConstantOfShape", "Expand", "Tile", "Range", "MatMul"])
def test_what_is_computed_while_loading(tmp_path: Path, operator: str) -> None:
    more = constant(integers("n", [8])), node(operator, ["n", "n"], ["big"])
    assert "computes on constants" in refusal(tmp_path, plain_graph(SPEC, *more))
    value = field(5, field(1, b"value") + field(5, integers("", [8])))
    for through in (node("Constant", [], ["k"], value), node("Shape", ["image"], ["k"]), node("Size", ["x"], ["k"])):
        assert "computes on constants" in refusal(tmp_path, plain_graph(SPEC, through, node(operator, ["k"], ["big"])))
    check(tmp_path, plain_graph(SPEC, *more[:1], node(operator, ["tokens", "n"], ["big"])))


@pytest.mark.parametrize("number", [2, 3, 4, 7, 8])
def test_constants_that_are_no_tensors(tmp_path: Path, number: int) -> None:
    """Their numbers are not checked."""
    part = field(5, field(1, b"value_ints") + field(number, 8))
    assert "without a tensor" in refusal(tmp_path, plain_graph(SPEC, node("Constant", [], ["k"], part)))


@pytest.mark.parametrize("kind", [1, 10, 11, 16, 2**32 + 7])
def test_sizes_that_are_cast(tmp_path: Path, kind: int) -> None:
    more = constant(tensor("n", [1], kind) + field(9, bytes(4))), node("Cast", ["n"], ["k"])
    refusal(tmp_path, plain_graph(SPEC, *more))
    for other in (integers("n", [8]), tensor("n", [65])):
        check(tmp_path, plain_graph(SPEC, constant(other), node("Cast", ["n"], ["k"])))


@pytest.mark.parametrize("axes", [[2**14, 2**14, 2**14], [0, 0, 16], [0, 0], []])
def test_sizes_of_inputs(tmp_path: Path, axes: list[int]) -> None:
    """0: a size that may change. The manifest says which. Memory for the others is taken while the graph is loaded."""

    def graph(sizes: list[int], parts: int) -> bytes:
        dims = [field(1, field(1, size) if size else field(2, b"n")) for size in sizes]
        kinds = [field(1, 6), *(field(2, b"".join(dims[first::parts])) for first in range(parts))]
        return plain_graph(SPEC, types={"tokens": b"".join(field(2, field(1, part)) for part in kinds)})

    for parts in (1, 2):  # the format allows that a message comes in parts
        check(tmp_path, graph([0, 0, 0], parts))
        assert "the input 'tokens' of shape" in refusal(tmp_path, graph(axes, parts))


@pytest.mark.parametrize("high", [2**29, 2**32, 2**60])
@pytest.mark.parametrize("number", [13, 14])
def test_field_numbers_that_some_readers_cut(tmp_path: Path, number: int, high: int) -> None:
    place = field(1, b"location") + field(2, b"*/_ORT_MEM_ADDR_/*")
    part = field(number + high, place if number == 13 else 1)
    assert "field" in refusal(tmp_path, plain_graph(SPEC, constant(tensor("w", [3]) + part)))


@pytest.mark.parametrize("number", [2, 14])
@pytest.mark.parametrize("value", [2**32 + 1, 2**31, 2**64 - 1])
def test_numbers_that_some_readers_cut(tmp_path: Path, number: int, value: int) -> None:
    refusal(tmp_path, plain_graph(SPEC, constant(tensor("w", [3, 4], **GOOD) + field(number, value))))


@pytest.mark.parametrize("number", [3, 15, 17, 99])
def test_unknown_parts_of_tensors_and_attributes(tmp_path: Path, number: int) -> None:
    assert f"a tensor has the field {number}" in refusal(
        tmp_path, plain_graph(SPEC, constant(tensor("w", [3]) + field(number, b"")))
    )
    attribute = field(5, field(1, b"a") + field(number + 11, b""))
    refusal(tmp_path, plain_graph(SPEC, node("Add", ["tokens"], ["x"], attribute)))
    place = field(13, field(1, b"location") + field(number, b""))
    refusal(tmp_path, plain_graph(SPEC, constant(tensor("w", [3]) + place + field(14, 1))))


@pytest.mark.parametrize("version", [101, 2**31 - 1, 2**64 - 1])
@pytest.mark.parametrize("domain", [b"", b"ai.onnx"])
def test_versions_of_the_far_future(tmp_path: Path, domain: bytes, version: int) -> None:
    assert "version" in refusal(tmp_path, plain_graph(SPEC) + field(8, field(1, domain) + field(2, version)))


@pytest.mark.parametrize(
    "part",
    [
        field(3, 2**40),
        field(3, 2**64 - 2**40),
        field(8, 2**21),
        field(8, packed([1, 2**62])),
        field(8, packed([1] * 65)),
        field(8, 1) * 65,
    ],
)
def test_attributes_with_huge_numbers(tmp_path: Path, part: bytes) -> None:
    def graph(numbers: bytes) -> bytes:
        return plain_graph(SPEC, node("Split", ["tokens"], ["x"], field(5, field(1, b"num_outputs") + numbers)))

    assert "an attribute has too many" in refusal(tmp_path, graph(part))
    check(tmp_path, graph(field(3, 2) + field(8, packed([-1, 2, 3]))))


@pytest.mark.parametrize("part", [field(1, b""), field(5, b""), field(13, b"")])
def test_graphs_of_very_many_parts(tmp_path: Path, part: bytes) -> None:
    assert "more than 10,000" in refusal(tmp_path, plain_graph(SPEC, part * 2_000_000))


def test_more_nodes_than_a_model_needs(tmp_path: Path) -> None:
    most = NODES + NODES_A_BLOCK * DEPTH
    part = node("Identity", ["tokens"], ["x"])
    check(tmp_path, plain_graph(SPEC, part * (most - 1)))
    assert f"has {most + 1:,} nodes" in refusal(tmp_path, plain_graph(SPEC, part * most))


def test_numbers_without_end(tmp_path: Path) -> None:
    """Reading stops early, because they take time and memory."""
    assert "axes" in refusal(tmp_path, plain_graph(SPEC, constant(field(1, b"\1" * 8 * 10**6))))
    check(tmp_path, plain_graph(SPEC, constant(tensor("n", [8 * 10**6], 7) + field(7, b"\1" * 8 * 10**6))))
    with (tmp_path / "decode.onnx").open("wb") as file:
        file.truncate(3 * 2**30)
    with pytest.raises(ArtifactRefused, match="too large"):
        check_graph(tmp_path / "decode.onnx", SPEC, SIZES, DEPTH)


@pytest.mark.parametrize("values", [[2**30], [-(2**22)], [2**10, 2**10, 2**10], [2**40 - 2**63]])
def test_sizes_that_are_huge(tmp_path: Path, values: list[int]) -> None:
    huge = values if abs(values[0]) < 2**31 - 1 else [2**30]
    assert "the constant 'n'" in refusal(tmp_path, plain_graph(SPEC, constant(integers("n", huge))))


@pytest.mark.parametrize("values", [[2**63 - 1], [2**31 - 1, 0], [-1, 32, 16], [4096]])
def test_sizes_that_are_common(tmp_path: Path, values: list[int]) -> None:
    check(tmp_path, plain_graph(SPEC, constant(integers("n", values))))


@pytest.mark.parametrize(
    "content",
    [
        b"<?xml version='1.0'?><net name='decode' version='11'></net>",
        b"\n<net name='decode' version='11'>" + b" " * 40,
        b"\x1c\x00\x00\x00TFL3" + bytes(64),
        b"\x80\x02}q\x00.",
    ],
)
def test_formats_of_other_libraries(tmp_path: Path, content: bytes) -> None:
    assert "cannot be read as ONNX" in refusal(tmp_path, content)


def test_other_inputs_and_outputs(tmp_path: Path) -> None:
    whole = plain_graph(SPEC)
    other = field(12, field(1, b"image")), field(11, field(1, b"more")), field(12, field(1, b"more"))
    for more in other:
        refusal(tmp_path, plain_graph(SPEC, more))
    refusal(tmp_path, whole.replace(b"image", b"photo"))
    refusal(tmp_path, model(b""))


def test_negative_sizes(tmp_path: Path) -> None:
    assert "the constant 'w'" in refusal(tmp_path, plain_graph(SPEC, constant(tensor("w", [4, -1]))))
