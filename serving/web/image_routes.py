"""The routes of OpenAI's API: models, generations and edits."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import StreamingResponse
from starlette.requests import ClientDisconnect

from flexvar_runtime.model.presets import PRESETS

from ..errors import HTTPError, of_worker
from ..images.answers import base_headers, error_event, events, json_body, result_headers
from ..images.fields import EditFields, GenerationFields
from ..images.parsing import Wanted, parse_edit, parse_form, parse_json, parse_order
from ..scheduling.jobs import Job
from ..scheduling.orders import Image, Spent
from .bodies import declared_bytes, read_body, read_form
from .observing import Record, record_of
from .request_headers import accepted_picture, asks_exact, with_accepted, with_deadline
from .schema import ERRORS, body_schema, form_schema
from .state import Service

log = logging.getLogger(__name__)


def image_routes(service: Service) -> APIRouter:
    """OpenAI's API."""
    router = APIRouter(prefix="/v1", responses=ERRORS)

    @router.head("/models", include_in_schema=False)
    @router.get("/models", summary="The model, its classes and defaults")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [_described(service)]}

    @router.get("/models/{name}", summary="The model of that name")
    async def model(name: str) -> dict[str, Any]:
        described = _described(service)
        if name != described["id"]:
            raise HTTPError(404, f"This service has the model {described['id']!r} only.", "model_not_found", "model")
        return described

    @router.post(
        "/images/generations",
        summary="Generate images",
        openapi_extra=body_schema("application/json", GenerationFields),
    )
    async def generations(request: Request) -> Response:
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise HTTPError(415, "Send the request as application/json.", "unsupported_media_type")
        body = await read_body(request, service.limits.json_bytes)
        fields = parse_json(GenerationFields, body)
        wanted = parse_order(service.opened_model(), with_accepted(request, fields), exact=asks_exact(request))
        deadline, wanted = with_deadline(service, request, fields, wanted)
        return await _answer(service, request, wanted, deadline, "image_generation", ExitStack())

    @router.post("/images/edits", summary="Edit an image", openapi_extra=form_schema(EditFields))
    async def edits(request: Request) -> Response:
        limit = service.limits.edit_bytes
        with ExitStack() as held:
            held.enter_context(service.uploads.taken(declared_bytes(request, limit)))
            values, sent = await read_form(request, limit)
            image, mask = _picture_files(values, sent)
            model, fields = service.opened_model(), parse_form(EditFields, values)
            if "x-flexvar-deadline-ms" in request.headers:
                got = "x-flexvar-deadline-ms works with generations. Leave it out."
                raise HTTPError(400, got, "invalid_value", "x-flexvar-deadline-ms")
            job = parse_edit(model, fields, image, mask)
            wanted = parse_order(model, with_accepted(request, fields), exact=asks_exact(request), edit=job)
            return await _answer(service, request, wanted, None, "image_edit", held)

    return router


def _picture_files(values: Mapping[str, str], files: Mapping[str, bytes]) -> tuple[bytes, bytes | None]:
    """The picture and the mask in the fields and files of a form. Raises HTTPError."""
    for name in ("image", "mask"):
        if name in values:
            got = f"{name} must be a file. With curl, write -F {name}=@FILE."
            raise HTTPError(400, got, "invalid_value", name)
    if unknown := set(files) - {"image", "image[]", "mask"}:
        name = min(unknown)[:100]
        raise HTTPError(400, f"The file {name!r} is not known. Send image and mask.", "unknown_field", name)
    image = files.get("image") or files.get("image[]")
    if not image:
        raise HTTPError(400, "image is missing. Send a picture file as the field image.", "missing_value", "image")
    return image, files.get("mask") or None


async def _answer(
    service: Service, request: Request, wanted: Wanted, deadline: float | None, name: str, held: ExitStack
) -> Response:
    """Run an order and answer it. A client that goes away cancels it. held: is closed when the job is over."""
    record, order, facts = record_of(request.scope), wanted.order, service.dispatcher.pool.facts
    assert facts is not None
    picture = accepted_picture(request) is not None
    if picture and (order.images > 1 or order.streamed):
        got = "Accept: image/... answers with one picture. Leave out n and stream, or accept application/json."
        raise HTTPError(400, got, "invalid_value", "n" if order.images > 1 else "stream")
    job = service.dispatcher.submit(order, deadline, record.request_id)
    until_over = held.pop_all()
    job.finished.add_done_callback(lambda _: until_over.close())
    headers = base_headers(order, facts.bundle, facts.backend)
    record.values |= {"seed": str(order.seed), "class": order.label, "images": order.images}
    if wanted.user is not None:
        record.values["user"] = wanted.user
    if order.streamed:
        headers |= {"cache-control": "no-store", "x-accel-buffering": "no"}  # a proxy must not hold events back
        return StreamingResponse(_stream(service, job, record, wanted, name), 200, headers, "text/event-stream")
    try:
        images, spent = await _unless_gone(request, job.finished)
    except ClientDisconnect:
        record.gone = True
        return Response(status_code=400)  # nobody reads it
    finally:
        service.dispatcher.cancel(job)
    encoded, encode = await service.encoder.images(wanted.output, images)
    headers |= _noted(record, images, spent, encode)
    if picture:
        return Response(encoded[0], headers=headers, media_type=wanted.output.media_type)
    return Response(json_body(order, wanted.output, images, encoded), headers=headers, media_type="application/json")


def _noted(record: Record, images: Sequence[Image], spent: Spent, encode: float) -> dict[str, str]:
    """The headers of finished images. They are noted for the log, too."""
    headers = result_headers(images, spent, encode)
    record.values |= {
        "schedule": headers["x-flexvar-schedule"],
        "batch": headers["x-flexvar-batch"],
        "queue_ms": round(spent.queue * 1e3, 1),
        "generate_ms": round(spent.generate * 1e3, 1),
    }
    return headers


async def _stream(service: Service, job: Job, record: Record, wanted: Wanted, name: str) -> AsyncIterator[bytes]:
    """The events of a job. An error is the last one. If they are not read to their end, the job is cancelled."""
    record.gone = True  # until the end
    try:
        note = partial(_noted, record)
        async for event in events(job, wanted.output, service.encoder, name, note):
            yield event
        record.gone = False
    except Exception as error:
        own = of_worker(error)
        if own is not error and own.status == 500:
            log.error("request %s failed", record.request_id, exc_info=error)
        record.gone, record.status = False, own.status
        service.record_refusal(record, own)
        yield error_event(own)
    finally:
        service.dispatcher.cancel(job)


async def _unless_gone(request: Request, finished: asyncio.Future[Any]) -> Any:
    """The result of a future. Raises ClientDisconnect if the client goes away first."""

    async def disconnected() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    watch = asyncio.create_task(disconnected())
    try:
        await asyncio.wait({watch, finished}, return_when=asyncio.FIRST_COMPLETED)
        if finished.done():
            return finished.result()
        raise ClientDisconnect
    finally:
        watch.cancel()
        with suppress(asyncio.CancelledError):
            await watch


def _described(service: Service) -> dict[str, Any]:
    """The model as an entry of /v1/models. What flexvar adds is under "flexvar"."""
    model, facts = service.opened_model(), service.dispatcher.pool.facts
    assert facts is not None
    sizes, defaults = model.manifest.model, model.start
    h, w = (side * sizes.downsampling for side in defaults.schedule[-1])
    return {
        "id": model.name,
        "object": "model",
        "created": int(service.opened),
        "owned_by": "flexvar",
        "flexvar": {
            "bundle": facts.bundle,
            "backend": facts.backend,
            "precision": str(model.manifest.precision),
            "classes": None if sizes.class_names is None else list(sizes.class_names),
            "class_count": sizes.classes,
            "null_class": sizes.null_class,
            "size": f"{w}x{h}",
            "size_multiple": sizes.downsampling,
            "max_tokens": model.max_tokens,
            "largest_square": f"{model.largest_side}x{model.largest_side}",
            "other_schedules": model.schedules is None,
            "schedule": str(defaults.schedule),
            "steps": len(defaults.schedule),
            "guidance": defaults.guidance.scale,
            "top_k": defaults.sampling.top_k,
            "top_p": defaults.sampling.top_p,
            "schedules": [str(one) for one in model.order],
            "presets": list(PRESETS),
        },
    }
