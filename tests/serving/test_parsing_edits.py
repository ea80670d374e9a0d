"""From the form of an edit to an order. Values of a form are text. Every refusal names the field at fault."""

from __future__ import annotations

from dataclasses import replace

import pytest

pytest.importorskip("fastapi", reason="needs the extra serve")

from flexvar_runtime import Guidance
from flexvar_runtime.bundle.manifest import Manifest
from flexvar_runtime.model.guidance import UNGUIDED
from flexvar_runtime.model.presets import PRESETS
from flexvar_serving.errors import HTTPError
from flexvar_serving.images.encoding import Output
from flexvar_serving.images.fields import EditFields
from flexvar_serving.images.model import Model
from flexvar_serving.images.parsing import Wanted, parse_edit, parse_form, parse_order
from flexvar_serving.scheduling.orders import Order
from flexvar_serving.workers.messages import EditJob


@pytest.fixture
def model(manifest: Manifest) -> Model:
    """A tiny model: classes 0 to 2, null class 3, 4 pixels a token, 12 x 20 pixels (h x w), at most 80 tokens."""
    return Model.of("tiny", manifest, None, None)


def wanted(model: Model, /, mask: bytes | None = None, **values: str) -> Wanted:
    fields = parse_form(EditFields, values)
    return parse_order(model, fields, edit=parse_edit(model, fields, b"picture", mask))


def order(model: Model, /, mask: bytes | None = None, **values: str) -> Order:
    return wanted(model, mask, **values).order


def job(model: Model, /, mask: bytes | None = None, **values: str) -> EditJob:
    edit = order(model, mask, **values).edit
    assert edit is not None
    return edit


def refusal(model: Model, /, mask: bytes | None = None, **values: str) -> tuple[int, str, str | None]:
    with pytest.raises(HTTPError) as error:
        wanted(model, mask, **values)
    assert len(str(error.value)) < 1000
    return error.value.status, error.value.code, error.value.param


def test_values_of_a_form_are_text(model: Model) -> None:
    values = {"prompt": "cat", "n": "3", "top_k": "5", "top_p": "0.5", "guidance": "1.5", "seed": str(2**64 - 1)}
    found = wanted(model, **values, output_format="jpeg", output_compression="0", user="me")
    assert (found.order.images, found.order.seed, found.order.guidance.scale) == (3, 2**64 - 1, 1.5)
    assert (found.order.sampling.top_k, found.order.sampling.top_p) == (5, 0.5)
    assert (found.output, found.user, found.order.streamed) == (Output("jpeg", 0), "me", False)
    shown = order(model, prompt="cat", stream="true", partial_images="2")
    assert (shown.streamed, shown.previews) == (True, 2)
    assert order(model, prompt="cat", n="", seed="7", size="", task="", sides="") == order(
        model, prompt="cat", seed="7"
    )  # empty text means that a field was left out


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("n", text) for text in ("abc", "0", "11", "1.5")),
        *(("strength", text) for text in ("abc", "nan", "1e999")),
        *(("guidance", text) for text in ("abc", "nan", "-1")),
        *(("seed", text) for text in (str(2**64), "-1", "9" * 5000)),
        *(("sides", text) for text in ("1,2,3", "1,2,3,4,5", "1,2,3,-4", "1, 2, 3, 4")),
        *(("size", text) for text in ("18x24", "24")),
        *(("stream", "maybe"), ("paste", "2"), ("top_p", "inf"), ("first_index", "0x1"), ("feather", "9" * 5000)),
        *(("task", "paint"), ("anchor", "middle"), ("fit", "stretch"), ("preset", "x"), ("class_id", "4")),
        *(("steps", "0"), ("quality", "hd"), ("output_format", "gif"), ("output_compression", "50")),
    ],
    ids=lambda value: ascii(value)[:30],
)
def test_values_that_are_refused(model: Model, name: str, value: str) -> None:
    assert refusal(model, **{name: value}) == (400, "invalid_value", name)


def test_unknown_fields(model: Model) -> None:
    for name in ("promt", "image", "masks", "input_fidelity", "x" * 10_000):
        assert refusal(model, **{name: "x"}) == (400, "unknown_field", name)


def test_what_an_edit_is(model: Model) -> None:
    plain = order(model, prompt="cat", seed="7")
    assert plain.edit == EditJob(image=b"picture", mask=None, task=None, steps=None)
    assert plain.schedule is None and plain.forecast_schedule == model.defaults.schedule  # the picture decides
    assert plain.alone and plain.max_tokens == 80
    assert job(model, b"mask", paste="true", feather="8", fit="pad") == EditJob(
        image=b"picture", mask=b"mask", task="inpaint", steps=None, options={"paste": True, "feather": 8, "fit": "pad"}
    )
    assert job(model, task="refine", strength="0.5", steps="4").options == {"strength": 0.5}
    assert job(model, task="refine", steps="4").steps == 4
    outpaint = job(model, task="outpaint", sides="1,2,3,4", paste="false")
    assert outpaint.options == {"sides": (1, 2, 3, 4), "paste": False}
    expand = job(model, task="expand", size="24x16", anchor="left")
    assert expand.options == {"size": (16, 24), "anchor": "left"}  # (height, width)
    assert job(model, size="auto").options == {}
    assert str(order(model, prompt="cat", schedule="1_2_4", size="16x16").schedule) == "1_2_4"


def test_an_edit_without_a_class_has_no_guidance_unless_it_is_given(model: Model) -> None:
    for values in ({}, {"prompt": ""}, {"prompt": "  "}, {"class_id": "3"}, {"preset": "sar-d24"}):
        found = order(model, **values)
        assert (found.label, found.guidance) == (3, UNGUIDED)
    assert order(model, prompt="", guidance="1.5").guidance == Guidance(1.5, "ramp", 16)
    assert order(model, prompt="Volcano").label == 2
    assert order(model, prompt="cat").guidance == Guidance(2.5, "ramp", 16)
    assert order(model, prompt="cat", preset="sar-d24").guidance == PRESETS["sar-d24"].guidance
    assert refusal(model, prompt="dog") == (400, "unknown_class", "prompt")


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"task": "refine", "sides": "1,2,3,4"}, "sides"),
        ({"task": "outpaint", "sides": "4,4,4,4", "strength": "0.5"}, "strength"),
        ({"task": "inpaint", "strength": "0.5"}, "strength"),
        ({"task": "inpaint", "anchor": "top"}, "anchor"),
        ({"task": "refine", "paste": "true"}, "paste"),
        ({"task": "expand", "size": "24x16", "fit": "pad"}, "fit"),
        ({"sides": "1,2,3,4"}, "sides"),
        ({"anchor": "top"}, "anchor"),
        ({"task": "refine", "strength": "1.5"}, "strength"),
        ({"task": "inpaint", "feather": "8"}, "feather"),
        ({"task": "inpaint", "paste": "true", "feather": "-1"}, "feather"),
        ({"task": "inpaint", "paste": "true", "feather": "1025"}, "feather"),
        ({"schedule": "1_2_4", "steps": "3"}, "steps"),
        ({"partial_images": "1"}, "partial_images"),
        ({"stream": "true", "n": "2"}, "n"),
    ],
)
def test_options_that_do_not_go_together(model: Model, values: dict[str, str], named: str) -> None:
    assert refusal(model, **values) == (400, "invalid_value", named)


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"task": "outpaint"}, "sides"),
        ({"task": "outpaint", "sides": "0,0,0,0"}, "sides"),
        ({"task": "expand"}, "size"),
    ],
)
def test_options_that_a_task_needs(model: Model, values: dict[str, str], named: str) -> None:
    assert refusal(model, **values) == (400, "missing_value", named)


def test_a_mask_is_for_inpainting(model: Model) -> None:
    for values in ({"task": "refine"}, {"task": "outpaint", "sides": "4,4,4,4"}, {"task": "expand", "size": "24x16"}):
        assert refusal(model, b"mask", **values) == (400, "invalid_value", "mask")
    assert refusal(model, b"mask", strength="0.5") == (400, "invalid_value", "strength")
    assert job(model, b"mask", task="inpaint").task == job(model, b"mask").task == "inpaint"


def test_the_tokens_of_all_scales_of_an_edit_count(manifest: Manifest) -> None:
    model = Model.of("tiny", replace(manifest, defaults=replace(manifest.defaults, schedule="1_2_4")), None, 101)
    assert job(model, size="32x32", steps="3").steps == 3  # 101 tokens
    assert order(model, size="16x16").schedule is None  # the default's own size takes its 21 tokens
    too_large = (413, "too_large")
    assert refusal(model, size="44x44") == (*too_large, "size")  # 121 tokens
    assert refusal(model, size="32x32", steps="16") == (*too_large, "size")
    assert refusal(model, size="512x512") == (*too_large, "size")
    assert refusal(model, schedule="1_11") == (*too_large, "schedule")
    assert refusal(Model.of("tiny", model.manifest, None, 25), steps="16") == (*too_large, "steps")
