"""Builds with TensorRT, which is not installed without a GPU. A fake plays it."""

from __future__ import annotations

import enum
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flexvar_export import engine_builder
from flexvar_export.engine_builder import build_engine
from flexvar_export.engine_precision import Layer
from flexvar_runtime import ArtifactRefused, BackendUnavailable, Bundle, OutOfMemory
from flexvar_runtime.backends.tensorrt.engine_files import EngineId
from flexvar_runtime.backends.tensorrt.library import TrtLibrary

EngineIds = Callable[..., EngineId]


class FakeLogger:
    Severity = enum.Enum("Severity", ["INTERNAL_ERROR", "ERROR", "WARNING", "INFO", "VERBOSE"])


class FakeMonitor:
    pass


class FakeCache:
    def __init__(self, data: bytes) -> None:
        self.data = data

    def serialize(self) -> bytes:
        return self.data + b"+"


class FakeTensorRT:
    """It has the interface of the bindings, parses into no layers, and builds what `outcome` returns."""

    __version__ = "11.4.0.106"
    ILogger, IProgressMonitor = FakeLogger, FakeMonitor
    BuilderFlag = types.SimpleNamespace(TF32="TF32")
    ProfilingVerbosity = types.SimpleNamespace(DETAILED="DETAILED")

    def __init__(self, outcome: Callable[[Any], Any]) -> None:
        self.outcome = outcome
        self.calls: list[Any] = []
        self.cache: FakeCache | None = None
        self.progress_monitor: Any = None

    def Builder(self, logger: Any) -> FakeTensorRT:
        self.logger = logger
        return self

    def __getattr__(self, name: str) -> Any:
        if name.startswith("create_") or name == "OnnxParser":
            return lambda *_: self
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *arguments: self.calls.append((name, *arguments)) or True

    def create_timing_cache(self, data: bytes) -> FakeCache | None:
        self.cache = None if data.startswith(b"broken") else FakeCache(data)
        return self.cache

    def get_timing_cache(self) -> FakeCache | None:
        return self.cache

    def build_serialized_network(self, network: Any, config: Any) -> Any:
        return self.outcome(self)


@pytest.fixture
def fake_build(
    tiny_bundles: Callable[[str], Path], engine_id: EngineIds, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[Any, FakeTensorRT]]:
    """(outcome, timing) -> the plan of `condition`, and the fake TensorRT."""
    bundle = Bundle.open(tiny_bundles("fp16"))
    half = [Layer("m", "matmul", "float16", frozenset(), False)]
    monkeypatch.setattr(engine_builder, "arithmetic", lambda *_: half)
    monkeypatch.setattr(engine_builder, "decompose_attention", lambda *_: 0)
    monkeypatch.setattr(engine_builder, "_check_bindings", lambda *_: None)

    def run(outcome: Callable[[Any], Any] = lambda _: b"plan", timing: Path | None = None) -> tuple[Any, FakeTensorRT]:
        fake = FakeTensorRT(outcome)
        library = TrtLibrary("tensorrt", fake, fake.__version__)
        wanted = engine_id(bundle, "condition", target="9.0", library=library)
        return build_engine(library, bundle, wanted, timing=timing).data, fake

    return run


def test_settings_and_profiles_of_a_build(fake_build: Callable[..., tuple[Any, FakeTensorRT]]) -> None:
    data, fake = fake_build()
    assert data == b"plan"
    assert ("clear_flag", "TF32") in fake.calls and fake.profiling_verbosity == "DETAILED"
    assert ("set_shape", "labels", (16,), (16,), (16,)) in fake.calls
    assert not [call for call in fake.calls if "capabilit" in call[0] or "timing" in call[0]]


def test_timings_are_saved_and_used_by_the_next_build(
    fake_build: Callable[..., tuple[Any, FakeTensorRT]], tmp_path: Path
) -> None:
    path = tmp_path / "timing" / "11.4.0-9.0.cache"
    for expected in (b"+", b"++"):
        fake_build(timing=path)
        assert path.read_bytes() == expected and path.parent.stat().st_mode & 0o777 == 0o700
    path.write_bytes(b"broken")  # a file of another version
    fake_build(timing=path)
    assert path.read_bytes() == b"+"
    path.parent.chmod(0o777)
    with pytest.raises(ArtifactRefused, match=str(path.parent)):
        fake_build(timing=path)


def test_no_timings_with_tensorrt_rtx(
    tiny_bundles: Callable[[str], Path], library: TrtLibrary, engine_id: EngineIds, tmp_path: Path
) -> None:
    """TensorRT-RTX crashes on a timing cache."""
    bundle = Bundle.open(tiny_bundles("fp16"))
    build_engine(library, bundle, engine_id(bundle, "condition"), timing=tmp_path / "timing" / "x.cache")
    assert not list(tmp_path.iterdir())


def log_error(fake: FakeTensorRT, text: str) -> None:
    fake.logger.log(FakeLogger.Severity["ERROR"], text)


def test_a_failed_build_shows_the_errors_of_the_library(fake_build: Callable[..., tuple[Any, FakeTensorRT]]) -> None:
    with pytest.raises(BackendUnavailable, match=r"condition\.onnx.* \[optimizer\] no implementation"):
        fake_build(lambda fake: log_error(fake, "[optimizer]\n no implementation"))


def raise_memory_error(fake: FakeTensorRT) -> None:
    raise MemoryError("std::bad_alloc")


@pytest.mark.parametrize("outcome", [lambda fake: log_error(fake, "Cuda Runtime (out of memory)"), raise_memory_error])
def test_a_build_without_enough_memory(
    fake_build: Callable[..., tuple[Any, FakeTensorRT]], outcome: Callable[[Any], None]
) -> None:
    with pytest.raises(OutOfMemory, match=r"condition\.onnx.* --schedule .*--max-batch") as error:
        fake_build(outcome)
    assert error.value.exit_code == 6


def test_an_exception_in_the_library_is_raised_again(fake_build: Callable[..., tuple[Any, FakeTensorRT]]) -> None:
    with pytest.raises(ZeroDivisionError):
        fake_build(lambda fake: 1 / 0)
