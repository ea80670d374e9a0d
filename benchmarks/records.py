"""What a benchmark leaves: JSON lines, one record a line, each of them readable on its own.

The first line is the machine, the second what it can do at best, then one line a measurement. A file that ends in
half a line (a run that was killed) is read up to there.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from flexvar_runtime.errors import ArtifactRefused
from flexvar_runtime.files.atomic import atomic_write
from flexvar_runtime.files.strict_json import decode, encode, loads

_FIX = "Run the benchmark again."
SCHEMA = 1
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Environment:
    """The machine and the software. gpu: None without one; commit: of this project, None outside a checkout; started:
    ISO 8601 in UTC."""

    cpu: str
    cores: int
    threads: int
    memory_bytes: int
    gpu: str | None
    python: str
    versions: dict[str, str]
    commit: str | None
    started: str


@dataclass(frozen=True, kw_only=True)
class Ceiling:
    """What this machine does at best, measured before and after everything else: bytes/s of a copy (read and written
    counted), and operations/s of a large matrix product by precision (a multiply-add is two)."""

    copy_bytes_per_second: float
    flops_per_second: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """What is measured. variant: a backend ("ort-cpu") or a peer ("torch-eager"); model: a name people know it by;
    precision: the bundle's, or what a peer computes in."""

    name: str
    model: str
    variant: str
    precision: str
    schedule: str
    batch: int
    guided: bool
    threads: int


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One scenario. seconds: wall time of every counted call, decoder included, in the order taken; turns: the place of
    each among all calls of the run, since variants take turns.

    Medians in seconds, None where a variant does not tell: `scales` one a scale (the transformer's step, without
    sampling), `condition`, `sampling` (all scales), `decode`. told: the share of a call that all these add up to, as
    the median over calls (a sum of medians says less where times scatter). peak_memory_bytes: of the process, from the
    warm-up on, None where that cannot be known. flops: operations of one call that cannot be avoided; joules: of one
    call, where a counter says. note: "not measured" and why, where `seconds` is empty.
    """

    scenario: Scenario
    bundle_sha256: str | None
    seconds: tuple[float, ...]
    turns: tuple[int, ...]
    condition: float | None
    scales: tuple[float, ...] | None
    sampling: float | None
    decode: float | None
    peak_memory_bytes: int | None
    flops: float | None
    joules: float | None
    note: str
    told: float | None = None


@dataclass(frozen=True, kw_only=True)
class Served:
    """One load, MLPerf's way. mode: "single-stream" (one after the other), "offline" (all at once, in batches) or
    "server" (requests arrive by a Poisson process of `rate` a second; `bound` is the latency asked for, in seconds).

    latencies: seconds from arrival to image, of every request; images_per_second over the whole load.
    """

    scenario: Scenario
    mode: str
    rate: float | None
    bound: float | None
    latencies: tuple[float, ...]
    images_per_second: float


@dataclass(frozen=True, kw_only=True)
class Quality:
    """How good the pictures of a schedule are: recognised share (0 … 1, None where unknown) and Fréchet distance."""

    model: str
    schedule: str
    accuracy: float | None
    frechet: float | None


Record = Environment | Ceiling | Measured | Served | Quality
KINDS: dict[str, type[Any]] = {
    kind.__name__.lower(): kind for kind in (Environment, Ceiling, Measured, Served, Quality)
}


@dataclass(frozen=True)
class Results:
    """A file of results."""

    environment: Environment
    ceiling: Ceiling
    measured: tuple[Measured, ...]
    served: tuple[Served, ...]
    quality: tuple[Quality, ...]


def line(record: Record) -> str:
    """One line of JSON, without its end."""
    kind = type(record).__name__.lower()
    return json.dumps({"schema": SCHEMA, "kind": kind, "value": encode(record)}, sort_keys=True, allow_nan=False)


def write(path: Path, records: Iterable[Record]) -> None:
    """Replace `path` at once."""
    with atomic_write(path, force=True) as temporary:
        temporary.write_text("".join(f"{line(record)}\n" for record in records), encoding="utf-8")


def read(path: Path) -> Results:
    """Raises ArtifactRefused for what is no such file."""
    records: list[Record] = []
    lines = path.read_text(encoding="utf-8").split("\n")
    for number, text in enumerate(lines[:-1], 1):
        records.append(_record(text, f"{path.name}:{number}"))
    environments, ceilings = _of(Environment, records), _of(Ceiling, records)
    if len(environments) != 1 or len(ceilings) != 1:
        raise ArtifactRefused(
            f"{path.name} with {len(environments)} environments and {len(ceilings)} ceilings",
            expected="one of each, as flexvar bench run writes them",
            fix=_FIX,
        )
    return Results(environments[0], ceilings[0], _of(Measured, records), _of(Served, records), _of(Quality, records))


def _record(text: str, where: str) -> Record:
    document = loads(text, where=where, fix=_FIX)
    known = isinstance(document, dict) and document.get("schema") == SCHEMA and document.get("kind") in KINDS
    if not isinstance(document, dict) or not known:
        raise ArtifactRefused(f"{where}: {text[:60]!r}", expected=f"a result of schema {SCHEMA}", fix=_FIX)
    record: Record = decode(KINDS[document["kind"]], document.get("value"), where=where, fix=_FIX)
    return record


def _of(kind: type[T], records: Iterable[Record]) -> tuple[T, ...]:
    return tuple(record for record in records if isinstance(record, kind))
