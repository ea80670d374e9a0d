"""`flexvar doctor` on machines that lack one thing or another."""

from __future__ import annotations

from typing import Any

import pytest

from flexvar_runtime import __version__
from flexvar_runtime.backends import BACKENDS
from flexvar_runtime.backends.tensorrt import backend as tensorrt
from flexvar_runtime.cuda.gpu import GpuFacts
from flexvar_runtime.machine.processors import default_threads


def test_this_machine(flexvar: Any) -> None:
    pytest.importorskip("openvino")
    ended = flexvar("doctor", "--json")
    data = ended.json
    assert ended.code == 0 and ended.err == ""
    assert data["version"] == __version__ and data["processors"] == default_threads()
    assert data["auto_by_precision"] == {
        **dict.fromkeys(("fp32", "fp16", "int8"), "ort-cpu"),
        "bf16": "openvino",
        "int8-bf16": "ort-openvino",
    }
    assert data["auto"] == "ort-cpu" and list(data["backends"]) == list(BACKENDS)
    assert data["backends"]["ort-cpu"]["available"] is True and data["backends"]["ort-cpu"]["fix"] is None
    assert {"python", "platform", "available_memory_bytes"} <= data.keys()
    text = flexvar("doctor")
    assert text.code == 0 and text.out.endswith(
        "--backend auto uses ort-cpu, openvino for bf16 bundles, ort-openvino for int8-bf16 bundles\n"
    )
    assert f"flexvar {__version__}, Python {data['python']}, {data['platform']}" in text.out


@pytest.mark.parametrize("wheel", ["onnxruntime", "onnxruntime-gpu"])
def test_one_wheel(flexvar: Any, install: Any, wheel: str) -> None:
    install(wheel)
    ended = flexvar("doctor")
    assert ended.code == 0
    assert f"ort-cpu      works: {wheel} 1.31.1, {default_threads()} threads\n" in ended.out


@pytest.mark.parametrize(
    ("wheels", "module", "fault", "fix"),
    [
        (
            ("onnxruntime", "onnxruntime-gpu"),
            "1.31.1",
            "onnxruntime-gpu",
            "pip uninstall -y onnxruntime onnxruntime-gpu",
        ),
        ((), ModuleNotFoundError("x"), "onnxruntime", "pip install 'flexvar-deploy[cpu]'"),
        (("onnxruntime",), "1.22.0", "1.22.0", "pip install 'onnxruntime>=1.25'"),
        (("onnxruntime-gpu",), ImportError("libcudart.so.13"), "libcudart.so.13", "onnxruntime-gpu"),
    ],
)
def test_nothing_works(flexvar: Any, install: Any, wheels: tuple[str, ...], module: Any, fault: str, fix: str) -> None:
    """Exit code 4. The fix is on its own line, so that it can be copied."""
    install(*wheels, module=module)
    ended = flexvar("doctor", "--json")
    state = ended.json["backends"]["ort-cpu"]
    assert ended.code == 4 and ended.json["auto"] is None and state["available"] is False
    assert fault in state["detail"] and fix in state["fix"]
    ended = flexvar("doctor")
    assert ended.code == 4 and ended.err == ""
    lines = ended.out.splitlines()
    assert lines[lines.index(f"ort-cpu      no: {state['detail']}") + 1].strip() == f"fix: {state['fix']}"
    assert "No backend" in lines[-1]


def test_generate_names_the_same_fault_and_fix(flexvar: Any, install: Any, tiny_bundle: Any, tmp_path: Any) -> None:
    install()
    install("onnxruntime", "onnxruntime-gpu")
    ended = flexvar("generate", tiny_bundle, "-o", tmp_path / "out", "--classes", "1")
    state = flexvar("doctor", "--json").json["backends"]["ort-cpu"]
    assert ended.refused(4, "ort-cpu", state["detail"], state["fix"]) and not (tmp_path / "out").exists()


def test_memory_that_is_not_known(flexvar: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flexvar_runtime.cli.doctor.available_bytes", lambda: None)
    assert flexvar("doctor", "--json").json["available_memory_bytes"] is None
    assert flexvar("doctor").out.splitlines()[0].endswith(" processors, unknown")


def test_tensorrt_rtx_on_a_gpu_that_it_does_not_run_on(flexvar: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorrt_rtx_bindings")
    monkeypatch.setattr(tensorrt, "find_gpus", lambda: (GpuFacts(0, "NVIDIA H200", "9.0", 2**37),))
    ended = flexvar("doctor", "--json")
    state = ended.json["backends"]["tensorrt-rtx"]
    assert state["available"] is False and ended.json["auto"] != "tensorrt-rtx"
    assert "9.0" in state["detail"] and "NVIDIA H200" in state["detail"]
    assert "tensorrt" in state["fix"] and "ort-cuda" in state["fix"]
