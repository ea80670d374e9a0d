"""`flexvar evaluate page`: pictures of a run: the best, the worst, and some of the best and worst classes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flexvar_runtime import FlexVARPipeline
from flexvar_runtime.cli import options
from flexvar_runtime.cli.console import JsonOption, emit, err, say
from flexvar_runtime.errors import InvalidInput
from flexvar_runtime.files.targets import check_files, make_writable

from .features import RunFeatures, load
from .page import make_again, require_same_model, rows_of, write_page
from .reference import read_reference
from .runs.settings import is_run, read_settings
from .score_command import Partial, ReferenceFile
from .scoring import influences_on_fid
from .statistics.threads import fixed_threads


def page(
    run: Annotated[Path, typer.Argument(help="Run of flexvar evaluate sample with --network.")],
    bundle: Annotated[Path, typer.Argument(help="The bundle of the run.")],
    reference: ReferenceFile,
    output: Annotated[Path, typer.Option("-o", "--output", help="HTML file to write.")],
    partial: Partial = False,
    backend: options.Backend = "auto",
    device: options.Device = None,
    engines: options.Engines = None,
    threads: options.Threads = None,
    allow_unproved: options.AllowUnproved = False,
    force: options.Force = False,
    as_json: JsonOption = False,
) -> None:
    """Show the best and worst pictures.

    The page has the pictures that lower and raise FID most, and some of the best and worst classes. They are generated
    again, because a run with features need not keep them.
    """
    check_files([output], force)
    make_writable(output.absolute().parent)
    if not is_run(run) or (settings := read_settings(run)).features is None:
        got = f"{run} is not a run that keeps features."
        raise InvalidInput(got, expected="a run with features", fix="Sample it with --network NETWORK.")
    found = read_reference(reference)
    with FlexVARPipeline.from_bundle(bundle, backend, device, threads, engines, allow_unproved=allow_unproved) as pipe:
        require_same_model(pipe, settings)
        source = RunFeatures(run, settings, partial)
        say(f"computing the influence of {source.count:,} images on FID", err)
        with fixed_threads():
            influences = influences_on_fid(load(source), found)
        rows = rows_of(source.numbers, influences.values, settings, pipe.model.class_names)
        pictures = make_again(pipe, settings, (number for row in rows for number in row.numbers))
    first = settings.first
    facts = [
        ("FID", f"{influences.fid:.3f} of {source.count:,} images against {found.facts.source}"),
        ("bundle", first.bundle),
        ("backend", first.backend),
        ("schedule", str(first.schedule)),
        ("guidance", f"{first.guidance.scale:g}, {first.guidance.rule}"),
        ("sampling", f"top_k {first.sampling.top_k}, top_p {first.sampling.top_p:g}"),
        ("seed", str(first.seed)),
    ]
    write_page(output, f"Pictures of {run.resolve().name}", facts, rows, pictures, settings, force=force)
    data = {
        "page": str(output),
        "fid": influences.fid,
        "rows": [{"title": row.title, "numbers": row.numbers} for row in rows],
    }
    emit(data, as_json, lambda: say(str(output)))
