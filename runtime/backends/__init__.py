"""Backends by name. A backend that was asked for by name is used or refused, never replaced."""

from __future__ import annotations

import importlib
import logging
from pathlib import Path
from typing import cast

from ..bundle import Bundle
from ..errors import BackendUnavailable, InvalidInput
from .base import Availability, Backend, BackendModule

log = logging.getLogger(__name__)

BACKENDS = {  # name to file, in the order in which "auto" prefers them
    # (measured: openvino is no faster than ort-cpu in what both compute, and slower to open; either at what it alone
    # computes is faster than both are in float32)
    "tensorrt": "tensorrt",
    "tensorrt-rtx": "tensorrt",
    "ort-cuda": "ort_cuda",
    "ort-cpu": "ort_cpu",
    "openvino": "openvino",
    "ort-openvino": "ort_openvino",
}
TENSORRT_BACKENDS = frozenset({"tensorrt", "tensorrt-rtx"})  # run engines that flexvar build made
CPU_BACKENDS = frozenset({"ort-cpu", "openvino", "ort-openvino"})


def probe(name: str) -> Availability:
    """Whether a backend works on this machine. Loads its libraries, builds nothing."""
    return _module(name).probe(name)


def precisions(name: str) -> frozenset[str]:
    """What a backend runs, of `manifest.PRECISIONS`."""
    return _module(name).PRECISIONS


def way_out(precision: str) -> str:
    """What to do with a bundle of a precision that the backend at hand does not run: the one on the CPU that does."""
    name = next(name for name in BACKENDS if name in CPU_BACKENDS and precision in precisions(name))
    state = probe(name)
    return f"use {name}, which runs it" if state.available else f"{state.fix}, for {name}, which runs it"


def create(
    name: str = "auto",
    bundle: Bundle | None = None,
    *,
    device: str | None = None,
    threads: int | None = None,
    engines: Path | None = None,
) -> Backend:
    """Start a backend; "auto" takes the first that works here and runs `bundle`, and logs what it passes over.

    A backend that was asked for by name is started or refused. Raises BackendUnavailable, InvalidInput.
    """
    if name == "auto":
        name = _choose(bundle, device, engines)
        if engines is not None and name not in TENSORRT_BACKENDS:
            log.warning("engines in %s are not used: %s runs none", engines, name)
            engines = None
        if threads is not None and name not in CPU_BACKENDS:
            log.warning("%d threads are not used: %s runs on a GPU", threads, name)
            threads = None
    state = probe(name)
    if not state.available:
        raise BackendUnavailable(
            f"backend {name}: {state.detail}",
            expected="a backend that works here",
            fix=state.fix or "run flexvar doctor",
        )
    return _module(name).create(name, device=device, threads=threads, engines=engines)


def _choose(bundle: Bundle | None, device: str | None, engines: Path | None) -> str:
    """The first backend that works and is ready for the bundle; one that works but is not is worth a warning."""
    kind = (device or "").partition(":")[0]
    for name in BACKENDS:
        state = probe(name)
        elsewhere = bool(kind) and (kind == "cpu") != (name in CPU_BACKENDS)
        if not state.available or elsewhere:
            log.debug("backend %s passed over: %s", name, state.detail)
            continue
        ready = state if bundle is None else _module(name).ready(name, bundle, device=device, engines=engines)
        if ready.available:
            log.info("backend %s chosen", name)
            return name
        level = logging.DEBUG if name in CPU_BACKENDS else logging.WARNING  # on the CPU nothing is lost
        log.log(level, "backend %s works here but is passed over: %s; fix: %s", name, ready.detail, ready.fix)
    if kind == "cuda":
        raise BackendUnavailable(
            f"no backend for device {device}",
            expected="one that works there and runs this bundle",
            fix="flexvar doctor says what is missing; name a backend to see why it is refused",
        )
    return "ort-cpu"


def check_name(name: str) -> None:
    """Raise InvalidInput for a name that is neither "auto" nor a backend."""
    if name != "auto":
        _module(name)


def _module(name: str) -> BackendModule:
    if name not in BACKENDS:
        raise InvalidInput(
            f"backend {name!r}",
            expected=f"auto, {', '.join(BACKENDS)}",
            fix="name one of them; flexvar doctor lists what works",
        )
    return cast(BackendModule, importlib.import_module(f".{BACKENDS[name]}", __package__))
