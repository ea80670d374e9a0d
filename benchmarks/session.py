"""A whole run: the models that a suite does not bring are made, then the machine's limit, then model after model.

The limit is measured again at the end, and the best counts: other work that comes and goes would lower it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from flexvar_runtime import Bundle
from flexvar_runtime.cli.console import steps
from flexvar_runtime.errors import InvalidInput

from .machine import best, ceiling, environment
from .models import make, model_of
from .plans import Extent, plan, read_quality
from .records import Ceiling, Environment, Record, Results, read, write
from .run import Costs, measure
from .suite import Entry


@dataclass(frozen=True)
class Outcome:
    """The records that a run added to its file, and what it kept for deadlines."""

    made: tuple[Record, ...]
    costs: tuple[Costs, ...]


def run_session(
    entries: Sequence[Entry], options: Extent, output: Path, *, threads: int, costs: bool = True, append: bool = False
) -> Outcome:
    """Measure every model into the file `output`, which is whole after each result; the file's own records stay in
    front where `append` says so.

    Models that are made for the run lie in `output` with the suffix .models. Raises InvalidInput for plans that cannot
    be and for models that cannot be appended, before anything is made, and ArtifactRefused for a bundle, table or file
    of results that cannot be read.
    """
    models = [model_of(entry, output.with_suffix(".models")) for entry in entries]
    extents = [entry.extent(options) for entry in entries]
    extents = extents if costs else [replace(extent, costs=()) for extent in extents]
    plans = [plan(model, extent) for model, extent in zip(models, extents, strict=True)]
    for entry in entries:
        if entry.bundle is not None:
            Bundle.open(entry.bundle)  # refused now, not after the models before it
    records: list[Record] = []
    if append and output.exists():
        before = read(output)
        names = [entry.name for entry in entries]
        _require_new(before, names, environment(threads), output.name)
        records = [before.environment, before.ceiling, *before.measured, *before.served]
        records += [one for one in before.quality if one.model not in names]  # of a run that was killed
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
        progress(f"{size}, {'what the machine can do is in the file' if records else 'after what the machine can do'}")
        if not records:
            records = [environment(threads), ceiling(threads)]
        for one in plans:
            for result in measure(one, threads, progress):
                if isinstance(result, Costs):
                    kept.append(result)
                else:
                    made.append(result)
                    write(output, [*records, *made])
        records = [best(record, ceiling(threads)) if isinstance(record, Ceiling) else record for record in records]
        write(output, [*records, *made])
    return Outcome(tuple(made), tuple(kept))


def _require_new(before: Results, names: Sequence[str], now: Environment, file: str) -> None:
    """Refuse to add another machine's times, and models that the file has. Raises InvalidInput."""
    for fact in ("cpu", "cores", "threads"):
        if (there := getattr(before.environment, fact)) != (here := getattr(now, fact)):
            raise InvalidInput(
                f"{file} with {fact} {there}, here {here}",
                expected="one machine and one number of threads a file",
                fix="write another file: -o",
            )
    known = {one.scenario.model for one in before.measured} | {one.scenario.model for one in before.served}
    if again := [name for name in names if name in known]:
        raise InvalidInput(
            f"models {', '.join(map(repr, again))}, which {file} has",
            expected="a model once a file",
            fix="name them otherwise (--name, or name = in the suite), or write another file: -o",
        )
