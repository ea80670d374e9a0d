"""The backend ort-cuda: its probe, no nodes on the CPU, work on the device's stream, and ONNX Runtime's CUDA graphs."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from fake_ort import OnStream, real_session
from fakes import FakeDevice
from host_kernels import HostKernels

from flexvar_runtime import BackendUnavailable, Bundle, FlexVARPipeline, InvalidInput, OutOfMemory
from flexvar_runtime.backends import create, probe
from flexvar_runtime.backends.base import Availability
from flexvar_runtime.backends.ort import cuda as ort_cuda
from flexvar_runtime.backends.ort.cuda import PROVIDER, OrtCuda
from flexvar_runtime.backends.ort.placement import without_cuda_kernel
from flexvar_runtime.bundle.onnx_scan import scan
from flexvar_runtime.cuda.libraries import CudaLibrary
from flexvar_runtime.model.precision import Precision

SCHEDULE = "1_2_3_4"


def test_the_wheel_without_cuda() -> None:
    state = probe("ort-cuda")
    assert not state.available and state.detail.startswith("onnxruntime ") and "CUDA" in state.detail
    assert state.fix == "pip uninstall -y onnxruntime && pip install 'flexvar-deploy[gpu]'"
    with pytest.raises(BackendUnavailable) as refusal:
        create("ort-cuda")
    assert refusal.value.exit_code == 4


def test_the_right_wheel_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [PROVIDER, "CPUExecutionProvider"])
    monkeypatch.setattr(ort_cuda, "probe_gpu", lambda: Availability(False, "CUDA found no driver", "Install it."))
    state = probe("ort-cuda")
    assert (state.available, state.fix) == (False, "Install it.")
    assert state.detail.startswith("onnxruntime ") and state.detail.endswith("CUDA found no driver")


def test_options_that_it_does_not_take(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ort_cuda, "probe", lambda _: Availability(True, "works"))
    for option, value in (("threads", 2), ("engines", Path("x"))):
        with pytest.raises(InvalidInput, match=f"{option} .*ort-cuda.*{option}"):
            create("ort-cuda", **{option: value})  # type: ignore[arg-type]


@pytest.fixture
def device(host_kernels: Callable[..., HostKernels]) -> FakeDevice:
    device = FakeDevice(partial(host_kernels, block=64))
    device.activate()
    return device


def test_a_session_on_the_cpu_is_refused(device: FakeDevice, tiny_bundle: Path) -> None:
    """If CUDA does not work, ONNX Runtime only warns and opens such a session."""
    with pytest.warns(UserWarning, match="CUDAExecutionProvider"), pytest.raises(BackendUnavailable) as refusal:
        OrtCuda(device).open(Bundle.open(tiny_bundle), "step")
    assert "step with CPUExecutionProvider" in refusal.value.got and refusal.value.expected == PROVIDER


Sessions = list[OnStream]


@pytest.fixture
def sessions(device: FakeDevice, monkeypatch: pytest.MonkeyPatch) -> Sessions:
    """All sessions that are opened from here on, except those of ort-cpu."""
    opened: Sessions = []

    def make(path: str, options: Any, providers: Any, enable_fallback: int) -> Any:
        if providers[0][0] != PROVIDER:
            return real_session(path, options, providers=providers)
        opened.append(OnStream(device, path, options, providers))
        return opened[-1]

    monkeypatch.setattr(onnxruntime, "InferenceSession", make)
    return opened


def same(got: Any, expected: Any) -> None:
    for scale, other in zip(got.tokens, expected.tokens, strict=True):
        np.testing.assert_array_equal(scale, other)
    np.testing.assert_array_equal(got.images, expected.images)


@pytest.fixture(scope="module")
def expected(tiny_bundle: Path) -> Iterator[Callable[..., Any]]:
    """(labels, schedule, seed) -> what ort-cpu generates."""
    made: dict[Any, Any] = {}
    with FlexVARPipeline.from_bundle(tiny_bundle, "ort-cpu", threads=1) as pipeline:

        def generate(labels: list[int], schedule: str, seed: int) -> Any:
            key = (*labels, schedule, seed)
            if key not in made:
                made[key] = pipeline(labels, schedule, seed=seed)
            return made[key]

        yield generate


def test_the_same_images_as_on_the_cpu(
    device: FakeDevice, tiny_bundle: Path, expected: Callable[..., Any], sessions: Sessions
) -> None:
    reference = expected([3, 1], SCHEDULE, 4)
    with FlexVARPipeline(Bundle.open(tiny_bundle), OrtCuda(device)) as pipeline:
        for _ in range(2):
            got = pipeline([3, 1], SCHEDULE, seed=4)
            assert got.timings.mode == "stream" and got.settings[0].backend == "ort-cuda"
            same(got, reference)
        encoded = pipeline.encode(got.images)
        assert encoded.shape == (2, 4, 4)
    assert {session.name for session in sessions if session.captures} == {"step", "decode"}


# ONNX Runtime's own CUDA graphs --------------------------------------------------------------------------------------


def test_one_capture_a_shape(
    device: FakeDevice, tiny_bundle: Path, expected: Callable[..., Any], sessions: Any
) -> None:
    """One capture serves all seeds and classes. Every scale and every batch size has its own number."""
    with FlexVARPipeline(Bundle.open(tiny_bundle), OrtCuda(device)) as pipeline:
        for labels, seed in (([3, 1], 4), ([0, 2], 5), ([3, 1], 6)):
            same(pipeline(labels, SCHEDULE, seed=seed), expected(labels, SCHEDULE, seed))
        [step] = [session for session in sessions if session.name == "step"]
        [decode] = [session for session in sessions if session.name == "decode"]
        assert step.numbers == [1, 2, 3, 4] * 3 and decode.numbers == [1] * 3
        list(pipeline.iter_scales([3, 1], SCHEDULE, seed=4))  # the same buffers
        assert step.numbers[12:] == [1, 2, 3, 4]
        pipeline([1], SCHEDULE, seed=4)
        assert step.numbers[16:] == [5, 6, 7, 8] and decode.numbers[3:] == [2]
        assert len(step.captured) == 8 and len(decode.captured) == 2


def test_calls_outside_a_generation_are_not_captured(device: FakeDevice, tiny_bundle: Path, sessions: Any) -> None:
    with FlexVARPipeline(Bundle.open(tiny_bundle), OrtCuda(device)) as pipeline:
        tokens = np.zeros((2, 3, 3), np.int32)
        pipeline.decode(tokens)
        pipeline.decode(tokens)
        pipeline([1], SCHEDULE, seed=4)
    decode = next(session for session in sessions if session.name == "decode")
    assert decode.numbers == [-1, -1, 1] and [number for _, number in decode.captured] == [1]
    condition = next(session for session in sessions if session.name == "condition")
    assert set(condition.numbers) == {-1} and not condition.captured


def test_a_new_binding_has_a_new_number(device: FakeDevice, tiny_bundle: Path, sessions: Any) -> None:
    """Also after an earlier one was closed. Its CUDA graph writes to addresses that others may use by now."""
    graph: Any = OrtCuda(device).open(Bundle.open(tiny_bundle), "decode")
    backend = OrtCuda(device)

    def bind(images: int) -> Any:
        tokens = backend.upload(np.full((images, 2, 2), images, np.int32))
        factor = graph.spec.outputs[0].axes[2].partition("_x")[2]
        image = backend.empty((images, 3, 2 * int(factor), 2 * int(factor)), "float32")
        return graph.bind({"tokens": tokens}, {"image": image})

    first, second = bind(1), bind(2)
    first.run()
    second.run()
    first.close()
    first.close()  # counts once
    third = bind(1)
    third.run()
    second.run()
    device.synchronize()
    assert sessions[0].numbers == [1, 2, 3, 2]
    with pytest.raises(InvalidInput, match=r"decode\.onnx is closed"):
        first.run()


def test_unused_cuda_graphs_do_not_pile_up(
    device: FakeDevice,
    tiny_bundle: Path,
    expected: Callable[..., Any],
    sessions: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """ONNX Runtime frees them only with their session. It is opened again, and bindings in use are captured again."""
    monkeypatch.setattr(ort_cuda, "UNUSED_KEPT", 6)
    schedules = ["1_2", "1_3", "1_2_3", "1_4", "1_2_4", "1_3_4", "1_2"]  # more shapes than are kept
    with FlexVARPipeline(Bundle.open(tiny_bundle), OrtCuda(device)) as pipeline:
        for turn in range(3):
            for schedule in schedules:
                same(pipeline([3], schedule, seed=turn), expected([3], schedule, turn))
        steps = [session for session in sessions if session.name == "step"]
        in_use = 4 * 3  # bindings of the shapes kept, at most
        assert len(steps) >= 3 and all(len(session.captured) <= 6 + in_use + 3 for session in steps)
        references = [weakref.ref(session) for session in steps]
        del steps
        sessions.clear()
        gc.collect()
        alive = [reference for reference in references if reference() is not None]
        assert len(alive) <= 1, "an old session is still alive"


def test_threads_that_come_and_go(
    device: FakeDevice, tiny_bundle: Path, expected: Callable[..., Any], sessions: Any
) -> None:
    """ONNX Runtime captures once per thread and keeps the captures of ended threads. So sessions are opened again."""
    reference = expected([3, 1], SCHEDULE, 4)
    with FlexVARPipeline(Bundle.open(tiny_bundle), OrtCuda(device)) as pipeline:

        def generate() -> None:
            same(pipeline([3, 1], SCHEDULE, seed=4), reference)

        for _ in range(2 * ort_cuda.THREADS_KEPT + 1):
            with ThreadPoolExecutor(1) as pool:
                pool.submit(generate).result()
        steps = [session for session in sessions if session.name == "step"]
        assert len(steps) > 1
        assert all(len(session.captured) <= 4 * ort_cuda.THREADS_KEPT for session in steps)


def test_a_run_that_failed_is_not_replayed(
    device: FakeDevice, tiny_bundle: Path, expected: Callable[..., Any], sessions: Any
) -> None:
    """Out of memory in the first run of a binding. It runs again, and is captured under another number."""
    backend = OrtCuda(device)
    with FlexVARPipeline(Bundle.open(tiny_bundle), backend) as pipeline:
        pipeline.generator.graph("step")
        [step] = [session for session in sessions if session.name == "step"]
        step.failing = RuntimeError("Failed to allocate memory for requested buffer")
        same(pipeline([3, 1], SCHEDULE, seed=4), expected([3, 1], SCHEDULE, 4))
        assert step.numbers[0] not in step.numbers[1:]


@pytest.mark.parametrize("graph", ["step", "decode", "encode"])
def test_single_calls_are_tried_once_more(
    device: FakeDevice, tiny_bundle: Path, expected: Callable[..., Any], sessions: Any, graph: str
) -> None:
    """Scale by scale, decoding and encoding: if memory runs out, unused buffers are freed and the call is repeated."""
    reference = expected([3, 1], SCHEDULE, 4)
    with FlexVARPipeline(Bundle.open(tiny_bundle), OrtCuda(device)) as pipeline:
        pipeline([1], "1_2", seed=0)  # a spare shape
        pipeline.generator.graph(graph)
        next(session for session in sessions if session.name == graph).failing = MemoryError()
        with device.recorded() as events:
            if graph == "step":
                steps = list(pipeline.iter_scales([3, 1], SCHEDULE, seed=4))
                np.testing.assert_array_equal(steps[-1].tokens, reference.tokens[-1])
            elif graph == "decode":
                np.testing.assert_array_equal(pipeline.decode(reference.tokens[-1]), reference.images)
            else:
                assert pipeline.encode(reference.images).shape == (2, 4, 4)
        assert "trim" in events


def test_a_class_whose_rows_were_not_written_is_computed_again(
    device: FakeDevice, tiny_bundle: Path, expected: Callable[..., Any], sessions: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory runs out after the condition was computed, but before its rows were stored."""
    backend = OrtCuda(device)
    with FlexVARPipeline(Bundle.open(tiny_bundle), backend) as pipeline:
        pipeline([3, 1], SCHEDULE, seed=4)
        upload, calls = backend.upload, []

        def failing(host: Any) -> Any:
            calls.append(host)
            if len(calls) == 2:  # the labels, then the slots
                raise OutOfMemory("a buffer", expected="one that fits", fix="use a smaller batch")
            return upload(host)

        monkeypatch.setattr(backend, "upload", failing)
        same(pipeline([5, 6], SCHEDULE, seed=4), expected([5, 6], SCHEDULE, 4))
        assert len(calls) > 2


# Nodes on the CPU ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("graph", ["step", "decode", "encode"])
def test_a_node_on_the_cpu_is_refused_by_name(
    device: FakeDevice, tiny_bundle: Path, sessions: Any, monkeypatch: pytest.MonkeyPatch, graph: str
) -> None:
    bundle = Bundle.open(tiny_bundle)
    computing = [node for node in scan(bundle.graph_file(graph)).nodes if node.operator in ("Mul", "Conv", "Add")]
    planted = computing[len(computing) // 2]
    assert not scan(bundle.graph_file(graph)).shape_arithmetic().intersection(planted.outputs)
    real = OnStream.__init__

    def init(self: OnStream, *arguments: Any) -> None:
        real(self, *arguments)
        self.elsewhere |= {planted.name} if self.name == graph else set()

    monkeypatch.setattr(OnStream, "__init__", init)
    with pytest.raises(BackendUnavailable) as refusal:
        OrtCuda(device).open(bundle, graph)
    assert refusal.value.exit_code == 4
    assert f"1 {planted.operator} of the graph {graph} " in refusal.value.got
    assert planted.name in refusal.value.got and "flexvar export --target gpu" in refusal.value.fix
    if graph != "encode":
        with FlexVARPipeline(bundle, OrtCuda(device)) as pipeline, pytest.raises(BackendUnavailable):
            pipeline([1], SCHEDULE, seed=0)


def test_shape_arithmetic_may_run_on_the_cpu(device: FakeDevice, tiny_bundle: Path, sessions: Any) -> None:
    OrtCuda(device).open(Bundle.open(tiny_bundle), "decode")
    [decode] = sessions
    assert decode.elsewhere, "the graph computes sizes, and they are on the CPU"


def edited_step(bundle: Path, target: Path, edit: Callable[[Any], None]) -> Path:
    """A copy of a bundle's step graph, edited, without its weights."""
    model = onnx.load(str(bundle / "step.onnx"), load_external_data=False)
    edit(model)
    onnx.save(model, str(target))
    return target


def test_nodes_without_a_name_and_other_opsets(tiny_bundle: Path, tmp_path: Path) -> None:
    def unnamed(model: Any) -> None:
        for node in model.graph.node:
            node.name = ""
        model.graph.node.append(onnx.helper.make_node("InstanceNormalization", ["codes", "a", "b"], ["planted"]))

    def later(model: Any) -> None:
        model.opset_import[0].version = 24

    found = without_cuda_kernel(scan(edited_step(tiny_bundle, tmp_path / "unnamed.onnx", unnamed)))
    assert [(node.operator, node.outputs) for node in found] == [("InstanceNormalization", ("planted",))]
    assert without_cuda_kernel(scan(tiny_bundle / "step.onnx")) == ()
    assert without_cuda_kernel(scan(edited_step(tiny_bundle, tmp_path / "later.onnx", later)))


def test_arithmetic_in_floating_point_is_no_shape(tiny_bundle: Path, tmp_path: Path) -> None:
    def planted(model: Any) -> None:
        float32 = onnx.TensorProto.FLOAT
        model.graph.node.append(onnx.helper.make_node("Shape", ["codes"], ["sizes"], name="sizes"))
        model.graph.node.append(onnx.helper.make_node("Cast", ["sizes"], ["wide"], name="wide", to=float32))
        model.graph.value_info.append(onnx.helper.make_tensor_value_info("wide", float32, [3]))

    shapes = scan(edited_step(tiny_bundle, tmp_path / "planted.onnx", planted)).shape_arithmetic()
    assert "sizes" in shapes and "wide" not in shapes


def test_auto_skips_bundles_that_it_would_refuse(
    schema1_bundle: Path, tiny_bundles: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    works = Availability(True, "works")
    monkeypatch.setattr(ort_cuda, "probe", lambda _: works)
    options: dict[str, Any] = {"device": None, "engines": None}
    old = ort_cuda.ready("ort-cuda", Bundle.open(schema1_bundle), **options)
    assert not old.available and "InstanceNormalization in decode" in old.detail
    assert old.fix is not None and "--target gpu" in old.fix
    assert ort_cuda.ready("ort-cuda", Bundle.open(tiny_bundles("fp16")), **options).available
    int8: Any = SimpleNamespace(manifest=SimpleNamespace(precision=Precision.INT8))
    assert "int8" in ort_cuda.ready("ort-cuda", int8, **options).detail
    assert create("auto", Bundle.open(schema1_bundle)).name == "ort-cpu"


def test_a_library_that_does_not_report_placement_is_refused(
    device: FakeDevice, tiny_bundle: Path, sessions: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(OnStream, "get_provider_graph_assignment_info")
    with pytest.raises(BackendUnavailable, match=r"pip install .*onnxruntime-gpu>=1\.31\.1"):
        OrtCuda(device).open(Bundle.open(tiny_bundle), "step")


def test_doctor_names_missing_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [PROVIDER])
    monkeypatch.setattr(ort_cuda, "probe_gpu", lambda: Availability(True, "H200"))
    libraries = (CudaLibrary("cublas", "/lib/libcublas.so"), CudaLibrary("cudnn", None, "not found"))
    monkeypatch.setattr(ort_cuda, "load_cuda_libraries", lambda: libraries)
    state = probe("ort-cuda")
    assert state.available and state.detail.endswith("H200 (cudnn not found)")


def test_the_probe_refuses_an_older_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [PROVIDER])
    monkeypatch.setattr(onnxruntime, "__version__", "1.31.0")
    state = probe("ort-cuda")
    assert not state.available and "1.31.0" in state.detail
    assert state.fix is not None and state.fix.endswith(">=1.31.1'")
