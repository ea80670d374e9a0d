"""Backends by name. A backend that is asked for by name is used or refused, never replaced."""

from __future__ import annotations

import importlib
import logging
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import cast

from ..bundle.opening import Bundle
from ..checks import check_choice, check_path, check_text, invalid
from ..errors import BackendUnavailable
from ..memory.library import LibraryMemory
from ..model.precision import Precision
from .base import RUN_BY, Availability, Backend, BackendModule

log = logging.getLogger(__name__)

BACKENDS = {  # name to module, in the order in which "auto" prefers them
    # TensorRT is taken only where the user has built engines for this GPU. cuda is predicted to take a third of the
    # time of ort-cuda (benchmarks/LOG.md). openvino is no faster than ort-cpu in float32, and slower to open.
    "tensorrt": "tensorrt.backend",
    "tensorrt-rtx": "tensorrt.backend",
    "cuda": "cuda.backend",
    "ort-cuda": "ort.cuda",
    "ort-cpu": "ort.cpu",
    "openvino": "openvino.backend",
    "ort-openvino": "ort_openvino",
}
TENSORRT_BACKENDS = frozenset({"tensorrt", "tensorrt-rtx"})  # run engines of flexvar build
CPU_BACKENDS = frozenset({"ort-cpu", "openvino", "ort-openvino"})
REFERENCE = "ort-cpu"  # works everywhere; proofs at export run on it
KERNELS_CHECKED = "ort-cuda"  # refuses bundles with nodes that have no CUDA kernel
_DEVICE = re.compile(r"cpu|cuda(:[0-9]{1,4})?")
LAYERS_CHECKED = "cuda"  # refuses bundles with layers that it does not know


def probe(name: str) -> Availability:
    """Whether a backend works on this machine. Loads its libraries, builds nothing."""
    return _module(name).probe(name)


def examine(name: str) -> str | None:
    """What works less well than it should on a backend that works here; None if there is nothing. May take a second."""
    return getattr(_module(name), "examine", lambda name: None)(name)


def runs(name: str, bundle: Bundle) -> Availability:
    """Whether a backend that needs no engines can run a bundle, as far as can be told without its hardware."""
    return _module(name).ready(name, bundle, device=None, engines=None)


def precisions(name: str) -> frozenset[Precision]:
    """The precisions that the bundles of a backend may have."""
    return _module(name).PRECISIONS


def suggest_backend(precision: Precision) -> str:
    """A sentence that names the CPU backend for bundles of a precision, and how to install it if it is missing."""
    name = next(name for name in BACKENDS if name in CPU_BACKENDS and precision in precisions(name))
    state = probe(name)
    return f"Use backend {name}." if state.available else f"Use backend {name}. To install it: {state.fix}"


def require_precision(name: str, precision: Precision, runs: frozenset[Precision]) -> None:
    """Raise BackendUnavailable unless the precision of a bundle is among those that a backend runs."""
    if precision not in runs:
        names = ", ".join(sorted(runs))
        advice = suggest_backend(precision) if name in CPU_BACKENDS else f"Name another backend: {RUN_BY[precision]}."
        raise BackendUnavailable(
            f"Backend {name} runs {names} bundles, and this bundle is {precision}.",
            expected=f"one of {names}",
            fix=advice,
        )


def libraries(name: str, precision: Precision) -> Mapping[str, LibraryMemory]:
    """The memory of the library that runs each graph of a bundle of this precision on a CPU backend."""
    return _module(name).libraries(precision)


def planned_backend(precision: Precision) -> tuple[str, Mapping[str, LibraryMemory]]:
    """The CPU backend that "auto" takes for a precision here, and the memory of its library for each graph.

    If none works here, the first that runs the precision is planned for.
    """
    names = [name for name in BACKENDS if name in CPU_BACKENDS and precision in precisions(name)]
    works = next((name for name in names if probe(name).available), names[0])
    return works, libraries(works, precision)


def create(
    name: str = "auto",
    bundle: Bundle | None = None,
    *,
    device: str | None = None,
    threads: int | None = None,
    engines: Path | None = None,
) -> Backend:
    """Start a backend. "auto" takes the first that works here and runs `bundle`, and logs why it passes over others.

    Raises BackendUnavailable, InvalidInput.
    """
    if name == "auto":
        name = _choose(bundle, device, engines)
        if engines is not None and name not in TENSORRT_BACKENDS:
            log.warning("engines in %s are not used: backend %s runs none", engines, name)
            engines = None
        if threads is not None and name not in CPU_BACKENDS:
            log.warning("%d threads are not used: backend %s runs on a GPU", threads, name)
            threads = None
    state = probe(name)
    if not state.available:
        if bundle is not None:  # then a driver or a library would not help
            require_precision(name, bundle.manifest.precision, precisions(name))
        raise BackendUnavailable(
            f"Backend {name} does not work here: {state.detail}.",
            expected="a backend that works here",
            fix=state.advice or "Run: flexvar doctor",
        )
    return _module(name).create(name, device=device, threads=threads, engines=engines)


def _choose(bundle: Bundle | None, device: str | None, engines: Path | None) -> str:
    """The first backend that works here and can run the bundle. Logs each one that works but cannot run it.

    A warning is due where the user may lose speed: engines are missing, or the processor is taken in place of a GPU.
    """
    kind = (device or "").partition(":")[0]
    passed: dict[str, Availability] = {}
    for name in BACKENDS:
        state = probe(name)
        elsewhere = bool(kind) and (kind == "cpu") != (name in CPU_BACKENDS)
        if not state.available or elsewhere:
            log.debug("backend %s passed over: %s", name, state.detail)
            continue
        ready = state if bundle is None else _module(name).ready(name, bundle, device=device, engines=engines)
        if ready.available:
            _log_passed(passed, name)
            log.info("backend %s chosen", name)
            return name
        passed[name] = ready
    _log_passed(passed, REFERENCE)
    if kind == "cuda":
        raise BackendUnavailable(
            f"No backend for device {device} works here and runs this bundle.",
            expected="a backend that works there and runs this bundle",
            fix="flexvar doctor says what is missing. Name a backend to see why it is refused.",
        )
    return REFERENCE


def _log_passed(passed: Mapping[str, Availability], chosen: str) -> None:
    for name, state in passed.items():
        lost = name in TENSORRT_BACKENDS or chosen in CPU_BACKENDS
        level = logging.DEBUG if name in CPU_BACKENDS else logging.WARNING if lost else logging.INFO
        log.log(level, "backend %s works here but is passed over: %s. %s", name, state.detail, state.advice)


def check_name(name: str) -> None:
    """Raise InvalidInput for a name that is neither "auto" nor a backend."""
    check_choice("backend", name, ("auto", *BACKENDS))


def check_options(name: str, device: str | None, engines: str | os.PathLike[str] | None) -> Path | None:
    """Check the options that say where to run, before a bundle is opened. Returns the folder of engines.

    Raises InvalidInput.
    """
    check_name(name)
    if device is not None:
        named = check_text("device", device)
        if not _DEVICE.fullmatch(named):
            raise invalid(f"device is {named!r:.100}", "cpu, cuda or cuda:N", "Write cuda:0 for the first GPU.")
    return None if engines is None else Path(check_path("engines", engines))


def _module(name: str) -> BackendModule:
    check_name(name)
    return cast(BackendModule, importlib.import_module(f".{BACKENDS[name]}", __package__))
