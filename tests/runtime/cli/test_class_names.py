"""Class names on the command line and in the API: with commas, in any case, and names that several classes have."""

from __future__ import annotations

from dataclasses import replace

import pytest

from flexvar_runtime import InvalidInput
from flexvar_runtime.cli.options import parse_labels
from flexvar_runtime.model.facts import ModelFacts
from flexvar_runtime.request import check_label

NAMES = (
    "tench, Tinca tinca",
    "crane",
    "tabby",
    "tabby cat",
    "Tabby, tabby cat",
    "Crane",
    "crane",
    "CAFÉ",
    "a, b, c",
    "a",
)


@pytest.mark.parametrize(
    ("text", "labels"),
    [
        ("tench, Tinca tinca", [0]),
        ("TENCH,tinca  TINCA , 3", [0, 3]),
        ("tabby, tabby cat,207", [4, 207]),
        ("tabby,tabby,tabby cat", [2, 4]),
        ("tabby cat, tabby", [3, 2]),
        ("a,a,b,c,a", [9, 8, 9]),
        ("a,b", None),
        ("Crane", [5]),
        ("café", [7]),
        ("crane", None),
        ("CRANE", None),
        ("7,999", [7, 999]),
        ("tench", None),
        ("", None),
        ("1,,2", None),
        ("9" * 30, None),
    ],
)
def test_the_longest_name_that_fits(text: str, labels: list[int] | None) -> None:
    """Numbers are labels. A name of exactly these letters comes before names in another case."""
    if labels is not None:
        assert parse_labels(text, NAMES) == labels
        return
    with pytest.raises(InvalidInput, match="--class "):
        parse_labels(text, NAMES, "--class")


def test_candidates_are_named() -> None:
    with pytest.raises(InvalidInput) as refusal:
        parse_labels("CRANE", NAMES)
    assert "1 'crane', 5 'Crane', 6 'crane'" in refusal.value.got and "1, 5, 6" in refusal.value.fix
    with pytest.raises(InvalidInput, match="'tench, Tinca tinca'"):
        parse_labels("tench", NAMES)


def test_many_names_take_no_time() -> None:
    """The names of ImageNet are a thousand, of several parts each."""
    names = tuple(f"kind {i}, sort {i}, form {i}" for i in range(1000))
    assert parse_labels(",".join(reversed(names)), names) == list(range(999, -1, -1))


@pytest.mark.parametrize(("label", "found"), [("TENCH, tinca tinca", 0), ("Crane", 5), ("Café", 7), (3, 3)])
def test_names_in_the_api(label: int | str, found: int) -> None:
    model = replace(ModelFacts.published(16), classes=10, class_names=NAMES, null_class=10)
    assert check_label(model, label) == found
    for ambiguous in ("crane", "CRANE"):
        with pytest.raises(InvalidInput, match=r"1, 5, 6|1, 6"):
            check_label(model, ambiguous)
