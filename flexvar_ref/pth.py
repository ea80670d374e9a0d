"""Reading of PyTorch checkpoints (`.pth`, `.pt`, `.ckpt`, `.bin`). No code in a file is ever run.

`read_pth` describes the tensors of a file and leaves them there, so its memory does not depend on the sizes that a file
claims. Values that are no tensors, numbers, text or plain containers become `Opaque`: options, optimiser and scheduler
objects, arrays. A file that asks for a call which runs code is refused.
"""

from __future__ import annotations

import io
import mmap
import re
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .errors import CheckpointError
from .parsing import refuse_failures, shown
from .pickles import opaque, read_pickle
from .stored import StoredTensor

_DTYPES = {
    "Float": torch.float32,
    "Double": torch.float64,
    "Half": torch.float16,
    "BFloat16": torch.bfloat16,
    "Long": torch.int64,
    "Int": torch.int32,
    "Short": torch.int16,
    "Char": torch.int8,
    "Byte": torch.uint8,
    "Untyped": torch.uint8,
    "Bool": torch.bool,
}
_LEGACY_MAGIC, _LEGACY_PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
_DICTIONARIES = ("collections.OrderedDict", "collections.defaultdict", "builtins.dict", "__builtin__.dict")
# Nothing that a file names is called. No checkpoint needs one of these, so a file that asks for one is refused.
_RUNS_CODE = re.compile(
    r"(os|posix|nt|subprocess|pty|shutil|socket|ctypes|runpy|importlib|webbrowser)\..*|"
    r"(builtins|__builtin__|io|_io)\.(eval|exec|execfile|compile|open|__import__|input|breakpoint)"
)


@dataclass(frozen=True, slots=True)
class _Storage:
    """A storage that a pickle refers to. count: number of elements."""

    key: str
    dtype: torch.dtype | None
    count: int


def read_pth(path: Path, call: Callable[[str], None] | None = None) -> Any:
    """The content of a PyTorch checkpoint, with a `StoredTensor` in place of every dense tensor.

    call: receives the name of every class or function that the file asks for and that becomes `Opaque`. It may raise.
    Raises CheckpointError.
    """
    with refuse_failures(
        CheckpointError,
        f"{path.name} cannot be read",
        expected="a complete PyTorch checkpoint of tensors and plain containers",
        fix="Download it again and compare its size.",
    ):
        if not path.is_file():
            raise CheckpointError(f"{path} is not a file.", expected="a checkpoint", fix="Check the path.")
        with path.open("rb") as file:
            # a private copy: torch needs memory that it may write to
            view = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        reader = _Reader(path.name, view, call)
        return reader.read_zip(path) if view[:4] == b"PK\x03\x04" else reader.read_legacy()


class _Reader:
    """Reads one file. places: offset and size in bytes of every storage."""

    def __init__(self, name: str, view: mmap.mmap, call: Callable[[str], None] | None) -> None:
        self.name, self.view, self.told = name, view, call
        self.places: dict[str, tuple[int, int]] = {}

    def read_zip(self, path: Path) -> Any:
        """The form that torch.save writes since 1.6: a zip archive whose entries are stored."""
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
        places: dict[str, tuple[int, int]] = {}
        for entry in entries:
            if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1:
                raise CheckpointError(
                    f"{self.name} is a zip archive with the compressed entry {shown(entry.filename)}, but torch.save "
                    "compresses nothing.",
                    expected="entries that are stored as they are",
                    fix="Use the file as torch.save wrote it.",
                )
            if entry.filename in places:
                raise ValueError(f"it has the entry {shown(entry.filename)} twice")
            places[entry.filename] = self._place(entry)
        pickles = [name for name in places if re.fullmatch(r"[^/]*/data\.pkl", name)]
        if len(pickles) != 1:
            raise ValueError("it is a zip archive, but not of torch.save")
        root = pickles[0].removesuffix("data.pkl")
        order = places.get(f"{root}byteorder")
        if order is not None and self._bytes(order) != b"little":
            raise ValueError("it was written on a machine of another byte order")
        data = f"{root}data/"
        self.places = {name.removeprefix(data): place for name, place in places.items() if name.startswith(data)}
        return read_pickle(io.BytesIO(self._bytes(places[pickles[0]])), self._call, self._storage)

    def _place(self, entry: zipfile.ZipInfo) -> tuple[int, int]:
        """Offset and size of the bytes of an entry, behind its local header."""
        signature, name, extra = struct.unpack_from("<4s22xHH", self.view, entry.header_offset)
        start = entry.header_offset + 30 + name + extra
        if signature != b"PK\x03\x04" or start + entry.file_size > len(self.view):
            raise ValueError("its zip archive is damaged")
        return start, entry.file_size

    def _bytes(self, place: tuple[int, int]) -> bytes:
        start, size = place
        return self.view[start : start + size]

    def read_legacy(self) -> Any:
        """The form before 1.6: pickles, then for each storage its number of elements and its bytes."""
        head = [read_pickle(self.view, self._call) for _ in range(3)]
        order = head[2].get("little_endian") if isinstance(head[2], dict) else None
        if head[:2] != [_LEGACY_MAGIC, _LEGACY_PROTOCOL] or order is not True:
            raise ValueError("it is a pickle, but not of torch.save")
        declared: dict[str, _Storage] = {}

        def storage(identity: Any) -> _Storage:
            found = self._storage(identity)
            return declared.setdefault(found.key, found)

        content = read_pickle(self.view, self._call, storage)
        keys = read_pickle(self.view, self._call)
        start = self.view.tell()
        for key in keys:
            (count,) = struct.unpack_from("<q", self.view, start)
            item = declared[key].dtype
            size = count * (item.itemsize if item is not None else 0)
            if count != declared[key].count or item is None or start + 8 + size > len(self.view):
                raise ValueError("it is cut short or damaged")
            self.places[key] = start + 8, size
            start += 8 + size
        return content

    def _storage(self, identity: Any) -> _Storage:
        """The storage of a persistent id: ("storage", type, key, device, number of elements, view)."""
        kind, cls, key, _, count, *view = identity
        if kind != "storage" or type(key) is not str or type(count) is not int or count < 0 or any(view):
            raise ValueError("its pickle is damaged")
        return _Storage(key, _DTYPES.get(cls.name.rpartition(".")[2].removesuffix("Storage")), count)

    def _call(self, name: str, arguments: tuple[Any, ...]) -> Any:
        """The value of a call in the pickle."""
        if name in ("torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor"):
            return self._tensor(*arguments[:4])
        if name == "torch._utils._rebuild_tensor_v3":  # the storage has no type, the tensor has one
            storage, *place, _, _, dtype = arguments[:7]
            known = next((known for known in _DTYPES.values() if str(known) == dtype.name), None)
            return self._tensor(replace(storage, dtype=known), *place)
        if name in ("torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state"):
            return arguments[0]
        if name in _DICTIONARIES:
            return {}
        if _RUNS_CODE.fullmatch(name):
            raise CheckpointError(
                f"{self.name} asks to run {shown(name)}, but code in a checkpoint is never run.",
                expected="tensors and plain containers; code in a pickle is never run",
                fix="Get the file from its publisher, or convert it to safetensors where it was made.",
            )
        if self.told is not None:
            self.told(name)
        return opaque(name, arguments)

    def _tensor(self, storage: _Storage, offset: int, size: tuple[int, ...], stride: tuple[int, ...]) -> StoredTensor:
        numbers = (offset, *size, *stride)
        whole = all(type(number) is int and 0 <= number < 2**62 for number in numbers)
        if not isinstance(storage, _Storage) or not whole or len(size) != len(stride):
            raise ValueError("its pickle is damaged")
        return StoredTensor(tuple(size), storage.dtype, lambda: self._read(storage, offset, size, stride))

    def _read(self, storage: _Storage, offset: int, size: tuple[int, ...], stride: tuple[int, ...]) -> Tensor:
        """A tensor, which shares the memory of the file. Raises ValueError if it exceeds its storage."""
        dtype = storage.dtype
        if dtype is None:
            raise ValueError("a tensor has an unknown type")
        if 0 in size:
            return torch.empty(size, dtype=dtype)
        count = 1 + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
        start, length = self.places[storage.key]
        begin, end = start + offset * dtype.itemsize, start + (offset + count) * dtype.itemsize
        if end > start + length:
            raise ValueError("a tensor exceeds its storage")
        part = memoryview(self.view)[begin:end]
        aligned = part if begin % dtype.itemsize == 0 else bytearray(part)
        return torch.frombuffer(aligned, dtype=dtype).as_strided(size, stride)
