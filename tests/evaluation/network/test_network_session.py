"""A network runs on the backend that was asked for, or not at all. The GPU is emulated."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnxruntime
import pytest
from recorded_images import recorded_images

from flexvar_evaluation.network import network_session
from flexvar_evaluation.network.features import FeatureNetwork
from flexvar_evaluation.network.network_file import read_network
from flexvar_evaluation.network.network_session import network_errors, open_session
from flexvar_runtime import ArtifactRefused, BackendUnavailable, InvalidInput, OutOfMemory

CUDA = "CUDAExecutionProvider"


@pytest.mark.parametrize("backend", ["openvino", "cuda", "auto", ""])
def test_other_backends_are_refused(backend: str, tiny_network: Path) -> None:
    with pytest.raises(InvalidInput, match="backend"):
        FeatureNetwork.open(tiny_network, backend)


def test_options_of_another_backend_are_refused(tiny_network: Path) -> None:
    with pytest.raises(InvalidInput, match="device"):
        FeatureNetwork.open(tiny_network, device="cuda:0")
    with pytest.raises(InvalidInput, match="threads"):
        FeatureNetwork.open(tiny_network, threads=0)


def test_no_gpu(tiny_network: Path) -> None:
    with pytest.raises(BackendUnavailable, match="ort-cuda"):
        FeatureNetwork.open(tiny_network, "ort-cuda")


class Gpu:
    """The backend ort-cuda, and ONNX Runtime's session on it. elsewhere: operators that would run on the CPU."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.closed, self.first, self.elsewhere = False, CUDA, frozenset[str]()
        self.device, self.cuda_libraries = SimpleNamespace(ordinal=1), ()
        self.settings: dict[str, str] = {}
        self.real = onnxruntime.InferenceSession
        monkeypatch.setattr(network_session.backends, "create", self.create)
        monkeypatch.setattr(onnxruntime, "InferenceSession", self.session)

    def create(self, name: str, *, device: str | None, threads: int | None) -> Any:
        assert (name, device, threads) == ("ort-cuda", "cuda:1", None)
        return self

    def session(self, content: bytes, options: Any, providers: Any, enable_fallback: int) -> Any:
        [(name, self.settings)] = providers
        assert name == CUDA and enable_fallback == 0
        session = self.real(content, options, providers=["CPUExecutionProvider"])
        nodes = [
            SimpleNamespace(op_type=operator, name="")
            for operator in ("Conv", "Relu", "MaxPool")
            if operator not in self.elsewhere
        ]
        left = [SimpleNamespace(op_type=operator, name="") for operator in self.elsewhere]
        parts = [
            SimpleNamespace(ep_name=place, get_nodes=found.copy)
            for place, found in ((CUDA, nodes), ("CPUExecutionProvider", left))
        ]
        return SimpleNamespace(
            run=session.run,
            get_providers=lambda: [self.first],
            get_provider_graph_assignment_info=lambda: parts,
        )

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    return Gpu(monkeypatch)


def test_a_network_on_a_gpu(tiny_network: Path, gpu: Gpu) -> None:
    """It computes in float32 without rounded factors."""
    with FeatureNetwork.open(tiny_network, "ort-cuda", "cuda:1") as network:
        assert network.features(recorded_images("smp64", 2)).pool.shape == (2, network.size)
        assert gpu.settings["use_tf32"] == "0" and gpu.settings["device_id"] == "1" and not gpu.closed
    assert gpu.closed


def test_the_cpu_never_replaces_the_gpu(tiny_network: Path, gpu: Gpu) -> None:
    gpu.elsewhere = frozenset({"MaxPool"})
    with pytest.raises(BackendUnavailable, match="MaxPool"):
        FeatureNetwork.open(tiny_network, "ort-cuda", "cuda:1")
    assert gpu.closed
    gpu.first, gpu.elsewhere = "CPUExecutionProvider", frozenset()
    with pytest.raises(BackendUnavailable, match="instead of CUDA"):
        FeatureNetwork.open(tiny_network, "ort-cuda", "cuda:1")


def test_the_bytes_that_were_checked_are_run(tiny_network: Path, tmp_path: Path) -> None:
    """The file may be replaced after the check."""
    path = tmp_path / "network.onnx"
    path.write_bytes(tiny_network.read_bytes())
    file = read_network(path)
    path.write_bytes(b"")
    session = open_session(file, "ort-cpu", None, 1)
    with FeatureNetwork(file, session) as network:
        assert network.features(recorded_images("smp64", 1)).pool.shape == (1, network.size)


@pytest.mark.parametrize(
    ("raised", "expected"),
    [
        (RuntimeError("bad allocation"), OutOfMemory),
        (RuntimeError("the node x has a wrong shape"), ArtifactRefused),
        (RuntimeError("NOT_IMPLEMENTED: Relu"), BackendUnavailable),
    ],
)
def test_errors_of_the_library(raised: Exception, expected: type[Exception]) -> None:
    with pytest.raises(expected, match=r"network\.onnx") as refusal, network_errors("network.onnx"):
        raise raised
    assert "bundle" not in str(refusal.value)
