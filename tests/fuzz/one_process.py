"""Command lines in one process, with the streams of typer's runner."""

from __future__ import annotations

import importlib
import os
import signal
import sys
from pathlib import Path

from commands import command_line, may_be_endless
from desk import lay_out
from outcome import Wrong, described, require_exit
from typer.testing import CliRunner

PATIENCE = 5  # seconds


def prepare(desk: Path) -> None:
    """Import what the commands import: an import that is interrupted cannot be repeated in the same process."""
    for name in ("accelerate", "matplotlib.pyplot", "onnx", "onnxscript", "tensorboard", "torch", "torch.onnx"):
        importlib.import_module(name)
    signal.signal(signal.SIGALRM, signal.default_int_handler)


def show(desk: Path, seed: int) -> str:
    """The command line of a seed."""
    return f"flexvar {' '.join(map(ascii, command_line(seed)))}"


def run(desk: Path, case: Path, seed: int) -> str:
    """Run the command line of a seed. Returns how it ended. Raises Wrong."""
    from flexvar_runtime.cli.main import main

    arguments = command_line(seed)
    lay_out(desk, case, arguments)
    os.chdir(case)
    code: object = None
    runner = CliRunner()
    with runner.isolation() as (out, err, _):
        try:
            signal.setitimer(signal.ITIMER_REAL, PATIENCE if may_be_endless(arguments) else 0)
            main(arguments)
        except SystemExit as end:
            code = end.code or 0
        except BaseException as error:
            raise Wrong(described(error)) from error
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        sys.stdout.flush()
        printed = [stream.getvalue().decode("utf-8", "replace") for stream in (out, err)]
    require_exit(code, arguments, *printed)
    return f"exit {code}"
