"""Files that options of `flexvar export` name: whatever they hold, they are read or refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from flexvar_export.commands import _read_class_names
from flexvar_export.facts import read_defaults
from flexvar_export.quality import read_quality
from flexvar_runtime.errors import ArtifactRefused, InvalidInput

NONSENSE = {
    "deep list": b"[" * 100_000,
    "deep object": b'{"a":' * 100_000,
    "deep and closed": b"[" * 50_000 + b"]" * 50_000,
    "empty": b"",
    "zeros": bytes(100),
    "Latin-1": b'["caf\xe9"]',
    "a number": b"7",
    "a long number": b"1" * 5000,
    "null": b"null",
    "text": b'"a"',
    "not a number": b'[NaN, "a"]',
    "a key twice": b'{"schedule": "1_2", "schedule": "1_3"}',
    "a byte order mark": b"\xef\xbb\xbf[]",
    "lists of numbers": b"[1, 2]",
    "wrong rows": b'{"rows": [5, {"name": 5}]}',
    "a row that is a list": b'{"1_2": [1]}',
    "images that are lists": b'{"1_2": {"images": []}}',
    "a wrong schedule": b'{"2_1": {"frechet": 1}}',
    "a large value": b'{"guidance_scale": 1e300, "1_2": 5}',
}
READERS = (_read_class_names, read_defaults, read_quality)


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("kind", NONSENSE)
def test_nonsense_is_refused(tmp_path: Path, kind: str, reader: object) -> None:
    path = tmp_path / "some.json"
    path.write_bytes(NONSENSE[kind])
    assert callable(reader)
    with pytest.raises((ArtifactRefused, InvalidInput), match=r"some\.json"):
        reader(path)


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("name", [".", "missing", "file/below", "x" * 300, "\udce9"])
def test_what_cannot_be_read_is_refused(tmp_path: Path, name: str, reader: object) -> None:
    (tmp_path / "file").touch()
    assert callable(reader)
    with pytest.raises((ArtifactRefused, InvalidInput), match="cannot be read"):
        reader(tmp_path / name)


@pytest.mark.skipif(not Path("/dev/zero").exists(), reason="there is no /dev/zero here")
@pytest.mark.parametrize("reader", READERS)
def test_an_endless_file_is_refused(reader: object) -> None:
    assert callable(reader)
    with pytest.raises((ArtifactRefused, InvalidInput), match="too large"):
        reader(Path("/dev/zero"))


@pytest.mark.parametrize(
    "change", [{"guidance_scale": -1.0}, {"guidance_rule": "slope"}, {"top_p": 2.0}, {"schedule": "2_4"}, {"colour": 1}]
)
def test_defaults_that_no_request_may_have(tmp_path: Path, change: dict[str, object]) -> None:
    path = tmp_path / "some.json"
    path.write_text(json.dumps(change))
    with pytest.raises(InvalidInput):
        read_defaults(path)
