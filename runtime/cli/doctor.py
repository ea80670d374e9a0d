"""`flexvar doctor`: the backends that work on this machine, and how to fix the others."""

from __future__ import annotations

import platform
from dataclasses import asdict
from typing import Any

import typer

from .._version import __version__
from ..backends import BACKENDS, examine, precisions, probe
from ..backends.loading import telemetry
from ..errors import BackendUnavailable
from ..machine.processors import default_threads
from ..memory.available import available_bytes
from ..model.precision import Precision
from .console import JsonOption, emit, say


def doctor(as_json: JsonOption = False) -> None:
    """List the backends that work on this machine.

    For each of the others, print why it does not work and how to fix it. The exit code is 4 if none works.
    """
    states = {name: probe(name) for name in BACKENDS}
    notes = {name: examine(name) for name, state in states.items() if state.available}
    available = available_bytes()
    working = [name for name, state in states.items() if state.available]
    auto = next(iter(working), None)
    by_precision = {
        precision: next((name for name in working if precision in precisions(name)), None) for precision in Precision
    }
    data: dict[str, Any] = {
        "version": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processors": default_threads(),
        "available_memory_bytes": available,
        "telemetry": telemetry(),
        "auto": auto,
        "auto_by_precision": by_precision,
        "backends": {name: asdict(state) | {"note": notes.get(name)} for name, state in states.items()},
    }

    def show() -> None:
        memory = "unknown" if available is None else f"{available / 2**30:.1f} GiB free"
        machine = f"{data['platform']}, {data['processors']} processors, {memory}"
        say(f"flexvar {__version__}, Python {data['python']}, {machine}")
        say(f"telemetry    {', '.join(f'{library}: {state}' for library, state in data['telemetry'].items())}")
        for name, state in states.items():
            say(f"{name:<13}{'works' if state.available else 'no'}: {state.detail}")
            if notes.get(name):
                say(f"{'':<13}note: {notes[name]}")
            if state.fix:  # on its own line, so that it can be copied
                say(f"{'':<13}fix: {state.fix}")
        others = [(kind, name) for kind, name in by_precision.items() if name not in (None, auto)]
        instead = "".join(f", {name} for {kind} bundles" for kind, name in others)
        say(f"--backend auto uses {auto}{instead}" if auto else "No backend works here.")

    emit(data, as_json, show)
    if auto is None:
        raise typer.Exit(BackendUnavailable.exit_code)
