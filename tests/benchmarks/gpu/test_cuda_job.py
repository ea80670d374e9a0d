"""The jobs that measure the backend `cuda`, as a rehearsal runs them: on an emulated device, with fake libraries."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fake_cudnn import FakeCudnn
from fakes import FakeDevice

from flexvar_bench.gpu import emulated, runtime_jobs
from flexvar_bench.gpu.child import JOBS
from flexvar_bench.gpu.files import ModelFiles
from flexvar_bench.timing import Budget
from flexvar_export.proof import Proof
from flexvar_runtime.backends.cuda import backend
from flexvar_runtime.errors import EnvironmentFailed

BUDGET = {"warmup": 0, "least": 1, "most": 1}
Saved = list[dict[str, Any]]


@pytest.fixture
def work(
    device: FakeDevice,
    tiny_bundles: Callable[[str], Path],
    proof: Proof,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Path:
    """The folder of a run, with the tiny model in bfloat16 in a folder of its own."""
    for folder, precision in (("", "fp16"), ("tiny-bf16", "bf16")):
        (tmp_path / folder).mkdir(exist_ok=True)
        files = ModelFiles.of(tmp_path / folder, "tiny")
        shutil.copytree(tiny_bundles(precision), files.bundle)
        proof.save(files.proof)
    for name in ("probe", "create"):  # they are replaced, and come back after the test
        monkeypatch.setattr(backend, name, getattr(backend, name))
    emulated.emulate_cuda(lambda: device)
    monkeypatch.setattr(runtime_jobs, "NEW_CLASSES", Budget(warmup=0, least=1, most=1))
    return tmp_path


@pytest.mark.kernels
def test_a_run_has_times_of_its_parts(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the decoder took one image at a time. Every call takes a quarter of a second on the device."""
    monkeypatch.setattr(runtime_jobs, "IMAGES_PER_RUN", 1)
    saved: Saved = []
    JOBS["run"](work, saved.append, model="tiny", backend="cuda", batches=[1, 2], budget=BUDGET)
    found = saved[-1]
    assert (found["backend"], found["precision"], found["device"]) == ("cuda", "fp16", "emulated GPU")
    parity = found["parity"]
    assert parity["passed"] and parity["again_equal"] == parity["scale_by_scale_equal"] == 1
    assert [row["mode"] for row in found["rows"]] == [["cuda-graph"]] * 2
    one, two = found["parts"]
    assert one == {"batch": 1, "decoder_s": 0.25, "transformer_and_sampling_s": 0.0}
    assert two == {"batch": 2, "decoder_s": 0.5, "transformer_and_sampling_s": -0.25}
    assert found["substituted"] == [] and len(found["scales"]["step_s"]) == 5


@pytest.mark.kernels
def test_the_tiny_model_in_another_precision(work: Path) -> None:
    saved: Saved = []
    JOBS["tiny"](work, saved.append, backend="cuda", folder="tiny-bf16")
    found = saved[-1]
    assert found["precision"] == "bf16" and found["parity"]["passed"]
    assert found["mode"] == ["cuda-graph"] * 2 and found["substituted"] == []
    assert "not measured: " in found["tokens_equal_to_ort_cpu"], "ort-cpu does not run bfloat16"


@pytest.mark.kernels
def test_convolutions_without_a_plan_are_listed(
    work: Path, device: FakeDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    create = backend.create

    def without_plans(name: str, **options: Any) -> Any:
        made: Any = create(name, **options)
        made.convolutions._cudnn = FakeCudnn(device, plans=set())
        made.convolutions._handle = made.convolutions._cudnn.create_handle()
        return made

    monkeypatch.setattr(backend, "create", without_plans)
    saved: Saved = []
    JOBS["tiny"](work, saved.append, backend="cuda")
    assert saved[-1]["parity"]["passed"], "im2col takes their place"
    assert "weight (32, 3, 3, 32)" in " ".join(saved[-1]["substituted"])


def test_a_checkout_without_tests_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(emulated, "FAKES", (tmp_path / "nowhere",))
    with pytest.raises(EnvironmentFailed, match="nowhere"):
        emulated.emulated_gpu(tmp_path)
