"""Compile kernels for a GPU with NVRTC, and keep the result in this user's cache.

CUDA is imported only when something is compiled or looked up.
"""

from __future__ import annotations

import hashlib
import importlib
import io
import logging
from collections.abc import Mapping
from contextlib import suppress
from importlib.resources import files
from pathlib import Path
from typing import Any, Protocol

from ..errors import BackendUnavailable, FlexVARError, first_line
from ..files.atomic import atomic_write
from ..files.private import make_private, read_private, user_folder

log = logging.getLogger(__name__)

_CUBIN = b"\x7fELF"
_MOST_BYTES = 2**26  # of a cubin; ours have less than a megabyte


class KernelSet(Protocol):
    """Kernels that are compiled together, for one configuration of their macros."""

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the kernels."""

    @property
    def source(self) -> str:
        """CUDA C++, see `read_sources`."""

    @property
    def fuses(self) -> bool:
        """Whether the compiler may fuse a multiplication and an addition, which rounds once instead of twice."""

    def defines(self) -> Mapping[str, int]:
        """The macros of the source."""


def read_sources(*names: str) -> str:
    """The text of files of this package, one after another."""
    return "\n".join(files(__package__).joinpath(name).read_text(encoding="utf-8") for name in names)


def compile_kernels(target: str, kernels: KernelSet) -> bytes:
    """A cubin with the kernels for a GPU of architecture `target` ("sm_90"). Needs no GPU.

    It is kept in `$XDG_CACHE_HOME/flexvar/kernels`, so that only the first call compiles. XDG_CACHE_HOME is `~/.cache`
    by default. A cache that cannot be used is logged and does no harm. Raises BackendUnavailable with the compiler's
    message if cuda.core or NVRTC is missing or the compilation fails.
    """
    key = _key(target, kernels)
    try:
        folder = user_folder("XDG_CACHE_HOME", ".cache") / "kernels"
        make_private(folder.parent)
        make_private(folder)
        path = folder / f"{key}.cubin"
        with suppress(FileNotFoundError):
            return _read(path)
    except (FlexVARError, OSError) as error:
        log.warning("The kernels are compiled again each time, because they cannot be kept: %s", error)
        return compile_source(kernels.source, target, kernels)[0]
    cubin = compile_source(kernels.source, target, kernels)[0]
    try:
        with atomic_write(path, force=True) as partial:
            partial.write_bytes(_digest(cubin) + cubin)
    except (FlexVARError, OSError) as error:
        log.warning("The compiled kernels are not kept: %s", error)
    return cubin


def _key(target: str, kernels: KernelSet) -> str:
    """A hash of all that the result of a compilation depends on."""
    parts = (target, *_versions(), str(sorted(_options(target, kernels).items())), kernels.source)
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def _versions() -> tuple[str, ...]:
    """Versions of cuda.core and NVRTC, which may be a package or of the system. Raises BackendUnavailable."""
    try:
        core, nvrtc = importlib.import_module("cuda.core"), importlib.import_module("cuda.bindings.nvrtc")
        return str(core.__version__), str(nvrtc.nvrtcVersion())
    except Exception as error:  # errors of Python and the loader have no common base class
        raise BackendUnavailable(
            f"NVRTC cannot be loaded ({first_line(error)}).",
            expected="cuda.core and NVRTC",
            fix="Run: pip install --upgrade 'cuda-python>=13' 'nvidia-cuda-nvrtc>=13'",
        ) from error


def _options(target: str, kernels: KernelSet) -> dict[str, Any]:
    """The options of NVRTC as cuda.core names them."""
    return {
        "name": "kernels.cu",
        "arch": target,
        "std": "c++17",
        "fma": kernels.fuses,
        "define_macro": [(name, str(value)) for name, value in sorted(kernels.defines().items())],
        "ptxas_options": ["-v"],
    }


def _digest(cubin: bytes) -> bytes:
    return hashlib.sha256(cubin).digest()


def _read(path: Path) -> bytes:
    """The kept cubin. A damaged file is removed. Raises FileNotFoundError, ArtifactRefused, OSError."""
    data = read_private(path, _MOST_BYTES)
    digest, cubin = data[:32], data[32:]
    if digest != _digest(cubin) or not cubin.startswith(_CUBIN):
        log.warning("%s is damaged, so the kernels are compiled again", path)
        path.unlink()
        raise FileNotFoundError(path)
    return cubin


def compile_source(source: str, target: str, kernels: KernelSet) -> tuple[bytes, str]:
    """The cubin of a source, and the compiler's log with the registers and spills of every kernel."""
    text = io.StringIO()
    try:
        core = importlib.import_module("cuda.core")
        options = core.ProgramOptions(**_options(target, kernels))
        code = core.Program(source, "c++", options).compile("cubin", logs=text).code
    except Exception as error:  # errors of Python, the loader and NVRTC have no common base class
        message = str(error).replace("\0", "").strip()
        raise BackendUnavailable(
            f"The GPU kernels cannot be compiled for {target} ({type(error).__name__}: {message}).",
            expected="cuda.core and an NVRTC that knows this GPU",
            fix="Run: pip install --upgrade 'cuda-python>=13' 'nvidia-cuda-nvrtc>=13'",
        ) from error
    return bytes(code), text.getvalue().strip("\0\n")
