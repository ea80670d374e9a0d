"""`flexvar doctor`: what works on this machine, and the one line that fixes what does not."""

from __future__ import annotations

import platform
from typing import Any

from rich.table import Table

from .._version import __version__
from ..backends import BACKENDS, probe
from ..backends.ort_cpu import default_threads
from ..memory import available_bytes
from .console import JsonOption, emit, out


def doctor(as_json: JsonOption = False) -> None:
    """Say which backends work here, why the others do not, and the one line that fixes each."""
    states = {name: probe(name) for name in BACKENDS}
    available = available_bytes()
    auto = next((name for name, state in states.items() if state.available), None)
    data: dict[str, Any] = {
        "version": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processors": default_threads(),
        "available_memory_bytes": available,
        "auto": auto,
        "backends": {
            name: {"available": state.available, "detail": state.detail, "fix": state.fix}
            for name, state in states.items()
        },
    }

    def show() -> None:
        memory = "unknown" if available is None else f"{available / 2**30:.1f} GiB free"
        machine = f"{data['platform']}, {data['processors']} processors, {memory}"
        out.print(
            f"flexvar {__version__}, Python {data['python']}, {machine}",
            highlight=False,
            soft_wrap=True,
        )
        table = Table("backend", "works", "detail", "fix")
        for name, state in states.items():
            table.add_row(name, "yes" if state.available else "no", state.detail, state.fix or "")
        out.print(table)
        out.print(
            f"--backend auto uses {auto}" if auto else "no backend works: pip install 'flexvar-deploy[cpu]'",
            markup=False,
        )

    emit(data, as_json, show)
