"""The files of an open bundle, and the checks that they are still those whose sha256 was checked."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import NoReturn, Self

from ..checks import short
from ..errors import ArtifactRefused, InvalidInput
from .manifest import FileRecord


@dataclass(frozen=True)
class Identity:
    """What a file system tells about a file. Times are in nanoseconds."""

    device: int
    inode: int
    size: int
    modified_ns: int
    changed_ns: int

    @classmethod
    def of(cls, info: os.stat_result) -> Self:
        return cls(info.st_dev, info.st_ino, info.st_size, info.st_mtime_ns, info.st_ctime_ns)

    @property
    def content(self) -> tuple[int, int]:
        """Size and modification time. They change with the content, but not when the file is moved or removed."""
        return self.size, self.modified_ns


class CheckedFiles:
    """Files that stay open after they were hashed. While a file is open, no other file can get its inode.

    Libraries open graphs and weights again by path, and map weights into memory. The checks here find files that were
    replaced or edited meanwhile. They do not find an edit that keeps the size and the times of a file.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._open: dict[str, tuple[int, Identity]] = {}
        self._closed = False

    def hash(self, name: str, file: BufferedReader) -> FileRecord:
        """Size and sha256 of an opened file. It stays open until `close`. Raises ArtifactRefused, OSError."""
        before = Identity.of(os.fstat(file.fileno()))
        digest = hashlib.file_digest(file, "sha256")
        record = FileRecord(size=file.tell(), sha256=digest.hexdigest())
        if Identity.of(os.fstat(file.fileno())) != before:
            _refuse_changed(name)
        self._open[name] = os.dup(file.fileno()), before
        return record

    @contextmanager
    def unchanged(self) -> Iterator[None]:
        """Check before and after the body that every path still names the file that was hashed, unedited.

        Raises ArtifactRefused if one does not, also if the body fails. Raises InvalidInput if the files are closed.
        """
        self._require_same_paths()
        try:
            yield
        finally:
            self._require_same_paths()

    def require_unedited(self) -> None:
        """Raise ArtifactRefused if the content of a file has changed. Moving or removing a file does not change it."""
        for name, (descriptor, identity) in self._open.items():
            if Identity.of(os.fstat(descriptor)).content != identity.content:
                _refuse_changed(name)

    def close(self) -> None:
        """Close the files. May be called again."""
        self._closed = True
        while self._open:
            os.close(self._open.popitem()[1][0])

    def __del__(self) -> None:
        self.close()

    def _require_same_paths(self) -> None:
        if self._closed:
            raise InvalidInput("The bundle is closed.", expected="an open bundle", fix="Open the bundle again.")
        for name, (_, identity) in self._open.items():
            try:
                found = Identity.of(os.lstat(self._root / name))
            except OSError:
                found = None
            if found != identity:
                _refuse_changed(name)


def _refuse_changed(name: str) -> NoReturn:
    shown = name if name.isprintable() else short(name)
    raise ArtifactRefused(
        f"The bundle changed while it was open: {shown} is not the file that was checked.",
        expected="files that stay as they are",
        fix="Open the bundle again.",
    ) from None
