"""A session of ONNX Runtime that computes on the CPU and behaves as the CUDA provider does on an emulated device."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnxruntime
from fakes import FakeDevice

from flexvar_runtime.backends.ort.cuda import PROVIDER
from flexvar_runtime.backends.ort.placement import RECORD_ASSIGNMENT
from flexvar_runtime.bundle.onnx_scan import scan

real_session = onnxruntime.InferenceSession


class OnStream:
    """A CPU session that behaves like a CUDA session: a run is enqueued on the stream of the device.

    The first run with a number is recorded with its bound addresses. Every later run with that number repeats the
    recording, whatever is bound then, as a CUDA graph does.
    """

    def __init__(self, device: FakeDevice, path: str, options: Any, providers: Any) -> None:
        [(name, settings)] = providers
        assert name == PROVIDER and settings["user_compute_stream"] == str(device.stream)
        assert settings["device_id"] == "0" and settings["use_tf32"] == "0"
        assert settings["cudnn_conv_algo_search"] == "HEURISTIC"
        assert options.get_session_config_entry(RECORD_ASSIGNMENT) == "1" and options.log_severity_level == 4
        self.name, self.captures = Path(path).stem, settings["enable_cuda_graph"] == "1"
        self.captured: dict[tuple[Any, int], Any] = {}  # by thread and number
        self.numbers: list[int] = []  # of every run
        self.device, self.scan = device, scan(Path(path))
        shapes = self.scan.shape_arithmetic()
        on_cpu = (node.name for node in self.scan.nodes if shapes.intersection(node.outputs))
        self.elsewhere = frozenset(on_cpu)  # names of nodes on the CPU
        self.failing: Exception | None = None  # raised by the next run
        self._session = real_session(path, options, providers=["CPUExecutionProvider"])

    def get_providers(self) -> list[str]:
        return [PROVIDER, "CPUExecutionProvider"]

    def get_provider_graph_assignment_info(self) -> list[Any]:
        parts: dict[str, list[Any]] = {PROVIDER: [], "CPUExecutionProvider": []}
        for node in self.scan.nodes:
            place = "CPUExecutionProvider" if node.name in self.elsewhere else PROVIDER
            parts[place].append(SimpleNamespace(op_type=node.operator, name=node.name, domain=""))
        return [SimpleNamespace(ep_name=place, get_nodes=nodes.copy) for place, nodes in parts.items()]

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
        number = int(run_options.get_run_config_entry("gpu_graph_id"))
        self.numbers.append(number)
        if self.failing is not None:
            error, self.failing = self.failing, None
            if number != -1:  # as ONNX Runtime, which would replay the capture of the failed run
                self.captured.setdefault((threading.current_thread(), number), self._session.io_binding())
            raise error
        assert number == -1 or self.captures
        key = threading.current_thread(), number
        recorded = binding.real if number == -1 else self.captured.setdefault(key, binding.real)
        self.device.enqueue(f"run {self.name}", lambda: self._session.run_with_iobinding(recorded))
