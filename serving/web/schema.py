"""What the OpenAPI schema says of bodies, headers and errors."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI

from ..images.fields import EditFields, GenerationFields

_TEXT = {"type": ["string", "null"]}
_FIELDS = {"message": {"type": "string"}, "type": _TEXT, "param": _TEXT, "code": _TEXT}
_BODY = {"type": "object", "required": ["error"], "properties": {"error": {"type": "object", "properties": _FIELDS}}}
ERROR: dict[str, Any] = {"description": "An error", "content": {"application/json": {"schema": _BODY}}}
ERRORS: dict[int | str, dict[str, Any]] = {
    status: ERROR for status in (400, 401, 403, 404, 405, 408, 413, 415, 429, 431, 500, 503, 504, 507)
}


def body_schema(media_type: str, kind: type[GenerationFields] | type[EditFields]) -> dict[str, Any]:
    """The description of a body in the OpenAPI schema, and of the headers that its route reads."""
    headers = [{"name": "x-flexvar-exact", "in": "header", "schema": {"type": "string", "enum": ["0", "1"]}}]
    if kind is GenerationFields:
        headers.append({"name": "x-flexvar-deadline-ms", "in": "header", "schema": {"type": "number", "minimum": 1}})
    content = {media_type: {"schema": kind.model_json_schema()}}
    others = ("text/event-stream", "image/png", "image/jpeg", "image/webp")
    answers: dict[str, Any] = {other: {"schema": {"type": "string"}} for other in others}
    done = {"description": "The images, their events, or one picture", "content": answers}
    return {"requestBody": {"required": True, "content": content}, "parameters": headers, "responses": {"200": done}}


def form_schema(kind: type[EditFields]) -> dict[str, Any]:
    described = body_schema("multipart/form-data", kind)
    schema = described["requestBody"]["content"]["multipart/form-data"]["schema"]
    file = {"type": "string", "format": "binary"}
    schema["properties"] = {"image": file, "mask": file, **schema["properties"]}
    schema["required"] = ["image"]
    return described


def describe(app: FastAPI, *, keys: bool) -> None:
    """Correct what FastAPI says of the application. keys: whether it asks for API keys.

    FastAPI lists answers with status 422, which this service never sends.
    """
    described = app.openapi()
    for path in described["paths"].values():
        for operation in path.values():
            operation["responses"].pop("422", None)
    described.get("components", {}).pop("schemas", None)
    if keys:
        described.setdefault("components", {})["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        described["security"] = [{"key": []}]
