"""The results of a benchmark as JSON lines. Each line is one record and can be read by itself.

The first line describes the machine, and the second holds its measured limits. Then each line is one measurement. If a
run was killed, the file may end in half a line, which is ignored.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from flexvar_runtime.checks import require_range
from flexvar_runtime.errors import ArtifactRefused
from flexvar_runtime.files.atomic import atomic_write
from flexvar_runtime.files.parsing import refuse_failures
from flexvar_runtime.files.reading import read_small
from flexvar_runtime.files.strict_json import decode, encode, loads

_FIX = "Run the benchmark again."
SCHEMA = 1
LEAST, MOST = 1e-15, 1e24  # of any number: reports divide by them
T = TypeVar("T")


def _require_numbers(field: str, values: Iterable[float | None], low: float) -> None:
    """Raise ArtifactRefused unless all numbers are from `low` to MOST. None is left out."""
    for value in values:
        if value is not None:
            require_range(field, value, low, MOST)


@dataclass(frozen=True, kw_only=True)
class Environment:
    """The machine and the software.

    gpu: its name, None without one. commit: of this project, None outside a checkout. started: ISO 8601 in UTC.
    """

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
    """The limits of the machine, measured before and after everything else.

    copy_bytes_per_second: of a copy, read and written bytes counted. flops_per_second: of a large matrix product, by
    precision. A multiply-add is two operations.
    """

    copy_bytes_per_second: float
    flops_per_second: dict[str, float]

    def __post_init__(self) -> None:
        _require_numbers("copy_bytes_per_second", (self.copy_bytes_per_second,), LEAST)
        _require_numbers("flops_per_second", self.flops_per_second.values(), LEAST)


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """What is measured.

    variant: a backend ("ort-cpu") or a peer ("torch-eager"). model: its name in the results. precision: of the bundle,
    or the one that a peer computes in.
    """

    name: str
    model: str
    variant: str
    precision: str
    schedule: str
    batch: int
    guided: bool
    threads: int

    def __post_init__(self) -> None:
        _require_numbers("batch", (self.batch,), 1)
        _require_numbers("threads", (self.threads,), 1)


@dataclass(frozen=True, kw_only=True)
class Measured:
    """The measurement of one scenario.

    seconds: wall time of each counted call, decoder included, in order. turns: the position of each call among all
    calls of the run, because variants take turns.

    condition, scales, sampling, decode: medians in seconds, None where the variant does not report them. scales: the
    transformer's step of each scale, without sampling. sampling: of all scales. told: the sum of these parts as a share
    of the call, as a median over the calls.

    peak_memory_bytes: of the process, from the warm-up on, None if unknown. flops: the least operations of one call.
    joules: of one call, if the GPU counts them. note: "not measured" and why, if `seconds` is empty.
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

    def __post_init__(self) -> None:
        _require_numbers("seconds", self.seconds, LEAST)
        parts = (self.condition, self.sampling, self.decode, *(self.scales or ()))
        _require_numbers("times of parts", parts, 0)
        _require_numbers("peak_memory_bytes", (self.peak_memory_bytes,), 0)
        _require_numbers("flops", (self.flops,), LEAST)
        _require_numbers("joules", (self.joules,), 0)
        _require_numbers("told", (self.told,), 0)


@dataclass(frozen=True, kw_only=True)
class Served:
    """The result of one load test, with the modes of MLPerf.

    mode: "single-stream" (one request after the other), "offline" (all at once, in batches) or "server" (requests
    arrive by a Poisson process). rate: requests per second. bound: the required latency in seconds. latencies: seconds
    from arrival to image of each request. images_per_second: over the whole load."""

    scenario: Scenario
    mode: str
    rate: float | None
    bound: float | None
    latencies: tuple[float, ...]
    images_per_second: float

    def __post_init__(self) -> None:
        _require_numbers("latencies", self.latencies, 0)
        _require_numbers("rates", (self.rate, self.bound, self.images_per_second), LEAST)


@dataclass(frozen=True, kw_only=True)
class Quality:
    """The quality of a schedule: recognised share of its images (0 … 1) and Fréchet distance. None if unknown."""

    model: str
    schedule: str
    accuracy: float | None
    frechet: float | None

    def __post_init__(self) -> None:
        _require_numbers("accuracy", (self.accuracy,), 0)
        _require_numbers("frechet", (self.frechet,), 0)


Record = Environment | Ceiling | Measured | Served | Quality
KINDS: dict[str, type[Any]] = {
    kind.__name__.lower(): kind for kind in (Environment, Ceiling, Measured, Served, Quality)
}


@dataclass(frozen=True)
class Results:
    """The content of a file of results."""

    environment: Environment
    ceiling: Ceiling
    measured: tuple[Measured, ...]
    served: tuple[Served, ...]
    quality: tuple[Quality, ...]


def line(record: Record) -> str:
    """A record as one line of JSON, without the newline."""
    kind = type(record).__name__.lower()
    return json.dumps({"schema": SCHEMA, "kind": kind, "value": encode(record)}, sort_keys=True, allow_nan=False)


def write(path: Path, records: Iterable[Record]) -> None:
    """Write records to `path`, which is replaced at once."""
    with atomic_write(path, force=True) as temporary:
        temporary.write_text("".join(f"{line(record)}\n" for record in records), encoding="utf-8")


def append(path: Path, record: Record) -> None:
    """Add a record to the file `path`. If the disk is full, the records before it stay readable."""
    with path.open("a", encoding="utf-8") as file:
        file.write(f"{line(record)}\n")
        file.flush()
        os.fsync(file.fileno())


def read(path: Path) -> Results:
    """The results in a file. Raises ArtifactRefused for another file."""
    records: list[Record] = []
    content = read_small(path, fix="Pass a file that flexvar bench run wrote.")
    with refuse_failures(f"{path.name} is not a file of results", expected="JSON lines in UTF-8", fix=_FIX):
        lines = content.decode("utf-8").split("\n")
    for number, text in enumerate(lines[:-1], 1):
        records.append(_record(text, f"{path.name}:{number}"))
    environments, ceilings = _of(Environment, records), _of(Ceiling, records)
    if len(environments) != 1 or len(ceilings) != 1:
        raise ArtifactRefused(
            f"{path.name} holds {len(environments)} environments and {len(ceilings)} ceilings, not one of each.",
            expected="one of each, as flexvar bench run writes them",
            fix=_FIX,
        )
    return Results(environments[0], ceilings[0], _of(Measured, records), _of(Served, records), _of(Quality, records))


def _record(text: str, where: str) -> Record:
    document = loads(text, where=where, fix=_FIX)
    known = isinstance(document, dict) and document.get("schema") == SCHEMA and document.get("kind") in [*KINDS]
    if not isinstance(document, dict) or not known:
        raise ArtifactRefused(
            f"{where} is not a result of schema {SCHEMA}: {text[:60]!r}.",
            expected=f"a result of schema {SCHEMA}",
            fix=_FIX,
        )
    record: Record = decode(KINDS[document["kind"]], document.get("value"), where=where, fix=_FIX)
    return record


def _of(kind: type[T], records: Iterable[Record]) -> tuple[T, ...]:
    return tuple(record for record in records if isinstance(record, kind))
