"""The HTTP application: its routes, and how they use the dispatcher."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from functools import partial
from importlib.resources import files
from typing import Any

from fastapi import APIRouter, Depends, FastAPI, Request, Response
from fastapi.responses import StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp

from flexvar_runtime import __version__
from flexvar_runtime.checks import shown
from flexvar_runtime.deadlines.choice import choose, seconds_of
from flexvar_runtime.errors import InvalidInput
from flexvar_runtime.model.presets import PRESETS

from ..errors import HTTPError, internal, of_worker
from ..images.answers import Encoder, base_headers, error_event, events, json_body, result_headers
from ..images.fields import EditFields, GenerationFields
from ..images.parsing import Model, Wanted, parse_edit, parse_form, parse_json, parse_order
from ..metrics import Metrics
from ..scheduling.dispatcher import Dispatcher, Job
from ..scheduling.orders import Image, Order, Spent
from ..settings import Limits
from .bodies import UploadSpace, declared_bytes, read_body, read_form
from .keys import Keys
from .observing import AccessLog, Observed, Record, record_of

log = logging.getLogger(__name__)

PAGE_POLICY = (
    "default-src 'none'; img-src 'self' data: blob:; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_OUTPUTS = {"image/png": "png", "image/jpeg": "jpeg", "image/webp": "webp"}
_ERROR = {"description": "An error", "content": {"application/json": {"schema": {"type": "object"}}}}
_ERRORS: dict[int | str, dict[str, Any]] = {
    status: _ERROR for status in (400, 401, 403, 404, 405, 408, 413, 415, 429, 500, 503, 504, 507)
}


@dataclass
class Service:
    """What the routes need. model is None until a worker has opened the bundle. draining: the service is stopping."""

    dispatcher: Dispatcher
    metrics: Metrics
    encoder: Encoder
    limits: Limits
    keys: Keys
    uploads: UploadSpace
    access_log: AccessLog
    model: Model | None = None
    draining: bool = False
    opened: float = 0.0

    @property
    def ready(self) -> bool:
        return self.model is not None and not self.draining and self.dispatcher.ready

    def opened_model(self) -> Model:
        """Raises HTTPError before the bundle is open."""
        if self.model is None or self.dispatcher.facts is None:
            raise HTTPError(503, "The model is being opened. Try again in a moment.", "not_ready", retry_after=2)
        return self.model


def create_application(service: Service) -> ASGIApp:
    app = FastAPI(title="flexvar serve", version=__version__, docs_url=None, redoc_url=None)

    @app.exception_handler(HTTPError)
    async def refused(request: Request, error: HTTPError) -> Response:
        _record_refusal(service, record_of(request.scope), error)
        return Response(error.body(), error.status, error.all_headers())

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> Response:
        return await refused(request, internal())

    @app.exception_handler(HTTPException)
    async def unknown(request: Request, error: HTTPException) -> Response:
        path, fix = shown(request.url.path), "GET /openapi.json lists the paths and methods of this service."
        texts = {404: f"There is nothing at {path}. {fix}", 405: f"{path} does not take {request.method[:20]}. {fix}"}
        text, code = texts.get(error.status_code, error.detail), {404: "not_found", 405: "method_not_allowed"}
        own = HTTPError(
            error.status_code, text, code.get(error.status_code, "http_error"), headers=dict(error.headers or {})
        )
        return Response(own.body(), own.status, own.all_headers())

    @app.exception_handler(ClientDisconnect)
    async def gone(request: Request, error: ClientDisconnect) -> Response:
        record_of(request.scope).gone = True
        service.metrics.cancelled.labels("receiving").inc()
        return Response(status_code=400)  # nobody reads it

    async def authorized(request: Request) -> None:
        if request.headers.get("sec-fetch-site") == "cross-site":  # browsers say so of pages of other sites
            raise HTTPError(
                403, "Web pages of other sites may not use this service. Call it from your own server.", "cross_site"
            )
        service.keys.check(request.headers.get("authorization", ""))

    app.include_router(_status_routes(service))
    app.include_router(_image_routes(service), dependencies=[Depends(authorized)])
    return Observed(app, service.metrics, service.access_log)


def _record_refusal(service: Service, record: Record, error: HTTPError) -> None:
    """Write an error to the log line of its request and, if it is for lack of something, to the metrics."""
    record.values["error"] = error.code
    if error.status in (413, 429, 503, 504, 507):
        service.metrics.rejected.labels(error.code).inc()


def _status_routes(service: Service) -> APIRouter:
    """The page, the health of the service and its metrics. They ask for no key."""
    router = APIRouter()
    page = files("flexvar_serving").joinpath("page/index.html").read_bytes()

    @router.head("/", include_in_schema=False)
    @router.get("/", response_class=Response, include_in_schema=False)
    async def index() -> Response:
        return Response(page, media_type="text/html; charset=utf-8", headers={"content-security-policy": PAGE_POLICY})

    @router.head("/health/live", include_in_schema=False)
    @router.get("/health/live", summary="Whether the process answers")
    async def live() -> dict[str, str]:
        return {"status": "live"}

    @router.head("/health/ready", include_in_schema=False)
    @router.get("/health/ready", summary="Whether requests are taken", responses={503: _ERROR})
    async def ready() -> dict[str, str]:
        if service.ready:
            return {"status": "ready"}
        reason = "The service is stopping." if service.draining else "No worker is ready."
        raise HTTPError(503, reason, "stopping" if service.draining else "not_ready", retry_after=2)

    @router.head("/metrics", include_in_schema=False)
    @router.get("/metrics", response_class=Response, summary="Prometheus metrics")
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    return router


def _image_routes(service: Service) -> APIRouter:
    """OpenAI's API."""
    router = APIRouter(prefix="/v1", responses=_ERRORS)

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
        "/images/generations", summary="Generate images", openapi_extra=_body("application/json", GenerationFields)
    )
    async def generations(request: Request) -> Response:
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise HTTPError(415, "Send the request as application/json.", "unsupported_media_type")
        body = await read_body(request, service.limits.json_bytes)
        fields = parse_json(GenerationFields, body)
        wanted = parse_order(service.opened_model(), _accepted(request, fields), exact=_exact(request))
        deadline, wanted = _deadline(service, request, fields, wanted)
        return await _answer(service, request, wanted, deadline, "image_generation", ExitStack())

    @router.post("/images/edits", summary="Edit an image", openapi_extra=_form(EditFields))
    async def edits(request: Request) -> Response:
        limit = service.limits.edit_bytes
        with ExitStack() as held:
            held.enter_context(service.uploads.taken(declared_bytes(request, limit)))
            values, sent = await read_form(request, limit)
            image = sent.pop("image", None) or sent.pop("image[]", None)
            mask = sent.pop("mask", None)
            if sent:
                name = next(iter(sent))[:100]
                raise HTTPError(400, f"The file {name!r} is not known. Send image and mask.", "unknown_field", name)
            if not image:
                raise HTTPError(
                    400, "image is missing. Send a picture file as the field image.", "missing_value", "image"
                )
            model, fields = service.opened_model(), parse_form(EditFields, values)
            if "x-flexvar-deadline-ms" in request.headers:
                got = "x-flexvar-deadline-ms works with generations. Leave it out."
                raise HTTPError(400, got, "invalid_value", "x-flexvar-deadline-ms")
            job = parse_edit(model, fields, image, mask or None)
            wanted = parse_order(model, _accepted(request, fields), exact=_exact(request), edit=job)
            return await _answer(service, request, wanted, None, "image_edit", held)

    return router


async def _answer(
    service: Service, request: Request, wanted: Wanted, deadline: float | None, name: str, held: ExitStack
) -> Response:
    """Run an order and answer it. A client that goes away cancels it. held: is closed when the job is over."""
    record, order, facts = record_of(request.scope), wanted.order, service.dispatcher.facts
    assert facts is not None
    picture = _accepts(request) is not None
    if picture and (order.images > 1 or wanted.streamed):
        got = "Accept: image/... answers with one picture. Leave out n and stream, or accept application/json."
        raise HTTPError(400, got, "invalid_value", "n" if order.images > 1 else "stream")
    job = service.dispatcher.submit(order, deadline, record.request_id)
    until_over = held.pop_all()
    job.finished.add_done_callback(lambda _: until_over.close())
    headers = base_headers(order, facts.bundle, facts.backend)
    record.values |= {"seed": str(order.seed), "class": order.label, "images": order.images}
    if wanted.user is not None:
        record.values["user"] = wanted.user
    if wanted.streamed:
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
        _record_refusal(service, record, own)
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


def _deadline(
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


def _exact(request: Request) -> bool:
    text = request.headers.get("x-flexvar-exact", "0")
    if text not in ("0", "1"):
        raise HTTPError(400, "x-flexvar-exact must be 0 or 1.", "invalid_value", "x-flexvar-exact")
    return text == "1"


def _accepts(request: Request) -> str | None:
    """The image type that the client asks for in Accept; "image/*" for any. None if it takes JSON."""
    kinds = [part.partition(";")[0].strip().lower() for part in request.headers.get("accept", "").split(",")]
    if {"application/json", "application/*", "*/*"} & set(kinds):
        return None
    return next((kind for kind in kinds if kind == "image/*" or kind in _OUTPUTS), None)


def _accepted(request: Request, fields: Any) -> Any:
    """The fields, with the output format that Accept names. Raises HTTPError if output_format differs."""
    kind = _accepts(request)
    if kind is None or kind == "image/*":
        return fields
    if fields.output_format is not None and fields.output_format != _OUTPUTS[kind]:
        got = f"Accept is {kind}, but output_format is {fields.output_format}. Send one of them."
        raise HTTPError(400, got, "invalid_value", "output_format")
    return fields.model_copy(update={"output_format": _OUTPUTS[kind]})


def _described(service: Service) -> dict[str, Any]:
    """The model as an entry of /v1/models. What flexvar adds is under "flexvar"."""
    model, facts = service.opened_model(), service.dispatcher.facts
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
            "schedule": str(defaults.schedule),
            "steps": len(defaults.schedule),
            "guidance": defaults.guidance.scale,
            "top_k": defaults.sampling.top_k,
            "top_p": defaults.sampling.top_p,
            "schedules": [str(one) for one in model.order],
            "presets": list(PRESETS),
        },
    }


def _body(media_type: str, kind: type[GenerationFields] | type[EditFields]) -> dict[str, Any]:
    """The description of a body in the OpenAPI schema, and of the header that both routes read."""
    exact = {"name": "x-flexvar-exact", "in": "header", "schema": {"type": "string", "enum": ["0", "1"]}}
    content = {media_type: {"schema": kind.model_json_schema()}}
    return {"requestBody": {"required": True, "content": content}, "parameters": [exact]}


def _form(kind: type[EditFields]) -> dict[str, Any]:
    described = _body("multipart/form-data", kind)
    schema = described["requestBody"]["content"]["multipart/form-data"]["schema"]
    file = {"type": "string", "format": "binary"}
    schema["properties"] = {"image": file, "mask": file, **schema["properties"]}
    schema["required"] = ["image"]
    return described
