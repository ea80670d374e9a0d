"""The `flexvar` command. Ctrl-C ends it without a traceback at every moment.

This module imports nothing that takes time. While everything else is imported, and while Python exits, SIGINT ends the
process at once. While a command runs, SIGINT becomes KeyboardInterrupt, so that the command can remove what it began.
"""

from __future__ import annotations

import os
import signal
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:  # importing typing takes time
    from collections.abc import Sequence
    from types import FrameType
    from typing import NoReturn


class Interruption:
    """The handler of SIGINT while a command runs. came: whether the signal came."""

    came = False

    def __call__(self, signal_number: int, frame: FrameType | None) -> None:
        self.came = True
        raise KeyboardInterrupt


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line. It always ends with SystemExit or by SIGINT. The exit codes:

    0 ok, 1 a fault of this program, 2 usage, 3 parity failed, 4 environment, 5 artefact refused, 6 out of memory, 7
    workers of a service keep dying, 130 interrupted, 141 the reader of standard output is gone.
    """
    before, interruption = signal.getsignal(signal.SIGINT), Interruption()
    heeded = before is signal.default_int_handler  # a shell starts jobs in the background with SIGINT ignored
    if heeded:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    _open_descriptors()
    from ..machine.threads import limit_openblas

    limit_openblas()
    from .application import INTERRUPTED, run

    hook, sys.unraisablehook = sys.unraisablehook, _end_if_interrupted
    try:
        if heeded:
            signal.signal(signal.SIGINT, interruption)
        code = run(sys.argv[1:] if arguments is None else arguments, lambda: interruption.came)
    except KeyboardInterrupt:  # a second one, while the first is handled
        code = INTERRUPTED
    finally:
        if heeded:
            signal.signal(signal.SIGINT, signal.SIG_DFL if arguments is None else before)
        sys.unraisablehook = hook
    sys.exit(code)


def _open_descriptors() -> None:
    """Open standard input, output and error on /dev/null if they are closed. Else a file would get their number."""
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest free number


def _end_if_interrupted(unraisable: sys.UnraisableHookArgs) -> None:
    """End the process if KeyboardInterrupt was raised where Python drops exceptions, such as in a `__del__`."""
    if issubclass(unraisable.exc_type, KeyboardInterrupt):
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.raise_signal(signal.SIGINT)
    sys.__unraisablehook__(unraisable)
