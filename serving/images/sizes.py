"""The schedule of a request, from its schedule, or from its size and steps."""

from __future__ import annotations

from flexvar_runtime import ScaleSchedule
from flexvar_runtime.editing.canvas import check_sides
from flexvar_runtime.errors import InvalidInput

from ..errors import HTTPError, blame, conflict
from .fields import Fields
from .model import Model


def parse_schedule(model: Model, fields: Fields, start: ScaleSchedule, edits: bool) -> tuple[ScaleSchedule, str]:
    """The schedule that the fields name, and the field that decides it. That of an edit is only near it, because the
    picture has its own proportions. Raises HTTPError."""
    factor = model.manifest.model.downsampling
    sized = fields.size is not None and fields.size != "auto"
    if fields.schedule is not None:
        if fields.steps is not None or (sized and not edits):
            raise conflict("schedule", "steps or size")
        with blame("schedule"):
            return ScaleSchedule.parse(fields.schedule), "schedule"
    last, param = start[-1], "schedule" if fields.preset is None else "preset"
    if fields.steps is not None:
        param = "steps"
    if sized:
        height, width = parse_pixels(model, fields.size or "")
        last, param = (height // factor, width // factor), "size"
    if last == start[-1] and fields.steps in (None, len(start)):
        return start, param
    require_tokens(model, last[0] * last[1], param)
    with blame("steps"):
        steps = len(start) if fields.steps is None else fields.steps
        return ScaleSchedule.for_size(last, steps, max(model.defaults.schedule[-1])), param


def parse_pixels(model: Model, size: str) -> tuple[int, int]:
    """(height, width) of a size in OpenAI's form, width x height. Raises HTTPError."""
    width, height = map(int, size.split("x"))
    factor = model.manifest.model.downsampling
    try:
        check_sides((height, width), factor)
    except InvalidInput:
        got = f"size is {size}, but width and height must be multiples of {factor}. {model.largest_text}"
        raise HTTPError(400, got, "invalid_value", "size") from None
    return height, width


def require_tokens(model: Model, tokens: int, param: str) -> None:
    if tokens > model.max_tokens:
        got = f"The scales of the image have {tokens:,} tokens together, but this service allows {model.max_tokens:,}."
        raise HTTPError(413, f"{got} {model.largest_text}", "too_large", param)
