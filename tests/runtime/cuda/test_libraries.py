"""CUDA's libraries are loaded before ONNX Runtime searches them. A missing library is reported, not raised."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from flexvar_runtime.backends.ort import cuda as ort_cuda
from flexvar_runtime.cuda.libraries import NAMES, CudaLibrary, describe_missing, load_cuda_libraries


class Pathfinder:
    """`cuda.pathfinder` on a machine with some libraries. asked: the names that were loaded, in order."""

    def __init__(self, found: dict[str, Any]) -> None:
        self.found = found
        self.asked: list[str] = []

    def load_nvidia_dynamic_lib(self, name: str) -> Any:
        self.asked.append(name)
        result = self.found.get(name, RuntimeError(f'Failure finding "lib{name}.so.13": No such file\nmore'))
        if isinstance(result, Exception):
            raise result
        return SimpleNamespace(abs_path=result, was_already_loaded_from_elsewhere=False)

    def importer(self, name: str) -> Any:
        assert name == "cuda.pathfinder"
        return self


ALL = {name: f"/wheels/nvidia/lib{name}.so" for name in NAMES}


def test_every_library_is_loaded_once_in_order() -> None:
    pathfinder = Pathfinder(ALL)
    libraries = load_cuda_libraries(pathfinder.importer)
    assert pathfinder.asked == ["cublasLt", "cublas", "curand", "cudart", "cudnn"]
    assert libraries == tuple(CudaLibrary(name, path) for name, path in ALL.items())
    assert describe_missing(libraries) == ""


def test_a_missing_library_is_reported_and_the_others_are_loaded(caplog: pytest.LogCaptureFixture) -> None:
    broken = OSError("/wheels/libcudnn.so.9: invalid ELF header")
    pathfinder = Pathfinder({name: path for name, path in ALL.items() if name != "cublas"} | {"cudnn": broken})
    logging.getLogger("flexvar_runtime").propagate = True
    with caplog.at_level(logging.DEBUG, "flexvar_runtime"):
        libraries = load_cuda_libraries(pathfinder.importer)
    assert pathfinder.asked == list(NAMES)
    problems = {library.name: library.problem for library in libraries if library.path is None}
    assert problems == {
        "cublas": 'Failure finding "libcublas.so.13": No such file',
        "cudnn": "/wheels/libcudnn.so.9: invalid ELF header",
    }
    assert describe_missing(libraries) == " (cublas, cudnn not found)"
    assert all(record.levelno == logging.DEBUG for record in caplog.records)
    assert 'Failure finding "libcublas.so.13"' in caplog.text


def test_without_pathfinder() -> None:
    def importer(name: str) -> Any:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    libraries = load_cuda_libraries(importer)
    assert [library.name for library in libraries] == list(NAMES)
    assert all(library.path is None and "No module named 'cuda.pathfinder'" in str(library) for library in libraries)


def test_a_library_that_is_loaded_already_is_kept() -> None:
    """Its path may be unknown then. It counts as found."""
    libraries = load_cuda_libraries(Pathfinder(ALL | {"cudart": None}).importer)
    assert CudaLibrary("cudart", "cudart") in libraries and describe_missing(libraries) == ""


def test_onnx_runtime_searches_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    found = (CudaLibrary("cudart", "/lib"),)

    def load() -> tuple[CudaLibrary, ...]:
        order.append("pathfinder")
        return found

    def preload() -> None:
        order.append("preload_dlls")
        print("Failed to load libcudnn.so.9")

    real: Callable[[str], Any] = importlib.import_module
    fake = SimpleNamespace(preload_dlls=preload, set_default_logger_severity=lambda _: None)
    monkeypatch.setattr(ort_cuda, "load_cuda_libraries", load)
    monkeypatch.setattr(importlib, "import_module", lambda name: fake if name == "onnxruntime" else real(name))
    device: Any = object()
    assert ort_cuda.OrtCuda(device).cuda_libraries == found
    assert order == ["pathfinder", "preload_dlls"]


def test_the_real_pathfinder_knows_every_name() -> None:
    """pathfinder raises its own error for an unknown name. It must not do so for our names, installed or not."""
    pathfinder = pytest.importorskip("cuda.pathfinder")
    with pytest.raises(pathfinder.DynamicLibUnknownError):
        pathfinder.load_nvidia_dynamic_lib("cublasLite")
    problems = [library.problem or "" for library in load_cuda_libraries()]
    assert not any("Unknown library name" in problem for problem in problems)
