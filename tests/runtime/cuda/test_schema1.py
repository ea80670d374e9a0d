"""A bundle of schema version 1, exported at commit a8c13d3, in this runtime.

Its graphs take the modulation of all blocks as one tensor, and normalise groups with InstanceNormalization.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from fake_machine import SCHEDULE as DEVICE_SCHEDULE
from fake_machine import make_machine
from host_kernels import HostKernels

from flexvar_export.parity import prove
from flexvar_export.proof import PROOF_FILE, Proof
from flexvar_runtime import Bundle, FlexVARPipeline
from flexvar_runtime.backends.ort.placement import without_cuda_kernel
from flexvar_runtime.bundle.onnx_scan import scan
from flexvar_runtime.model.signatures import CONDITION, DECODE, STEP, graph_specs

SCHEDULE = "1_2_3_5x4"


def test_it_opens_with_a_warning_and_passes_its_gates(schema1_bundle: Path, caplog: pytest.LogCaptureFixture) -> None:
    bundle = Bundle.open(schema1_bundle)
    manifest = bundle.manifest
    assert manifest.schema_version == 1 and manifest.graphs == graph_specs(manifest.model, "fp32", 1)
    assert [tensor.name for tensor in bundle.graph(CONDITION).outputs] == [
        "modulation",
        "head_modulation",
        "first_input",
    ]
    with caplog.at_level(logging.WARNING, "flexvar_runtime"):
        record = prove(bundle, Proof.load(bundle.file(PROOF_FILE)), threads=1)
    assert record.passed and all(row.holds for row in record.rows)
    assert {row.graph for row in record.rows} == {"condition", "step", "prefill", "decode", "encode"}
    assert "schema version 1" in caplog.text


def test_it_generates_and_edits(schema1_bundle: Path) -> None:
    with FlexVARPipeline.from_bundle(schema1_bundle, "ort-cpu", threads=1) as pipeline:
        whole = pipeline([1, 3], SCHEDULE, seed=7)
        alone = pipeline([3], SCHEDULE, seed=7, first_index=1)
        for both, one in zip(whole.tokens, alone.tokens, strict=True):
            np.testing.assert_array_equal(both[1:], one)
        edited = pipeline.edit(whole.images[0], "refine", labels=[2], seed=1, strength=0.5)
        assert edited.images.shape[0] == 1 and edited.tokens[-1].max() < pipeline.model.vocabulary


def test_it_runs_on_a_device(
    schema1_bundle: Path, host_kernels: Callable[..., HostKernels], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one captured generation, with the modulation of all blocks as one tensor."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    machine = make_machine(
        schema1_bundle, host_kernels, tmp_path / "engines", tmp_path / "state" / "flexvar" / "receipts"
    )
    with FlexVARPipeline.from_bundle(schema1_bundle, "ort-cpu", threads=1) as reference:
        expected = reference([3, 1], DEVICE_SCHEDULE, seed=4)
    with machine.open() as pipeline:
        for _ in range(2):
            got = pipeline([3, 1], DEVICE_SCHEDULE, seed=4)
            assert got.timings.mode == "cuda-graph"
            for scale, other in zip(got.tokens, expected.tokens, strict=True):
                np.testing.assert_array_equal(scale, other)


def test_ort_cuda_has_no_kernel_for_its_norms(schema1_bundle: Path) -> None:
    bundle = Bundle.open(schema1_bundle)
    missing = without_cuda_kernel(scan(bundle.graph_file(DECODE)))
    assert {node.operator for node in missing} == {"InstanceNormalization"}
    assert without_cuda_kernel(scan(bundle.graph_file(STEP))) == ()
