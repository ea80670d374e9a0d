"""A whole run: makes the missing models of a suite, measures the limits of the machine, then each model.

The limits are measured again at the end, and the higher rate counts, because other work on the machine lowers it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from flexvar_runtime import Bundle
from flexvar_runtime.cli.console import steps
from flexvar_runtime.errors import EnvironmentFailed, InvalidInput

from .machine import best, ceiling, environment
from .records import Ceiling, Environment, Record, Results, read, write
from .records import append as append_record
from .suite import Entry
from .suite_models import make, model_of
from .turns import Costs, measure
from .workload import Extent, plan, read_quality


@dataclass(frozen=True)
class Outcome:
    """The records that a run added to its file, and the costs that it saved for deadlines."""

    made: tuple[Record, ...]
    costs: tuple[Costs, ...]


def run_session(
    entries: Sequence[Entry],
    options: Extent,
    output: Path,
    *,
    threads: int,
    costs: bool = True,
    append: bool = False,
    allow_unproved: bool = False,
) -> Outcome:
    """Measure every model, and add each result to the file `output` at once.

    append: keep the records of the file. allow_unproved: as in `Bundle.open`. Models that are made for the run lie in a
    folder named as `output`, with the suffix .models. Before anything is made, it raises InvalidInput for a plan that
    is not possible and for models that cannot be appended, and ArtifactRefused for a bundle, table or file of results
    that is not accepted.
    """
    models = [model_of(entry, output.with_suffix(".models")) for entry in entries]
    extents = [entry.extent(options) for entry in entries]
    extents = extents if costs else [replace(extent, costs=()) for extent in extents]
    plans = [plan(model, extent) for model, extent in zip(models, extents, strict=True)]
    for entry in entries:
        for key, path in (("checkpoint", entry.checkpoint), ("vae", entry.vae)):
            if path is not None and not os.path.exists(path):
                got = f"{key} of the model {entry.name!r:.100}: there is no file {path}."
                raise InvalidInput(got, expected="a checkpoint", fix="Check the path.")
        if entry.bundle is not None:
            Bundle.open(entry.bundle, allow_unproved=allow_unproved)  # refused before anything is measured
    records: list[Record] = []
    if append and os.path.exists(output):
        before = read(output)
        names = [entry.name for entry in entries]
        _require_new(before, names, environment(threads), output.name)
        records = [before.environment, before.ceiling, *before.measured, *before.served]
        records += [one for one in before.quality if one.model not in names]  # left by a run that was killed
    made: list[Record] = [
        row for entry in entries if entry.quality for row in read_quality(Path(entry.quality), entry.name)
    ]
    kept: list[Costs] = []
    exports = [pair for pair in zip(entries, models, strict=True) if pair[0].bundle is None]
    pieces = sum(1 + len(one.cases) + len(one.loads) + (one.costs is not None) for one in plans)
    with steps(len(exports) + 1 + pieces, "bench") as progress:
        for entry, model in exports:
            make(entry, model, threads, progress)
        size = f"{len(plans)} {'model' if len(plans) == 1 else 'models'}, {sum(one.calls for one in plans)} calls"
        progress(
            f"{size}, {'the limits of the machine are in the file' if records else 'after the limits of the machine'}"
        )
        if not records:
            records = [environment(threads), ceiling(threads)]
        begun = False
        for one in plans:
            for result in measure(one, threads, progress):
                if isinstance(result, Costs):
                    kept.append(result)
                    continue
                made.append(result)
                with _disk_errors(output, begun):
                    if begun:
                        append_record(output, result)
                    else:
                        write(output, [*records, *made])
                begun = True
        records = [best(record, ceiling(threads)) if isinstance(record, Ceiling) else record for record in records]
        with _disk_errors(output, begun):
            write(output, [*records, *made])
    return Outcome(tuple(made), tuple(kept))


@contextmanager
def _disk_errors(output: Path, begun: bool) -> Iterator[None]:
    """Turn OSError into EnvironmentFailed. begun: whether the file holds results of this run."""
    try:
        yield
    except OSError as error:
        rest = " The results before that are in the file." if begun else ""
        raise EnvironmentFailed(
            f"{output} cannot be written ({error.strerror or error}).{rest}",
            expected="a file that can be written",
            fix="Free space, or write another file: -o FILE",
        ) from error


def _require_new(before: Results, names: Sequence[str], now: Environment, file: str) -> None:
    """Raises InvalidInput if the file is of another machine, or if it holds one of the models."""
    for fact in ("cpu", "cores", "threads"):
        if (there := getattr(before.environment, fact)) != (here := getattr(now, fact)):
            raise InvalidInput(
                f"{file} was measured with {fact} {there}, but {fact} here is {here}.",
                expected="one machine and one number of threads in a file",
                fix="Write another file: -o FILE",
            )
    known = {one.scenario.model for one in before.measured} | {one.scenario.model for one in before.served}
    if again := [name for name in names if name in known]:
        raise InvalidInput(
            f"{file} holds the models {', '.join(map(repr, again))} already.",
            expected="each model once in a file",
            fix="Give them other names (--name, or name = in the suite), or write another file: -o FILE",
        )
