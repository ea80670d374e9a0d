"""OpenVINO: its probe, every precision, and results that equal those of the reference."""

from __future__ import annotations

import functools
import importlib
import json
import signal
import subprocess
import sys
import threading
import time
import types
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray

from flexvar_runtime import BackendUnavailable, Bundle, FlexVARPipeline, Guidance, InvalidInput, ScaleSchedule
from flexvar_runtime.backends import create, probe
from flexvar_runtime.backends.base import Graph
from flexvar_runtime.backends.openvino import backend as backend_module
from flexvar_runtime.backends.openvino.backend import DefaultSizeGraph, OpenVino, OpenVinoGraph, shared_core
from flexvar_runtime.backends.openvino.memory import BF16_ARITHMETIC, FLOAT32_ARITHMETIC
from flexvar_runtime.backends.openvino.norms import keep_layout
from flexvar_runtime.backends.ort.cpu import OrtCpu
from flexvar_runtime.generation.host import HostGenerator
from flexvar_runtime.machine.processors import default_threads
from flexvar_runtime.memory.plan import plan
from flexvar_runtime.model.precision import Precision
from flexvar_runtime.model.signatures import DECODE, GRAPHS, STEP
from flexvar_runtime.request import Shape

FLEXVAR = Path(sys.executable).with_name("flexvar")


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Pretend that importing openvino gives this version, on a processor with these capabilities, or raises."""
    real = importlib.import_module

    def pretend(version: str | Exception, *capabilities: str) -> None:
        def load(name: str, package: str | None = None) -> Any:
            if name != "openvino":
                return real(name, package)
            if isinstance(version, Exception):
                raise version
            core = types.SimpleNamespace(get_property=lambda *_: list(capabilities))
            return types.SimpleNamespace(__version__=version, Core=lambda: core)

        monkeypatch.setattr(importlib, "import_module", load)
        monkeypatch.setattr(backend_module, "shared_core", lambda: load("openvino").Core())  # the real core stays

    return pretend


def test_the_probe_says_whether_the_processor_computes_in_bfloat16(library: Callable[..., None]) -> None:
    for capabilities, arithmetic in (
        (("FP32", "INT8"), "no bf16 arithmetic"),
        (("FP32", "FP16"), "no bf16 arithmetic"),
        (("FP32", "FP16", "BF16"), "bf16 arithmetic"),
    ):
        library("2026.4.1-22982-abc", *capabilities)
        state = probe("openvino")
        assert state.available and state.detail == f"openvino 2026.4.1, {default_threads()} threads, {arithmetic}"


@pytest.mark.parametrize(
    ("version", "named", "fix"),
    [
        (ModuleNotFoundError("x"), "openvino is not installed", "pip install 'flexvar-deploy[openvino]'"),
        ("2025.4.0", "openvino 2025.4.0 is older than 2026.4", "pip install 'openvino>=2026.4'"),
        (
            ImportError("libopenvino.so: cannot open\nmore"),
            "libopenvino.so: cannot open)",
            "pip install --force-reinstall openvino",
        ),
    ],
)
def test_what_does_not_work(
    library: Callable[..., None], version: str | Exception, named: str, fix: str, schema1_bundle: Path
) -> None:
    library(version)
    state = probe("openvino")
    assert not state.available and state.detail.endswith(named) and state.fix == fix
    with pytest.raises(BackendUnavailable, match="openvino") as refusal:
        FlexVARPipeline.from_bundle(schema1_bundle, backend="openvino")
    assert refusal.value.exit_code == 4 and refusal.value.fix == f"Run: {fix}"


def test_auto_takes_it_for_precisions_that_onnx_runtime_cannot_run() -> None:
    expected = {Precision.FP32: "ort-cpu", Precision.FP16: "ort-cpu", Precision.BF16: "openvino"}
    for precision, name in expected.items():
        bundle: Any = types.SimpleNamespace(manifest=types.SimpleNamespace(precision=precision))
        assert create("auto", bundle).name == name


SIGNALLED = """
import gc, signal, sys
from flexvar_runtime import Bundle
from flexvar_runtime.backends.openvino.backend import OpenVino

bundle, handled = Bundle.open(sys.argv[1]), []
signal.signal(signal.SIGUSR1, lambda *_: handled.append(True))  # uses the stack of signal handlers
graphs = []
for _ in range(3):
    backend = OpenVino(1)
    graphs.append(backend.open(bundle, "decode"))
del backend
while graphs:
    graphs.pop(0).close()  # in the order in which they were opened
    gc.collect()
    signal.raise_signal(signal.SIGUSR1)
assert len(handled) == 3
"""


@pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="the system has no SIGUSR1")
def test_signals_are_handled_after_backends_were_freed(tiny_bundle: Path) -> None:
    """With one core per backend the stack of signal handlers would be freed, and the process would end with SIGSEGV."""
    ended = subprocess.run([sys.executable, "-c", SIGNALLED, tiny_bundle], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, (ended.returncode, ended.stderr)


def test_threads_share_one_core(monkeypatch: pytest.MonkeyPatch) -> None:
    made, start = [], threading.Barrier(4)

    class SlowCore:
        def __init__(self) -> None:
            made.append(self)
            time.sleep(0.05)

    def ask(_: int) -> Any:
        start.wait()
        return backend_module.shared_core()

    backend_module.shared_core()  # makes the real core, which stays
    monkeypatch.setattr(backend_module, "_core", functools.cache(SlowCore))
    with ThreadPoolExecutor(4) as pool:
        cores = list(pool.map(ask, range(4)))
    assert len(made) == 1 and all(core is made[0] for core in cores)


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_the_first_call_of_a_fresh_process_passes_the_gates(
    tiny_bundles: Callable[[str], Path], precision: str
) -> None:
    command = [FLEXVAR, "verify", tiny_bundles(precision), "--backend", "openvino", "--threads", "1", "--json"]
    ended = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    record = json.loads(ended.stdout)["parity"]
    assert record["passed"] is True and record["backend"] == "openvino" and record["emulated"] is False
    assert {row["graph"] for row in record["rows"]} == {"condition", "step", "prefill", "decode", "encode"}


def test_calls_of_any_size_in_any_order(tiny_bundle: Path) -> None:
    """With and without past tokens. OpenVINO computes garbage after a first run without them."""
    bundle, random = Bundle.open(tiny_bundle), np.random.default_rng(0)
    spec, graphs = bundle.graph(STEP), [backend.open(bundle, STEP) for backend in (OpenVino(1), OrtCpu(1))]
    for past in (0, 1, 0, 5, 30, 0, 7, 2, 0, 14):
        B, L = int(random.integers(1, 4)), int(random.integers(1, 30))
        sizes = {"sequences": 2 * B, "images": B, "new": L, "past": past}
        shapes = {t.name: tuple(sizes[a] if isinstance(a, str) else a for a in t.axes) for t in spec.inputs}
        inputs: dict[str, Any] = {name: random.standard_normal(shape, np.float32) for name, shape in shapes.items()}
        inputs |= {"cond_rows": np.arange(B, dtype=np.int32), "uncond_rows": np.arange(B, 2 * B, dtype=np.int32)}
        results = []
        for graph in graphs:
            outputs = {
                t.name: np.full([sizes[a] if isinstance(a, str) else a for a in t.axes], np.nan, np.float32)
                for t in spec.outputs
            }
            graph.run(inputs, outputs)
            results.append(outputs)
        for name, expected in results[1].items():
            error = np.linalg.norm(results[0][name] - expected) / np.linalg.norm(expected)
            assert error < 1e-5, (past, L, B, name)


def test_the_same_tokens_as_onnx_runtime(tiny_bundle: Path) -> None:
    """In float32 the two differ too little to change a token here, guided or not, alone or in a batch."""
    made = {}
    for name in ("ort-cpu", "openvino"):
        with FlexVARPipeline.from_bundle(tiny_bundle, backend=name, threads=1) as pipe:
            made[name] = [
                pipe([1, 2], "1_2_3_4", seed=5),
                pipe([3], "1_2_3x5", Guidance(0.0), seed=6),
                pipe([2], "1_2_3_4", seed=5, first_index=1),
            ]
    for ours, theirs in zip(made["openvino"], made["ort-cpu"], strict=True):
        for tokens, expected in zip(ours.tokens, theirs.tokens, strict=True):
            np.testing.assert_array_equal(tokens, expected)
        assert np.abs(ours.images.astype(int) - theirs.images).max() <= 1


def test_outputs_that_are_not_wanted_are_not_written(tiny_bundle: Path) -> None:
    """A run must not write into arrays that an earlier run had bound."""
    bundle = Bundle.open(tiny_bundle)
    spec, graph = bundle.graph("condition"), OpenVino(1).open(bundle, "condition")
    every = {
        t.name: np.full([2 if isinstance(a, str) else a for a in t.axes], np.nan, np.float32) for t in spec.outputs
    }
    graph.run({"labels": np.array([1, 2], np.int32)}, every)
    kept = {name: array.copy() for name, array in every.items()}
    some = {"first_input": np.empty((3, *every["first_input"].shape[1:]), np.float32)}
    graph.run({"labels": np.array([3, 2, 1], np.int32)}, some)
    np.testing.assert_allclose(some["first_input"][[2, 1]], kept["first_input"], rtol=1e-6)
    for name, array in every.items():
        np.testing.assert_array_equal(array, kept[name])


# The default size of the decoder in bfloat16 -------------------------------------------------------------------------


def decoded(graph: Graph, tokens: NDArray[np.int32]) -> NDArray[np.float32]:
    sizes = dict(zip(("images", "height", "width"), tokens.shape, strict=True))
    image = np.full(graph.spec.outputs[0].shape(sizes), np.nan, np.float32)
    graph.run({"tokens": tokens}, {"image": image})
    return image


def relative_error(got: NDArray[Any], expected: NDArray[Any]) -> float:
    return float(np.linalg.norm(got - expected) / np.linalg.norm(expected))


@pytest.fixture
def half(tiny_bundles: Callable[[str], Path]) -> Bundle:
    return Bundle.open(tiny_bundles("bf16"))


def tokens_of(bundle: Bundle, images: int) -> NDArray[np.int32]:
    """Tokens of the default size."""
    h, w = ScaleSchedule.parse(bundle.manifest.defaults.schedule)[-1]
    return np.random.default_rng(0).integers(0, bundle.manifest.model.vocabulary, (images, h, w), np.int32)


def test_the_default_size_has_its_own_model(half: Bundle) -> None:
    """It differs from the other by bfloat16 rounding only. Images are the same alone, in a batch, first or last."""
    tokens, backend = tokens_of(half, 3), OpenVino(1)
    graph = backend.open(half, DECODE)
    assert isinstance(graph, DefaultSizeGraph)
    batch = decoded(graph, tokens)
    other = decoded(graph, tokens[:2, :3, :5].copy())
    assert np.isfinite(batch).all() and np.isfinite(other).all()
    for i in range(3):
        np.testing.assert_array_equal(decoded(graph, tokens[i : i + 1]), batch[i : i + 1])
    later = backend.open(half, DECODE)
    np.testing.assert_array_equal(decoded(later, tokens[:2, :3, :5].copy()), other)
    np.testing.assert_array_equal(decoded(later, tokens), batch)
    plain = OpenVinoGraph(
        shared_core().compile_model(str(half.graph_file(DECODE)), "CPU", {"INFERENCE_PRECISION_HINT": "f32"}),
        "decode.onnx",
        half.graph(DECODE),
    )
    assert set(graph._graphs) == {True, False}
    assert 0 < relative_error(batch, decoded(plain, tokens)) < 0.03
    assert relative_error(batch, decoded(plain, tokens_of(half, 3)[::-1].copy())) > 0.1


def test_only_a_compiled_model_holds_weights(half: Bundle) -> None:
    """So a memory plan counts the weights of a model that is not compiled yet."""
    tokens, graph = tokens_of(half, 1), OpenVino(1).open(half, DECODE)
    default = half.manifest.defaults.size
    assert not graph.holds(default) and not graph.holds((3, 5))
    decoded(graph, tokens)
    assert graph.holds(default) and not graph.holds((3, 5))
    with FlexVARPipeline.from_bundle(half.path, backend="openvino", threads=1) as pipe:
        pipe([1], seed=0)
        assert DECODE in pipe.generator.opened(default) and DECODE not in pipe.generator.opened((3, 5))


@pytest.mark.parametrize("arithmetic", [False, True])
def test_plans_know_what_the_processor_computes_in(
    half: Bundle, arithmetic: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    schedule = ScaleSchedule.parse("1_2_3x5")
    with FlexVARPipeline.from_bundle(half.path, backend="openvino", threads=1) as pipe:
        generator, planned = cast(HostGenerator, pipe.generator), []
        for kind in (arithmetic, not arithmetic):
            monkeypatch.setattr("flexvar_runtime.backends.openvino.backend.has_bf16_arithmetic", lambda k=kind: k)
            planned.append(generator.memory_plan(Shape(schedule, 2, True)))
    same, other = (
        plan(half.manifest, schedule, 2, True, dict.fromkeys(GRAPHS, library), decoded_at_once=1)
        for library in (BF16_ARITHMETIC, FLOAT32_ARITHMETIC)[:: 1 if arithmetic else -1]
    )
    assert planned == [same, other] and same != other


def test_the_decoder_in_float32_has_one_model(tiny_bundle: Path) -> None:
    assert isinstance(OpenVino(1).open(Bundle.open(tiny_bundle), DECODE), OpenVinoGraph)


def test_a_closed_graph_of_two_models_is_refused(half: Bundle) -> None:
    graph = OpenVino(1).open(half, DECODE)
    graph.close()
    with pytest.raises(InvalidInput, match=r"decode\.onnx is closed"):
        decoded(graph, tokens_of(half, 1))


# Normalisations ------------------------------------------------------------------------------------------------------


def test_normalisations_keep_the_layout(schema1_bundle: Path) -> None:
    """In a bundle with instance normalisations all are rewritten, and the image changes by float32 rounding only."""
    bundle, worst = Bundle.open(schema1_bundle), 1e-4
    core, tokens, images = shared_core(), tokens_of(bundle, 2), []
    for rewrite in (False, True):
        model = core.read_model(str(bundle.graph_file(DECODE)))
        model.reshape(list(tokens.shape))
        norms = sum(node.get_type_name() == "MVN" for node in model.get_ops())
        if rewrite:
            assert keep_layout(model) == norms > 5
            assert not any(node.get_type_name() == "MVN" for node in model.get_ops())
        compiled = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        images.append(decoded(OpenVinoGraph(compiled, "decode.onnx", bundle.graph(DECODE)), tokens))
    assert 0 < relative_error(images[1], images[0]) < worst


@pytest.mark.parametrize(
    ("grouped", "gain", "bias", "back", "rewritten"),
    [
        ((1, 2, -1), 1.0, 0.0, (1, 6, 4, 5), 1),  # a group normalisation
        ((1, 2, -1), 1.0, 0.0, (1, 6, 5, 4), 0),
        ((1, 2, -1), 2.0, 0.0, (1, 6, 4, 5), 0),
        ((1, 2, -1), 1.0, 0.5, (1, 6, 4, 5), 0),
        ((3, 2, -1), 1.0, 0.0, (1, 6, 4, 5), 0),
        ((1, 4, -1), 1.0, 0.0, (1, 6, 4, 5), 0),
    ],
)
def test_other_normalisations_are_left_alone(
    tmp_path: Path, grouped: tuple[int, ...], gain: float, bias: float, back: tuple[int, ...], rewritten: int
) -> None:
    """A rewrite would lose a gain or bias of the groups, and mix up groups that are not whole channels."""
    info, node = onnx.helper.make_tensor_value_info, onnx.helper.make_node
    groups = grouped[1]
    constants = {"gain": np.full(groups, gain, np.float32), "bias": np.full(groups, bias, np.float32)}
    constants |= {"grouped": np.array(grouped), "back": np.array(back)}
    graph = onnx.helper.make_graph(
        [
            node("Reshape", ["x", "grouped"], ["g"]),
            node("InstanceNormalization", ["g", "gain", "bias"], ["n"]),
            node("Reshape", ["n", "back"], ["y"]),
        ],
        "norm",
        [info("x", onnx.TensorProto.FLOAT, [1, 6, 4, 5])],
        [info("y", onnx.TensorProto.FLOAT, back)],
        [onnx.numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)]), tmp_path / "norm.onnx")
    x, results, core = np.random.default_rng(0).normal(1.0, 2.0, (1, 6, 4, 5)).astype(np.float32), [], shared_core()
    for rewrite in (False, True):
        model = core.read_model(str(tmp_path / "norm.onnx"))
        if rewrite:
            assert keep_layout(model) == rewritten
        compiled = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        results.append(next(iter(compiled(x).values())).copy())
    np.testing.assert_allclose(results[1], results[0], atol=1e-5)
