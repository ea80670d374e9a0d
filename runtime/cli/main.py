"""The `flexvar` command: the subcommands that the installed packages register, and the exit codes."""

from __future__ import annotations

import importlib.metadata
import json
import re
import sys
from collections.abc import Sequence
from typing import Annotated, Any, NoReturn, cast

import typer

from .._version import __version__
from ..errors import EnvironmentFailed, FlexVARError, InvalidInput, OutOfMemory
from .console import err, say, start_logging

GROUP = "flexvar.commands"
INTERRUPTED = 130
_SIDES = "--top, --right, --bottom or --left"
_OPTIONS = {"guidance scale": "--cfg", "guidance rule": "--guidance", "sides": _SIDES}  # the others have the same name
_ARGUMENT = re.compile(  # quoted texts, file names and numbers; or the name of a Python argument as group 1
    r"""'[^']*'|"[^"]*"|\S*[/.]\S*\w|(\b(?:top_k|top_p|greedy_scales|max_side|first_index|deadline_ms)\b|"""
    r"(?:^|(?<=Pass )|(?<=Leave out )|(?<=combined with )|(?<=without ))(?:guidance (?:scale|rule)|steps|seed|threads|"
    r"backend|device|engines|schedule|task|paste|strength|anchor|precision|fit|size|mask|sides|feather)\b)"
)
UsageError = cast(
    type[Exception], typer.BadParameter.__mro__[1]
)  # click's class: typer may bundle its own copy of click


def build() -> typer.Typer:
    """The application with the subcommands of every installed package."""
    app = typer.Typer(
        name="flexvar",
        help="Export a FlexVAR checkpoint to a bundle, verify it, and generate or edit images with it.",
        no_args_is_help=True,
        add_completion=False,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
    )

    @app.callback()
    def root(
        version: Annotated[
            bool, typer.Option("--version", is_eager=True, callback=_version, help="Print the version and exit.")
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
    """Run the command line. It always ends with SystemExit. The exit codes:

    0 ok, 2 usage, 3 parity failed, 4 environment, 5 artefact refused, 6 out of memory, 130 interrupted.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        code = build()(arguments, prog_name="flexvar", standalone_mode=False) or 0
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    except UsageError as error:
        code = _report_usage(error, arguments)
    except FlexVARError as error:
        _report(error, arguments)
    except MemoryError:
        fix = "Use a smaller batch, or a machine with more memory."
        _report(OutOfMemory("There is no memory left.", expected="more memory", fix=fix), arguments)
    except OSError as error:
        got, fix = f"A file cannot be read or written: {error}.", "Check its path, its permissions and the free space."
        _report(EnvironmentFailed(got, expected="files that can be read and written", fix=fix), arguments)
    if code == INTERRUPTED:
        err.print("interrupted")
    sys.exit(code)


def _report_usage(error: Any, arguments: Sequence[str]) -> int:
    """Print what is wrong with the options, or help if there are none, and return the exit code of click."""
    got = error.format_message()
    command = error.ctx.command_path if error.ctx else "flexvar"
    line = f"error: {' '.join(got.split()).removesuffix('.')}. Run: {command} --help"
    usage = f"{error.ctx.get_usage()}\n" if error.ctx else ""
    say(got if "Usage:" in got else usage + line, err)
    if "--json" in arguments:
        _print_json("UsageError", got, f"the options of {command}", f"Run: {command} --help")
    return cast(int, error.exit_code)


def _print_json(kind: str, got: str, expected: str, fix: str) -> None:
    content = {"type": kind, "got": got, "expected": expected, "fix": fix}
    sys.stdout.write(json.dumps({"error": content}, indent=1) + "\n")


def _report(error: FlexVARError, arguments: Sequence[str]) -> NoReturn:
    """Print an error as one line on standard error, and with --json also as JSON on standard output.

    Python arguments that it names are replaced by the options of the command line.
    """

    def option(match: re.Match[str]) -> str:
        name = match[1]
        kept = name is None or name in arguments or not isinstance(error, InvalidInput)  # an argument may name a file
        return match[0] if kept else _OPTIONS.get(name, f"--{name.replace('_', '-')}")

    got, fix = (_ARGUMENT.sub(option, text) for text in (error.got, error.fix))
    if "--json" in arguments:
        _print_json(type(error).__name__, got, error.expected, fix)
    say(f"error: {' '.join(f'{got} {fix}'.splitlines())}", err)
    sys.exit(error.exit_code)
