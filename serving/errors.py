"""Errors of the service, and their form in OpenAI's API."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from flexvar_runtime.errors import DeviceFailed, FlexVARError, InvalidInput, OutOfMemory


class WorkersKeepDying(FlexVARError):
    """A worker process ended again and again, so the service gives up."""

    exit_code = 7


class HTTPError(Exception):
    """An error response of the API.

    status: of HTTP. message: sentences for the client. code: a word for programs, also the reason in the metrics.
    param: the field at fault. retry_after: seconds after which the request may succeed. headers: further ones.
    """

    def __init__(
        self,
        status: int,
        message: str,
        code: str,
        param: str | None = None,
        retry_after: int | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(status, message, code, param, retry_after, headers)  # so that it can be pickled
        self.status, self.message, self.code, self.param = status, message, code, param
        self.retry_after, self.headers = retry_after, dict(headers or {})

    def __str__(self) -> str:
        return self.message

    @property
    def kind(self) -> str:
        """The type in OpenAI's terms."""
        if self.status == 429:
            return "rate_limit_error"
        return "invalid_request_error" if self.status < 500 else "server_error"

    def body(self) -> bytes:
        return json.dumps({"error": self.content()}).encode()

    def content(self) -> dict[str, str | None]:
        return {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}

    def all_headers(self) -> dict[str, str]:
        retry = {} if self.retry_after is None else {"retry-after": str(self.retry_after)}
        return {"content-type": "application/json", **self.headers, **retry}


def of_field(error: FlexVARError, param: str | None) -> HTTPError:
    """The answer to a value that the runtime refuses. param: the field that it came from."""
    return HTTPError(400, str(error), "invalid_value", param)


def of_worker(error: Exception) -> HTTPError:
    """The answer to an error that a worker reports. The text of an unexpected one is not sent: it is in the log."""
    if isinstance(error, HTTPError):
        return error
    if isinstance(error, OutOfMemory):
        return HTTPError(507, str(error), "out_of_memory", retry_after=5)
    if isinstance(error, InvalidInput):
        return of_field(error, None)
    return worker_lost() if isinstance(error, DeviceFailed) else internal()


def internal() -> HTTPError:
    got = "The service failed on this request. Its log has the reason."
    return HTTPError(500, f"{got} The id of the request is in the header x-request-id.", "internal_error")


def worker_lost() -> HTTPError:
    return HTTPError(
        503, "The process that ran this request has ended. Send the request again.", "worker_lost", retry_after=1
    )


def conflict(one: str, other: str) -> HTTPError:
    return HTTPError(400, f"{one} cannot be combined with {other}. Send one of them.", "invalid_value", one)


@contextmanager
def blame(param: str) -> Iterator[None]:
    """Turn errors of the runtime into an answer that names the field at fault."""
    try:
        yield
    except InvalidInput as error:
        raise of_field(error, param) from error
