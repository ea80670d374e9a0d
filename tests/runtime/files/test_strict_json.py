"""Strict JSON: what is declared comes back; everything else is refused, with its place and the caller's fix."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum

import pytest

from flexvar_runtime.checks import short
from flexvar_runtime.errors import ArtifactRefused
from flexvar_runtime.files.strict_json import decode, encode, loads

FIX = "Plant it again."


class Kind(StrEnum):
    OAK = "oak"
    ELM = "elm"


@dataclass(frozen=True, kw_only=True)
class Leaf:
    count: int
    ratio: float
    name: str | None


@dataclass(frozen=True, kw_only=True)
class Tree:
    flag: bool
    axes: tuple[str | int, ...]
    pair: tuple[float, float]
    leaves: dict[str, Leaf]
    names: tuple[str, ...] | None
    leaf: Leaf
    kind: Kind


LEAF = {"count": 1, "ratio": 0.5, "name": None}
TREE = {"flag": True, "axes": ["N", 3], "pair": [0.0, 1.0], "leaves": {"a": LEAF}, "names": ["x"], "leaf": LEAF}
TREE["kind"] = "elm"


def test_decode_then_encode_is_the_identity() -> None:
    tree = decode(Tree, TREE, where="t.json", fix=FIX)
    assert tree.kind is Kind.ELM
    assert tree.axes == ("N", 3)
    assert tree.leaves["a"] == Leaf(count=1, ratio=0.5, name=None)
    assert encode(tree) == TREE


def test_a_whole_number_is_a_float_where_a_float_is_declared() -> None:
    ratio = decode(Leaf, LEAF | {"ratio": 2}, where="t.json", fix=FIX).ratio
    assert type(ratio) is float
    assert ratio == 2.0


@pytest.mark.parametrize(
    ("change", "got", "expected"),
    [
        ({"flag": 1}, "t.json: flag is 1,", "true or false"),
        ({"leaf": LEAF | {"count": True}}, "t.json: leaf.count is True,", "an integer"),
        ({"leaf": LEAF | {"count": 1.0}}, "t.json: leaf.count is 1.0,", "an integer"),
        ({"leaf": LEAF | {"ratio": "1"}}, "t.json: leaf.ratio is '1',", "a finite number"),
        ({"leaf": LEAF | {"ratio": True}}, "t.json: leaf.ratio is True,", "a finite number"),
        ({"leaf": LEAF | {"ratio": math.nan}}, "t.json: leaf.ratio is nan,", "a finite number"),
        ({"leaf": LEAF | {"ratio": 10**400}}, "t.json: leaf.ratio is 1000", "a finite number"),
        ({"leaf": LEAF | {"name": 3}}, "t.json: leaf.name is 3,", "a string"),
        ({"leaf": LEAF | {"name": "\x1b[2J"}}, "t.json: leaf.name is '\\x1b[2J',", "text without control characters"),
        ({"leaf": LEAF | {"name": "\ud800"}}, "t.json: leaf.name is '\\ud800',", "text without control characters"),
        ({"leaf": LEAF | {"nmae": 3}}, "t.json: leaf has the unknown key 'nmae'", "only the keys count, ratio, name"),
        ({"leaf": {"count": 1, "ratio": 0.5}}, "t.json: leaf has no key 'name'", "the keys count, ratio, name"),
        ({"leaf": [1]}, "t.json: leaf is [1],", "an object"),
        ({"leaves": {"a b": 3}}, "t.json: leaves['a b'] is 3,", "an object"),
        ({"leaves": []}, "t.json: leaves is [],", "an object"),
        ({"axes": ["N", True]}, "t.json: axes[1] is True,", "a string or an integer"),
        ({"axes": "N"}, "t.json: axes is 'N',", "a list"),
        ({"pair": [0.0]}, "t.json: pair has length 1,", "length 2"),
        ({"names": {}}, "t.json: names is {},", "a list"),
        ({"kind": "leaf"}, "t.json: kind is 'leaf',", "one of oak, elm"),
        ({"extra": 0}, "t.json has the unknown key 'extra'", "only the keys flag, axes"),
    ],
)
def test_refusals_name_the_place(change: dict[str, object], got: str, expected: str) -> None:
    with pytest.raises(ArtifactRefused) as refusal:
        decode(Tree, TREE | change, where="t.json", fix=FIX)
    assert refusal.value.got.startswith(got)
    assert refusal.value.expected.startswith(expected)
    assert refusal.value.fix == FIX
    assert len(str(refusal.value)) < 300


def test_the_checks_of_a_class_are_reported_with_their_place() -> None:
    @dataclass(frozen=True)
    class Positive:
        n: int

        def __post_init__(self) -> None:
            if self.n <= 0:
                raise ArtifactRefused(f"n is {self.n}.", expected="n > 0", fix="Use more.")

    with pytest.raises(ArtifactRefused) as refusal:
        decode(Positive, {"n": -1}, where="t.json", fix=FIX)
    assert (refusal.value.got, refusal.value.expected, refusal.value.fix) == ("t.json: n is -1.", "n > 0", FIX)


def test_loads_refuses() -> None:
    for text, named in (
        ('{"a": 1, "b": {"c": 1, "c": 2}}', "'c' twice"),
        ('{"a": NaN}', "NaN"),
        ("[-Infinity]", "-Infinity"),
        ('{"a": 1', "Expecting"),
        ('{"a": 1} x', "Extra data"),
        (b'{"a": "\xff"}', "'utf-8' codec"),
        ('{"a": 1}'.encode("utf-16"), "'utf-8' codec"),
        (b"\xef\xbb\xbf{}", "UTF-8 BOM"),
        ("", "Expecting value"),
        ("1" * 5000, "Exceeds the limit"),
        ("[" * 10**6, "recursion depth"),
    ):
        with pytest.raises(ArtifactRefused, match=r"^t\.json ") as refusal:
            loads(text, where="t.json", fix=FIX)
        assert named in refusal.value.got and refusal.value.fix == FIX


def test_numbers_beyond_a_double_are_refused() -> None:
    document = loads('{"count": 1, "ratio": 1e999, "name": null}', where="t.json", fix=FIX)
    with pytest.raises(ArtifactRefused, match=r"ratio is inf"):
        decode(Leaf, document, where="t.json", fix=FIX)


def test_encode_refuses_what_json_cannot_say() -> None:
    with pytest.raises(ArtifactRefused, match="nan"):
        encode(Leaf(count=1, ratio=math.nan, name=None))
    with pytest.raises(TypeError, match="bytes"):
        encode({"a": b""})
    with pytest.raises(TypeError, match="dict"):
        encode({1: "a"})


def test_short_cuts_long_and_deep_values() -> None:
    deep: list[object] = []
    for _ in range(100_000):
        deep = [deep]
    assert len(short(deep)) <= 80
    assert len(short("x" * 10**6)) <= 80
    assert short("\x1b[0m") == r"'\x1b[0m'"
