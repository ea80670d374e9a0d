"""The whole command on a machine without a GPU, from a copy of the checkout; what it reports; runs merged."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from flexvar_bench import gpu_check, gpu_report
from flexvar_bench.gpu_models import ModelFiles, default_guidance, random_model, schedule_of
from flexvar_bench.gpu_report import AS_PUBLISHED, merge, rows
from flexvar_bench.gpu_runs import growth
from flexvar_export.proof import make_proof
from flexvar_runtime import ArtifactRefused

ROOT = Path(gpu_check.__file__).resolve().parent.parent
VERSION = "0.0.copied"


@pytest.fixture(scope="session")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Our folders, and nothing of them installed under this version."""
    root = tmp_path_factory.mktemp("checkout")
    for folder in gpu_check.PACKAGES.values():
        shutil.copytree(ROOT / folder, root / folder, ignore=shutil.ignore_patterns("__pycache__"))
    (root / "runtime" / "_version.py").write_text(f'__version__ = "{VERSION}"\n')
    return root


@pytest.fixture(scope="session")
def work(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model exported, as an earlier run leaves it."""
    folder = tmp_path_factory.mktemp("work")
    files = ModelFiles.of(folder, "tiny")
    shutil.copytree(tiny_bundle, files.bundle)
    make_proof(*random_model("tiny"), schedule_of("tiny"), default_guidance()).save(files.proof)
    return folder


def run(checkout: Path, out: Path, *options: str) -> tuple[dict[str, Any], list[str]]:
    """The result file, and the lines printed."""
    command = [sys.executable, str(checkout / "benchmarks" / "gpu_check.py"), "--out", str(out), "--tiny", *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads((out / gpu_check.RESULT).read_text())
    return result, done.stdout.splitlines()


def check_facts(result: dict[str, Any], printed: list[str]) -> None:
    assert {
        "schema",
        "created",
        "options",
        "version",
        "source_sha256",
        "model",
        "gpu",
        "goals",
        "rows",
        "phases",
    } <= set(result)
    assert (result["version"], result["gpu"]) == (VERSION, None)
    machine = result["phases"]["machine"]
    assert machine["result"]["versions"]["flexvar-deploy"] == VERSION, "the children ran the copy too"
    assert machine["result"]["rates"] == {"reason": "not measured: torch sees no GPU"}
    last = json.loads(printed[-1])
    assert {"gpu", "minutes", "done", "goals", "wall_ms"} <= set(last)


def check_run(result: dict[str, Any]) -> None:
    found = result["phases"]["run ort-cpu tiny"]["result"]
    assert found["parity"]["passed"] and found["parity"]["teacher_forced_tokens"]["holds"]
    assert found["parity"]["scale_by_scale_equal"] == found["parity"]["again_equal"] == 1
    assert len(found["scales"]["step_s"]) == len(schedule_of("tiny"))
    for row in found["rows"]:
        assert {"batch", "warmup", "samples", "decoder_included", "wall_s", "device_s", "mode"} <= set(row)
        assert row["device_s"] is None and row["mode"] == ["steps"], "a time of the processor, and it says so"
        assert row["wall_s"]["p10"] <= row["wall_s"]["median"] <= row["wall_s"]["p90"]
    ours = [row for row in result["rows"] if row["side"] == "ort-cpu"]
    assert [(row["batch"], row["device"], row["share_of_limit"]) for row in ours] == [
        (1, "cpu", None),
        (2, "cpu", None),
    ]


def test_parts_of_a_run(checkout: Path, work: Path, tmp_path: Path) -> None:
    result, printed = run(
        checkout, tmp_path, "--backends", "ort-cpu,tensorrt", "--work", str(work), "--minutes", "3", "--only", "run"
    )
    check_facts(result, printed)
    check_run(result)
    phases = result["phases"]
    assert phases["export tiny"]["result"]["reason"] == "there from an earlier run"
    tensorrt = phases["tiny tensorrt"]
    assert tensorrt["status"] == "failed" and "backend tensorrt: tensorrt is not installed" in tensorrt["reason"]
    assert tensorrt["result"]["probe"]["available"] is False
    assert phases["run tensorrt tiny"]["reason"].startswith("not measured: it needs 'build tensorrt tiny'")
    jobs = {"tiny ort-cpu", "tiny tensorrt", "build tensorrt tiny", "run ort-cpu tiny", "run tensorrt tiny"}
    assert set(phases) == {"machine", "export tiny"} | jobs


def test_growth_of_memory(work: Path) -> None:
    saved: list[dict[str, Any]] = []
    growth(work, "tiny", "ort-cpu", 20, saved.append)
    assert [sample["generations"] for sample in saved[-1]["samples"]] == list(range(0, 21, 2))
    assert saved[-1]["resident_grown_bytes_second_half"] is not None and saved[-1]["device_grown_bytes"] is None
    assert len(saved) > 5, "told on the way"


def test_no_time_at_all(checkout: Path, work: Path, tmp_path: Path) -> None:
    result, _ = run(checkout, tmp_path, "--backends", "ort-cpu", "--work", str(work), "--minutes", "0.11")
    states = {name: record["status"] for name, record in result["phases"].items()}
    assert set(states.values()) <= {"not measured", "stopped"}
    assert result["phases"]["reference tiny"]["reason"].startswith("not measured: ")
    assert result["minutes_taken"] < 0.25
    assert all(goal["held"] is None for goal in result["goals"]), "nothing is guessed"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--only", "profil"], "gpu_check: got phase 'profil'; expected one of "),
        (["--backends", "cuda"], "gpu_check: got backend 'cuda'; expected "),
    ],
)
def test_refusals(options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_check.main(["--out", str(tmp_path / "out"), *options]) == 2
    assert capsys.readouterr().err.startswith(message)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_whole_run(checkout: Path, tmp_path: Path) -> None:
    """Export included; every phase that needs no GPU."""
    result, printed = run(checkout, tmp_path, "--backends", "ort-cpu", "--minutes", "4.5")
    check_facts(result, printed)
    check_run(result)
    done = {name for name, record in result["phases"].items() if record["status"] == "done"}
    assert set(result["phases"]) - done == {"kernels"}
    assert "driver" in result["phases"]["kernels"]["reason"] or "cuda" in result["phases"]["kernels"]["reason"]
    assert result["phases"]["export tiny"]["result"]["attention_nodes"]["step"] == 2, "one node a block"
    sides = {row["side"] for row in result["rows"]}
    variants = {AS_PUBLISHED, "flexvar_ref resident-bf16", "torch.compile dynamic", "torch.compile exact"}
    assert sides == {"ort-cpu"} | variants
    assert result["phases"]["compiled tiny"]["result"]["relative_error"] < 1e-5, "float32 on a processor"
    assert result["phases"]["tiny ort-cpu"]["result"]["tokens_equal_to_ort_cpu"] == [1, 1]


# What a run on a GPU says ---------------------------------------------------------------------------------------------


def record(result: Mapping[str, Any] | None, status: str = "done") -> dict[str, Any]:
    reason = None if status == "done" else "got /opt/a-b/c.1/file.so, 3/4 of it"
    return {"status": status, "reason": reason, "stderr": "words", "seconds": 1, "result": result}


def timed(batch: int, milliseconds: float, **more: Any) -> dict[str, Any]:
    seconds = {"median": milliseconds / 1e3}
    row = {"batch": batch, "wall_s": seconds, "device_s": seconds, "images_per_second": 1e3 * batch / milliseconds}
    return row | {"decoder_included": True, "warmup": 3, "samples": 9, "device_memory_bytes": {"peak": 1}} | more


@pytest.fixture
def on_gpu() -> dict[str, Any]:
    """Records of a run with one backend that works and one that does not."""
    common = {"model": "d16", "schedule": "1_2_3_4_5_6_8_10_13_16", "device": "NVIDIA H200"}
    parity = {"passed": True, "teacher_forced_tokens": {"holds": True}}
    rates = {"copy_bytes_per_second": 4.3e12, "gemm_flops_per_second": 790e12}
    ours = common | {"backend": "ort-cuda", "precision": "fp16", "parity": parity}
    large = {"batch": 64, "reason": "not measured: no memory"}
    return {
        "machine": record({"torch": {"gpu": "NVIDIA H200"}, "rates": rates}),
        "tiny tensorrt-rtx": record({"probe": {"available": False}}, "failed"),
        "run ort-cuda d16": record(ours | {"rows": [timed(1, 5, mode=["cuda-graph"]), large]}),
        "profile ort-cuda d16": record(ours | {"rows": [{"classes": {"sampling": {"share": 0.03}}}]}),
        "growth ort-cuda d16": record(ours | {"resident_grown_bytes_second_half": 0, "device_grown_bytes": 2**30}),
        "reference d16": record(common | {"rows": [timed(1, 50, variant="autocast-fp16")]}),
        "compiled d16": record(
            common | {"precision": "float16", "rows": [timed(1, 9, shapes="dynamic"), timed(1, 6, shapes="exact")]},
            "stopped",
        ),
        "run ort-cuda d20": record(None, "not measured"),
    }


def test_goals(on_gpu: dict[str, Any]) -> None:
    flat = rows(on_gpu)
    assert [row["side"] for row in flat] == ["ort-cuda", AS_PUBLISHED, "torch.compile dynamic", "torch.compile exact"]
    assert flat[0]["share_of_limit"] == pytest.approx(1.48 / 5, rel=0.02)
    goals = {goal["goal"]: (goal["measured"], goal["held"]) for goal in gpu_report.goals(on_gpu, "d16", flat)}
    assert goals["d16 B=1 wall ms"] == (5, True)
    assert goals["times faster than the reference as published"] == (10, True)
    assert goals["times faster than torch.compile"] == (pytest.approx(1.2), True), "the faster of its two"
    assert goals["B=64 images/s"] == (None, None)
    assert goals["sampling share"] == (0.03, True)
    assert goals["device bytes grown"] == (2**30, False)
    assert goals["every graph within its gate"] == ("1 of 1", True)
    assert goals["draws equal the host's"] == ("0 of 0", None)
    on_gpu["run ort-cuda d16"]["result"]["parity"]["passed"] = False
    on_gpu["run ort-cuda d16"]["result"]["rows"][0] = timed(1, 9)
    missed = {goal["goal"]: goal["held"] for goal in gpu_report.goals(on_gpu, "d16", rows(on_gpu))}
    assert not any(missed[name] for name in ("d16 B=1 wall ms", "times faster than torch.compile"))
    assert missed["every graph within its gate"] is False


def test_runs_of_a_day_are_merged(on_gpu: dict[str, Any], tmp_path: Path) -> None:
    facts = {"minutes_taken": 9, "options": {}, "source_sha256": "x", "version": "1", "model": "d16"}
    names = "one", "two"
    for name, hour in zip(names, (8, 9), strict=True):
        (tmp_path / name).mkdir()
        day = {"created": f"2026-11-23T0{hour}:00:00+00:00"}
        gpu_report.write(tmp_path / name / "gpu_check.json", gpu_report.document(facts | day, on_gpu, "d16"))
        on_gpu["run ort-cuda d20"] = record({"backend": "ort-cuda", "model": "d20", "rows": []})
        on_gpu["machine"] = record(on_gpu["machine"]["result"])
        on_gpu["reference d16"] = record(None, "not measured")
    paths = {merge(tmp_path / name / "gpu_check.json", tmp_path) for name in names}
    assert paths == {tmp_path / "gpu_nvidia-h200_2026-11-23.json"}
    merged = json.loads(paths.pop().read_text())
    assert merged["phases"]["run ort-cuda d20"]["status"] == "done", "measured later"
    assert merged["phases"]["reference d16"]["status"] == "done", "not lost to a run that did not measure it"
    assert [run["created"] for run in merged["earlier"]] == ["2026-11-23T08:00:00+00:00"]
    assert len(merged["rows"]) == 4
    assert merged["phases"]["compiled d16"]["reason"] == "got file.so, 3/4 of it"
    assert {phase["stderr"] for phase in merged["phases"].values()} == {None}
    (tmp_path / "one" / "gpu_check.json").write_text("{}")
    with pytest.raises(ArtifactRefused, match="the result of a run, schema 1"):
        merge(tmp_path / "one" / "gpu_check.json", tmp_path)
