"""`flexvar inspect`: what a bundle is."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, cast

import typer
from rich.markup import escape
from rich.table import Column, Table

from ..bundle import Bundle
from ..strict_json import encode
from .console import JsonOption, emit, out


def inspect(
    bundle: Annotated[Path, typer.Argument(help="Bundle directory.")],
    as_json: JsonOption = False,
) -> None:
    """Check a bundle's integrity and show its model, graphs, defaults, parity record and files."""
    opened = Bundle.open(bundle)
    manifest = opened.manifest
    data = {"bundle": opened.sha256, **cast(dict[str, Any], encode(manifest))}

    def show() -> None:
        model, defaults, parity = manifest.model, manifest.defaults, manifest.parity
        worst = max((r.value / r.bound for r in parity.rows if r.metric != "psnr_db"), default=0.0)
        size = sum(record.size for record in manifest.files.values())
        facts = Table(Column(), Column(overflow="fold"), show_header=False)
        for name, value in (
            ("bundle", opened.sha256),
            ("precision", manifest.precision),
            ("size", f"{size / 1e6:.1f} MB in {len(manifest.files)} files"),
            ("transformer", f"depth {model.depth}, width {model.width}, {model.heads} heads"),
            ("classes", f"{model.classes} (label {model.null_class} means no class)"),
            ("tokens", f"{model.vocabulary} codes of dimension {model.code_dim}, {model.downsampling} pixels a side"),
            ("schedule", defaults.schedule),
            ("guidance", f"{defaults.guidance_scale:g}, {defaults.guidance_rule}"),
            ("sampling", f"top-k {defaults.top_k}, top-p {defaults.top_p:g}, greedy scales {defaults.greedy_scales}"),
            (
                "parity",
                f"{'passed' if parity.passed else 'FAILED'} on {parity.backend}"
                f"{' (emulated)' if parity.emulated else ''}, {len(parity.rows)} checks, "
                f"largest error {worst:.0%} of its bound",
            ),
            ("made with", ", ".join(f"{tool} {version}" for tool, version in manifest.provenance.tools.items())),
        ):
            facts.add_row(name, escape(value))
        out.print(facts)
        graphs = Table("graph", "inputs", "outputs", "largest activation")
        for name, graph in manifest.graphs.items():
            largest = manifest.largest_activation.get(name)
            tensors = [
                ", ".join(f"{t.name} ({', '.join(map(str, t.axes))})" for t in _shown(side))
                for side in (graph.inputs, graph.outputs)
            ]
            graphs.add_row(escape(name), *map(escape, tensors), f"{largest.value:.1f}" if largest else "")
        out.print(graphs)

    emit(data, as_json, show)


def _shown(tensors: tuple[Any, ...]) -> list[Any]:
    """Of the cache tensors, one a block, the first of keys and of values."""
    return [tensor for tensor in tensors if not tensor.name.startswith(("past_", "new_")) or tensor.name.endswith("_0")]
