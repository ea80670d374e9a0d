"""`flexvar evaluate score`: FID, sFID, inception score, precision and recall of a run or of pictures."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from flexvar_runtime.checks import conflict
from flexvar_runtime.cli import options
from flexvar_runtime.cli.console import JsonOption, emit, err, say, steps
from flexvar_runtime.errors import InvalidInput
from flexvar_runtime.files.strict_json import encode
from flexvar_runtime.files.targets import make_writable

from .features import ComputedFeatures, LoadedFeatures, RunFeatures, RunPictures, blocks_of, load
from .network.features import FeatureNetwork
from .pictures import Pictures, open_pictures
from .reference import read_reference
from .runs.settings import PUBLISHED_COUNT, is_run, read_settings
from .scoring import STEPS, Metrics, Paired, compare, influences_on_fid, metrics_of, require_network
from .statistics.intervals import Interval
from .statistics.threads import fixed_threads

_WIDE = 250  # characters; longer names are broken into lines

ReferenceFile = Annotated[Path, typer.Option("--reference", help="File that flexvar evaluate reference wrote.")]
NetworkFile = Annotated[
    Path | None, typer.Option(help="Feature network that flexvar evaluate import wrote. Needed for pictures.")
]
Partial = Annotated[bool, typer.Option("--partial", help="Use the images that exist although some are missing.")]
Work = Annotated[
    Path | None, typer.Option(help="Directory for intermediate results, so that a stopped command continues.")
]
NetworkBackend = Annotated[str, typer.Option(help="Where the feature network runs: ort-cpu or ort-cuda.")]


def score(
    images: Annotated[
        Path, typer.Argument(help="Run of flexvar evaluate sample, directory of pictures, or NPZ file with arr_0.")
    ],
    reference: ReferenceFile,
    network: NetworkFile = None,
    against: Annotated[
        Path | None,
        typer.Option(help="Second run with the same classes and seed. The difference in FID has an interval."),
    ] = None,
    partial: Partial = False,
    work: Work = None,
    backend: NetworkBackend = "ort-cpu",
    device: options.Device = None,
    threads: options.Threads = None,
    as_json: JsonOption = False,
) -> None:
    """Compute FID and other metrics.

    These are FID, sFID, inception score, precision and recall, as OpenAI's evaluator computes them.
    Metrics of different numbers of images cannot be compared. Published ones are of 50,000.
    """
    if against is not None:
        if partial:
            raise conflict("--against", "--partial, because images are compared one by one", "Leave one out.")
        _require_pairs(images, against)
    found = read_reference(reference)
    if work is not None:
        make_writable(work)
    with ExitStack() as stack:
        stack.enter_context(fixed_threads())
        networks = list[FeatureNetwork]()

        def opened(path: Path) -> FeatureNetwork:
            if network is None:
                got = f"{path} holds pictures, so their features must be computed."
                raise InvalidInput(got, expected="a feature network", fix="Pass --network NETWORK.")
            networks.append(stack.enter_context(FeatureNetwork.open(network, backend, device, threads)))
            require_network(networks[-1].identity, found)
            return networks[-1]

        features = _load(images, opened, partial, work)
        other = None if against is None else _load(against, opened, partial, work)
        if not networks:
            _require_unused(network, device, threads, backend)
        if len(features.pool) != PUBLISHED_COUNT:
            say(f"warning: FID depends on the number of images. These are {len(features.pool):,}, not 50,000.", err)
        with steps(STEPS, "score") as advance:
            influences = influences_on_fid(features, found)
            metrics = metrics_of(features, found, influences, advance, work)
        paired = None if other is None else compare(influences, influences_on_fid(other, found))
    data = {"run": str(images), **to_json(metrics), "reference": encode(found.facts)}
    if paired is not None:
        data["against"] = {"run": str(against), **paired_json(paired)}

    def show() -> None:
        print_table([(str(images), metrics)])
        if paired is not None:
            say(describe_paired(paired, str(against)))

    emit(data, as_json, show)


def _load(images: Path, opened: Callable[[Path], FeatureNetwork], partial: bool, work: Path | None) -> LoadedFeatures:
    """The features of a run or of pictures. opened: opens the network, if one is needed."""
    labels = classes = None
    if not is_run(images):
        pictures: Pictures = open_pictures(images, partial=partial)
    else:
        settings = read_settings(images)
        if settings.features is not None:
            return load(RunFeatures(images, settings, partial))
        pictures = RunPictures(images, settings, partial)
        labels, classes, work = pictures.numbers % settings.classes, settings.classes, work or images / "features"
    network = opened(images)
    if work is not None:
        make_writable(work)
    with steps(blocks_of(pictures), "features") as advance:
        return load(ComputedFeatures(pictures, network, labels, classes, work, advance))


def _require_unused(network: Path | None, device: str | None, threads: int | None, backend: str) -> None:
    """Raise InvalidInput if options of a feature network are given although none was needed."""
    given = {"--network": network, "--device": device, "--threads": threads}
    named = [name for name, value in given.items() if value is not None]
    if backend != "ort-cpu":
        named.append("--backend")
    if named:
        got = f"The run keeps its features, so {named[0]} is not used."
        raise InvalidInput(got, expected="a run or pictures without features", fix=f"Leave out {', '.join(named)}.")


def _require_pairs(one: Path, other: Path) -> None:
    """Raise InvalidInput unless both are runs of the same classes, seeds and images."""
    for path in (one, other):
        if not is_run(path):
            got = f"{path} is not a run, so its classes and seeds are not known. --against compares two runs."
            raise InvalidInput(got, expected="two runs", fix="Pass directories of flexvar evaluate sample.")
    first, second = read_settings(one), read_settings(other)
    for name, option in (("count", "--count"), ("classes", "BUNDLE")):
        if getattr(first, name) != getattr(second, name):
            got = f"The runs differ in {option}: {getattr(first, name)} and {getattr(second, name)}."
            raise InvalidInput(got, expected="the same images", fix=f"Sample both with the same {option}.")
    if first.first.seed != second.first.seed:
        got = f"The runs have the seeds {first.first.seed} and {second.first.seed}."
        raise InvalidInput(got, expected="the same seed", fix="Sample both with the same --seed.")


def to_json(metrics: Metrics) -> dict[str, Any]:
    """The metrics by name."""
    data: dict[str, Any] = {}
    for name, value in vars(metrics).items():
        if isinstance(value, Interval):
            data |= {name: value.value, f"{name}_interval": [value.low, value.high]}
        else:
            data[name] = value
    if metrics.fid_infinity is None:
        data["fid_infinity_interval"] = None
    return data


def paired_json(paired: Paired) -> dict[str, Any]:
    """A comparison by name."""
    return {
        "images": paired.images,
        "difference": paired.difference.value,
        "interval": [paired.difference.low, paired.difference.high],
        "unpaired_width": paired.unpaired_width,
        "significant": paired.significant,
    }


def describe_paired(paired: Paired, other: str) -> str:
    """The comparison as a sentence."""
    found = paired.difference
    interval = f"95 % interval {found.low:+.4f} to {found.high:+.4f}"
    verdict = f"The difference is {'' if paired.significant else 'not '}significant."
    return f"FID minus that of {other}: {found.value:+.4f} ({interval}). {verdict}"


def print_table(rows: Sequence[tuple[str, Metrics]]) -> None:
    """Print the table. Its lines may be longer than those of the terminal, so that nothing is cut."""
    Console(file=sys.stdout, width=_WIDE, markup=False, emoji=False, highlight=False).print(table(rows))


def table(rows: Sequence[tuple[str, Metrics]]) -> Table:
    """The metrics of several sets of images, one row each."""
    named = any(one.recognised is not None for _, one in rows)
    result = Table(box=None, padding=(0, 1), pad_edge=False)
    result.add_column("name", overflow="fold")
    columns = ["images", "FID", "95 % interval", "sFID", "IS", "precision", "recall"]
    for column in (*columns, *(["recognised"] if named else [])):
        result.add_column(column, justify="right", no_wrap=True)
    for name, one in rows:
        result.add_row(
            name,
            f"{one.images:,}",
            f"{one.fid.value:.3f}",
            f"{one.fid.low:.3f} to {one.fid.high:.3f}",
            _shown(one.sfid, ".3f"),
            _shown(one.inception_score, ".2f"),
            f"{one.precision:.4f}",
            f"{one.recall:.4f}",
            *([_shown(one.recognised, ".2%")] if named else []),
        )
    return result


def _shown(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)
