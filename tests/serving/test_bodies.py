"""Bodies of requests: their limits, the memory of edits, and forms. Nothing is written to disk."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from tempfile import SpooledTemporaryFile
from typing import Any, NoReturn

import pytest

pytest.importorskip("fastapi", reason="needs the extra serve")

from starlette.formparsers import MultiPartParser
from starlette.requests import ClientDisconnect, Request

from flexvar_serving.errors import HTTPError
from flexvar_serving.web.bodies import UploadSpace, declared_bytes, read_body, read_form

LIMIT = 2**20


class Sent:
    """A client that sends chunks. read: how many of them were taken. It goes away at the end if it `breaks`."""

    def __init__(self, chunks: Sequence[bytes], *, breaks: bool = False) -> None:
        self.chunks, self.breaks, self.read = chunks or [b""], breaks, 0

    async def receive(self) -> dict[str, Any]:
        if self.read == len(self.chunks):
            assert self.breaks, "the body was read beyond its end"
            return {"type": "http.disconnect"}
        self.read += 1
        more = self.breaks or self.read < len(self.chunks)
        return {"type": "http.request", "body": self.chunks[self.read - 1], "more_body": more}

    def request(self, **headers: str) -> Request:
        raw = [(name.replace("_", "-").encode(), value.encode("latin-1")) for name, value in headers.items()]
        return Request({"type": "http", "method": "POST", "headers": raw}, self.receive)


def chunked(body: bytes, size: int = 7) -> list[bytes]:
    return [body[i : i + size] for i in range(0, len(body), size)]


def part(name: str, value: bytes, file: str | None = None) -> bytes:
    """A part of a form, and a file of that name if there is one."""
    filename = "" if file is None else f'; filename="{file}"'
    return f'--edge\r\ncontent-disposition: form-data; name="{name}"{filename}\r\n\r\n'.encode() + value + b"\r\n"


END = b"--edge--\r\n"


def form(
    body: bytes | Sequence[bytes], kind: str = "multipart/form-data; boundary=edge", limit: int = LIMIT
) -> tuple[dict[str, str], dict[str, bytes]]:
    sent = Sent(chunked(body) if isinstance(body, bytes) else body)
    return asyncio.run(read_form(sent.request(content_type=kind), limit))


# Limits ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("header", "expected"),
    [(None, 1000), ("0", 0), ("1000", 1000), ("0007", 7), ("abc", 1000), ("-5", 1000), ("", 1000), ("1e3", 1000)],
)
def test_the_declared_length(header: str | None, expected: int) -> None:
    headers = {} if header is None else {"content_length": header}
    assert declared_bytes(Sent([]).request(**headers), 1000) == expected


def test_a_declared_length_over_the_limit_is_refused_before_reading() -> None:
    sent = Sent([b"x" * 10])
    with pytest.raises(HTTPError) as refusal:
        asyncio.run(read_body(sent.request(content_length="1025"), 1024))
    assert (refusal.value.status, refusal.value.code) == (413, "body_too_large")
    assert refusal.value.all_headers()["connection"] == "close" and "1 KiB" in str(refusal.value)
    assert sent.read == 0


def test_a_body_over_the_limit_is_refused_while_reading() -> None:
    sent = Sent([b"x" * 100] * 50)
    with pytest.raises(HTTPError) as refusal:
        asyncio.run(read_body(sent.request(transfer_encoding="chunked"), 1024))
    assert (refusal.value.status, refusal.value.code) == (413, "body_too_large")
    assert sent.read == 11  # 1100 bytes, not all 5000


def test_a_body_within_the_limit() -> None:
    for chunks in ([b""], [b"abc"], [b"x" * 1024], [b"a", b"", b"bc", b"\0" * 1021]):
        sent = Sent(chunks)
        body = b"".join(chunks)
        assert asyncio.run(read_body(sent.request(content_length=str(len(body))), 1024)) == body


def test_a_client_that_goes_away() -> None:
    for read in (read_body, read_form):
        sent = Sent([part("prompt", b"cat")], breaks=True)
        with pytest.raises(ClientDisconnect):
            asyncio.run(read(sent.request(content_type="multipart/form-data; boundary=edge"), LIMIT))


def test_a_form_over_the_limit_is_refused_while_reading() -> None:
    sent = Sent([part("image", b"x" * 500, "a.png"), *[b"x" * 500] * 100])
    with pytest.raises(HTTPError) as refusal:
        asyncio.run(read_form(sent.request(content_type="multipart/form-data; boundary=edge"), 2000))
    assert refusal.value.status == 413 and sent.read < 6


def test_the_memory_of_edits_is_given_back() -> None:
    space = UploadSpace(100)
    with space.taken(60):
        assert space.free == 40
        with space.taken(40):
            assert space.free == 0
        with pytest.raises(HTTPError) as refusal, space.taken(41):
            pytest.fail("there is no room")
        assert (refusal.value.status, refusal.value.code, space.free) == (429, "uploads_full", 40)
        assert int(refusal.value.all_headers()["retry-after"]) > 0
    assert space.free == 100
    for error in (HTTPError(400, "bad", "invalid_form"), ClientDisconnect(), asyncio.CancelledError()):
        with pytest.raises(type(error)), space.taken(100):
            raise error
        assert space.free == 100


# Forms ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 7, 10_000])
def test_fields_and_files(size: int) -> None:
    picture = bytes(range(256)) + b"\r\n--edg\r\n--"
    body = part("prompt", "crème brûlée".encode()) + part("n", b"") + part("image", picture, "cat.png")
    body += part("mask", b"", "") + END
    fields, files = form(chunked(body, size))
    assert fields == {"prompt": "crème brûlée", "n": ""}
    assert files == {"image": picture, "mask": b""}


def test_an_end_of_the_form_without_a_line_end() -> None:
    assert form(part("n", b"1") + END[:-2]) == ({"n": "1"}, {})
    assert form(END) == ({}, {})


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (part("prompt", b"cat") * 2 + END, "prompt"),
        (part("image", b"a", "a.png") + part("image", b"b", "b.png") + END, "image"),
        (part("image", b"a") + part("image", b"b", "b.png") + END, "image"),
        (b"".join(part(f"f{i}", b"") for i in range(65)) + END, None),
        (b"".join(part(f"f{i}", b"", "a.png") for i in range(5)) + END, None),
        (part("prompt", b"x" * 20_000) + END, None),
        (b"hello", None),
        (b"\0" * 3000, None),
        (b"", None),
        (b"--edge\r\n\r\nwithout headers\r\n" + END, None),
        (b"--edge\r\ncontent-disposition: form-data\r\n\r\nwithout name\r\n" + END, None),
        (b"--edge\r\na header: with space\r\n\r\nx\r\n" + END, None),
        (b"--edge\r\n" + b"x-a: b\r\n" * 5000 + b"\r\nx\r\n" + END, None),
        (part("prompt", b"cat"), None),  # cut off at several places: the last part would be lost
        ((part("prompt", b"cat") + part("seed", b"123"))[:-4], None),
        ((part("prompt", b"cat") + END)[:-4], None),
    ],
    ids=lambda value: ascii(value)[:40],
)
def test_forms_that_are_refused(body: bytes, param: str | None) -> None:
    with pytest.raises(HTTPError) as refusal:
        form(body)
    assert (refusal.value.status, refusal.value.code, refusal.value.param) == (400, "invalid_form", param)


@pytest.mark.parametrize(
    ("kind", "status", "code"),
    [
        ("multipart/form-data", 400, "invalid_form"),
        ("multipart/form-data; boundary=", 400, "invalid_form"),
        ("multipart/form-data; boundary=other", 400, "invalid_form"),
        ("multipart/form-data; boundary=edge; charset=undefined", 400, "invalid_form"),
        ("multipart/mixed; boundary=edge", 415, "unsupported_media_type"),
        ("application/x-www-form-urlencoded", 415, "unsupported_media_type"),
        ("", 415, "unsupported_media_type"),
    ],
)
def test_content_types_that_are_refused(kind: str, status: int, code: str) -> None:
    with pytest.raises(HTTPError) as refusal:
        form(part("prompt", b"cat") + END, kind)
    assert (refusal.value.status, refusal.value.code) == (status, code)


def test_the_content_type_in_any_case_and_a_quoted_boundary() -> None:
    assert form(part("n", b"1") + END, 'Multipart/Form-Data; charset=utf-8; boundary="edge"') == ({"n": "1"}, {})


def test_files_stay_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """The parser of Starlette writes large files to disk; ours does not."""

    def rollover(file: Any) -> NoReturn:
        raise OSError("a file was written to disk")

    monkeypatch.setattr(SpooledTemporaryFile, "rollover", rollover)
    picture = b"\x89PNG" * (5 * 2**20 // 4)
    chunks = chunked(part("image", picture, "a.png") + END, 64 * 1024)
    assert form(chunks, limit=6 * 2**20) == ({}, {"image": picture})

    async def stream() -> AsyncGenerator[bytes, None]:
        for chunk in chunks:
            yield chunk

    headers = Sent([]).request(content_type="multipart/form-data; boundary=edge").headers
    with pytest.raises(OSError, match="written to disk"):
        asyncio.run(MultiPartParser(headers, stream()).parse())
