"""Ctrl-C while the command is imported, while it runs, and where Python drops exceptions."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from typing import Any

import pytest

from flexvar_runtime.cli.main import main

INTERRUPT_ON_IMPORT = """
import importlib.abc, os, signal, sys

signal.signal(signal.SIGINT, signal.default_int_handler)

class Interrupt(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == sys.argv[1]:
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Interrupt())
from flexvar_runtime.cli.main import main
main()
"""
INTERRUPT_IN_FINALIZER = """
import os, signal, sys
import flexvar_runtime.cli.application as application
from flexvar_runtime.cli.main import main

signal.signal(signal.SIGINT, signal.default_int_handler)

class Resource:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGINT)
        while True:
            pass

def run(arguments, interrupted):
    Resource()
    return 0

application.run = run
main()
"""


@pytest.mark.skipif(os.name == "nt", reason="signals are those of POSIX")
@pytest.mark.parametrize(
    ("program", "argument"),
    [
        *[(INTERRUPT_ON_IMPORT, name) for name in ("numpy", "typer", "flexvar_runtime.pipeline", "rich.console")],
        (INTERRUPT_IN_FINALIZER, "doctor"),
    ],
)
def test_no_traceback(program: str, argument: str) -> None:
    process = subprocess.run([sys.executable, "-c", program, argument], capture_output=True, text=True, timeout=60)
    assert process.returncode in (-signal.SIGINT, 130)
    assert "Traceback" not in process.stderr and "Exception ignored" not in process.stderr


def raise_signal() -> None:
    signal.raise_signal(signal.SIGINT)


def as_import_error() -> None:
    """As the start of an extension module does."""
    try:
        raise_signal()
    except KeyboardInterrupt as error:
        raise ImportError("initialization failed") from error


def swallowed_before_an_exit_code() -> None:
    import typer

    try:
        raise_signal()
    except KeyboardInterrupt:
        raise typer.Exit(4) from None


def twice() -> None:
    try:
        raise_signal()
    finally:
        raise_signal()


@pytest.mark.parametrize("work", [raise_signal, as_import_error, swallowed_before_an_exit_code, twice])
def test_an_interrupted_command_ends_with_130(flexvar: Any, install_command: Any, work: Any) -> None:
    install_command(lambda: work())
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        ended = flexvar("<lambda>")
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
    assert (ended.code, ended.err) == (130, "interrupted\n")


def test_an_ignored_signal_stays_ignored(flexvar: Any, install_command: Any) -> None:
    """A shell starts jobs in the background so."""
    install_command(lambda: raise_signal())
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        assert flexvar("<lambda>").code == 0
    finally:
        signal.signal(signal.SIGINT, before)


def test_descriptors_that_were_closed_are_open_while_a_command_runs() -> None:
    """Else the next file that a library opens would be its standard output."""
    program = (
        "import os, sys; from flexvar_runtime.cli.main import main; import flexvar_runtime.cli.application as a;"
        "a.run = lambda *_: os.open('/', os.O_RDONLY); main([])"
    )
    command = f'exec {sys.executable} -c "{program}" <&- >&- 2>&-'
    assert subprocess.run(["sh", "-c", command], timeout=60).returncode == 3


def test_a_file_that_ends_too_early_is_not_an_interrupt(flexvar: Any, install_command: Any) -> None:
    """typer reports EOFError as it reports Ctrl-C."""

    def work() -> None:
        raise EOFError("no data left in file")

    install_command(work)
    assert flexvar("work").refused(5, "no data left in file")


def test_main_restores_what_it_changed() -> None:
    before = sys.stdout, sys.stderr, sys.unraisablehook, signal.getsignal(signal.SIGINT)
    with pytest.raises(SystemExit):
        main(["--version"])
    assert before == (sys.stdout, sys.stderr, sys.unraisablehook, signal.getsignal(signal.SIGINT))
