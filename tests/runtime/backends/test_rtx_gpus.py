"""TensorRT-RTX on a GPU that it does not run on: the probe, `auto` and opening a pipeline name a backend that works."""

from __future__ import annotations

import logging
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from flexvar_export.engine_writer import lock_engine, write_engine
from flexvar_runtime import BackendUnavailable, Bundle, FlexVARPipeline, backends
from flexvar_runtime.backends import create, probe
from flexvar_runtime.backends.base import Availability
from flexvar_runtime.backends.ort import cuda as ort_cuda
from flexvar_runtime.backends.tensorrt import backend as tensorrt
from flexvar_runtime.backends.tensorrt.engine_files import (
    PORTABLE,
    RECIPE,
    EngineId,
    PrecisionReport,
    graph_sha256,
    receipts_folder,
)
from flexvar_runtime.backends.tensorrt.library import load
from flexvar_runtime.cuda.gpu import GpuFacts
from flexvar_runtime.model.signatures import REQUIRED

if find_spec("tensorrt_rtx_bindings") is None:
    pytest.skip("TensorRT-RTX is not installed", allow_module_level=True)

RTX = "tensorrt-rtx"
UNFIT = ["7.5", "9.0", "10.0", "10.3"]
FIT = ["8.6", "12.0", "12.3"]
GPUS = Callable[..., None]


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> GPUS:
    """Pretend that the machine has GPUs of these compute capabilities. Nothing runs on them."""

    def install(*capabilities: str) -> None:
        there = tuple(GpuFacts(i, f"GPU {i}", one, 2**34) for i, one in enumerate(capabilities))

        def find(device: str | None = None) -> GpuFacts:
            return there[int((device or "cuda:0").partition(":")[2])]

        monkeypatch.setattr(tensorrt, "find_gpu", find)
        monkeypatch.setattr(tensorrt, "find_gpus", lambda: there)
        monkeypatch.setattr(tensorrt, "CudaDevice", lambda facts: facts)
        monkeypatch.setattr(tensorrt, "TensorRT", lambda library, device, engines: device)

    return install


@pytest.fixture
def portable(tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Bundle, Path]:
    """A bundle, and a folder with a portable engine of every required graph."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    bundle, report = Bundle.open(tiny_bundle), PrecisionReport(claimed="", layers={}, fused_attention=0, share=1.0)
    for graph in REQUIRED:
        engine = EngineId(
            graph=graph,
            graph_sha256=graph_sha256(bundle, graph),
            recipe=RECIPE,
            flavour=RTX,
            version=load(RTX).version,
            target=PORTABLE,
            profiles=(),
        )
        with lock_engine(tmp_path / "engines", engine, receipts_folder()):
            write_engine(tmp_path / "engines", engine, b"engine", report, receipts_folder())
    return bundle, tmp_path / "engines"


def check(state: Availability, capability: str) -> None:
    """The state must name the compute capability and the backends that work."""
    assert not state.available and f"compute capability {capability}" in state.detail
    assert "--backend tensorrt," in (state.fix or "") and "--backend ort-cuda" in (state.fix or "")


def test_probe(gpus: GPUS) -> None:
    for capability in UNFIT:
        gpus(capability)
        check(probe(RTX), capability)
        assert f"GPU 0, compute capability {capability}, 16 GiB" in probe(RTX).detail
    for capability in FIT:
        gpus(capability)
        detail = f"{RTX} {load(RTX).version}, GPU 0, compute capability {capability}, 16 GiB"
        assert probe(RTX) == Availability(True, detail)


def test_without_a_gpu_engines_can_still_be_built(monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> Any:
        raise BackendUnavailable("CUDA found no driver.", expected="a GPU", fix="Install it.")

    monkeypatch.setattr(tensorrt, "find_gpus", none)
    state = probe(RTX)
    assert not state.available and state.fix == "Install it."
    assert state.detail.startswith(RTX) and state.detail.endswith("CUDA found no driver") and "build" in state.detail


def test_a_portable_engine_is_used_only_where_the_library_runs(gpus: GPUS, portable: tuple[Bundle, Path]) -> None:
    bundle, engines = portable
    for capability in UNFIT:
        gpus(capability)
        check(tensorrt.ready(RTX, bundle, device=None, engines=engines), capability)
        with pytest.raises(BackendUnavailable) as refusal:
            FlexVARPipeline.from_bundle(bundle.path, RTX, engines=engines)
        assert refusal.value.exit_code == 4
        check(Availability.of_error(refusal.value), capability)
    for capability in FIT:
        gpus(capability)
        assert tensorrt.ready(RTX, bundle, device=None, engines=engines).available


def test_auto_takes_the_next_backend(
    gpus: GPUS, portable: tuple[Bundle, Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(ort_cuda, "probe", lambda name: Availability(True, "works"))
    monkeypatch.setattr(logging.getLogger("flexvar_runtime"), "propagate", True)
    bundle, engines = portable
    for capability, chosen in (("9.0", "ort-cuda"), ("10.0", "ort-cuda"), ("8.6", RTX)):
        gpus(capability)
        caplog.clear()
        with caplog.at_level(logging.DEBUG, "flexvar_runtime"):
            assert backends._choose(bundle, None, engines) == chosen
        assert (f"does not run on compute capability {capability}" in caplog.text) == (chosen != RTX)


def test_of_two_gpus_the_one_that_was_named_decides(gpus: GPUS, portable: tuple[Bundle, Path]) -> None:
    gpus("9.0", "8.9")
    bundle, engines = portable
    assert probe(RTX).available and "GPU 1" in probe(RTX).detail
    check(tensorrt.ready(RTX, bundle, device="cuda:0", engines=engines), "9.0")
    assert tensorrt.ready(RTX, bundle, device="cuda:1", engines=engines).available
    with pytest.raises(BackendUnavailable, match=r"compute capability 9\.0"):
        create(RTX, bundle, device="cuda:0")
    opened: Any = create(RTX, bundle, device="cuda:1")
    assert opened.capability == "8.9"


def test_tensorrt_is_untouched(gpus: GPUS, monkeypatch: pytest.MonkeyPatch) -> None:
    gpus("9.0")
    library = SimpleNamespace(rtx=False, flavour="tensorrt", version="11.4.0")
    monkeypatch.setattr(tensorrt, "probe_library", lambda name: Availability(True, "tensorrt 11.4.0"))
    monkeypatch.setattr(tensorrt, "load", lambda name: library)
    assert probe("tensorrt") == Availability(True, "tensorrt 11.4.0, GPU 0, compute capability 9.0, 16 GiB")
    opened: Any = create("tensorrt")
    assert opened.capability == "9.0"
