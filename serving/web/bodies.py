"""Reading the body of a request within its limits. Nothing is written to disk."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request

from ..errors import HTTPError

_MOST_FIELDS, _MOST_FIELD_BYTES = 64, 16 * 1024


class _InMemory(MultiPartParser):
    """A parser that keeps files in memory. The size of a body is limited before."""

    spool_max_size = 2**40
    ended = False

    def on_end(self) -> None:
        self.ended = True


@dataclass
class UploadSpace:
    """Memory for the bodies of edits. free: bytes."""

    free: int

    @contextmanager
    def taken(self, size: int) -> Iterator[None]:
        """Hold `size` bytes. Raises HTTPError if they are not free."""
        if size > self.free:
            got = "Too many pictures are being edited at the moment. Try again soon."
            raise HTTPError(429, got, "uploads_full", retry_after=2)
        self.free -= size
        try:
            yield
        finally:
            self.free += size


def declared_bytes(request: Request, limit: int) -> int:
    """The length that a request declares for its body, or the limit if it declares none. Raises HTTPError."""
    text = request.headers.get("content-length", "")
    size = int(text) if text.isascii() and text.isdecimal() and len(text) < 20 else limit
    if size > limit:
        raise _too_large(limit)
    return size


async def read_body(request: Request, limit: int) -> bytes:
    """The whole body. Raises HTTPError if it is longer than `limit`, and ClientDisconnect."""
    declared_bytes(request, limit)
    return b"".join([chunk async for chunk in _limited(request, limit)])


async def read_form(request: Request, limit: int) -> tuple[dict[str, str], dict[str, bytes]]:
    """The text fields and the files of a multipart form. Raises HTTPError."""
    if not request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
        raise HTTPError(415, "Send the edit as multipart/form-data.", "unsupported_media_type")
    parser = _InMemory(
        request.headers, _limited(request, limit), max_files=4, max_fields=_MOST_FIELDS, max_part_size=_MOST_FIELD_BYTES
    )
    try:
        form = await parser.parse()
    except MultiPartException as error:
        raise HTTPError(400, f"The form cannot be read: {error.message}", "invalid_form") from error
    except (KeyError, ValueError, AssertionError) as error:  # for headers of a part that mean nothing
        raise HTTPError(
            400, "The form cannot be read. Send multipart/form-data as curl -F does.", "invalid_form"
        ) from error
    if not parser.ended:  # the last part would be missing
        raise HTTPError(400, "The form is cut off: its last boundary is missing.", "invalid_form")
    fields: dict[str, str] = {}
    files: dict[str, bytes] = {}
    for name, value in form.multi_items():
        if name in fields or name in files:
            raise HTTPError(400, f"The field {name[:100]!r} comes twice. Send it once.", "invalid_form", name[:100])
        if isinstance(value, UploadFile):
            files[name] = await value.read()
            await value.close()
        else:
            fields[name] = value
    return fields, files


async def _limited(request: Request, limit: int) -> AsyncGenerator[bytes, None]:
    size = 0
    async for chunk in request.stream():
        size += len(chunk)
        if size > limit:
            raise _too_large(limit)
        yield chunk


def _too_large(limit: int) -> HTTPError:
    text = f"{limit // 2**20} MiB" if limit >= 2**20 else f"{limit // 2**10} KiB"
    return HTTPError(
        413, f"The body is too large. At most {text} are allowed.", "body_too_large", headers={"connection": "close"}
    )
