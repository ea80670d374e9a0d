"""Backends by name. A backend that was asked for by name is used or refused, never replaced."""

from __future__ import annotations

import importlib
import logging
from typing import cast

from .._version import __version__
from ..errors import BackendUnavailable, InvalidInput
from .base import Availability, Backend, BackendModule

log = logging.getLogger(__name__)

# In the order in which "auto" prefers them; None: known by name, not part of this version.
BACKENDS: dict[str, str | None] = {
    "tensorrt": None,
    "tensorrt-rtx": None,
    "ort-cuda": None,
    "openvino": None,
    "ort-cpu": "ort_cpu",
}


def probe(name: str) -> Availability:
    """Whether a backend works on this machine. Loads its libraries, builds nothing."""
    module = _module(name)
    if module is None:
        return Availability(False, f"not part of flexvar-deploy {__version__}", "use --backend ort-cpu")
    return module.probe(name)


def create(name: str = "auto", *, device: str | None = None, threads: int | None = None) -> Backend:
    """Start a backend; "auto" takes the first that works and logs which. Raises BackendUnavailable, InvalidInput."""
    if name == "auto":
        name = next((candidate for candidate in BACKENDS if probe(candidate).available), "ort-cpu")
        log.info("backend %s chosen", name)
    state = probe(name)
    module = _module(name)
    if module is None or not state.available:
        raise BackendUnavailable(
            f"backend {name}: {state.detail}",
            expected="a backend that works here",
            fix=state.fix or "run flexvar doctor",
        )
    return module.create(name, device=device, threads=threads)


def _module(name: str) -> BackendModule | None:
    if name not in BACKENDS:
        raise InvalidInput(
            f"backend {name!r}",
            expected=f"auto, {', '.join(BACKENDS)}",
            fix="name one of them; flexvar doctor lists what works",
        )
    file = BACKENDS[name]
    return None if file is None else cast(BackendModule, importlib.import_module(f".{file}", __package__))
