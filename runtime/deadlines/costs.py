"""Measured costs, kept in the cache folder of the user.

A cost is the time of a whole generation, up to its images, in a pipeline whose graphs are already open.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

from ..checks import require, short
from ..errors import ArtifactRefused, FlexVARError, InvalidInput
from ..files.atomic import atomic_write
from ..files.parsing import refuse_failures
from ..files.private import check_private, make_private, read_private, user_folder
from ..files.strict_json import decode, encode, loads
from ..model.schedule import ScaleSchedule

log = logging.getLogger(__name__)

COSTS_VERSION = 2
QUANTILE = 0.9
FILTERS = ("top-k", "top-p", "top-k, top-p", "none")
MAX_COSTS_BYTES = 4 * 2**20

_MEASURE_AGAIN = "Measure the costs again."
_SHA256 = re.compile(r"[0-9a-f]{64}")
_BACKEND = re.compile(r"[a-z0-9-]{1,40}")


@dataclass(frozen=True, kw_only=True)
class CostRow:
    """Seconds that `batch` images at once take with a schedule, measured on `samples` generations.

    filters: see `Sampling.filters`. p90: 9 of 10 generations took no longer; of fewer than 10 samples it is the
    slowest. scales: the median of every scale, without the condition and the decoder. It is empty if a GPU runs all
    scales at once."""

    schedule: str
    batch: int
    guided: bool
    filters: str
    p90: float
    median: float
    samples: int
    scales: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        with refuse_failures("A cost is not valid", expected="a number of each kind", fix=_MEASURE_AGAIN):
            self._check()

    def _check(self) -> None:
        """Raises ArtifactRefused, and exceptions of any type for values of other types."""
        try:
            count = len(ScaleSchedule.parse(self.schedule))
        except InvalidInput as error:
            raise ArtifactRefused(f"schedule: {error.got}", expected=error.expected, fix=_MEASURE_AGAIN) from error
        require(self.batch >= 1, "batch", self.batch, "at least 1")
        require(self.filters in FILTERS, "filters", self.filters, f"one of {', '.join(map(repr, FILTERS))}")
        require(self.samples >= 1, "samples", self.samples, "at least 1")
        require(0 < self.median <= self.p90 < math.inf, "median", self.median, "above 0, and at most p90")
        require(len(self.scales) in (0, count), "scales of length", len(self.scales), f"0 or {count}")

    @classmethod
    def of(
        cls,
        schedule: ScaleSchedule,
        batch: int,
        guided: bool,
        filters: str,
        seconds: Sequence[float],
        scales: Sequence[Sequence[float]] = (),
    ) -> Self:
        """A row from the seconds of every generation and of every scale of them. Raises ArtifactRefused."""
        import statistics  # takes longer to import than the rest of this package

        with refuse_failures("A cost is not valid", expected="a number of each kind", fix=_MEASURE_AGAIN):
            return cls(
                schedule=str(schedule),
                batch=batch,
                guided=guided,
                filters=filters,
                p90=sorted(seconds)[math.ceil(QUANTILE * len(seconds)) - 1],
                median=statistics.median_low(seconds),
                samples=len(seconds),
                scales=tuple(statistics.median(one) for one in zip(*scales, strict=True)),
            )

    @property
    def key(self) -> tuple[ScaleSchedule, int, bool, str]:
        return ScaleSchedule.parse(self.schedule), self.batch, self.guided, self.filters


@dataclass(frozen=True, kw_only=True)
class CostTable:
    """Costs of one bundle (its sha256) on one backend with a number of threads, on the processor or GPU `device`."""

    version: int = COSTS_VERSION
    bundle: str
    backend: str
    threads: int
    device: str
    rows: tuple[CostRow, ...] = ()

    def __post_init__(self) -> None:
        with refuse_failures("The costs are not valid", expected="costs that were measured", fix=_MEASURE_AGAIN):
            self._check()

    def _check(self) -> None:
        """Raises ArtifactRefused, and exceptions of any type for values of other types."""
        require(self.version == COSTS_VERSION, "version", self.version, str(COSTS_VERSION))
        require(_SHA256.fullmatch(self.bundle) is not None, "bundle", self.bundle, "64 hexadecimal digits")
        require(_BACKEND.fullmatch(self.backend) is not None, "backend", self.backend, "the name of a backend")
        require(self.threads >= 1, "threads", self.threads, "at least 1")
        keys = [row.key for row in self.rows]
        require(
            len(set(keys)) == len(keys), "rows", len(keys), "one row for each schedule, batch, guidance and filters"
        )

    def cost(self, schedule: ScaleSchedule, batch: int, guided: bool, filters: str) -> float | None:
        """The p90 in seconds. None if it was not measured."""
        return next((row.p90 for row in self.rows if row.key == (schedule, batch, guided, filters)), None)

    def with_rows(self, rows: Iterable[CostRow]) -> CostTable:
        """The table with these rows added, in place of earlier ones of the same key."""
        merged = {row.key: row for row in (*self.rows, *rows)}
        return replace(self, rows=tuple(merged.values()))

    def path(self, environ: Mapping[str, str] = os.environ) -> Path:
        """The file of the table, in `$XDG_CACHE_HOME/flexvar/costs`. XDG_CACHE_HOME is `~/.cache` by default."""
        folder = user_folder("XDG_CACHE_HOME", ".cache", environ) / "costs"
        device = hashlib.sha256(self.device.encode()).hexdigest()[:16]
        return folder / f"{self.bundle}-{self.backend}-{self.threads}-{device}.json"

    def save(self, environ: Mapping[str, str] = os.environ) -> Path:
        """Write the table to its file. Raises ArtifactRefused, EnvironmentFailed, OSError."""
        path = self.path(environ)
        make_private(path.parent)
        with atomic_write(path, force=True) as temporary:
            temporary.chmod(0o600)
            temporary.write_text(json.dumps(encode(self), indent=1, allow_nan=False) + "\n", encoding="ascii")
        return path

    def load(self, environ: Mapping[str, str] = os.environ) -> CostTable | None:
        """The saved table of the same bundle, backend, threads and device. None if there is none.

        Raises ArtifactRefused for a file that is damaged, belongs to another setup, or may come from another user.
        """
        path = self.path(environ)
        fix = f"Remove {path}, and measure again."
        try:
            check_private(path.parent)
            data = read_private(path, MAX_COSTS_BYTES + 1)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise ArtifactRefused(
                f"The costs in {path} cannot be read ({error.strerror}).", expected="a regular file", fix=fix
            ) from error
        try:
            require(len(data) <= MAX_COSTS_BYTES, f"{path.name}: bytes", len(data), f"at most {MAX_COSTS_BYTES}")
            document = loads(data, where=path.name, fix=fix)
            found = decode(CostTable, document, where=path.name, fix=fix)
            for field in ("bundle", "backend", "threads", "device"):
                mine, its = getattr(self, field), getattr(found, field)
                require(mine == its, f"{path.name}: {field}", its, f"{short(mine)}")
        except ArtifactRefused as error:
            raise ArtifactRefused(error.got, expected=error.expected, fix=fix) from error
        return found


class KeptCosts:
    """The costs of one setup: those on disk, and those that this process could not write."""

    def __init__(self, setup: CostTable) -> None:
        """setup: a table without rows, of the bundle, backend, threads and device."""
        self._setup = setup
        self._table: CostTable | None = None

    @property
    def table(self) -> CostTable:
        """The table as it was last read. Raises ArtifactRefused for a file that cannot be used."""
        return self.read_again() if self._table is None else self._table

    def read_again(self) -> CostTable:
        """The table, with rows that other processes have written since. Raises ArtifactRefused."""
        found = self._setup.load() or self._setup
        self._table = found if self._table is None else self._table.with_rows(found.rows)
        return self._table

    def keep(self, rows: Iterable[CostRow]) -> None:
        """Add rows to those on disk. If that fails, log a warning and keep them in this process."""
        rows = tuple(rows)
        try:
            self._table = self.read_again().with_rows(rows)
            self._table.save()
        except (OSError, FlexVARError) as error:
            self._table = (self._table or self._setup).with_rows(rows)
            log.warning(
                "Costs are kept in this process only, because they cannot be saved: %s "
                "Set XDG_CACHE_HOME to a folder that can be written.",
                error.got if isinstance(error, FlexVARError) else error,
            )
