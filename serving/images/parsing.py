"""From the fields of a request to an order. Every value is checked here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import Any, TypeVar

from pydantic import ValidationError

from flexvar_runtime import FlexVARError, Guidance
from flexvar_runtime.checks import check_index, check_seed, shown
from flexvar_runtime.editing.options import Edit
from flexvar_runtime.errors import InvalidInput
from flexvar_runtime.files.strict_json import loads
from flexvar_runtime.model.guidance import UNGUIDED
from flexvar_runtime.model.noise import fresh_seed
from flexvar_runtime.model.presets import preset
from flexvar_runtime.request import RequestDefaults

from ..errors import HTTPError, blame, conflict, of_field
from ..schedules import nearest_allowed, not_allowed
from ..scheduling.orders import Order
from ..workers.messages import EditJob
from .classes import parse_class
from .encoding import Output
from .fields import EditFields, Fields
from .model import Model
from .sizes import parse_pixels, parse_schedule, require_tokens

F = TypeVar("F", bound=Fields)
_WHOLE_64 = "it must be a whole number from 0 to 18446744073709551615, as a number or as text"
_FORMS = {
    "size": "it must be auto, or width x height in pixels such as 96x64",
    "sides": "it must be the pixels to add above, right, below and left, such as 0,16,0,16",
    "seed": _WHOLE_64,
    "first_index": _WHOLE_64,
}
"""What the fields that have a form of their own must be."""
_KINDS = {
    **dict.fromkeys(("bool_type", "bool_parsing"), "it must be true or false"),
    **dict.fromkeys(("int_type", "int_parsing", "int_from_float"), "it must be a whole number"),
    **dict.fromkeys(("float_type", "float_parsing"), "it must be a number such as 0.5"),
    "string_type": "it must be text",
}
"""What a value of the wrong kind must be."""


@dataclass(frozen=True)
class Wanted:
    """A request: its order, the form of its images, and what goes to the log."""

    order: Order
    output: Output
    user: str | None


def parse_json(kind: type[F], body: bytes) -> F:
    """The fields in a JSON body. Raises HTTPError for bad JSON, NaN, keys that come twice, and wrong fields."""
    try:
        document = loads(body, where="The body", fix="Send one JSON object.")
    except FlexVARError as error:
        raise HTTPError(400, str(error), "invalid_json") from error
    if not isinstance(document, dict):
        raise HTTPError(400, "The body is not a JSON object. Send one JSON object.", "invalid_json")
    return _validated(kind, document, strict=True)


def parse_form(kind: type[F], values: Mapping[str, str]) -> F:
    """The fields of a form, whose values are text. Empty text means that a field was left out, except for prompt."""
    given = {name: value for name, value in values.items() if value or name == "prompt"}
    return _validated(kind, given, strict=False)


def _validated(kind: type[F], values: Mapping[str, Any], *, strict: bool) -> F:
    try:
        return kind.model_validate(values, strict=strict)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = str(first["loc"][0]) if first["loc"] else None
        if first["type"] == "extra_forbidden":
            close = get_close_matches(str(name), kind.model_fields, n=1, cutoff=0.75)
            hint = f"Did you mean {close[0]}?" if close else f"The fields are {', '.join(kind.model_fields)}."
            raise HTTPError(400, f"The field {shown(name)} is not known. {hint}", "unknown_field", name) from None
        reason = _FORMS.get(name or "") or _KINDS.get(first["type"]) or first["msg"]
        reason = reason.replace("Input should", "it must").replace("String should", "it must")
        got = f"{name or 'The name of a field'} is {shown(first['input'])}, but {reason[:1].lower()}{reason[1:]}."
        raise HTTPError(400, got, "invalid_value", name) from None


def parse_order(model: Model, fields: Fields, *, exact: bool = False, edit: EditJob | None = None) -> Wanted:
    """The order of a request. edit: from `parse_edit`. Raises HTTPError."""
    if fields.model is not None and fields.model != model.name:
        got = f"There is no model {shown(fields.model)}. This service has {model.name!r}."
        raise HTTPError(404, got, "model_not_found", "model")
    images, streamed = fields.n or 1, bool(fields.stream)
    if streamed and images > 1:
        raise HTTPError(
            400, "stream works for one image at a time. Leave out n, or send stream false.", "invalid_value", "n"
        )
    if fields.partial_images and not streamed:
        got = "partial_images needs stream. Send stream true, or leave out partial_images."
        raise HTTPError(400, got, "invalid_value", "partial_images")
    label = parse_class(model, fields, edit is not None)
    start = model.start
    if fields.preset is not None:
        with blame("preset"):
            chosen = preset(fields.preset)
        start = RequestDefaults(chosen.schedule, chosen.guidance, chosen.sampling)
        if edit is not None and edit.steps is None and fields.schedule is None:
            edit = replace(edit, steps=len(chosen.schedule))
    first_choice = start.schedule if edit is None else model.start.schedule  # an edit takes its size from the picture
    schedule, param = parse_schedule(model, fields, first_choice, edit is not None)
    require_tokens(model, schedule.tokens, param)
    if model.schedules is not None and param == "schedule" and schedule not in model.schedules:
        raise not_allowed(schedule, model.schedules, param)
    if edit is None:
        schedule = nearest_allowed(schedule, fields.steps, model.schedules, param)
    guidance, sampling = _guidance(model, fields, start.guidance, label, edit), start.sampling
    with blame("top_k"):
        sampling = sampling if fields.top_k is None else replace(sampling, top_k=fields.top_k)
    with blame("top_p"):
        sampling = sampling if fields.top_p is None else replace(sampling, top_p=fields.top_p)
    with blame("seed"):
        seed = fresh_seed() if fields.seed is None else check_seed(int(fields.seed))
    with blame("first_index"):
        first = 0 if fields.first_index is None else check_index(int(fields.first_index))
        check_index(first + images - 1)
    order = Order(
        label=label,
        images=images,
        seed=seed,
        first_index=first,
        schedule=schedule if edit is None or fields.schedule is not None else None,
        forecast_schedule=schedule,
        guidance=guidance,
        sampling=sampling,
        previews=fields.partial_images or 0,
        streamed=streamed,
        exact=exact,
        edit=edit,
        max_tokens=model.max_tokens,
    )
    return Wanted(order, Output.of(fields.output_format, fields.output_compression), fields.user)


def parse_edit(model: Model, fields: EditFields, image: bytes, mask: bytes | None) -> EditJob:
    """What to do with a picture. Its pixels are read later, by a worker. Raises HTTPError."""
    options: dict[str, Any] = {
        name: value
        for name in ("strength", "anchor", "fit", "paste", "feather")
        if (value := getattr(fields, name)) is not None
    }
    if fields.sides is not None:
        options["sides"] = tuple(map(int, fields.sides.split(",")))
    if fields.size is not None and fields.size != "auto":
        options["size"] = parse_pixels(model, fields.size)
    if fields.steps is not None and fields.schedule is not None:
        raise conflict("steps", "schedule")
    task = fields.task
    if mask is not None:
        if task not in (None, "inpaint"):
            raise HTTPError(
                400, f"mask cannot be used with task {task}. Leave out one of them.", "invalid_value", "mask"
            )
        task = "inpaint"
    if task == "expand" and "size" not in options:
        got = "task expand needs size. Send size as width x height in pixels, such as 320x192."
        raise HTTPError(400, got, "missing_value", "size")
    if task == "outpaint" and not any(options.get("sides", ())):
        got = "task outpaint needs sides. Send the pixels to add above, right, below and left, such as 0,16,0,16."
        raise HTTPError(400, got, "missing_value", "sides")
    try:
        Edit(**{**options, "task": task or _task_of(options)})
    except InvalidInput as error:
        option = error.got.partition(" ")[0]  # errors about one option begin with it
        raise of_field(error, option if option in options else "task") from error
    return EditJob(image=image, mask=mask, task=task, steps=fields.steps, options=options)


def _task_of(options: Mapping[str, Any]) -> str:
    """A task that may have these options: the picture decides between inpaint and refine."""
    return "refine" if "strength" in options else "inpaint"


def _guidance(model: Model, fields: Fields, start: Guidance, label: int, edit: EditJob | None) -> Guidance:
    """The guidance. As in the runtime, an edit without a class has none unless it is given."""
    if fields.guidance is None:
        return UNGUIDED if edit is not None and label == model.manifest.model.null_class else start
    with blame("guidance"):
        return replace(start, scale=fields.guidance)
