from __future__ import annotations

import math
from dataclasses import dataclass

import pytest

from flexvar_runtime.errors import ArtifactRefused
from flexvar_runtime.files.strict_json import decode, encode, loads, short


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


LEAF = {"count": 1, "ratio": 0.5, "name": None}
TREE = {"flag": True, "axes": ["N", 3], "pair": [0.0, 1.0], "leaves": {"a": LEAF}, "names": ["x"], "leaf": LEAF}


def test_decode_then_encode_is_the_identity() -> None:
    tree = decode(Tree, TREE, where="t.json")
    assert tree.axes == ("N", 3)
    assert tree.leaves["a"] == Leaf(count=1, ratio=0.5, name=None)
    assert encode(tree) == TREE


def test_a_whole_number_is_a_float_where_a_float_is_declared() -> None:
    ratio = decode(Leaf, LEAF | {"ratio": 2}, where="t.json").ratio
    assert type(ratio) is float
    assert ratio == 2.0


@pytest.mark.parametrize(
    ("change", "got", "expected"),
    [
        ({"flag": 1}, "t.json: flag = 1", "true or false"),
        ({"leaf": LEAF | {"count": True}}, "t.json: leaf.count = True", "an integer"),
        ({"leaf": LEAF | {"count": 1.0}}, "t.json: leaf.count = 1.0", "an integer"),
        ({"leaf": LEAF | {"ratio": "1"}}, "t.json: leaf.ratio = '1'", "a finite number"),
        ({"leaf": LEAF | {"ratio": True}}, "t.json: leaf.ratio = True", "a finite number"),
        ({"leaf": LEAF | {"ratio": math.nan}}, "t.json: leaf.ratio = nan", "a finite number"),
        ({"leaf": LEAF | {"ratio": math.inf}}, "t.json: leaf.ratio = inf", "a finite number"),
        ({"leaf": LEAF | {"ratio": 10**400}}, "t.json: leaf.ratio = 1000", "a finite number"),
        ({"leaf": LEAF | {"name": 3}}, "t.json: leaf.name = 3", "a string"),
        ({"leaf": LEAF | {"name": "\x1b[2J"}}, "t.json: leaf.name = '\\x1b[2J'", "text without control characters"),
        ({"leaf": LEAF | {"name": "\ud800"}}, "t.json: leaf.name = '\\ud800'", "text without control characters"),
        ({"leaf": LEAF | {"nmae": 3}}, "t.json: leaf: unknown key 'nmae'", "only the keys count, ratio, name"),
        ({"leaf": {"count": 1, "ratio": 0.5}}, "t.json: leaf: no key 'name'", "the keys count, ratio, name"),
        ({"leaf": [1]}, "t.json: leaf = [1]", "an object"),
        ({"leaves": {"a b": 3}}, "t.json: leaves['a b'] = 3", "an object"),
        ({"leaves": []}, "t.json: leaves = []", "an object"),
        ({"axes": ["N", True]}, "t.json: axes[1] = True", "a string or an integer"),
        ({"axes": ["N", None]}, "t.json: axes[1] = None", "a string or an integer"),
        ({"axes": "N"}, "t.json: axes = 'N'", "a list"),
        ({"pair": [0.0]}, "t.json: pair of length 1", "length 2"),
        ({"names": {}}, "t.json: names = {}", "a list"),
        ({"extra": 0}, "t.json: unknown key 'extra'", "only the keys flag, axes"),
    ],
)
def test_refusals_name_the_place(change: dict[str, object], got: str, expected: str) -> None:
    with pytest.raises(ArtifactRefused) as refusal:
        decode(Tree, TREE | change, where="t.json")
    assert refusal.value.got.startswith(got)
    assert refusal.value.expected.startswith(expected)
    assert "fix: copy the whole bundle again" in str(refusal.value)
    assert len(str(refusal.value)) < 300


def test_the_checks_of_a_class_are_reported_with_their_place() -> None:
    @dataclass(frozen=True)
    class Positive:
        n: int

        def __post_init__(self) -> None:
            if self.n <= 0:
                raise ArtifactRefused(f"n = {self.n}", expected="n > 0", fix="more")

    with pytest.raises(ArtifactRefused, match=r"^got t\.json: n = -1; expected n > 0; fix: more$"):
        decode(Positive, {"n": -1}, where="t.json")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1, "b": {"c": 1, "c": 2}}', "t.json: the key 'c' twice"),
        ('{"a": NaN}', "t.json: the constant NaN"),
        ("[-Infinity]", "t.json: the constant -Infinity"),
        ('{"a": 1', "t.json: Expecting"),
        ('{"a": 1} x', "t.json: Extra data"),
        (b'{"a": "\xff"}', "t.json: 'utf-8' codec"),
        ('{"a": 1}'.encode("utf-16"), "t.json: 'utf-8' codec"),
        (b"\xef\xbb\xbf{}", "t.json: Unexpected UTF-8 BOM"),
        ("", "t.json: Expecting value"),
        ("1" * 5000, "t.json: Exceeds the limit"),
        ("[" * 10**6, "t.json: maximum recursion depth"),
    ],
)
def test_loads_refuses(text: str | bytes, message: str) -> None:
    with pytest.raises(ArtifactRefused) as refusal:
        loads(text, where="t.json")
    assert refusal.value.got.startswith(message)


def test_numbers_beyond_a_double_are_refused() -> None:
    with pytest.raises(ArtifactRefused, match=r"ratio = inf; expected a finite number"):
        decode(Leaf, loads('{"count": 1, "ratio": 1e999, "name": null}', where="t.json"), where="t.json")


def test_encode_refuses_what_json_cannot_say() -> None:
    with pytest.raises(ArtifactRefused, match="got the number nan; expected a finite number"):
        encode(Leaf(count=1, ratio=math.nan, name=None))
    with pytest.raises(TypeError, match="bytes has no JSON form"):
        encode({"a": b""})
    with pytest.raises(TypeError, match="dict has no JSON form"):
        encode({1: "a"})


def test_short_cuts_long_and_deep_values() -> None:
    deep: list[object] = []
    for _ in range(100_000):
        deep = [deep]
    assert len(short(deep)) <= 80
    assert len(short("x" * 10**6)) <= 80
    assert short("\x1b[0m") == r"'\x1b[0m'"
