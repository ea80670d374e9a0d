"""The `flexvar` command, composed from what the installed packages register, and its exit codes."""

from __future__ import annotations

import importlib.metadata
import json
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from .._version import __version__
from ..errors import FlexVARError, OutOfMemory
from .console import err, start_logging

GROUP = "flexvar.commands"
INTERRUPTED = 130


def build() -> typer.Typer:
    """The application with the subcommands of every installed package."""
    app = typer.Typer(
        name="flexvar",
        help="FlexVAR in production: export, verify, generate.",
        no_args_is_help=True,
        add_completion=False,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
    )

    @app.callback()
    def root(
        version: Annotated[
            bool, typer.Option("--version", is_eager=True, callback=_version, help="Print the version.")
        ] = False,
        verbose: Annotated[bool, typer.Option("--verbose", help="Show debugging messages.")] = False,
    ) -> None:
        start_logging(verbose)

    for entry in sorted(importlib.metadata.entry_points(group=GROUP), key=lambda entry: entry.name != "runtime"):
        entry.load()(app)
    return app


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"flexvar {__version__}")
        raise typer.Exit


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; always ends with SystemExit.

    0 ok, 2 usage, 3 parity failed, 4 environment, 5 artefact refused, 6 out of memory, 130 interrupted.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        build()(arguments, prog_name="flexvar")
    except KeyboardInterrupt:
        err.print("interrupted")
        sys.exit(INTERRUPTED)
    except MemoryError as error:
        known = isinstance(error, OutOfMemory)
        _report(
            error if known else OutOfMemory("no memory left", expected="more", fix="use a smaller batch"), arguments
        )
    except FlexVARError as error:
        _report(error, arguments)


def _report(error: BaseException, arguments: Sequence[str]) -> None:
    """Print a refusal for people on standard error, and as JSON on standard output where JSON was asked for."""
    assert isinstance(error, FlexVARError)
    if "--json" in arguments:
        content = {"type": type(error).__name__, "got": error.got, "expected": error.expected, "fix": error.fix}
        sys.stdout.write(json.dumps({"error": content}, indent=1) + "\n")
    for label, text in (("error: got", error.got), ("  expected", error.expected), ("  fix", error.fix)):
        err.print(f"{label}: {text}", highlight=False, markup=False, soft_wrap=True)
    sys.exit(error.exit_code)
