"""The job that runs torch modules behind the runtime on a GPU, here on a device that computes on the host."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from fakes import FakeDevice, FakeReplay
from host_kernels import HostKernels

from flexvar_bench.gpu import runtime_jobs, torch_proof
from flexvar_bench.gpu.child import JOBS
from flexvar_bench.gpu.files import ModelFiles
from flexvar_bench.timing import Budget
from flexvar_export.proof import Proof
from flexvar_runtime.cuda.compilation import KernelSet

Saved = list[dict[str, Any]]


@dataclass
class CountingFake(FakeDevice):
    """As `torch_proof.CountingDevice`."""

    captures: int = 0

    def capture(self, enqueue: Callable[[], None]) -> FakeReplay:
        self.captures += 1
        return super().capture(enqueue)


@pytest.fixture
def job(
    kernels: Callable[[KernelSet], HostKernels],
    tiny_bundle: Path,
    proof: Proof,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[[Saved], None]:
    """Runs the job on an emulated device. The list takes what it saves."""
    files = ModelFiles.of(tmp_path, "tiny")
    shutil.copytree(tiny_bundle, files.bundle)
    proof.save(files.proof)

    def start_device() -> CountingFake:
        device = CountingFake(kernels)
        device.activate()
        return device

    monkeypatch.setattr(torch_proof, "start_device", start_device)
    monkeypatch.setattr(runtime_jobs, "NEW_CLASSES", Budget(warmup=0, least=1, most=1))
    monkeypatch.setattr(runtime_jobs, "GROWTH_WARM_UP", 1)
    budget = {"warmup": 1, "least": 1, "most": 1}
    options: dict[str, Any] = {"model": "tiny", "batches": [1, 2], "generations": 2, "seeds": [0, 1], "budget": budget}

    def run(saved: Saved) -> None:
        def save(result: dict[str, Any]) -> None:
            saved.append(copy.deepcopy(result))

        JOBS["proof"](tmp_path, save, **options)

    return run


def test_the_job_saves_part_by_part(job: Callable[[Saved], None]) -> None:
    saved: Saved = []
    job(saved)
    found = saved[-1]
    assert (found["backend"], found["precision"], found["failed"]) == ("torch-modules", "fp32", {})
    assert found["parity"]["passed"]
    assert found["replays"]["holds"] and found["replays"]["captures"] == 1
    assert len(found["replays"]["requests"]) == 4
    assert [(row["batch"], row["mode"]) for row in found["rows"]] == [(1, ["cuda-graph"]), (2, ["cuda-graph"])]
    assert found["growth"]["generations"] == 2 and found["growth"]["device_grown_bytes"] == 0
    added = [{"parity", "replays", "growth"} & set(result) for result in saved]
    assert [len(parts) for parts in added[:5]] == [0, 1, 2, 2, 2] and len(added[-1]) == 3
    assert [len(result["rows"]) for result in saved[:5]] == [0, 0, 0, 1, 2]


def test_a_part_that_fails_is_recorded_and_the_others_run(
    job: Callable[[Saved], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise ValueError("no proof here")

    monkeypatch.setattr(torch_proof, "load_proof", fail)
    monkeypatch.setattr(torch_proof, "GUIDANCE_SCALES", (2.5,))
    saved: Saved = []
    with pytest.raises(RuntimeError, match="parity"):
        job(saved)
    found = saved[-1]
    assert found["failed"] == {"parity": "ValueError: no proof here"}
    assert found["replays"]["holds"] and len(found["rows"]) == 2 and "growth" in found
