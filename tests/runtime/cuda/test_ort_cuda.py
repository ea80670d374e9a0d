"""ONNX Runtime on CUDA: what is missing is said, the processor never takes over, and it runs on the device's stream."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import pytest
from fakes import FakeDevice
from host_kernels import HostKernels

from flexvar_runtime import BackendUnavailable, Bundle, FlexVARPipeline, InvalidInput
from flexvar_runtime.backends import create, ort_cuda, probe
from flexvar_runtime.backends.base import Availability
from flexvar_runtime.backends.ort_cuda import PROVIDER, OrtCuda

SCHEDULE = "1_2_3_4"


def test_the_wheel_for_processors_is_told_apart() -> None:
    state = probe("ort-cuda")
    assert not state.available and state.detail.endswith("is built without CUDA")
    assert state.fix == "pip uninstall -y onnxruntime && pip install 'flexvar-deploy[gpu]'"
    with pytest.raises(BackendUnavailable) as refusal:
        create("ort-cuda")
    assert refusal.value.exit_code == 4


def test_the_right_wheel_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [PROVIDER, "CPUExecutionProvider"])
    monkeypatch.setattr(ort_cuda, "probe_gpu", lambda: Availability(False, "no NVIDIA driver (libcuda)", "install it"))
    state = probe("ort-cuda")
    assert (state.available, state.fix) == (False, "install it")
    assert state.detail.startswith("onnxruntime ") and state.detail.endswith(", no NVIDIA driver (libcuda)")


@pytest.mark.parametrize("options", [{"threads": 2}, {"engines": Path("x")}])
def test_options_that_mean_nothing_here_are_refused(monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]) -> None:
    monkeypatch.setattr(ort_cuda, "probe", lambda _: Availability(True, "works"))
    with pytest.raises(InvalidInput, match="for ort-cuda; expected none; fix: leave them out"):
        create("ort-cuda", **options)


@pytest.fixture
def device(host_kernels: Callable[..., HostKernels]) -> FakeDevice:
    device = FakeDevice(partial(host_kernels, block=64))
    device.activate()
    return device


def test_a_session_on_the_processor_is_refused(device: FakeDevice, tiny_bundle: Path) -> None:
    """What ONNX Runtime gives, with a warning, where CUDA does not work."""
    with pytest.warns(UserWarning, match="CUDAExecutionProvider"), pytest.raises(BackendUnavailable) as refusal:
        OrtCuda(device).open(Bundle.open(tiny_bundle), "step")
    assert refusal.value.got == "ONNX Runtime that fell back to CPUExecutionProvider for step"
    assert refusal.value.expected == PROVIDER


class OnStream:
    """A session of the processor in the clothes of CUDA: what is run waits on the stream of the device."""

    def __init__(self, device: FakeDevice, path: str, options: Any, providers: Any) -> None:
        [(name, settings)] = providers
        assert name == PROVIDER and settings["user_compute_stream"] == str(device.stream)
        assert settings["device_id"] == "0" and settings["use_tf32"] == "0"
        self._device, self._name = device, Path(path).stem
        self._session = _session(path, options, providers=["CPUExecutionProvider"])

    def get_providers(self) -> list[str]:
        return [PROVIDER]

    def io_binding(self) -> Any:
        binding = self._session.io_binding()

        def bind(real: Callable[..., None]) -> Callable[..., None]:
            def on_device(name: str, place: str, number: int, dtype: Any, shape: Any, address: int) -> None:
                assert (place, number) == ("cuda", 0)
                real(name, "cpu", 0, dtype, shape, address)

            return on_device

        return SimpleNamespace(real=binding, bind_input=bind(binding.bind_input), bind_output=bind(binding.bind_output))

    def run_with_iobinding(self, binding: Any, run_options: Any) -> None:
        key = "disable_synchronize_execution_providers"
        assert run_options.get_run_config_entry(key) == "1", "it would wait"
        self._device.enqueue(f"run {self._name}", lambda: self._session.run_with_iobinding(binding.real))


_session = onnxruntime.InferenceSession


def test_the_same_images_as_on_the_cpu(device: FakeDevice, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = FlexVARPipeline.from_bundle(tiny_bundle, "ort-cpu", threads=1)([3, 1], SCHEDULE, seed=4)
    monkeypatch.setattr(
        onnxruntime,
        "InferenceSession",
        lambda path, options, providers, enable_fallback: OnStream(device, path, options, providers),
    )
    with FlexVARPipeline(Bundle.open(tiny_bundle), OrtCuda(device)) as pipeline:
        for _ in range(2):
            got = pipeline([3, 1], SCHEDULE, seed=4)
            assert got.timings.mode == "stream" and got.settings[0].backend == "ort-cuda"
            for scale, other in zip(got.tokens, expected.tokens, strict=True):
                np.testing.assert_array_equal(scale, other)
            np.testing.assert_array_equal(got.images, expected.images)
        encoded = pipeline.encode(got.images)
        assert encoded.shape == (2, 4, 4)
