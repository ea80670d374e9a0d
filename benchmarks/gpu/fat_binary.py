"""Kernels in a CUDA library: which cubins its fat binary holds, and the same library with only some of them.

A fat binary is a row of containers, one for each object file that was linked. A container holds entries: a cubin for
one architecture, or PTX. The loader asks for a container by its address, so every container stays where it is; entries
that are left out become zeros, which packs to nothing.
"""

from __future__ import annotations

import re
import struct
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from flexvar_runtime.errors import ArtifactRefused

SECTION = ".nv_fatbin"
MAGIC = 0xBA55ED50  # of a container
CUBIN = 2  # kind of an entry
STEP = 8  # containers are aligned to as many bytes


@dataclass(frozen=True)
class Entry:
    """number: as cuobjdump counts, from 1; kind, architecture (90 is sm_90); data: with its header."""

    number: int
    kind: int
    architecture: int
    data: bytes


@dataclass(frozen=True)
class Container:
    """Where one begins in the file, the size of its header, and where it ends."""

    start: int
    header: int
    end: int
    entries: tuple[Entry, ...]


def keep_kernels(library: Path, architecture: int, wanted: Callable[[bytes], bool], cuobjdump: Path) -> int:
    """Leave in `library`, which is changed, only those cubins of `architecture` that are wanted. Returns their bytes.

    wanted: told by the names of the kernels in a cubin, joined by spaces. Raises ArtifactRefused for a library without
    kernels of that architecture.
    """
    source = library.read_bytes()
    offset, size = section(library)
    found = list(containers(source, offset, offset + size))
    names = _kernel_names(library, architecture, cuobjdump)
    ours = [e for c in found for e in c.entries if (e.kind, e.architecture) == (CUBIN, architecture)]
    if not ours or {entry.number for entry in ours} != set(names):
        raise ArtifactRefused(
            f"{library.name} with {len(ours)} cubins for sm_{architecture}, of which cuobjdump finds {len(names)}",
            expected="the CUDA provider of onnxruntime-gpu",
            fix="take the version that the tool was written for",
        )
    smallest = min((entry.data for entry in ours), key=len)  # for a container that keeps nothing: it stays a valid one
    target, kept = bytearray(source), 0
    for container in found:
        chosen = [e.data for e in container.entries if e.number in names and wanted(names[e.number])]
        data = b"".join(chosen) or smallest
        kept += len(data)
        struct.pack_into("<Q", target, container.start + 8, len(data))
        begin = container.start + container.header
        target[begin : container.end] = data + bytes(container.end - begin - len(data))
    library.write_bytes(target)
    return kept


def section(library: Path, name: str = SECTION) -> tuple[int, int]:
    """Offset and size of a section of an ELF file, by readelf. Raises ArtifactRefused where there is none."""
    command = ["readelf", "--sections", "--wide", str(library)]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    for line in printed.splitlines():
        match = re.search(r"\]\s+(\S+)\s+\S+\s+[0-9a-f]+\s+([0-9a-f]+)\s+([0-9a-f]+)", line)
        if match and match[1] == name:
            return int(match[2], 16), int(match[3], 16)
    raise ArtifactRefused(f"{library.name} without {name}", expected="a CUDA library", fix="name another file")


def containers(source: bytes, start: int, end: int) -> Iterator[Container]:
    """Those of a section, in order."""
    position, number = start, 0
    while position + 16 <= end:
        magic, _, header, size = struct.unpack_from("<IHHQ", source, position)
        if magic != MAGIC:
            position += STEP
            continue
        entries, at = list[Entry](), position + header
        while at < position + header + size:
            kind, _, entry_header, entry_size = struct.unpack_from("<HHIQ", source, at)
            (architecture,) = struct.unpack_from("<I", source, at + 0x1C)
            number += 1
            entries.append(Entry(number, kind, architecture, source[at : at + entry_header + entry_size]))
            at += entry_header + entry_size
        yield Container(position, header, at, tuple(entries))
        position = at


def _kernel_names(library: Path, architecture: int, cuobjdump: Path) -> dict[int, bytes]:
    """Number of an entry to the names of its kernels. cuobjdump unpacks what the entries hold compressed."""
    names = {}
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        command = [str(cuobjdump), "-xelf", "all", str(library.resolve())]
        subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)
        for path in Path(folder).glob("*.cubin"):
            match = re.search(rf"cuda\.(\d+)\.sm_{architecture}\b", path.name)
            if match:
                symbols = set(re.findall(rb"\.text\.([A-Za-z0-9_$.]+)", path.read_bytes()))
                names[int(match[1])] = b" ".join(sorted(symbols))
    return names
