"""Loading TensorRT and TensorRT-RTX, their messages, what is missing, and the GPUs that they run on."""

from __future__ import annotations

import enum
import importlib
import logging
import subprocess
import sys
import types
from collections.abc import Callable
from typing import Any

import pytest

from flexvar_runtime.backends.tensorrt.library import (
    FLAVOURS,
    Messages,
    TrtLibrary,
    known_targets,
    load,
    probe_library,
    require_runs_on,
    runs_on,
)
from flexvar_runtime.errors import BackendUnavailable, InvalidInput

Importer = Callable[[str], Any]
PROVIDER = "onnxruntime_ep_nv_tensorrt_rtx"


class FakeLogger:
    Severity = enum.Enum("Severity", ["INTERNAL_ERROR", "ERROR", "WARNING", "INFO", "VERBOSE"])


def module(version: str = "11.4.0.106") -> Any:
    return types.SimpleNamespace(__version__=version, ILogger=FakeLogger)


def importer(found: dict[str, Any], imported: list[str] | None = None) -> Importer:
    """An importer that knows only these modules. An exception in place of a module is raised."""

    def load_module(name: str) -> Any:
        if imported is not None:
            imported.append(name)
        result = found.get(name, ModuleNotFoundError(f"No module named {name!r}", name=name))
        if isinstance(result, Exception):
            raise result
        return result

    return load_module


def refusal(flavour: str, found: dict[str, Any]) -> BackendUnavailable:
    with pytest.raises(BackendUnavailable) as refused:
        load(flavour, importer(found))
    assert refused.value.exit_code == 4
    state = probe_library(flavour, importer(found))
    assert not state.available and f"{state.detail}." == refused.value.got
    assert state.advice == refused.value.fix == f"Run: {state.fix}"
    return refused.value


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_not_installed(flavour: str) -> None:
    error = refusal(flavour, {})
    assert error.got.startswith(f"{flavour} ")
    assert error.fix == f"Run: pip install 'flexvar-deploy[{flavour}]'"


@pytest.mark.parametrize(
    ("flavour", "found", "named"),
    [
        (
            "tensorrt",
            {"tensorrt": ImportError("libnvinfer.so.11: cannot open shared object file\nmore")},
            ["tensorrt: libnvinfer.so.11: cannot open shared object file)"],
        ),
        (
            "tensorrt",
            {"tensorrt": ModuleNotFoundError("No module named 'numpy'", name="numpy")},
            ["tensorrt: No module named 'numpy'"],
        ),
        (
            "tensorrt-rtx",
            {"tensorrt_rtx": OSError("wrong ELF class"), "tensorrt_rtx_bindings": RuntimeError()},
            ["tensorrt_rtx: wrong ELF class", "tensorrt_rtx_bindings: RuntimeError"],
        ),
    ],
)
def test_broken(flavour: str, found: dict[str, Any], named: list[str]) -> None:
    error = refusal(flavour, found)
    assert error.got.startswith(f"{flavour} ") and all(part in error.got for part in named)
    assert error.fix == f"Run: pip install --force-reinstall 'flexvar-deploy[{flavour}]'"


@pytest.mark.parametrize(
    ("flavour", "name", "version"),
    [("tensorrt", "tensorrt", "10.16.1.11"), ("tensorrt-rtx", "tensorrt_rtx", "1.6.0"), ("tensorrt", "tensorrt", "")],
)
def test_too_old(flavour: str, name: str, version: str) -> None:
    error = refusal(flavour, {name: module(version)})
    assert error.got.startswith(f"{flavour} {version}")
    assert error.expected == ("11.0 or later" if flavour == "tensorrt" else "1.7 or later")
    assert error.fix == f"Run: pip install --upgrade 'flexvar-deploy[{flavour}]'"


def test_the_vendors_own_package_comes_first() -> None:
    imported: list[str] = []
    own = module("1.8.0")
    library = load("tensorrt-rtx", importer({"tensorrt_rtx": own, "tensorrt_rtx_bindings": module()}, imported))
    assert library.module is own and library.version == "1.8.0" and library.rtx
    assert imported == ["tensorrt_rtx"]


def test_else_the_bindings_with_the_libraries_of_the_provider() -> None:
    imported: list[str] = []
    load("tensorrt-rtx", importer({"tensorrt_rtx_bindings": module("1.7.1.116")}, imported))
    assert imported == ["tensorrt_rtx", PROVIDER, "tensorrt_rtx_bindings"]


def test_once_a_process() -> None:
    imported: list[str] = []
    find = importer({"tensorrt": module()}, imported)
    assert load("tensorrt", find) is load("tensorrt", find)
    assert imported == ["tensorrt"]


def test_an_unknown_flavour() -> None:
    with pytest.raises(InvalidInput, match=r"'trt'.*tensorrt, tensorrt-rtx"):
        load("trt")


def test_messages(caplog: pytest.LogCaptureFixture) -> None:
    """Errors are kept while somebody collects them, and logged as errors otherwise."""
    library = TrtLibrary("tensorrt", module(), "11.4.0")
    severity = FakeLogger.Severity
    with caplog.at_level(logging.DEBUG, "flexvar_runtime.backends.tensorrt.library"):
        library.logger.log(severity["ERROR"], "before")
        with library.messages.reading() as errors:
            assert "before" not in errors()
            for name in ("VERBOSE", "INFO", "WARNING", "ERROR", "INTERNAL_ERROR", "ERROR"):
                library.logger.log(severity[name], f"{name}\n  text")
            assert errors() == "ERROR text | INTERNAL_ERROR text"
    levels = [record.levelname for record in caplog.records]
    assert levels == ["ERROR", "DEBUG", "DEBUG", "DEBUG", "DEBUG", "DEBUG"]  # verbose messages are dropped


def test_only_the_last_errors_are_kept() -> None:
    messages = Messages(kept=2)
    with messages.reading() as errors:
        for i in range(5):
            messages.add(str(i))
        assert errors() == "3 | 4"


# Where TensorRT-RTX runs


@pytest.fixture(params=["the real library", "a fake"])
def rtx(request: pytest.FixtureRequest) -> TrtLibrary:
    if request.param == "the real library":
        pytest.importorskip("tensorrt_rtx_bindings")
        return load("tensorrt-rtx")
    members = dict.fromkeys(["NONE", "CURRENT", "SM75", "SM80", "SM86", "SM89", "SM120", "SM121"])
    fake = module("1.7.1.116")
    fake.ComputeCapability = types.SimpleNamespace(__members__=members)
    return TrtLibrary("tensorrt-rtx", fake, "1.7.1.116")


def test_gpus_that_tensorrt_rtx_runs_on(rtx: TrtLibrary) -> None:
    for capability in ("8.0", "8.6", "8.9", "12.0", "12.1", "12.3", "13.0"):
        assert runs_on(rtx, capability).available
        require_runs_on(rtx, capability)


def test_gpus_that_tensorrt_rtx_does_not_run_on(rtx: TrtLibrary) -> None:
    for capability in ("7.0", "7.5", "8.7", "9.0", "10.0", "10.3", "11.0"):
        state = runs_on(rtx, capability)
        assert not state.available and f"compute capability {capability}" in state.detail
        assert "8.0, 8.6, 8.9, 12.0, 12.1" in state.detail
        assert "--backend tensorrt," in (state.fix or "") and "--backend ort-cuda" in (state.fix or "")
        with pytest.raises(BackendUnavailable) as refused:
            require_runs_on(rtx, capability, given="--target 90: ")
        assert refused.value.exit_code == 4 and refused.value.got.startswith("--target 90: tensorrt-rtx ")
    turing, hopper = runs_on(rtx, "7.5").detail, runs_on(rtx, "9.0").detail
    assert "7.5" in known_targets(rtx) and "builds engines" in turing and "builds engines" not in hopper


def test_tensorrt_runs_on_every_gpu() -> None:
    for capability in ("7.5", "9.0", "10.3", "12.3"):
        assert runs_on(TrtLibrary("tensorrt", module(), "11.4.0"), capability).available


# The real TensorRT-RTX, which needs no GPU for this


def test_the_real_library() -> None:
    pytest.importorskip("tensorrt_rtx_bindings")
    library = load("tensorrt-rtx")
    assert library.version == importlib.import_module("tensorrt_rtx_bindings").__version__
    parser = library.module.OnnxParser(library.module.Builder(library.logger).create_network(), library.logger)
    with library.messages.reading() as errors:
        assert not parser.parse_from_file("no such file")
        assert "Input file cannot be found" in errors()


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_nothing_is_imported_before() -> None:
    watched = {"tensorrt", "tensorrt_rtx", "tensorrt_rtx_bindings", PROVIDER, "onnxruntime"}
    code = f"import sys, flexvar_runtime.backends.tensorrt.backend; print(sorted({watched} & sys.modules.keys()))"
    assert run(code) == "[]"


def test_the_libraries_are_found_where_the_provider_cannot_be_imported() -> None:
    pytest.importorskip("tensorrt_rtx_bindings")
    """Importing it writes links beside its libraries, which fails in a read-only folder."""
    code = f"""
import importlib
from flexvar_runtime.backends.tensorrt.library import load
def find(name):
    if name == "{PROVIDER}":
        raise PermissionError("read-only")
    return importlib.import_module(name)
print(load("tensorrt-rtx", find).module.Builder is not None)
"""
    assert run(code) == "True"
