"""Output of the commands: results (text or JSON) on standard output, progress and logs on standard error."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object.")]

# Without markup and emoji codes: "[v2]" and ":cat:" may be parts of file names.
out = Console(markup=False, emoji=False, highlight=False)
err = Console(stderr=True, markup=False, emoji=False, highlight=False)
_PACKAGES = (
    *("flexvar_runtime", "flexvar_ref", "flexvar_export"),
    *("flexvar_serving", "flexvar_evaluation", "flexvar_bench"),
)
_CONTROLS = {code: ascii(chr(code))[1:-1] for code in (*range(32), *range(127, 160)) if code not in (9, 10)}


def start_logging(verbose: bool) -> None:
    """Send log messages to standard error."""
    level = logging.DEBUG if verbose else logging.INFO
    handler: logging.Handler = _PlainHandler()
    if err.is_terminal:
        handler = RichHandler(console=err, show_time=False, show_path=False, markup=False)
    for name in _PACKAGES:
        root = logging.getLogger(name)
        root.handlers, root.propagate = [handler], False
        root.setLevel(level)


class _PlainHandler(logging.Handler):
    """Writes each message as one line, as it is read from files. Tracebacks follow it."""

    def emit(self, record: logging.LogRecord) -> None:
        say(f"{record.levelname:<8} {self.format(record)}", err)


def emit(data: dict[str, Any], as_json: bool, show: Callable[[], None]) -> None:
    """Print `data` as JSON, or call `show` to print it for people."""
    if as_json:
        sys.stdout.write(json.dumps(data, indent=1) + "\n")
    else:
        show()


def say(line: str, console: Console = out) -> None:
    """Print a line as it is: not wrapped, not coloured. On standard error, control characters are escaped."""
    line = line if console is out else line.translate(_CONTROLS)
    if console.is_terminal:
        console.print(line, soft_wrap=True)
    else:
        console.file.write(f"{line}\n")  # rich would expand tabs
        console.file.flush()


@contextmanager
def steps(total: int | None, what: str) -> Iterator[Callable[[str], None]]:
    """Show progress: a bar on a terminal, plain lines otherwise. Call the yielded function once for each step.

    total: the number of steps, or None if it is not known. It grows if more steps follow."""
    if not err.is_terminal:
        done = 0

        def plain(message: str) -> None:
            nonlocal done
            done += 1
            place = what if total is None else f"{what} {done}/{max(total, done)}"
            say(f"{place}: {message}", err)

        yield plain
        return
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=err, transient=True) as progress:
        task = progress.add_task(what, total=total)

        def advance(message: str) -> None:
            progress.update(task, advance=1, description=f"{what}: {message}")
            known = progress.tasks[task]
            if known.total is not None and known.completed > known.total:
                progress.update(task, total=known.completed)

        yield advance
