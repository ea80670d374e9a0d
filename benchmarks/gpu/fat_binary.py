"""Lists the cubins in the fat binary of a CUDA library, and removes those that are not needed.

A fat binary is a row of containers, one for each object file that was linked. A container holds entries. An entry is a
cubin for one architecture, or PTX. The loader asks for a container by its address, so every container stays where it
is. Entries that are removed become zeros, which compress to almost nothing.
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
    """One entry of a container.

    number: its place as cuobjdump counts, from 1. kind: CUBIN, or another for PTX. architecture: 90 is sm_90. data: the
    entry with its header.
    """

    number: int
    kind: int
    architecture: int
    data: bytes


@dataclass(frozen=True)
class Container:
    """The place of a container in the file: its start, the size of its header, and its end."""

    start: int
    header: int
    end: int
    entries: tuple[Entry, ...]


def keep_kernels(library: Path, architecture: int, wanted: Callable[[bytes], bool], cuobjdump: Path) -> int:
    """Remove all cubins from `library` but those of `architecture` that are wanted. Returns the bytes that stay.

    wanted: called with the names of the kernels in a cubin, joined by spaces. Raises ArtifactRefused for a library
    without kernels of that architecture.
    """
    source = library.read_bytes()
    offset, size = section(library)
    found = list(containers(source, offset, offset + size))
    names = _kernel_names(library, architecture, cuobjdump)
    ours = [e for c in found for e in c.entries if (e.kind, e.architecture) == (CUBIN, architecture)]
    if not ours or {entry.number for entry in ours} != set(names):
        raise ArtifactRefused(
            f"{library.name} holds {len(ours)} cubins for sm_{architecture}, but cuobjdump lists {len(names)}.",
            expected=f"the same cubins for sm_{architecture} in the file and from cuobjdump, at least one",
            fix="Use the onnxruntime-gpu version of trim_onnxruntime.VERSION.",
        )
    smallest = min((entry.data for entry in ours), key=len)  # a container that keeps no other entry must stay valid
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
    """The offset and the size of a section of an ELF file, by readelf. Raises ArtifactRefused if it has none."""
    command = ["readelf", "--sections", "--wide", str(library)]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    for line in printed.splitlines():
        match = re.search(r"\]\s+(\S+)\s+\S+\s+[0-9a-f]+\s+([0-9a-f]+)\s+([0-9a-f]+)", line)
        if match and match[1] == name:
            return int(match[2], 16), int(match[3], 16)
    raise ArtifactRefused(
        f"{library.name} has no section {name}.",
        expected="a CUDA library",
        fix="Use the onnxruntime-gpu version of trim_onnxruntime.VERSION.",
    )


def containers(source: bytes, start: int, end: int) -> Iterator[Container]:
    """The containers in the bytes from `start` to `end`, in order."""
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
    """The names of the kernels in each cubin, by the number of its entry. cuobjdump decompresses the entries."""
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
