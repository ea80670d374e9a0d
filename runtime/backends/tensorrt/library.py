"""Load TensorRT or TensorRT-RTX, the two flavours of one library, and send its messages to `logging`.

Neither is imported before `load` is called.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import logging
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from ...checks import check_choice, version_numbers
from ...errors import BackendUnavailable, first_line
from ..base import Availability

log = logging.getLogger(__name__)

TENSORRT, TENSORRT_RTX = FLAVOURS = ("tensorrt", "tensorrt-rtx")
MINIMUM = {TENSORRT: "11.0", TENSORRT_RTX: "1.7"}  # 11.0: networks are always strongly typed. 1.7: tested
_MODULES = {TENSORRT: ("tensorrt",), TENSORRT_RTX: ("tensorrt_rtx", "tensorrt_rtx_bindings")}
_PROVIDER = "onnxruntime_ep_nv_tensorrt_rtx"  # the wheel that carries the libraries of TensorRT-RTX
_BUILD_ONLY = frozenset({"7.5"})  # TensorRT-RTX builds engines for 7.5, but does not run on it
_RUNS_ABOVE = (12, 0)  # TensorRT-RTX 1.7.1: "Supported compute capabilities: 8.0 8.6 8.9 12.0 12.1 >12.0"
_LIBRARIES = ("libtensorrt_rtx.so.1", "libtensorrt_onnxparser_rtx.so.1")  # the second needs the first

Importer: TypeAlias = Callable[[str], Any]


class Messages:
    """The errors that a library logs, from any of its threads."""

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
        """Collect errors during a call that may fail. The yielded function returns them in one line, oldest first.

        The caller raises them, so meanwhile they are logged at debug level only.
        """
        errors: deque[str] = deque(maxlen=self._kept)
        with self._lock:
            self._readers[id(errors)] = errors
        try:
            yield lambda: " | ".join(dict.fromkeys(errors)).removesuffix(".") or "no reason given"
        finally:
            with self._lock:
                del self._readers[id(errors)]


@dataclass(frozen=True, eq=False)
class TrtLibrary:
    """A loaded flavour: its Python module, its version and its logger.

    All objects of the library share one logger, because TensorRT keeps the first logger that it gets.
    """

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
    """Load a flavour, once per process. Raises InvalidInput, BackendUnavailable with the command that installs it."""
    check_choice("flavour", flavour, FLAVOURS)
    with _loading:
        library = _loaded.get((flavour, importer))
        if library is None:
            module = _import(flavour, importer)
            library = _loaded[flavour, importer] = TrtLibrary(flavour, module, _checked_version(flavour, module))
    return library


def probe_library(flavour: str, importer: Importer = importlib.import_module) -> Availability:
    """Whether a flavour can be loaded. This needs no GPU."""
    try:
        library = load(flavour, importer)
    except BackendUnavailable as error:
        return Availability.of_error(error)
    return Availability(True, f"{flavour} {library.version}")


def known_targets(library: TrtLibrary) -> tuple[str, ...]:
    """The compute capabilities ("8.6") that TensorRT-RTX can build engines for by name. Empty for TensorRT."""
    members = library.module.ComputeCapability.__members__ if library.rtx else {}
    numbers = [name.removeprefix("SM") for name in members if name.startswith("SM")]
    return tuple(f"{number[:-1]}.{number[-1]}" for number in numbers)


def runs_on(library: TrtLibrary, capability: str) -> Availability:
    """Whether a library runs engines on GPUs of a compute capability ("9.0").

    TensorRT runs on every GPU that it builds for. TensorRT-RTX also builds engines for GPUs that it does not run on. It
    refuses every engine there when the engine is loaded, even a portable one (1.7.1 on 9.0).
    """
    targets = [name for name in known_targets(library) if name not in _BUILD_ONLY]
    if not library.rtx or capability in targets or version_numbers(capability) > _RUNS_ABOVE:
        return Availability(True, f"{library.flavour} {library.version} runs on compute capability {capability}")
    builds = ", although it builds engines for it" if capability in known_targets(library) else ""
    return Availability(
        False,
        f"{library.flavour} {library.version} does not run on compute capability {capability}{builds}: "
        f"it runs on {', '.join(targets)} and later ones",
        "Use --backend tensorrt, or --backend ort-cuda, which needs no engines.",
    )


def require_runs_on(library: TrtLibrary, capability: str, *, given: str = "", instead: str = "") -> None:
    """Raise BackendUnavailable unless `runs_on`. given: the option that named the GPU. instead: added to the advice."""
    state = runs_on(library, capability)
    if not state.available:
        fix = f"{state.advice}{instead}"
        raise BackendUnavailable(f"{given}{state.detail}.", expected=f"a GPU that {library.flavour} runs on", fix=fix)


_loaded: dict[tuple[str, Importer], TrtLibrary] = {}
_loading = threading.Lock()


def _import(flavour: str, importer: Importer) -> Any:
    """The vendor's package if it is installed, else the bindings with the libraries of the provider's wheel."""
    broken: list[str] = []
    cause: Exception | None = None
    for name in _MODULES[flavour]:
        try:
            if name == "tensorrt_rtx_bindings":
                _preload(importer)
            return importer(name)
        except Exception as error:  # a damaged wheel can raise any error
            cause = error
            if not (isinstance(error, ModuleNotFoundError) and error.name == name):
                broken.append(f"{name}: {first_line(error)}")
    raise BackendUnavailable(
        f"{flavour} cannot be loaded ({'; '.join(broken)})." if broken else f"{flavour} is not installed.",
        expected=f"the {flavour} libraries",
        fix=f"Run: pip install {'--force-reinstall ' if broken else ''}'flexvar-deploy[{flavour}]'",
    ) from cause


def _preload(importer: Importer) -> None:
    """Load the libraries that the bindings need from the provider's wheel, so that the dynamic loader finds them.

    Importing the provider also makes links to its libraries, which TensorRT-RTX looks for at run time. In a read-only
    folder this fails, but the libraries are loaded anyway. Without the wheel the libraries of the system are used.
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
    version, wanted = str(getattr(module, "__version__", "")), MINIMUM[flavour]
    if version_numbers(version) < version_numbers(wanted):
        raise BackendUnavailable(
            f"{flavour} {version or 'of an unknown version'} is older than {wanted}.",
            expected=f"{wanted} or later",
            fix=f"Run: pip install --upgrade 'flexvar-deploy[{flavour}]'",
        )
    return version


def _bridge(module: Any, messages: Messages) -> Any:
    """A logger for the library. It keeps errors, logs warnings and information at debug level, and drops the rest."""
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
