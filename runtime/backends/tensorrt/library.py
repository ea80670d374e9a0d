"""TensorRT and TensorRT-RTX as one library in two flavours: found, loaded once, its messages sent to `logging`.

Nothing of either is imported before `load` is called.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import logging
import re
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from ...errors import BackendUnavailable, InvalidInput
from ..base import Availability

log = logging.getLogger(__name__)

TENSORRT, TENSORRT_RTX = FLAVOURS = ("tensorrt", "tensorrt-rtx")
MINIMUM = {TENSORRT: (11, 0), TENSORRT_RTX: (1, 7)}  # the first whose networks are always strongly typed; tested
_MODULES = {TENSORRT: ("tensorrt",), TENSORRT_RTX: ("tensorrt_rtx", "tensorrt_rtx_bindings")}
_PROVIDER = "onnxruntime_ep_nv_tensorrt_rtx"  # the wheel that carries the libraries of TensorRT-RTX
_BUILD_ONLY = frozenset({"7.5"})  # TensorRT-RTX builds for it by name, but does not list it among those it runs on
_RUNS_ABOVE = (12, 0)  # "Supported compute capabilities: 8.0 8.6 8.9 12.0 12.1 >12.0", says TensorRT-RTX 1.7.1
_LIBRARIES = ("libtensorrt_rtx.so.1", "libtensorrt_onnxparser_rtx.so.1")  # in the order in which they need each other

Importer: TypeAlias = Callable[[str], Any]


class Messages:
    """The last errors a library logged. It logs from threads of its own."""

    def __init__(self, kept: int = 32) -> None:
        self._kept, self._lock = kept, threading.Lock()
        self._readers: dict[int, deque[str]] = {}

    def add(self, message: str) -> None:
        with self._lock:
            for errors in self._readers.values():
                errors.append(" ".join(message.split()))
        log.log(logging.DEBUG if self._readers else logging.ERROR, "%s", message)

    @contextmanager
    def reading(self) -> Iterator[Callable[[], str]]:
        """For a call that may fail: the yielded function gives the errors since then in one line, oldest first.

        Whoever reads them raises them, so meanwhile they are logged for debugging only.
        """
        errors: deque[str] = deque(maxlen=self._kept)
        with self._lock:
            self._readers[id(errors)] = errors
        try:
            yield lambda: " | ".join(dict.fromkeys(errors)) or "no reason given"
        finally:
            with self._lock:
                del self._readers[id(errors)]


@dataclass(frozen=True, eq=False)
class TrtLibrary:
    """A loaded flavour: its Python module, its version, and the one logger that everything made from it shares
    (TensorRT keeps the first logger it was given, whatever later objects are made with)."""

    flavour: str
    module: Any
    version: str
    messages: Messages = field(default_factory=Messages, repr=False)
    logger: Any = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "logger", _bridge(self.module, self.messages))

    @property
    def rtx(self) -> bool:
        return self.flavour == TENSORRT_RTX


def load(flavour: str, importer: Importer = importlib.import_module) -> TrtLibrary:
    """Load a flavour, once a process. Raises BackendUnavailable with the line that installs it."""
    if flavour not in FLAVOURS:
        raise InvalidInput(f"flavour {flavour!r}", expected=" or ".join(FLAVOURS), fix="name one of them")
    with _loading:
        library = _loaded.get((flavour, importer))
        if library is None:
            module = _import(flavour, importer)
            library = _loaded[flavour, importer] = TrtLibrary(flavour, module, _checked_version(flavour, module))
    return library


def probe_library(flavour: str, importer: Importer = importlib.import_module) -> Availability:
    """Whether a flavour can be loaded, which says nothing of a GPU."""
    try:
        library = load(flavour, importer)
    except BackendUnavailable as error:
        return Availability(False, error.got, error.fix)
    return Availability(True, f"{flavour} {library.version}")


def known_targets(library: TrtLibrary) -> tuple[str, ...]:
    """Compute capabilities that TensorRT-RTX names ("8.6"); TensorRT names none."""
    members = library.module.ComputeCapability.__members__ if library.rtx else {}
    numbers = [name.removeprefix("SM") for name in members if name.startswith("SM")]
    return tuple(f"{number[:-1]}.{number[-1]}" for number in numbers)


def runs_on(library: TrtLibrary, capability: str) -> Availability:
    """Whether a library runs engines on GPUs of a compute capability ("9.0"), whatever the engines were built for.

    TensorRT runs on the GPU that it built for. TensorRT-RTX builds without complaint for a GPU that it does not run on,
    and refuses every engine there, also a portable one, when the engine is loaded (1.7.1 on 9.0).
    """
    targets = [name for name in known_targets(library) if name not in _BUILD_ONLY]
    if not library.rtx or capability in targets or _number(capability) > _RUNS_ABOVE:
        return Availability(True, f"{library.flavour} {library.version} runs on compute capability {capability}")
    builds = ", although it builds engines for it" if capability in known_targets(library) else ""
    return Availability(
        False,
        f"{library.flavour} {library.version} does not run on compute capability {capability}{builds}: "
        f"it runs on {', '.join(targets)} and on capabilities above the last",
        "use --backend tensorrt, or --backend ort-cuda, which needs no engines",
    )


def require_runs_on(library: TrtLibrary, capability: str, *, given: str = "", instead: str = "") -> None:
    """Raise BackendUnavailable where `runs_on` says no. given: the option that named the GPU; instead: another fix."""
    state = runs_on(library, capability)
    if not state.available:
        raise BackendUnavailable(
            f"{given}{state.detail}",
            expected=f"a GPU that {library.flavour} runs on",
            fix=f"{state.fix}{instead}",
        )


def _number(capability: str) -> tuple[int, ...]:
    return tuple(map(int, capability.split(".")))


_loaded: dict[tuple[str, Importer], TrtLibrary] = {}
_loading = threading.Lock()


def _import(flavour: str, importer: Importer) -> Any:
    """The vendor's own package where it is installed, else the bindings, with libraries from the provider's wheel."""
    broken: list[str] = []
    cause: Exception | None = None
    for name in _MODULES[flavour]:
        try:
            if name == "tensorrt_rtx_bindings":
                _preload(importer)
            return importer(name)
        except Exception as error:  # a wheel half installed or made for another system fails in any way
            cause = error
            if not (isinstance(error, ModuleNotFoundError) and error.name == name):
                broken.append(f"{name}: {(str(error) or type(error).__name__).splitlines()[0]}")
    raise BackendUnavailable(
        f"{flavour} cannot be loaded ({'; '.join(broken)})" if broken else f"{flavour} is not installed",
        expected=f"the {flavour} libraries",
        fix=f"pip install {'--force-reinstall ' if broken else ''}'flexvar-deploy[{flavour}]'",
    ) from cause


def _preload(importer: Importer) -> None:
    """Load what the bindings need, so that the dynamic loader finds it by name.

    Importing the provider makes links beside its libraries, which TensorRT-RTX looks for when it runs. Where its folder
    is read-only that fails, and the libraries are loaded all the same; without the wheel the system's own are used.
    """
    try:
        importer(_PROVIDER)
    except Exception as error:
        log.debug("%s: %s", _PROVIDER, error)
    try:
        found = importlib.util.find_spec(_PROVIDER)
    except (ImportError, ValueError):
        return
    for folder in (found.submodule_search_locations or []) if found else []:
        for name in _LIBRARIES:
            files = sorted(path for path in Path(folder).glob(f"{name}*") if path.is_file())
            if files:
                ctypes.CDLL(str(files[-1]), mode=ctypes.RTLD_GLOBAL)


def _checked_version(flavour: str, module: Any) -> str:
    version = str(getattr(module, "__version__", ""))
    if tuple(int(part) for part in re.findall("[0-9]+", version)[:2]) < MINIMUM[flavour]:
        wanted = ".".join(map(str, MINIMUM[flavour]))
        raise BackendUnavailable(
            f"{flavour} {version or 'without a version'}",
            expected=f"{wanted} or later",
            fix=f"pip install --upgrade 'flexvar-deploy[{flavour}]'",
        )
    return version


def _bridge(module: Any, messages: Messages) -> Any:
    """A logger for the library: its errors are kept, its remarks are for debugging, the verbose ones are dropped."""
    errors = {module.ILogger.Severity.INTERNAL_ERROR, module.ILogger.Severity.ERROR}
    remarks = {module.ILogger.Severity.WARNING, module.ILogger.Severity.INFO}

    class Bridge(module.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            module.ILogger.__init__(self)  # the binding refuses super()

        def log(self, severity: Any, message: str) -> None:
            if severity in errors:
                messages.add(message)
            elif severity in remarks:
                log.debug("%s", message)

    return Bridge()
