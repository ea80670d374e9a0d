"""int8-bf16 on ort-openvino: the transformer of the int8 bundle and the tokenizer of the bf16 bundle."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from flexvar_export.bundle import export_bundle
from flexvar_export.parity import GATES, prove
from flexvar_export.proof import Proof
from flexvar_runtime import Bundle, FlexVARPipeline
from flexvar_runtime.backends import BACKENDS, create, libraries, ort_openvino, probe
from flexvar_runtime.backends.base import Availability
from flexvar_runtime.backends.openvino import backend as openvino
from flexvar_runtime.backends.ort import cpu as ort_cpu
from flexvar_runtime.errors import BackendUnavailable
from flexvar_runtime.memory.plan import PYTHON, MemoryPlan, plan
from flexvar_runtime.model.precision import Precision
from flexvar_runtime.model.schedule import ScaleSchedule
from flexvar_runtime.model.signatures import CONDITION, DECODE, ENCODE, GRAPHS, STEP

pytest.importorskip("openvino")
MIXED = Precision.INT8_BF16
SCHEDULE = "1_2_3"


@pytest.fixture(scope="module")
def mixed(tiny_bundles: Callable[[str], Path]) -> Bundle:
    return Bundle.open(tiny_bundles(MIXED))


@pytest.mark.parametrize("graph", GRAPHS)
def test_every_graph_is_that_of_a_bundle_in_its_precision(
    mixed: Bundle,
    tiny_bundles: Callable[[str], Path],
    quick_export: None,
    tiny_checkpoint: tuple[Path, Path],
    tmp_path: Path,
    graph: str,
) -> None:
    precision = MIXED.of(graph)
    assert precision == ("bf16" if graph in (DECODE, ENCODE) else "int8")
    other = Bundle.open(tiny_bundles(precision))
    if graph == DECODE:  # of which a bf16 bundle has another form where it is not asked for this one
        assert (mixed.manifest.decoder, other.manifest.decoder) == ("transposed", "phases")
        other = export_bundle(*tiny_checkpoint, tmp_path / "bf16", precision="bf16", decoder="transposed")
    own = {name: record for name, record in mixed.manifest.files.items() if name.startswith(f"{graph}.onnx")}
    assert own and own == {name: other.manifest.files[name] for name in own}


def test_its_proof_emulates_the_tokenizer(mixed: Bundle) -> None:
    parity = mixed.manifest.parity
    assert parity.passed and parity.emulated and parity.backend == "ort-cpu"
    bounds = {row.graph: row.bound for row in parity.rows}
    for graph, precision in ((CONDITION, "int8"), (STEP, "int8"), (ENCODE, "bf16")):
        assert bounds[graph] == GATES[precision].error(graph)
    assert bounds[DECODE] == GATES["bf16"].psnr


def test_parity_on_both_libraries(mixed: Bundle, tiny_proof: Proof) -> None:
    record = prove(mixed, tiny_proof, "ort-openvino", threads=1)
    assert record.passed and not record.emulated and {row.graph for row in record.rows} == set(GRAPHS)
    image = next(row for row in record.rows if row.graph == DECODE)
    assert image.holds and image.value < 80  # as bfloat16 is: the float32 decoder reaches more


def test_tokens_are_those_of_the_int8_bundle(mixed: Bundle, tiny_bundles: Callable[[str], Path]) -> None:
    outputs = []
    for bundle, backend in ((mixed.path, "ort-openvino"), (tiny_bundles("int8"), "ort-cpu")):
        with FlexVARPipeline.from_bundle(bundle, backend=backend, threads=1) as pipe:
            outputs.append(pipe([3, 7], SCHEDULE, seed=5))
    for own, other in zip(*(output.tokens for output in outputs), strict=True):
        np.testing.assert_array_equal(own, other)
    own, other = (output.images.astype(int) for output in outputs)
    assert 0 < np.abs(own - other).max() <= 16


def test_auto_takes_the_backend_that_runs_it(mixed: Bundle) -> None:
    assert create("auto", mixed).name == "ort-openvino"


@pytest.mark.parametrize("backend", ["ort-cpu", "openvino"])
def test_backends_with_one_library_refuse_it(mixed: Bundle, backend: str) -> None:
    with pytest.raises(BackendUnavailable, match=f"{backend} .*int8-bf16.*ort-openvino"):
        FlexVARPipeline.from_bundle(mixed.path, backend=backend)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
def test_ort_openvino_refuses_other_precisions(tiny_bundles: Callable[[str], Path], precision: str) -> None:
    with pytest.raises(BackendUnavailable, match=f"ort-openvino .*{precision}"):
        FlexVARPipeline.from_bundle(tiny_bundles(precision), backend="ort-openvino")


@pytest.mark.parametrize("missing", [ort_cpu, openvino])
def test_a_missing_library_is_reported(missing: object, monkeypatch: pytest.MonkeyPatch) -> None:
    assert probe("ort-openvino").available and "ort-openvino" in BACKENDS
    absent = Availability(False, "it is not installed", "install it")
    monkeypatch.setattr(missing, "probe", lambda name: absent)
    assert ort_openvino.probe("ort-openvino") == absent


def test_memory_is_planned_for_each_library(mixed: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flexvar_runtime.backends.openvino.backend.has_bf16_arithmetic", lambda: False)
    schedule = ScaleSchedule.parse(SCHEDULE)
    plans = {
        name: plan(mixed.manifest, schedule, 1, True, libraries(name, mixed.manifest.precision))
        for name in ("ort-cpu", "openvino", "ort-openvino")
    }
    both = plans["ort-openvino"]
    assert both.weights[STEP] == plans["ort-cpu"].weights[STEP] and both.scratch[STEP] == plans["ort-cpu"].scratch[STEP]
    assert both.weights[DECODE] == plans["openvino"].weights[DECODE]
    assert both.runtime == plans["openvino"].runtime + plans["ort-cpu"].runtime - PYTHON and both.kept == frozenset()


def test_memory_on_a_processor_with_bf16_arithmetic(mixed: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tokenizer takes less. Images of the default size are decoded one by one."""
    usual = ScaleSchedule.parse(mixed.manifest.defaults.schedule)

    def planned(schedule: ScaleSchedule, images: int, arithmetic: bool) -> MemoryPlan:
        monkeypatch.setattr("flexvar_runtime.backends.openvino.backend.has_bf16_arithmetic", lambda: arithmetic)
        return plan(mixed.manifest, schedule, images, True, libraries("ort-openvino", mixed.manifest.precision))

    widened, native = planned(usual, 4, False), planned(usual, 4, True)
    assert native.weights[DECODE] < widened.weights[DECODE] / 2
    assert native.scratch[DECODE] < widened.scratch[DECODE] / 2
    assert native.weights[STEP] == widened.weights[STEP] and native.scratch[STEP] == widened.scratch[STEP]
    assert native.scratch[DECODE] == planned(usual, 1, True).scratch[DECODE]
    other = ScaleSchedule.parse("1_2_3x5")
    assert planned(other, 4, True).scratch[DECODE] == 4 * planned(other, 1, True).scratch[DECODE]
