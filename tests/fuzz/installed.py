"""Command lines through the installed command."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

from commands import command_line, may_be_endless
from desk import lay_out
from one_process import show as show
from outcome import MEMORY, Wrong, require_exit

COMMAND = Path(sys.executable).parent / "flexvar"
PATIENCE = 20  # seconds until a command that may be endless is interrupted. Others have ended long before


def prepare(desk: Path) -> None:
    assert COMMAND.exists(), COMMAND


def run(desk: Path, case: Path, seed: int) -> str:
    """Run the command line of a seed. Returns how it ended. Raises Wrong."""
    arguments = command_line(seed)
    lay_out(desk, case, arguments)
    command = [os.fsencode(word) for word in (COMMAND, *arguments)]
    with (case / ".out").open("w+b") as out, (case / ".err").open("w+b") as err:
        child = subprocess.Popen(command, cwd=case, stdin=subprocess.DEVNULL, stdout=out, stderr=err)
        watch = threading.Timer(PATIENCE, child.send_signal, (signal.SIGINT,))
        if may_be_endless(arguments):
            watch.start()
        _, status, used = os.wait4(child.pid, 0)
        watch.cancel()
        child.returncode = code = os.waitstatus_to_exitcode(status)
        for stream in (out, err):
            stream.seek(0)
        printed = [stream.read().decode("utf-8", "replace") for stream in (out, err)]
    if code == -signal.SIGINT:
        code = 130  # as a shell shows it
    if code < 0:
        raise Wrong(f"killed by {signal.Signals(-code).name}: {printed[1].strip()[-300:]}")
    require_exit(code, arguments, *printed)
    if used.ru_maxrss * 1024 > MEMORY:
        raise Wrong(f"{used.ru_maxrss >> 10} MB of memory")
    return f"exit {code}"
