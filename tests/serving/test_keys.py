"""API keys: the file that names them, and the header that must hold one."""

from __future__ import annotations

import hmac
from pathlib import Path
from typing import Any

import pytest

from flexvar_runtime import InvalidInput
from flexvar_serving.errors import HTTPError
from flexvar_serving.web.keys import Keys, read_keys

KEY, OTHER = "sk-0123456789", "another!key~#1"


@pytest.mark.parametrize(
    ("content", "keys"),
    [
        (f"{KEY}\n", (KEY,)),
        (KEY, (KEY,)),
        (f"# a comment\n\n{KEY}\r\n   \n\t{OTHER}  \n#{KEY}x\n", (KEY, OTHER)),
        ("a" * 8 + "\n" + "b" * 200, ("a" * 8, "b" * 200)),
    ],
    ids=lambda value: ascii(value)[:30],
)
def test_a_file_of_keys(tmp_path: Path, content: str, keys: tuple[str, ...]) -> None:
    path = tmp_path / "keys.txt"
    path.write_bytes(content.encode())
    assert read_keys(path) == keys


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\n  \n",
        b"# only a comment\n",
        b"short12\n",
        b"x" * 201,
        b"two words-and-more\n",
        b"sk-0123456789\nbad\n",
        "schlüssel-0123".encode(),
        b"sk-0123456789\0\n",
        b"\xff\xfes\0k\0-\x000\x001\x002\x003\0",  # UTF-16
        b"sk-0123456789ab\n" * (2**16 + 1),  # larger than 1 MiB: its end would not be read
    ],
    ids=lambda value: ascii(value)[:30],
)
def test_files_that_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "keys.txt"
    path.write_bytes(content)
    with pytest.raises(InvalidInput) as refusal:
        read_keys(path)
    text = str(refusal.value)
    assert refusal.value.exit_code == 2 and "--api-keys" in text and str(path) in text
    assert "sk-0123" not in text and "two words" not in text  # a key does not go to the log


def test_a_large_file_is_read_to_its_end(tmp_path: Path) -> None:
    path = tmp_path / "keys.txt"
    path.write_bytes(b"#" * (2**20 - len(KEY) - 1) + b"\n" + KEY.encode())
    assert read_keys(path) == (KEY,)


def test_a_path_that_cannot_be_read(tmp_path: Path) -> None:
    for path in (tmp_path / "missing.txt", tmp_path):
        with pytest.raises(InvalidInput, match="--api-keys") as refusal:
            read_keys(path)
        assert str(path) in str(refusal.value) and refusal.value.exit_code == 2


@pytest.mark.parametrize(
    "header", [f"Bearer {KEY}", f"bearer {KEY}", f"BEARER   {KEY}  ", f"Bearer {OTHER}", f"Bearer {OTHER}\t"]
)
def test_headers_that_name_a_key(header: str) -> None:
    keys = Keys([KEY, OTHER])
    keys.check(header)
    with pytest.raises(HTTPError):
        Keys(["yet-another-key"]).check(header)


@pytest.mark.parametrize(
    "header",
    [
        "",
        "Bearer",
        "Bearer ",
        KEY,
        f"Basic {KEY}",
        f"Bearer{KEY}",
        f"Bearer {KEY[:-1]}",
        f"Bearer {KEY}x",
        f"Bearer {KEY.upper()}",
        f"Bearer {KEY} {OTHER}",
        f"Bearer {KEY},{OTHER}",
        "Bearer schlüssel",
        f" Bearer {KEY}",
    ],
)
def test_headers_that_are_refused(header: str) -> None:
    with pytest.raises(HTTPError) as refusal:
        Keys([KEY, OTHER]).check(header)
    assert (refusal.value.status, refusal.value.code) == (401, "invalid_api_key")
    assert refusal.value.all_headers()["www-authenticate"] == "Bearer"
    assert KEY not in str(refusal.value)


def test_without_keys_everyone_may_generate() -> None:
    for header in ("", "Bearer anything", "nonsense"):
        Keys(()).check(header)


def test_every_key_is_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """The time does not tell which key matched: all are compared, also after a match, by their hashes."""
    compared: list[Any] = []

    def compare(one: bytes, other: bytes) -> bool:
        compared.append((len(one), len(other)))
        return real(one, other)

    real = hmac.compare_digest
    monkeypatch.setattr(hmac, "compare_digest", compare)
    keys = Keys([KEY, OTHER, "third-key-123"])
    keys.check(f"Bearer {KEY}")
    with pytest.raises(HTTPError):
        keys.check("Bearer x")
    assert compared == [(32, 32)] * 6
