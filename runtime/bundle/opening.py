"""Reading a bundle: everything is checked against the manifest before any parser of its content sees a byte.

Cheap checks come first: manifest, names, links, sizes; then the sha256 of every file. The only parser that runs on
unchecked bytes is the strict JSON of the manifest itself.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import NoReturn

from ..checks import check_whole, short
from ..errors import ArtifactRefused
from ..model.signatures import WEIGHTS_OF
from ..model.tensors import GraphSpec
from .manifest import ENGINES, MANIFEST, MAX_MANIFEST_BYTES, FileRecord, Manifest

MAX_WORKERS = 1024
_COPY_AGAIN = "copy the whole bundle again, or export it again"
_READ_FLAGS = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)


@dataclass(frozen=True, kw_only=True)
class Bundle:
    """A checked bundle. `sha256` is that of `manifest.json`, and so stands for every byte of the bundle."""

    path: Path
    manifest: Manifest
    sha256: str

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, workers: int | None = None) -> Bundle:
        """Check a bundle and open it. workers: threads that hash its files. Raises ArtifactRefused, InvalidInput."""
        root = bundle_root(path)
        data = read_manifest(root)
        manifest = Manifest.from_bytes(data)
        check_listing(root, manifest)
        for name, record in hash_files(root, manifest.files, workers).items():
            expected = manifest.files[name]
            if record != expected:
                _refuse(name, f"sha256 {record.sha256}", f"sha256 {expected.sha256}", _COPY_AGAIN)
        return cls(path=root, manifest=manifest, sha256=hashlib.sha256(data).hexdigest())

    def file(self, name: str) -> Path:
        """Where a file of the manifest lies. Raises ArtifactRefused for any other name."""
        if name not in self.manifest.files:
            _refuse(name, "no such file in the manifest", f"one of {', '.join(self.manifest.files)}", "export again")
        return self.path / name

    def graph(self, name: str) -> GraphSpec:
        """Inputs and outputs of a graph. Raises ArtifactRefused where the bundle has no such graph."""
        if name not in self.manifest.graphs:
            _refuse(name, "no such graph in the bundle", f"one of {', '.join(self.manifest.graphs)}", "export again")
        return self.manifest.graphs[name]

    def graph_files(self, name: str) -> tuple[str, ...]:
        """Files of the manifest that a graph consists of: itself and its weights, which another graph may own."""
        file, files = self.graph(name).file, self.manifest.files
        owner = name if f"{file}.data" in files else WEIGHTS_OF.get(name, name)
        return tuple(each for each in (file, f"{self.graph(owner).file}.data") if each in files)

    def graph_file(self, name: str) -> Path:
        """Where a graph lies. Raises ArtifactRefused for one that takes weights from `engines/`.

        Backends refuse weights outside the bundle; inside it, only what lies there is not under the manifest.
        """
        path = self.file(self.graph(name).file)
        if ENGINES.encode() in path.read_bytes().lower():
            _refuse(path.name, f"a graph that names {ENGINES}/", "weights in files of the manifest", "export again")
        return path


def bundle_root(path: str | os.PathLike[str]) -> Path:
    """The real directory behind `path` (links on the way to a bundle are the user's own). Raises ArtifactRefused."""
    if not os.path.isdir(path):
        what = "a file" if os.path.exists(path) else "nothing"
        fix = "check the path, or make a bundle with flexvar export"
        raise ArtifactRefused(f"{what} at {os.fspath(path)}", expected="the directory of a bundle", fix=fix)
    return Path(path).resolve()


def read_manifest(root: Path) -> bytes:
    """The bytes of `manifest.json`, which must be a regular file; cut where too long. Raises ArtifactRefused."""
    if not os.path.lexists(root / MANIFEST):
        fix = "name the directory that flexvar export wrote"
        raise ArtifactRefused(f"{root} without {MANIFEST}", expected="a bundle", fix=fix)
    with _reading(MANIFEST):
        _require_regular(MANIFEST, os.lstat(root / MANIFEST).st_mode)
    with _open(root, MANIFEST) as file:
        return file.read(MAX_MANIFEST_BYTES + 1)


def inventory(root: Path) -> dict[str, int]:
    """Every file below `root` with its size, manifest and `engines/` left out. Links and special files are refused."""
    found: dict[str, int] = {}
    pending = [""]
    while pending:
        folder = pending.pop()
        with _reading(folder or "."), os.scandir(root / folder) as scan:
            entries = list(scan)
        if folder and not entries:
            _refuse(folder, "an empty directory", "only the files of the manifest", "remove it")
        for entry in entries:
            name = f"{folder}/{entry.name}" if folder else entry.name
            with _reading(name):
                info = os.lstat(entry.path)
            if not stat.S_ISDIR(info.st_mode):
                _require_regular(name, info.st_mode)
                found[name] = info.st_size
            elif name != ENGINES:
                pending.append(name)
    found.pop(MANIFEST, None)
    return found


def check_listing(root: Path, manifest: Manifest) -> None:
    """Refuse files that are missing, unknown, cut or grown, without reading them. Raises ArtifactRefused."""
    found = inventory(root)
    for name in sorted(found.keys() - manifest.files.keys()):
        _refuse(name, "a file that the manifest does not list", "only the files of the manifest", "remove it")
    for name, record in manifest.files.items():
        if name not in found:
            _refuse(name, "no such file", f"a file of {record.size} bytes", _COPY_AGAIN)
        if found[name] != record.size:
            _refuse(name, f"{found[name]} bytes", f"{record.size} bytes", _COPY_AGAIN)


def hash_files(root: Path, names: Iterable[str], workers: int | None = None) -> dict[str, FileRecord]:
    """Size and sha256 of files below `root`, in the order of `names`; `workers` None means up to 8 threads."""
    if workers is not None:
        check_whole("threads", workers, 1, MAX_WORKERS)
    ordered = list(names)
    with ThreadPoolExecutor(max_workers=workers or min(8, os.cpu_count() or 1)) as pool:
        return dict(zip(ordered, pool.map(lambda name: _hash(root, name), ordered), strict=True))


def _hash(root: Path, name: str) -> FileRecord:
    with _open(root, name) as file:
        digest = hashlib.file_digest(file, "sha256")
        return FileRecord(size=file.tell(), sha256=digest.hexdigest())


@contextmanager
def _open(root: Path, name: str) -> Iterator[BufferedReader]:
    """Open a regular file, looking at what was opened and not only at what was there before."""
    with _reading(name):
        fd = os.open(root / name, _READ_FLAGS)
        with os.fdopen(fd, "rb") as file:
            _require_regular(name, os.fstat(fd).st_mode)
            yield file


@contextmanager
def _reading(name: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        _refuse(name, f"a file that cannot be read ({error.strerror})", "a readable file", "check its permissions")


def _require_regular(name: str, mode: int) -> None:
    if not stat.S_ISREG(mode):
        what = "a link" if stat.S_ISLNK(mode) else "a directory" if stat.S_ISDIR(mode) else "a special file"
        _refuse(name, what, "a regular file", "copy the bundle with its links resolved (cp -rL), or export it again")


def _refuse(name: str, got: str, expected: str, fix: str) -> NoReturn:
    shown = name if name.isprintable() else short(name)
    raise ArtifactRefused(f"{shown}: {got}", expected=expected, fix=fix) from None
