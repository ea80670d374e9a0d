"""From the fields of a request to an order. Every refusal names the field at fault."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="needs the extra serve")

from flexvar_runtime import Guidance, Sampling, ScaleSchedule
from flexvar_runtime.bundle.manifest import Manifest
from flexvar_runtime.model.presets import PRESETS
from flexvar_serving.errors import HTTPError
from flexvar_serving.images.encoding import Output
from flexvar_serving.images.fields import GenerationFields
from flexvar_serving.images.model import Model
from flexvar_serving.images.parsing import Wanted, parse_json, parse_order
from flexvar_serving.scheduling.orders import Order

INVALID = (400, "invalid_value")
TOO_LARGE = (413, "too_large")
WRONG_SEEDS = ["-1", '"-1"', "1.5", '"1.0"', "true", '""', str(2**64), f'"{2**64}"', "1" + "0" * 99, '"٣"', '"1\\n"']
REFUSED = {  # by field, as JSON
    "n": ['"2"', "1.0", "true", "0", "11", "-1", "[]", "1e400"],
    "stream": ["1", '"true"'],
    "partial_images": ["4", "-1"],
    "model": ["5"],
    "user": ["{}", f'"{"x" * 201}"'],
    "prompt": ["5.5", "true", '"\\ud800"', f'"{"x" * 1001}"'],
    "class_id": ['"1"', "true", "1.0", "-1", "4"],
    "guidance": ["true", '"2"', "-0.1", "1000.1", "1e400", "1" + "0" * 400],
    "top_k": ["-1", "1.5", "true"],
    "top_p": ["-0.1", "1.1", '"1"'],
    "size": ['"24"', '"16x16 "', '"16x16\\n"', '"16X16"', '"-4x4"', "256", '"24x18"', '"18x24"', '"0x4"', '"516x4"'],
    "steps": ["0", "65", "1", '"3"'],
    "schedule": ['"2_4"', '"1_2_"', "[1, 2]", '"1_129"'],
    "seed": WRONG_SEEDS,
    "first_index": WRONG_SEEDS,
    "response_format": ['"url"'],
    "output_format": ['"gif"', '["png"]'],
    "output_compression": ["101", "-1"],
    "quality": ['"hd"'],
    "background": ['"transparent"'],
    "preset": ['"none"', "1"],
}
CONFLICTS: list[tuple[dict[str, Any], str]] = [
    ({"schedule": "1_2_4", "steps": 3}, "schedule"),
    ({"schedule": "1_2_4", "size": "16x16"}, "schedule"),
    ({"class_id": 1, "prompt": "cat"}, "class_id"),
    ({"n": 2, "stream": True}, "n"),
    ({"partial_images": 1}, "partial_images"),
    ({"partial_images": 1, "stream": False}, "partial_images"),
    ({"output_compression": 50}, "output_compression"),
    ({"first_index": 2**64 - 1, "n": 2}, "first_index"),
]


@pytest.fixture
def model(manifest: Manifest) -> Model:
    """A tiny model: classes 0 to 2, null class 3, 4 pixels a token, 12 x 20 pixels (h x w), at most 80 tokens."""
    return Model.of("tiny", manifest, None, None)


def placed(model: Model, body: str, exact: bool = False) -> Wanted:
    return parse_order(model, parse_json(GenerationFields, body.encode()), exact=exact)


def wanted(model: Model, /, exact: bool = False, **fields: Any) -> Wanted:
    return placed(model, json.dumps({"prompt": "cat", **fields} if "class_id" not in fields else fields), exact)


def order(model: Model, /, **fields: Any) -> Order:
    return wanted(model, **fields).order


def refused(call: Callable[..., object], *arguments: Any, **options: Any) -> HTTPError:
    with pytest.raises(HTTPError) as refusal:
        call(*arguments, **options)
    assert len(str(refusal.value)) < 1000
    return refusal.value


def facts(error: HTTPError) -> tuple[int, str, str | None]:
    return error.status, error.code, error.param


# The body -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "body",
    [
        *(b"", b"{", b"[]", b"null", b'"cat"', b"{'n': 1}", b'{"n": NaN}', b'{"guidance": -Infinity}', b"\xff{}"),
        *(b'{"n": 1, "n": 1}', b'{"user": {"a": 1, "a": 2}}', b"[" * 15_000, b'{"n": 1' + b"0" * 5000 + b"}", b"{} {}"),
    ],
    ids=lambda value: ascii(value)[:30],
)
def test_bodies_that_are_not_an_object_in_json(body: bytes) -> None:
    assert facts(refused(parse_json, GenerationFields, body)) == (400, "invalid_json", None)


@pytest.mark.parametrize(("name", "hint"), [("promt", "prompt"), ("Seed", "seed"), ("zzz", "output_format")])
def test_unknown_fields(name: str, hint: str) -> None:
    for value in (1, None):
        error = refused(parse_json, GenerationFields, json.dumps({name: value}).encode())
        assert facts(error) == (400, "unknown_field", name) and hint in str(error)


def test_fields_of_edits_are_unknown_to_generations() -> None:
    for name in ("strength", "sides", "task", "mask", "model_config", "", "x" * 10_000):
        error = refused(parse_json, GenerationFields, json.dumps({name: "1"}).encode())
        assert facts(error) == (400, "unknown_field", name)
    broken = refused(parse_json, GenerationFields, b'{"\\ud800": 1}')
    assert facts(broken) == (*INVALID, None) and not str(broken).startswith("None")


@pytest.mark.parametrize(
    ("name", "value"),
    [(name, value) for name, values in REFUSED.items() for value in values],
    ids=lambda value: ascii(value)[:30],
)
def test_values_that_are_refused(model: Model, name: str, value: str) -> None:
    given = {"prompt": '""' if name == "class_id" else '"cat"', name: value}
    body = "{" + ", ".join(f'"{key}": {text}' for key, text in given.items()) + "}"
    error = refused(placed, model, body)
    assert facts(error) == (*INVALID, name)


@pytest.mark.parametrize(("fields", "named"), CONFLICTS)
def test_fields_that_exclude_each_other(model: Model, fields: dict[str, Any], named: str) -> None:
    assert facts(refused(wanted, model, **{"prompt": "cat", **fields})) == (*INVALID, named)


# What an order is -----------------------------------------------------------------------------------------------------


def test_a_plain_request_takes_the_defaults_of_the_bundle(model: Model) -> None:
    found = wanted(model)
    schedule, seed = ScaleSchedule.parse("1_2_3x5"), found.order.seed
    assert found.order == Order(
        label=0,
        images=1,
        seed=seed,
        first_index=0,
        schedule=schedule,
        forecast_schedule=schedule,
        guidance=Guidance(2.5, "ramp", 16),
        sampling=Sampling(900, 0.95, "upstream", 16),
        max_tokens=80,
    )
    assert (found.output, found.order.streamed, found.user) == (Output("png"), False, None)
    assert 0 <= seed < 2**64 and order(model).seed != seed  # a new one for each request
    null = dict.fromkeys(set(GenerationFields.model_fields) - {"prompt", "seed"})
    assert order(model, prompt="cat", seed=7, **null) == order(model, seed=7)  # null means that a field was left out


def test_every_field_arrives(model: Model) -> None:
    found = wanted(
        model, exact=True, n=10, seed=5, first_index=3, guidance=0, top_k=1, top_p=1, user="me", model="tiny"
    )
    assert (found.order.images, found.order.seed, found.order.first_index) == (10, 5, 3)
    assert (found.order.guidance, found.order.guided) == (Guidance(0, "ramp", 16), False)
    assert found.order.sampling == Sampling(1, 1.0, "upstream", 16)
    assert found.user == "me" and found.order.exact
    shown = wanted(model, stream=True, partial_images=2, output_format="webp", output_compression=30)
    assert (shown.order.streamed, shown.order.previews) == (True, 2)
    assert shown.output == Output("webp", 30)


def test_fields_of_openai_that_change_nothing(model: Model) -> None:
    plain = order(model, seed=7)
    for quality, background in (("auto", "auto"), ("standard", "opaque")):
        fields = {"quality": quality, "background": background, "size": "auto", "response_format": "b64_json"}
        assert order(model, seed=7, **fields, user="someone", partial_images=0, stream=False) == plain


def test_seeds_as_numbers_and_as_text(model: Model) -> None:
    for seed in (0, 7, 2**53 + 1, 2**64 - 1):  # a program that reads JSON numbers as doubles writes text
        assert order(model, seed=seed).seed == order(model, seed=str(seed)).seed == seed
        assert order(model, first_index=seed).first_index == order(model, first_index=str(seed)).first_index == seed
    assert order(model, first_index=2**64 - 2, n=2).first_index == 2**64 - 2


def test_the_name_of_the_model(model: Model) -> None:
    error = refused(wanted, model, model="gpt-image-1")
    assert facts(error) == (404, "model_not_found", "model") and "tiny" in str(error)


# Schedules and presets ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "schedule"),
    [
        ({"size": "24x16"}, ScaleSchedule.for_size((4, 6), 3, 5)),  # width x height
        ({"size": "12x20", "steps": 4}, ScaleSchedule.for_size((5, 3), 4, 5)),
        ({"steps": 2}, ScaleSchedule.for_size((3, 5), 2, 5)),
        ({"schedule": "1_4_2x3"}, ScaleSchedule.parse("1_4_2x3")),
        ({"schedule": "1", "size": "auto"}, ScaleSchedule.parse("1")),
    ],
)
def test_schedules(model: Model, fields: dict[str, Any], schedule: ScaleSchedule) -> None:
    assert order(model, **fields).schedule == order(model, **fields).forecast_schedule == schedule


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"size": "512x512"}, "size"),
        ({"size": "32x36"}, "size"),
        ({"schedule": "1_9"}, "schedule"),
        ({"preset": "flexvar-d16"}, "preset"),
        ({"preset": "flexvar-d16", "steps": 5}, "steps"),
    ],
)
def test_images_that_are_too_large(model: Model, fields: dict[str, Any], named: str) -> None:
    assert facts(refused(wanted, model, **fields)) == (*TOO_LARGE, named)


def test_the_limit_of_tokens(manifest: Manifest) -> None:
    """The tokens of all scales count."""
    assert order(Model.of("tiny", manifest, None, 20), schedule="1_2_3x5").schedule is not None
    for fields, named in (
        ({}, "schedule"),
        ({"schedule": "1_2_3x5"}, "schedule"),
        ({"size": "16x16", "steps": 9}, "size"),
    ):
        error = refused(wanted, Model.of("tiny", manifest, None, 19), **fields)
        assert facts(error) == (*TOO_LARGE, named)
    larger = Model.of("tiny", manifest, (ScaleSchedule.parse("1_2_8"),), None)
    assert larger.max_tokens == 4 * 69  # also of what --schedules names


def test_allowed_schedules(manifest: Manifest) -> None:
    allowed = tuple(map(ScaleSchedule.parse, ("1_2_3x5", "1_4")))
    model = Model.of("tiny", manifest, allowed, None)
    assert (order(model).schedule, order(model, schedule="1_4").schedule) == allowed
    for fields, named in (({"schedule": "1_3x5"}, "schedule"), ({"steps": 2}, "steps"), ({"size": "8x8"}, "size")):
        error = refused(wanted, model, **fields)
        assert facts(error) == (400, "schedule_not_allowed", named) and "1_4" in str(error)
    assert model.order == allowed[:1] and Model.of("tiny", manifest, allowed[1:], None).order == allowed[1:]
    assert order(Model.of("tiny", manifest, allowed[1:], None)).schedule == allowed[1]  # the default is not among them


def test_presets_and_fields_that_override_them(manifest: Manifest) -> None:
    model, preset = Model.of("tiny", manifest, None, 5000), PRESETS["sar-d24"]
    found = order(model, preset="sar-d24")
    assert (found.schedule, found.guidance, found.sampling) == (preset.schedule, preset.guidance, preset.sampling)
    changed = order(model, preset="sar-d24", guidance=1.5, top_k=5, schedule="1_2_4")
    assert changed.guidance == replace(preset.guidance, scale=1.5)
    assert changed.sampling == replace(preset.sampling, top_k=5) and str(changed.schedule) == "1_2_4"
    assert order(model, preset="sar-d24", size="64x32").schedule == ScaleSchedule.for_size((8, 16), 10, 5)
    assert "sar-d24" in str(refused(wanted, model, preset="SAR-D24"))
