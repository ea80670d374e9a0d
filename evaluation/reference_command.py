"""`flexvar evaluate import` and `flexvar evaluate reference`: what metrics are computed with and compared with."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from flexvar_runtime.cli import options
from flexvar_runtime.cli.console import JsonOption, emit, say, steps
from flexvar_runtime.errors import InvalidInput
from flexvar_runtime.files.strict_json import encode
from flexvar_runtime.files.targets import check_files, make_writable

from .features import ComputedFeatures, blocks_of, load
from .network.features import FeatureNetwork
from .pictures import open_pictures
from .reference import Difference, make_reference, stored_moments, write_reference
from .score_command import NetworkBackend, Partial, Work
from .statistics.threads import fixed_threads


def import_network(
    source: Annotated[Path, typer.Argument(help="classify_image_graph_def.pb, the network of OpenAI's evaluator.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="ONNX file to write the feature network to.")],
    force: options.Force = False,
    as_json: JsonOption = False,
) -> None:
    """Convert OpenAI's network to ONNX.

    TensorFlow is not needed. Nothing in the file is executed.
    """
    from .network.importing import import_network as convert

    _require_other(source, output)
    check_files([output], force)
    make_writable(output.absolute().parent)
    imported = convert(source, output, force=force)
    emit(imported.to_json(), as_json, lambda: say(str(output)))


def reference(
    source: Annotated[Path, typer.Argument(help="NPZ file of OpenAI's evaluator, or a directory of real pictures.")],
    network: Annotated[Path, typer.Option(help="Feature network that flexvar evaluate import wrote.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="File to write the reference to.")],
    partial: Partial = False,
    work: Work = None,
    backend: NetworkBackend = "ort-cpu",
    device: options.Device = None,
    threads: options.Threads = None,
    force: options.Force = False,
    as_json: JsonOption = False,
) -> None:
    """Compute the features of real pictures.

    If the file stores moments for FID and sFID, these are used, as OpenAI's evaluator does.
    """
    _require_other(source, output)
    check_files([output], force)
    make_writable(output.absolute().parent)
    if work is not None:
        make_writable(work)
    with FeatureNetwork.open(network, backend, device, threads) as opened:
        pictures = open_pictures(source, partial=partial)
        stored = (None, None) if source.is_dir() else stored_moments(source, opened.widths(pictures.size))
        with fixed_threads(), steps(blocks_of(pictures), "features") as advance:
            features = load(ComputedFeatures(pictures, opened, work=work, advance=advance))
        made = make_reference(
            features,
            stored,
            opened.head,
            source=source.name,
            sha256=pictures.identity,
            size=pictures.size,
            network_name=opened.name,
        )
    write_reference(output, made, force=force)
    data: dict[str, Any] = {"reference": str(output), "about": encode(made.facts)}

    def show() -> None:
        say(str(output))
        facts = made.facts
        say(f"{facts.images:,} pictures of {facts.height}x{facts.width} pixels, network {facts.network_name}")
        if facts.stored:
            say("The moments are those that the file stores.")
        for name, difference in (("FID", facts.difference), ("sFID", facts.spatial_difference)):
            if difference is not None:
                say(_describe(name, difference))

    emit(data, as_json, show)


def _require_other(source: Path, output: Path) -> None:
    """Raise InvalidInput if the result would replace its source."""
    if output.exists() and source.exists() and output.samefile(source):
        got = f"--output {output} is the file that is read."
        raise InvalidInput(got, expected="another file", fix="Choose another name.")


def _describe(name: str, difference: Difference) -> str:
    return (
        f"{name}: the stored moments differ from those of the pictures: {difference.mean:.3g} in a mean, "
        f"{difference.frechet:.6g} as a Fréchet distance"
    )
