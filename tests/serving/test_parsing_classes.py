"""The class of a request: by name, by number, or none."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

pytest.importorskip("fastapi", reason="needs the extra serve")

from flexvar_runtime.bundle.manifest import Manifest
from flexvar_serving.errors import HTTPError
from flexvar_serving.images.fields import GenerationFields
from flexvar_serving.images.model import Model
from flexvar_serving.images.parsing import parse_json, parse_order


@pytest.fixture
def model(manifest: Manifest) -> Model:
    """Classes 0 to 2, which are cat, crème brûlée and volcano, and the null class 3."""
    return Model.of("tiny", manifest, None, None)


def label(model: Model, **fields: str | int | None) -> int:
    return parse_order(model, parse_json(GenerationFields, json.dumps(fields).encode())).order.label


def refused(model: Model, **fields: str | int | None) -> tuple[str, str | None, str]:
    """The code, the field at fault and the text of the refusal."""
    with pytest.raises(HTTPError) as refusal:
        label(model, **fields)
    assert refusal.value.status == 400 and len(str(refusal.value)) < 1000
    return refusal.value.code, refusal.value.param, str(refusal.value)


@pytest.mark.parametrize(
    ("prompt", "number"),
    [("cat", 0), ("CAT", 0), (" Cat\n", 0), ("CRÈME  Brûlée", 1), ("volcano", 2), ("0", 0), ("2", 2), ("3", 3)],
)
def test_classes_by_name_and_number(model: Model, prompt: str, number: int) -> None:
    assert label(model, prompt=prompt) == label(model, class_id=number) == label(model, class_id=number, prompt="")
    assert label(model, prompt=prompt) == number


@pytest.mark.parametrize(
    ("prompt", "hint"),
    [("vulcano", "volcano"), ("creme brulee", "crème brûlée"), ("4", "3"), ("-1", "3"), ("²", "cat"), ("9" * 999, "3")],
    ids=lambda value: ascii(value)[:30],
)
def test_unknown_classes(model: Model, prompt: str, hint: str) -> None:
    code, param, text = refused(model, prompt=prompt)
    assert (code, param) == ("unknown_class", "prompt") and hint in text


def test_a_number_that_is_no_class(model: Model) -> None:
    for number in (-1, 4, 10**4000):
        assert refused(model, class_id=number)[:2] == ("invalid_value", "class_id")
    assert refused(model, class_id=1, prompt="cat")[:2] == ("invalid_value", "class_id")


def test_a_class_must_be_named(model: Model) -> None:
    for fields in ({}, {"prompt": ""}, {"prompt": "  "}, {"prompt": None}, {"class_id": None}):
        assert refused(model, **fields)[:2] == ("missing_value", "prompt")


def named(manifest: Manifest, *names: str) -> Model:
    """A model with these names of classes, or with none."""
    return Model.of("tiny", replace(manifest, model=replace(manifest.model, class_names=names or None)), None, None)


def test_a_name_of_two_classes(manifest: Manifest) -> None:
    code, param, text = refused(named(manifest, "crane", "cat", "crane"), prompt="Crane")
    assert (code, param) == ("invalid_value", "prompt") and "0, 2" in text
    birds = named(manifest, "crane", "cat", "Crane")  # exactly these letters come first
    assert [label(birds, prompt=prompt) for prompt in ("crane", "Crane")] == [0, 2]
    assert refused(birds, prompt="CRANE")[:2] == ("invalid_value", "prompt")


def test_a_model_without_names(manifest: Manifest) -> None:
    assert label(named(manifest), prompt="1") == 1
    assert refused(named(manifest), prompt="cat")[:2] == ("unknown_class", "prompt")
