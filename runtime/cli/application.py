"""The command line: the subcommands that the installed packages register, and how each kind of error ends."""

from __future__ import annotations

import importlib.metadata
import json
import logging
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, cast

import typer

from .._version import __version__
from ..errors import ArtifactRefused, EnvironmentFailed, FlexVARError, InvalidInput, OutOfMemory, first_line
from .console import err, say, start_logging
from .streams import OutputLost, ReaderGone, protected

log = logging.getLogger(__name__)

GROUP = "flexvar.commands"
_NO_MEMORY = ("can't allocate memory", "out of memory")  # in the errors of torch
FAULT, INTERRUPTED, READER_GONE = 1, 130, 141
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


def run(arguments: Sequence[str], interrupted: Callable[[], bool]) -> int:
    """Run the command line, report its error, and return the exit code (see `main`).

    interrupted: whether SIGINT came. A library may turn KeyboardInterrupt into an error of its own.
    """
    with protected():
        try:
            code: int = build()(arguments, prog_name="flexvar", standalone_mode=False) or 0
            sys.stdout.flush()
        except ReaderGone:
            return READER_GONE
        except KeyboardInterrupt:
            code = INTERRUPTED
        except Exception as error:
            code = INTERRUPTED if interrupted() else _report(error, arguments)
        if code == INTERRUPTED or (code and interrupted()):
            say("interrupted", err)
            return INTERRUPTED
        return code


def _report(error: Exception, arguments: Sequence[str]) -> int:
    """Print an error on standard error, with --json also as JSON on standard output, and return its exit code."""
    if isinstance(error, typer.Abort):  # typer turns EOFError into Abort
        if not isinstance(error.__cause__, EOFError):
            return INTERRUPTED
        error = error.__cause__
    if isinstance(error, UsageError):
        code, line, content = _usage_error(error)
    elif typed := _typed(error):
        code, line, content = _expected_error(typed, arguments)
    else:
        code, line, content = _fault(error)
    say(line, err)
    if "--json" in arguments:
        with suppress(ReaderGone, OutputLost):  # the exit code still says what happened first
            sys.stdout.write(json.dumps({"error": content}, indent=1) + "\n")
            sys.stdout.flush()
    return code


def _typed(error: Exception) -> FlexVARError | None:
    """An error of the system as one of this package. None if it is not expected."""
    if isinstance(error, FlexVARError):
        return error
    torch_failed = isinstance(error, RuntimeError) and any(text in str(error) for text in _NO_MEMORY)
    if isinstance(error, MemoryError) or torch_failed:
        fix = "Use a smaller batch, or a machine with more memory."
        return OutOfMemory("There is no memory left.", expected="more memory", fix=fix)
    if isinstance(error, OSError):
        got, fix = f"A file cannot be read or written: {error}.", "Check its path, its permissions and the free space."
        return EnvironmentFailed(got, expected="files that can be read and written", fix=fix)
    if isinstance(error, EOFError):
        got, fix = f"A file ends too early ({first_line(error)}).", "Make or copy the file again."
        return ArtifactRefused(got, expected="a complete file", fix=fix)
    return None


def _usage_error(error: Any) -> tuple[int, str, dict[str, str]]:
    """The exit code, text and JSON of an error in the options. The text is the help if there are no options."""
    got = error.format_message()
    command = error.ctx.command_path if error.ctx else "flexvar"
    fix = f"Run: {command} --help"
    usage = f"{error.ctx.get_usage()}\n" if error.ctx else ""
    line = got if "Usage:" in got else f"{usage}error: {' '.join(got.split()).removesuffix('.')}. {fix}"
    return error.exit_code, line, _json_values("UsageError", got, f"the options of {command}", fix)


def _expected_error(error: FlexVARError, arguments: Sequence[str]) -> tuple[int, str, dict[str, str]]:
    """The exit code, text and JSON of an error. Python arguments that it names become options of the command line."""

    def option(match: re.Match[str]) -> str:
        name = match[1]
        kept = name is None or name in arguments or not isinstance(error, InvalidInput)  # an argument may name a file
        return match[0] if kept else _OPTIONS.get(name, f"--{name.replace('_', '-')}")

    got, fix = (_ARGUMENT.sub(option, text) for text in (error.got, error.fix))
    line = f"error: {' '.join(f'{got} {fix}'.splitlines())}"
    return error.exit_code, line, _json_values(type(error).__name__, got, error.expected, fix)


def _fault(error: Exception) -> tuple[int, str, dict[str, str]]:
    """The exit code, text and JSON of an error that nothing in this program expects."""
    log.debug("This error was not expected.", exc_info=error)
    place = traceback.extract_tb(error.__traceback__)[-1]
    got = f"flexvar itself failed: {type(error).__name__} in {Path(place.filename).name}, line {place.lineno}"
    got += f" ({first_line(error)})."
    fix = "Run flexvar --verbose with the same command, and report what it prints."
    return FAULT, f"error: {got} {fix}", _json_values(type(error).__name__, got, "a command without a failure", fix)


def _json_values(kind: str, got: str, expected: str, fix: str) -> dict[str, str]:
    return {"type": kind, "got": got, "expected": expected, "fix": fix}
