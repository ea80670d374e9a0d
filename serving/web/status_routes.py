"""The page, the health of the service and its metrics. They ask for no key."""

from __future__ import annotations

from importlib.resources import files

from fastapi import APIRouter, Response
from prometheus_client import CONTENT_TYPE_LATEST

from ..errors import HTTPError
from .schema import ERROR
from .state import Service

PAGE_POLICY = (
    "default-src 'none'; img-src 'self' data: blob:; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


def status_routes(service: Service) -> APIRouter:
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
    @router.get("/health/ready", summary="Whether requests are taken", responses={503: ERROR})
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
