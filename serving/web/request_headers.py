"""What the headers of a request ask for."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import TypeVar

from fastapi import Request

from flexvar_runtime.deadlines.choice import choose, seconds_of
from flexvar_runtime.errors import InvalidInput

from ..errors import HTTPError
from ..images.fields import Fields, GenerationFields
from ..images.parsing import Wanted
from ..scheduling.orders import Order
from .state import Service

F = TypeVar("F", bound=Fields)
_OUTPUTS = {"image/png": "png", "image/jpeg": "jpeg", "image/webp": "webp"}


def accepted_picture(request: Request) -> str | None:
    """The image type that the client asks for in Accept; "image/*" for any. None if it takes JSON."""
    kinds = [part.partition(";")[0].strip().lower() for part in request.headers.get("accept", "").split(",")]
    if {"application/json", "application/*", "*/*"} & set(kinds):
        return None
    return next((kind for kind in kinds if kind == "image/*" or kind in _OUTPUTS), None)


def with_accepted(request: Request, fields: F) -> F:
    """The fields, with the output format that Accept names. Raises HTTPError if output_format differs."""
    kind = accepted_picture(request)
    if kind is None or kind == "image/*":
        return fields
    if fields.output_format is not None and fields.output_format != _OUTPUTS[kind]:
        got = f"Accept is {kind}, but output_format is {fields.output_format}. Send one of them."
        raise HTTPError(400, got, "invalid_value", "output_format")
    return fields.model_copy(update={"output_format": _OUTPUTS[kind]})


def asks_exact(request: Request) -> bool:
    text = request.headers.get("x-flexvar-exact", "0")
    if text not in ("0", "1"):
        raise HTTPError(400, "x-flexvar-exact must be 0 or 1.", "invalid_value", "x-flexvar-exact")
    return text == "1"


def with_deadline(
    service: Service, request: Request, fields: GenerationFields, wanted: Wanted
) -> tuple[float | None, Wanted]:
    """The deadline on the clock of the dispatcher, and the order with the schedule that meets it. Raises HTTPError."""
    name = "x-flexvar-deadline-ms"
    text = request.headers.get(name)
    if text is None:
        return None, wanted
    for field in ("schedule", "steps", "size", "preset"):
        if getattr(fields, field) not in (None, "auto"):
            got = f"{name} cannot be combined with {field}, because it chooses the schedule. Send one of them."
            raise HTTPError(400, got, "invalid_value", name)
    try:
        seconds = seconds_of(float(text))
    except ValueError:  # also InvalidInput
        got = f"{name} must be a number of milliseconds above 0, such as 250."
        raise HTTPError(400, got, "invalid_value", name) from None
    order, model, dispatcher = wanted.order, service.opened_model(), service.dispatcher
    wait = dispatcher.forecast(order)

    def choice(left: float) -> Order:
        chosen = choose(model.order, lambda one: dispatcher.careful_seconds(order, one), left).schedule
        return replace(order, schedule=chosen, forecast_schedule=chosen)

    try:
        choice(seconds)  # on an idle service
    except InvalidInput as error:
        raise HTTPError(400, f"{error.got} Send a larger {name}.", "invalid_value", name) from error
    try:
        return time.monotonic() + seconds, replace(wanted, order=choice(seconds - wait))
    except InvalidInput:
        got = f"The queue takes about {wait * 1e3:.0f} ms, so the deadline cannot be met now. Try again later."
        raise HTTPError(429, got, "deadline_unreachable", name, retry_after=max(1, round(wait))) from None
