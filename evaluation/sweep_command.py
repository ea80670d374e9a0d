"""`flexvar evaluate sweep`: FID against steps, guidance and precision."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from flexvar_runtime import FlexVARPipeline
from flexvar_runtime.cli import options
from flexvar_runtime.cli.console import JsonOption, emit, err, say
from flexvar_runtime.cli.console import steps as progress
from flexvar_runtime.errors import InvalidInput
from flexvar_runtime.files.atomic import atomic_write
from flexvar_runtime.files.strict_json import encode
from flexvar_runtime.files.targets import make_writable

from .features import LoadedFeatures, RunFeatures, load
from .network.features import FeatureNetwork
from .plot import draw, require_matplotlib
from .reference import Reference, read_reference
from .runs.parts import Share, share_of_launcher
from .runs.sampling import sample as make_shards
from .runs.settings import RunSettings, begin_or_resume
from .runs.starting import MOST_IMAGES, BatchSize, NetworkOnSameDevice, Seed, describe_run, open_network, reporting
from .score_command import ReferenceFile, describe_paired, paired_json, print_table, to_json
from .scoring import STEPS, compare, influences_on_fid, metrics_of, require_network
from .statistics.threads import fixed_threads
from .sweep import Point, Scored, bundle_names, parse_numbers, points_of

RESULT, PLOT = "sweep.json", "sweep.png"


def sweep(
    bundles: Annotated[list[Path], typer.Argument(help="Bundle directories: one model, in one or more precisions.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Directory for the runs, sweep.json and sweep.png.")],
    reference: ReferenceFile,
    network: Annotated[Path, typer.Option(help="Feature network that flexvar evaluate import wrote.")],
    count: Annotated[int, typer.Option(min=8, max=MOST_IMAGES, help="Number of images of each point.")] = 5000,
    steps: Annotated[
        str | None,
        typer.Option(help="Numbers of scales joined by commas, such as 6,8,10. The default is the bundle's."),
    ] = None,
    cfg: Annotated[
        str | None,
        typer.Option(help="Guidance scales joined by commas, such as 1.5,2.5. The default is the bundle's."),
    ] = None,
    seed: Seed = 0,
    backend: options.Backend = "auto",
    device: options.Device = None,
    engines: options.Engines = None,
    threads: options.Threads = None,
    network_backend: NetworkOnSameDevice = None,
    allow_unproved: options.AllowUnproved = False,
    batch_size: BatchSize = None,
    as_json: JsonOption = False,
) -> None:
    """Score many settings of one model.

    FID and the other metrics are computed for every number of steps with every guidance scale and bundle.

    Each point is a run in OUTPUT. Run the same command again to continue. Points are compared with the first one image
    by image, because all have the same classes and seeds.
    """
    require_matplotlib()
    if share_of_launcher(os.environ).count > 1:
        got = "flexvar evaluate sweep runs in one process, but torchrun or SLURM started several."
        raise InvalidInput(
            got, expected="one process", fix="Start it once, or sample the points with flexvar evaluate sample."
        )
    found = read_reference(reference)
    numbers = None if steps is None else [int(n) for n in parse_numbers("--steps", steps, int)]
    scales = None if cfg is None else parse_numbers("--cfg", cfg, float)
    make_writable(output)

    def opened(bundle: Path) -> FlexVARPipeline:
        return FlexVARPipeline.from_bundle(bundle, backend, device, threads, engines, allow_unproved=allow_unproved)

    points: dict[Path, list[Point]] = {}
    classes = set[int]()
    for bundle, name in zip(bundles, bundle_names(bundles), strict=True):  # all are checked before hours of work
        with opened(bundle) as pipe, open_network(network, pipe, network_backend, device, threads) as extractor:
            points[bundle] = list(points_of(pipe, bundle, name, numbers, scales))
            classes.add(pipe.model.classes)
            require_network(extractor.identity, found)
    if len(classes) > 1:
        got = f"The bundles have different numbers of classes: {', '.join(map(str, sorted(classes)))}."
        raise InvalidInput(got, expected="bundles of one model", fix="Pass bundles of one model in several precisions.")
    scored, first = list[Scored](), None
    for bundle in bundles:
        with opened(bundle) as pipe, open_network(network, pipe, network_backend, device, threads) as extractor:
            for point in points[bundle]:
                say(f"{point.name}: schedule {point.schedule}", err)
                settings, features = _run(pipe, extractor, point, output / point.name, count, seed, batch_size)
                with fixed_threads(), progress(STEPS, "score") as advance:
                    influences = influences_on_fid(features, found)
                    metrics = metrics_of(features, found, influences, advance)
                    against = None if first is None else compare(influences, first)
                precision = str(pipe.bundle.manifest.precision)
                scored.append(
                    Scored(point=point, precision=precision, settings=settings, metrics=metrics, against=against)
                )
                first = influences if first is None else first
    data = _to_json(scored, found)
    with atomic_write(output / RESULT, force=True) as partial:
        partial.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    draw(output / PLOT, scored, force=True)

    def show() -> None:
        print_table([(one.point.name, one.metrics) for one in scored])
        for one in scored:
            if one.against is not None:
                say(f"{one.point.name}: {describe_paired(one.against, scored[0].point.name)}")
        say(str(output / RESULT))
        say(str(output / PLOT))

    emit(data, as_json, show)


def _run(
    pipe: FlexVARPipeline,
    network: FeatureNetwork,
    point: Point,
    folder: Path,
    count: int,
    seed: int,
    batch_size: int | None,
) -> tuple[RunSettings, LoadedFeatures]:
    """Sample one point, or continue, and load its features. Raises InvalidInput if other processes sample it too."""
    start = options.starting_settings(pipe, None, "generate")
    first = replace(start, schedule=point.schedule, guidance=point.guidance, seed=seed)
    settings, batch = describe_run(pipe, first, count, network, batch_size=batch_size)
    make_writable(folder)
    begin_or_resume(folder, settings)
    with reporting(settings, Share()) as report:
        result = make_shards(pipe, folder, settings, batch, Share(), network, report)
    if not result.complete:
        got = f"Another process is making images in {folder}."
        raise InvalidInput(got, expected="one process", fix="Wait until it ends, then run the same command again.")
    return settings, load(RunFeatures(folder, settings, partial=False))


def _to_json(scored: list[Scored], reference: Reference) -> dict[str, Any]:
    points = []
    for one in scored:
        point = {
            "name": one.point.name,
            "bundle": one.settings.first.bundle,
            "bundle_precision": one.precision,
            "steps": one.point.steps,
            "schedule": str(one.point.schedule),
            "guidance": one.point.guidance.to_json(),
            **to_json(one.metrics),
        }
        points.append(point | ({} if one.against is None else {"against_first": paired_json(one.against)}))
    return {"reference": encode(reference.facts), "seed": str(scored[0].settings.first.seed), "points": points}
