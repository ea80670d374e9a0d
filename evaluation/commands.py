"""`flexvar evaluate`: the group of commands. Each command has a file of its own."""

from __future__ import annotations

import typer

from .page_command import page
from .reference_command import import_network, reference
from .sample_command import sample
from .score_command import score
from .sweep_command import sweep


def register(app: typer.Typer) -> None:
    group = typer.Typer(
        no_args_is_help=True,
        rich_markup_mode=None,
        help="Sample thousands of images and compute FID, sFID, inception score, precision and recall.",
    )
    group.command("import")(import_network)
    group.command("reference")(reference)
    group.command("sample")(sample)
    group.command("score")(score)
    group.command("sweep")(sweep)
    group.command("page")(page)
    app.add_typer(group, name="evaluate")
