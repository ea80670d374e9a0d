"""API keys: read from a file, and compared in constant time."""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Iterable
from pathlib import Path

from flexvar_runtime.errors import InvalidInput

from ..errors import HTTPError

_KEY = re.compile(r"[!-~]{8,200}")
_FORM = "8 to 200 printable characters without spaces"
_MOST_BYTES = 2**20


def read_keys(path: Path) -> tuple[str, ...]:
    """The keys of a file, one a line. Empty lines and lines that begin with # are skipped. Raises InvalidInput."""
    try:
        with path.open("rb") as file:
            content = file.read(_MOST_BYTES + 1)
    except OSError as error:
        got = f"--api-keys names {path}, which cannot be read ({error.strerror})."
        raise InvalidInput(got, expected="a file of keys", fix="Check the path and its permissions.") from error
    if len(content) > _MOST_BYTES:
        raise _refusal(path, f"is larger than {_MOST_BYTES // 2**20} MiB")
    lines = enumerate(content.decode("ascii", "replace").splitlines(), 1)
    keys = [(number, line.strip()) for number, line in lines if line.strip() and not line.startswith("#")]
    if not keys:
        raise _refusal(path, "has no keys")
    for number, key in keys:
        if not _KEY.fullmatch(key):
            raise _refusal(path, f"has a line {number} that is not {_FORM}")
    return tuple(key for _, key in keys)


def _refusal(path: Path, problem: str) -> InvalidInput:
    fix = f"Write one key a line, each of {_FORM}."
    return InvalidInput(f"--api-keys names {path}, which {problem}.", expected="one key a line", fix=fix)


class Keys:
    """The allowed keys. Only their hashes are kept."""

    def __init__(self, keys: Iterable[str]) -> None:
        self._hashes = tuple(hashlib.sha256(key.encode()).digest() for key in keys)

    @property
    def asked(self) -> bool:
        """Whether a key is asked for."""
        return bool(self._hashes)

    def check(self, authorization: str) -> None:
        """Raise HTTPError unless the header names an allowed key, or no keys are asked for."""
        if not self.asked:
            return
        scheme, _, key = authorization.partition(" ")
        given = hashlib.sha256(key.strip().encode()).digest()
        matches = [hmac.compare_digest(given, allowed) for allowed in self._hashes]
        if scheme.lower() != "bearer" or not any(matches):
            got = "The API key is missing or wrong. Send it as Authorization: Bearer KEY."
            raise HTTPError(401, got, "invalid_api_key", headers={"www-authenticate": "Bearer"})
