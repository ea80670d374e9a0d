"""Arrays from outside: names, types and shapes are checked before an array is read."""

from __future__ import annotations

import io
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flexvar_runtime.errors import ArtifactRefused
from flexvar_runtime.files.npz import ArrayInfo, open_npz, read_npz

ARRAYS = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.int32(7).reshape(())}
WANTED = {"a": ArrayInfo("float32", (2, 3)), "b": ArrayInfo("int32", ())}


def npy(array: Any, **options: Any) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array(file, array, **options)
    return file.getvalue()


def header(text: str, version: int = 1) -> bytes:
    size = len(text).to_bytes(2 if version == 1 else 4, "little")
    return b"\x93NUMPY" + bytes([version, 0]) + size + text.encode()


def described(shape: str, dtype: str = "'<f4'", order: str = "False") -> bytes:
    return header(f"{{'descr': {dtype}, 'fortran_order': {order}, 'shape': {shape}}}\n")


def write(path: Path, entries: list[tuple[str, bytes]], method: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in entries:
            archive.writestr(name, content)
    return path


ENTRIES = [("a.npy", npy(ARRAYS["a"])), ("b.npy", npy(ARRAYS["b"]))]


def patched(path: Path, offset: int, value: bytes) -> Path:
    """Every directory entry of a good file with other bytes at an offset."""
    data = bytearray(write(path, ENTRIES).read_bytes())
    at = data.find(b"PK\x01\x02")
    while at >= 0:
        data[at + offset : at + offset + len(value)] = value
        at = data.find(b"PK\x01\x02", at + 4)
    path.write_bytes(data)
    return path


HOSTILE: dict[str, Callable[[Path], Path]] = {
    "compressed": lambda path: write(path, ENTRIES, zipfile.ZIP_DEFLATED),
    "lzma": lambda path: write(path, ENTRIES, zipfile.ZIP_LZMA),
    "encrypted": lambda path: patched(path, 8, b"\x01"),
    "an unknown method": lambda path: patched(path, 10, b"\x61"),
    "another size": lambda path: patched(path, 24, b"\xff\xff\xff\x7f"),
    "a name twice": lambda path: write(path, [*ENTRIES, ENTRIES[0]]),
    "one more": lambda path: write(path, [*ENTRIES, ("c.npy", npy(np.zeros(1)))]),
    "one missing": lambda path: write(path, ENTRIES[:1]),
    "no array": lambda path: write(path, [*ENTRIES, ("readme.txt", b"text")]),
    "objects": lambda path: write(path, [("a.npy", npy(np.array([{}], object))), ENTRIES[1]]),
    "another type": lambda path: write(path, [("a.npy", npy(np.zeros((2, 3)))), ENTRIES[1]]),
    "big-endian": lambda path: write(path, [("a.npy", npy(ARRAYS["a"].astype(">f4"))), ENTRIES[1]]),
    "Fortran order": lambda path: write(path, [("a.npy", npy(np.asfortranarray(ARRAYS["a"]))), ENTRIES[1]]),
    "another version": lambda path: write(path, [("a.npy", npy(ARRAYS["a"], version=(2, 0))), ENTRIES[1]]),
    "a huge shape": lambda path: write(path, [("a.npy", described("(805306368,)") + bytes(24)), ENTRIES[1]]),
    "a negative shape": lambda path: write(path, [("a.npy", described("(-2, -3)") + bytes(24)), ENTRIES[1]]),
    "a shape of truth": lambda path: write(path, [("a.npy", described("(True,)") + bytes(4)), ENTRIES[1]]),
    "a deep header": lambda path: write(path, [("a.npy", header("(" * 900 + "\n")), ENTRIES[1]]),
    "a long header": lambda path: write(path, [("a.npy", header("(" * 9000 + "\n")), ENTRIES[1]]),
    "code": lambda path: write(path, [("a.npy", described("(2, 3)", "__import__('os')") + bytes(24)), ENTRIES[1]]),
    "records": lambda path: write(path, [("a.npy", described("(2, 3)", "[('x', '<f4')]") + bytes(24)), ENTRIES[1]]),
    "cut": lambda path: Path(path).write_bytes(write(path, ENTRIES).read_bytes()[:-30]) and path,
    "a plain array": lambda path: path.write_bytes(npy(ARRAYS["a"])) and path,
    "empty": lambda path: path.touch() or path,
    "missing": lambda path: path,
}


def test_what_numpy_writes_is_read(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", **ARRAYS)
    found = read_npz(tmp_path / "x.npz", "x.npz", WANTED, fix="Export again.")
    for name, array in ARRAYS.items():
        assert found[name].dtype == array.dtype and np.array_equal(found[name], array) and found[name].flags.writeable


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("kind", HOSTILE)
def test_refused(tmp_path: Path, kind: str) -> None:
    path = HOSTILE[kind](tmp_path / "x.npz")
    with pytest.raises(ArtifactRefused, match=r"^x\.npz .* Export again\.$") as refusal:
        read_npz(path, "x.npz", WANTED, fix="Export again.")
    assert refusal.value.exit_code == 5 and len(refusal.value.got) < 600


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("extra", ["c.npy", "a.npy", "c.txt"])
def test_nothing_is_unpacked_before_the_check(tmp_path: Path, extra: str) -> None:
    """64 MB of zeros that take 64 KB compressed."""
    path = tmp_path / "x.npz"
    with (
        zipfile.ZipFile(write(path, ENTRIES), "a", zipfile.ZIP_DEFLATED) as archive,
        archive.open(extra, "w") as file,
    ):
        file.write(described("(16777216,)"))
        for _ in range(64):
            file.write(bytes(2**20))
    tracemalloc.start()
    with pytest.raises(ArtifactRefused):
        read_npz(path, "x.npz", WANTED, fix="Export again.")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**21


def test_names_are_known_before_an_array_is_read(tmp_path: Path) -> None:
    with open_npz(write(tmp_path / "x.npz", ENTRIES), "x.npz", expected="arrays", fix="") as stored:
        assert stored.infos == WANTED
        assert stored.read("b") == 7
    with pytest.raises(ArtifactRefused), open_npz(tmp_path / "x.npz", "x.npz", expected="arrays", fix="") as stored:
        stored.read("c")
