"""The HTTP application: its routes, and the form of its errors."""

from __future__ import annotations

from fastapi import Depends, FastAPI, Request, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp

from flexvar_runtime import __version__
from flexvar_runtime.checks import shown

from ..errors import HTTPError, internal
from .image_routes import image_routes
from .observing import Observed, record_of
from .schema import describe
from .state import Service
from .status_routes import status_routes


def create_application(service: Service) -> ASGIApp:
    app = FastAPI(title="flexvar serve", version=__version__, docs_url=None, redoc_url=None, redirect_slashes=False)

    @app.exception_handler(HTTPError)
    async def refused(request: Request, error: HTTPError) -> Response:
        service.record_refusal(record_of(request.scope), error)
        return Response(error.body(), error.status, error.all_headers())

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> Response:
        return await refused(request, internal())

    @app.exception_handler(HTTPException)
    async def unknown(request: Request, error: HTTPException) -> Response:
        path, fix = shown(request.url.path), "The API is under /v1, and GET /openapi.json lists it."
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

    app.include_router(status_routes(service))
    app.include_router(image_routes(service), dependencies=[Depends(authorized)])
    describe(app, keys=service.keys.asked)
    return Observed(app, service.metrics, service.access_log)
