"""Choosing a backend, and what all CPU backends do: arrays in place, refused bindings, weights of the bundle only."""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from flexvar_runtime import ArtifactRefused, BackendUnavailable, FlexVARPipeline, InvalidInput, OutOfMemory, backends
from flexvar_runtime.backends import BACKENDS, check_options, create, probe
from flexvar_runtime.backends.base import Availability
from flexvar_runtime.backends.openvino.backend import OpenVino
from flexvar_runtime.backends.ort.cpu import OrtCpu
from flexvar_runtime.backends.ort.session import OrtGraph
from flexvar_runtime.machine.processors import default_threads
from flexvar_runtime.model.precision import Precision
from flexvar_runtime.model.tensors import GraphSpec, TensorSpec

BUNDLE: Any = SimpleNamespace(manifest=SimpleNamespace(precision=Precision.FP32))  # only fakes see it

# Choosing ------------------------------------------------------------------------------------------------------------


def test_a_backend_by_name() -> None:
    backend = create("ort-cpu", threads=3)
    assert isinstance(backend, OrtCpu) and (backend.name, backend.threads) == ("ort-cpu", 3)
    assert create("ort-cpu", device="cpu").threads == default_threads() == len(os.sched_getaffinity(0))


def test_auto_takes_the_first_that_works_and_says_so(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("flexvar_runtime"), "propagate", True)  # off once a command has run here
    with caplog.at_level(logging.INFO, "flexvar_runtime"):
        assert create().name == "ort-cpu"
    assert "backend ort-cpu chosen" in caplog.text


def module(available: bool, ready: bool = True) -> Any:
    """The module of a backend, as far as `create` uses it."""
    return SimpleNamespace(
        PRECISIONS=frozenset(Precision),
        probe=lambda name: Availability(available, f"{name} detail", f"{name} fix"),
        ready=lambda name, bundle, **_: Availability(ready, f"no engines for {name}", "flexvar build"),
        create=lambda name, **options: SimpleNamespace(name=name, options=options),
    )


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The modules of all backends. None works unless a test changes it."""
    files = {name: module(False) for name in BACKENDS}
    monkeypatch.setattr(backends, "_module", files.__getitem__)
    monkeypatch.setattr(logging.getLogger("flexvar_runtime"), "propagate", True)
    return files


def test_auto_skips_a_backend_that_cannot_run_the_bundle_and_logs_why(
    modules: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    modules |= {"tensorrt": module(True, ready=False), "ort-cuda": module(True), "ort-cpu": module(True)}
    with caplog.at_level(logging.INFO, "flexvar_runtime"):
        assert create("auto", BUNDLE, engines=Path("e")).name == "ort-cuda"
    warning, chosen, unused = (record.message for record in caplog.records)
    assert all(part in warning for part in ("backend tensorrt ", "no engines for tensorrt", "flexvar build"))
    assert "ort-cuda" in chosen and "engines in e " in unused and "ort-cuda" in unused


def test_threads_are_for_processors(modules: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    modules |= {"ort-cuda": module(True), "ort-cpu": module(True)}
    created: Any = create("auto", BUNDLE, threads=2)
    assert created.name == "ort-cuda" and created.options["threads"] is None
    assert "2 threads are not used" in caplog.text
    created = create("auto", BUNDLE, threads=2, device="cpu")
    assert created.options["threads"] == 2


def test_engines_go_only_to_those_that_run_them(modules: dict[str, Any]) -> None:
    modules |= {"tensorrt-rtx": module(True), "ort-cpu": module(True)}
    created: Any = create("auto", BUNDLE, engines=Path("e"))
    assert (created.name, created.options["engines"]) == ("tensorrt-rtx", Path("e"))
    modules["tensorrt-rtx"] = module(False)
    created = create("auto", BUNDLE, engines=Path("e"))
    assert (created.name, created.options["engines"]) == ("ort-cpu", None)


@pytest.mark.parametrize(("device", "name"), [(None, "ort-cuda"), ("cuda:1", "ort-cuda"), ("cpu", "ort-cpu")])
def test_auto_stays_on_the_device_that_was_asked_for(modules: dict[str, Any], device: str | None, name: str) -> None:
    modules |= {"ort-cuda": module(True), "ort-cpu": module(True)}
    assert create("auto", BUNDLE, device=device).name == name


def test_a_gpu_that_was_asked_for_is_not_replaced_by_the_processor(modules: dict[str, Any]) -> None:
    modules["ort-cpu"] = module(True)
    with pytest.raises(BackendUnavailable, match="device cuda:0"):
        create("auto", BUNDLE, device="cuda:0")


def test_by_name_nothing_is_passed_over(modules: dict[str, Any]) -> None:
    modules |= {"ort-cuda": module(False), "ort-cpu": module(True)}
    with pytest.raises(BackendUnavailable, match=r"Backend ort-cuda .*: ort-cuda detail.*ort-cuda fix"):
        create("ort-cuda", BUNDLE)


@pytest.mark.parametrize("folder", [b"caf\xe9", b"\xff/b", "фото".encode()])
@pytest.mark.parametrize("name", ["ort-cpu", "openvino"])
def test_folders_in_other_encodings(tiny_bundle: Path, tmp_path: Path, name: str, folder: bytes) -> None:
    if name == "openvino":
        pytest.importorskip("openvino")
    place = tmp_path / os.fsdecode(folder)
    place.mkdir(parents=True)
    shutil.copytree(tiny_bundle, place / "tiny.bundle")
    images = []
    for path in (tiny_bundle, place / "tiny.bundle"):
        with FlexVARPipeline.from_bundle(path, name, threads=1) as pipe:
            images.append(pipe([1], "1_2", seed=0).images)
            pipe([2], "1_2", seed=0)  # `ort-cpu` opens the condition again
    assert np.array_equal(*images)


def test_unknown_names() -> None:
    for name in ("CUDA", "ORT-CPU", "", "ort_cpu", "../ort_cpu"):
        with pytest.raises(InvalidInput, match=f"backend is {name!r}") as refusal:
            create(name)
        assert all(known in refusal.value.got for known in ("auto", *BACKENDS))


def test_devices_that_are_none() -> None:
    for device in ("cuda:x", "cuda:-1", "0", "gpu", "", "cuda:1 ", "cuda:" + "9" * 5):
        with pytest.raises(InvalidInput, match=r"device .*must be cpu, cuda or cuda:N"):
            check_options("auto", device, None)
    for device in ("cpu", "cuda", "cuda:0", "cuda:15", None):
        assert check_options("auto", device, None) is None


def test_options_that_a_cpu_backend_does_not_take() -> None:
    for threads in (0, -1, 1.5, True, "2", 1025):
        with pytest.raises(InvalidInput, match=r"threads .* from 1 to 1024"):
            create("ort-cpu", threads=threads)  # type: ignore[arg-type]
    with pytest.raises(InvalidInput, match=r"device .*'cuda:0'.* ort-cpu"):
        create("ort-cpu", device="cuda:0")
    with pytest.raises(InvalidInput, match=r"engines .* ort-cpu"):
        create("ort-cpu", engines=Path("e"))


IDLE = """
import sys, time
from flexvar_runtime import FlexVARPipeline

with FlexVARPipeline.from_bundle(sys.argv[1], backend=sys.argv[2], threads=2) as pipe:
    for _ in range(3):
        pipe([1])
        before = time.process_time()
        time.sleep(0.1)
        print(time.process_time() - before)
"""


@pytest.mark.parametrize("name", ["ort-cpu", "openvino"])
def test_a_pipeline_at_rest_takes_no_processor(tiny_bundle: Path, name: str) -> None:
    """By default ONNX Runtime's threads spin for 45 ms after a call, which takes processor time from others."""
    done = subprocess.run([sys.executable, "-c", IDLE, tiny_bundle, name], capture_output=True, text=True, check=True)
    assert min(map(float, done.stdout.split())) < 0.01


# What is installed ---------------------------------------------------------------------------------------------------

Install = Callable[..., None]
CANNOT_LOAD = ImportError("libonnx.so.1: cannot open shared object file\nmore")


def test_one_wheel_that_works(install: Install) -> None:
    versions = ("1.31.1", "1.25.0", "2.0", "1.25.0.dev20261101+cpu", "1.30rc1")
    wheels = ("onnxruntime", "onnxruntime-gpu", "onnxruntime-directml")
    for wheel, version in itertools.product(wheels, versions):
        install(wheel, module=version)
        state = probe("ort-cpu")
        assert state.available and state.fix is None
        assert state.detail == f"{wheel} {version}, {default_threads()} threads"


def test_built_from_source_there_is_no_wheel(install: Install) -> None:
    install()
    assert probe("ort-cpu").detail.startswith("onnxruntime 1.31.1, ")


@pytest.mark.parametrize(
    ("wheels", "module", "named", "fix"),
    [
        ((), ModuleNotFoundError("onnxruntime"), "onnxruntime is not installed", "pip install 'flexvar-deploy[cpu]'"),
        ((), None, "onnxruntime is not installed", "pip install 'flexvar-deploy[cpu]'"),  # an empty folder is left
        (
            ("onnxruntime", "onnxruntime-gpu"),
            "1.31.1",
            "onnxruntime and onnxruntime-gpu",
            "pip uninstall -y onnxruntime onnxruntime-gpu && pip install 'flexvar-deploy[cpu]'",
        ),
        (
            ("onnxruntime",),
            CANNOT_LOAD,
            "libonnx.so.1: cannot open shared object file)",
            "pip install --force-reinstall onnxruntime",
        ),
        (
            ("onnxruntime-gpu",),
            OSError("undefined symbol"),
            "onnxruntime-gpu cannot be loaded",
            "pip install --force-reinstall onnxruntime-gpu",
        ),
        (
            ("onnxruntime-gpu",),
            None,  # half removed
            "__version__",
            "pip install --force-reinstall onnxruntime-gpu",
        ),
        (
            ("onnxruntime",),
            "1.24.4",
            "onnxruntime 1.24.4",
            "pip install 'onnxruntime>=1.25'",
        ),
        (
            ("onnxruntime-gpu",),
            "1.9.0",
            "onnxruntime-gpu 1.9.0",
            "pip install 'onnxruntime-gpu>=1.25'",  # never the other wheel beside it
        ),
    ],
)
def test_what_does_not_work(
    install: Install, wheels: tuple[str, ...], module: str | Exception | None, named: str, fix: str
) -> None:
    install(*wheels, module=module)
    state = probe("ort-cpu")
    assert not state.available and named in state.detail and state.fix == fix
    for name in ("ort-cpu", "auto"):
        with pytest.raises(BackendUnavailable) as refusal:
            create(name)
        assert refusal.value.got.startswith("Backend ort-cpu ") and refusal.value.got.endswith(f"{state.detail}.")
        assert refusal.value.fix == f"Run: {fix}"


def test_a_wheel_in_a_folder_behind_does_no_harm(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where one environment is put in front of another."""
    monkeypatch.setattr(sys, "path", ["", "/front", *sys.path, "/back"])
    install("onnxruntime", "onnxruntime-gpu", folders=("/back", "/front"))
    assert probe("ort-cpu").detail == f"onnxruntime-gpu 1.31.1, {default_threads()} threads"


def test_no_library_is_loaded_where_two_wheels_are_mixed(install: Install) -> None:
    install("onnxruntime", "onnxruntime-gpu", module=RuntimeError("it crashed"))
    assert "onnxruntime and onnxruntime-gpu" in probe("ort-cpu").detail


# ort-cpu -------------------------------------------------------------------------------------------------------------


def spec(file: str, dtype: str = "float32", *axes: int | str) -> GraphSpec:
    def tensor(name: str) -> TensorSpec:
        return TensorSpec(name=name, dtype=dtype, axes=axes or ("n",))

    return GraphSpec(file=file, inputs=(tensor("x"),), outputs=(tensor("y"),))


def bundle_of(path: Path, declared: GraphSpec) -> Any:
    """A bundle with one graph, as far as a backend uses it."""
    manifest = SimpleNamespace(precision=Precision.FP32)
    return SimpleNamespace(
        graph_file=lambda _: path, graph=lambda _: declared, manifest=manifest, unchanged=contextlib.nullcontext
    )


def write_add(path: Path, weight: TensorProto | None = None, axis: int | str = "n", op: str = "Add") -> Path:
    """y = x + w, w = 1, 2, 3, 4 if not given."""
    weight = weight or helper.make_tensor("w", TensorProto.FLOAT, [4], [1, 2, 3, 4])
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [axis]) for name in "xy")
    graph = helper.make_graph([helper.make_node(op, ["x", "w"], ["y"])], "add", [x], [y], [weight])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
    path.write_bytes(model.SerializeToString())
    return path


def external(location: str) -> TensorProto:
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[4], data_location=TensorProto.EXTERNAL)
    for key, value in (("location", location), ("offset", "0"), ("length", "16")):
        tensor.external_data.add(key=key, value=value)
    return tensor


@pytest.fixture(params=[OrtCpu, OpenVino])
def backend(request: pytest.FixtureRequest) -> Any:
    return request.param(1)


def test_results_are_written_in_place(backend: Any, tmp_path: Path) -> None:
    graph = backend.open(bundle_of(write_add(tmp_path / "add.onnx"), spec("add.onnx")), "add")
    buffer = backend.empty((3, 4), "float32")
    buffer[:] = 7
    graph.run({"x": buffer[0]}, {"y": buffer[2]})
    np.testing.assert_array_equal(buffer, [[7] * 4, [7] * 4, [8, 9, 10, 11]])
    buffer[0] = 1
    graph.run({"x": buffer[0]}, {"y": buffer[1]})  # what is bound is the memory, not a copy of it
    np.testing.assert_array_equal(buffer[1], [2, 3, 4, 5])
    graph.run({"x": buffer[0]}, {"y": buffer[0]})
    np.testing.assert_array_equal(buffer[0], [2, 3, 4, 5])


def test_arrays(backend: Any) -> None:
    stored = {"float32": "f4", "float16": "f2", "bfloat16": "u2", "int32": "i4", "int64": "i8"}
    for dtype, kind in stored.items():
        array = backend.empty((2, 0, 3), dtype)
        assert array.shape == (2, 0, 3) and array.dtype == np.dtype(kind)
    host = np.arange(6.0).reshape(2, 3)
    assert backend.upload(host) is host and backend.download(host) is host
    turned = backend.upload(host.T)
    assert turned.flags.c_contiguous and not np.shares_memory(turned, host)


def test_a_closed_graph(backend: Any, tmp_path: Path) -> None:
    graph = backend.open(bundle_of(write_add(tmp_path / "add.onnx"), spec("add.onnx")), "add")
    graph.close()
    graph.close()
    x = np.zeros(4, np.float32)
    with pytest.raises(InvalidInput, match=r"add\.onnx is closed"):
        graph.run({"x": x}, {"y": x})


def test_runs_with_other_sizes_and_other_outputs(backend: Any, tmp_path: Path) -> None:
    """Runs share a binding. A known address with another shape must be bound again, and so must other outputs."""
    infos = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n"]) for name in "xyz"]
    nodes = [helper.make_node("Add", ["x", "x"], ["y"]), helper.make_node("Mul", ["x", "x"], ["z"])]
    graph_proto = helper.make_graph(nodes, "two", infos[:1], infos[1:])
    path = tmp_path / "two.onnx"
    model = helper.make_model(graph_proto, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
    path.write_bytes(model.SerializeToString())
    tensors = {name: TensorSpec(name=name, dtype="float32", axes=("n",)) for name in "xyz"}
    declared = GraphSpec(file="two.onnx", inputs=(tensors["x"],), outputs=(tensors["y"], tensors["z"]))
    graph = backend.open(bundle_of(path, declared), "two")
    x, y, z = (backend.empty((4,), "float32") for _ in range(3))
    x[:] = [1, 2, 3, 4]
    graph.run({"x": x}, {"y": y, "z": z})
    np.testing.assert_array_equal((y, z), [[2, 4, 6, 8], [1, 4, 9, 16]])
    y[:] = z[:] = 0
    graph.run({"x": x[:2]}, {"y": y[:2], "z": z[:2]})
    np.testing.assert_array_equal((y, z), [[2, 4, 0, 0], [1, 4, 0, 0]])
    y[:] = z[:] = 0
    graph.run({"x": x[:2]}, {"z": z[:2]})
    np.testing.assert_array_equal((y, z), [[0, 0, 0, 0], [1, 4, 0, 0]])


F4, I4 = np.zeros(4, np.float32), np.zeros(4, np.int32)


BAD_BINDINGS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "input name": ({"z": F4}, {"y": F4}, r"\['z'\].*\['x'\]"),
    "output name": ({"x": F4}, {"z": F4}, r"\['z'\].*\['y'\]"),
    "no input": ({}, {"y": F4}, r"\[\].*\['x'\]"),
    "axes of one name": ({"x": F4}, {"y": F4[:3]}, r" y .*\(3,\).*{'n': 4}"),
    "rank": ({"x": F4[None]}, {"y": F4}, r" x .*\(1, 4\)"),
    "type": ({"x": I4}, {"y": F4}, r" x .*int32.*float32"),
    "strides": ({"x": F4}, {"y": np.zeros(8, np.float32)[::2]}, "contiguous"),
}


def test_bindings_that_are_not_as_declared(backend: Any, tmp_path: Path) -> None:
    """Arrays are bound by address, so each of these would access memory outside the array."""
    graph = backend.open(bundle_of(write_add(tmp_path / "add.onnx"), spec("add.onnx")), "add")
    for inputs, outputs, named in BAD_BINDINGS.values():
        with pytest.raises(InvalidInput, match=named):
            graph.run(inputs, outputs)
    fixed = backend.open(bundle_of(tmp_path / "add.onnx", spec("add.onnx", "float32", 4)), "add")
    with pytest.raises(InvalidInput, match=r" x .*\(3,\).*\(4,\)"):
        fixed.run({"x": F4[:3]}, {"y": F4[:3]})


def test_a_graph_that_is_not_what_its_declaration_says(backend: Any, tmp_path: Path) -> None:
    graph = backend.open(bundle_of(write_add(tmp_path / "add.onnx", axis=4), spec("add.onnx")), "add")
    five = np.zeros(5, np.float32)
    with pytest.raises(ArtifactRefused, match=r"(ONNX Runtime|OpenVINO) .*add\.onnx"):
        graph.run({"x": five}, {"y": five.copy()})
    for dtype in ("float16", "int32", "int64"):
        graph = backend.open(bundle_of(write_add(tmp_path / "add.onnx"), spec("add.onnx", dtype)), "add")
        x = np.zeros(4, dtype)
        with pytest.raises(ArtifactRefused, match=r"add\.onnx.*(data type|tensor precision)"):
            graph.run({"x": x}, {"y": x.copy()})


def test_files_that_are_no_model(backend: Any, tmp_path: Path) -> None:
    for content in (b"", b"no model", b"\x08\x0a\x12\x03abc", bytes(100)):
        (tmp_path / "add.onnx").write_bytes(content)
        with pytest.raises(ArtifactRefused, match=r"add\.onnx") as refusal:
            backend.open(bundle_of(tmp_path / "add.onnx", spec("add.onnx")), "add")
        assert "\n" not in str(refusal.value) and len(str(refusal.value)) < 500


def test_an_operator_that_is_not_there(backend: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = write_add(tmp_path / "add.onnx", op="NoSuchOperator")
    with pytest.raises((ArtifactRefused, BackendUnavailable), match=r"add\.onnx"):
        backend.open(bundle_of(path, spec("add.onnx")), "add")
    assert capfd.readouterr() == ("", "")  # onnxruntime does not write past our logging


def test_a_type_without_kernels_needs_another_backend(tmp_path: Path) -> None:
    """ONNX Runtime has no kernel for bfloat16 products on the CPU. OpenVINO has one."""
    x, y = (helper.make_tensor_value_info(name, TensorProto.BFLOAT16, [4, 4]) for name in "xy")
    graph = helper.make_graph([helper.make_node("MatMul", ["x", "x"], ["y"])], "square", [x], [y])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
    onnx.save(model, str(tmp_path / "square.onnx"))
    bundle = bundle_of(tmp_path / "square.onnx", spec("square.onnx", "bfloat16", 4, 4))
    with pytest.raises(BackendUnavailable, match=r"square\.onnx.*--precision fp32"):
        OrtCpu(1).open(bundle, "square")
    two, four = (np.eye(4, dtype=np.uint16) * bits for bits in (0x4000, 0x4080))  # bfloat16 as its bits
    result = np.zeros_like(two)
    OpenVino(1).open(bundle, "square").run({"x": two}, {"y": result})
    np.testing.assert_array_equal(result, four)


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("Failed to allocate memory for requested buffer")])
def test_out_of_memory_while_running(
    backend: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    graph = backend.open(bundle_of(write_add(tmp_path / "add.onnx"), spec("add.onnx")), "add")

    def fail() -> Any:
        raise error

    held = "_model" if isinstance(backend, OpenVino) else "_session"
    monkeypatch.setattr(graph, held, SimpleNamespace(io_binding=fail, create_infer_request=fail))
    with pytest.raises(OutOfMemory, match=r"add\.onnx"):
        graph.run({"x": F4}, {"y": F4.copy()})


def test_out_of_memory_while_allocating(backend: Any) -> None:
    with pytest.raises(OutOfMemory, match="float32"):
        backend.empty((2**40, 2**10), "float32")


# Weights of a graph --------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The folder of a bundle. A file beside it must not be read."""
    (tmp_path / "bundle").mkdir()
    for path in (tmp_path / "secret", tmp_path / "bundle" / "w.bin"):
        path.write_bytes(np.array([1, 2, 3, 4], np.float32).tobytes())
    return tmp_path / "bundle"


def test_weights_beside_the_graph_are_read(backend: Any, folder: Path) -> None:
    """The control of the refusals below."""
    graph: OrtGraph = backend.open(
        bundle_of(write_add(folder / "add.onnx", external("w.bin")), spec("add.onnx")), "add"
    )
    x, y = np.zeros(4, np.float32), np.zeros(4, np.float32)
    graph.run({"x": x}, {"y": y})
    np.testing.assert_array_equal(y, [1, 2, 3, 4])


def test_weights_outside_the_bundle_are_not_read(backend: Any, folder: Path) -> None:
    (folder / "link").symlink_to(folder.parent / "secret")
    (folder / "engines").mkdir()
    for location in ("../secret", "../../secret", f"{folder.parent}/secret", "engines/../../secret", "link"):
        path = write_add(folder / "add.onnx", external(location))
        with pytest.raises(ArtifactRefused, match=r"add\.onnx") as refusal:
            backend.open(bundle_of(path, spec("add.onnx")), "add")
        assert refusal.value.exit_code == 5
