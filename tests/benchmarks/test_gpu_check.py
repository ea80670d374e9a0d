"""The whole command on a machine without a GPU, from a copy of the checkout, and its options."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from flexvar_bench import gpu_check
from flexvar_bench.gpu import command_line, measurement, random_models
from flexvar_bench.gpu.files import ModelFiles
from flexvar_bench.gpu.random_models import (
    default_guidance,
    export_model,
    load_proof,
    phases_model,
    random_model,
    schedule_of,
)
from flexvar_bench.gpu.result_file import write
from flexvar_bench.gpu.rows_and_goals import AS_PUBLISHED, document
from flexvar_bench.gpu.runtime_jobs import decoders, growth
from flexvar_bench.gpu.sources import PACKAGES, source_hash
from flexvar_bench.timing import Budget
from flexvar_export.proof import make_proof
from flexvar_runtime import Bundle

if TYPE_CHECKING:
    from graph_cache import GraphCache

ROOT = Path(gpu_check.__file__).resolve().parent.parent
VERSION = "0.0.copied"


@pytest.fixture(scope="session")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Our folders, and nothing of them installed under this version."""
    root = tmp_path_factory.mktemp("checkout")
    for folder in PACKAGES.values():
        shutil.copytree(ROOT / folder, root / folder, ignore=shutil.ignore_patterns("__pycache__"))
    (root / "runtime" / "_version.py").write_text(f'__version__ = "{VERSION}"\n')
    return root


@pytest.fixture(scope="session")
def work(checkout: Path, tiny_bundles: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model exported, as an earlier run leaves it."""
    folder = tmp_path_factory.mktemp("work")
    (folder / "fp16").mkdir()
    files = ModelFiles.of(folder / "fp16", "tiny")
    shutil.copytree(tiny_bundles("fp16"), files.bundle)
    make_proof(*random_model("tiny"), schedule_of("tiny"), default_guidance()).save(files.proof)
    files.stamp.write_text(source_hash(checkout))
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


@pytest.mark.kernels
def test_parts_of_a_run(checkout: Path, work: Path, tmp_path: Path) -> None:
    result, printed = run(
        checkout, tmp_path, "--backends", "ort-cpu,tensorrt", "--work", str(work), "--minutes", "3", "--only", "run"
    )
    check_facts(result, printed)
    check_run(result)
    phases = result["phases"]
    assert phases["export tiny"]["result"]["reason"] == "there from an earlier run"
    assert phases["run ort-cpu tiny"]["result"]["decoder"] == result["rows"][0]["decoder"] == "plain"
    assert result["missing"] is None
    tensorrt = phases["tiny tensorrt"]
    assert tensorrt["status"] == "failed" and "tensorrt" in tensorrt["reason"]
    assert tensorrt["result"]["probe"]["available"] is False
    assert phases["run tensorrt tiny"]["reason"].startswith("not measured: it needs 'build tensorrt tiny'")
    jobs = {"tiny ort-cpu", "tiny tensorrt", "build tensorrt tiny", "run ort-cpu tiny", "run tensorrt tiny"}
    assert set(phases) == {"machine", "export tiny"} | jobs


def test_a_run_goes_on_where_an_earlier_one_was_stopped(
    tiny_bundles: Callable[[str], Path], graph_cache: GraphCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped while the proof was written. What is measured is what `flexvar export` makes of the same model."""
    monkeypatch.setattr(random_models, "export_graph", graph_cache.export_graph)
    saved: list[dict[str, Any]] = []

    class Half:
        def save(self, path: Path) -> None:
            path.write_bytes(b"half")
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(random_models, "make_proof", lambda *_: Half())
        with pytest.raises(KeyboardInterrupt):
            export_model("tiny", tmp_path, "fp16", saved.append)
    assert saved[-1]["decoder"] == "plain" and "proof" not in saved[-1]["seconds"]
    assert {path.name for path in tmp_path.iterdir()} == {"tiny.bundle", "tiny.sources"}
    export_model("tiny", tmp_path, "fp16", saved.append)
    assert load_proof(tmp_path, "tiny").cases and set(saved[-1]["seconds"]) == {"weights", "proof"}
    both = ModelFiles.of(tmp_path, "tiny").bundle, tiny_bundles("fp16")
    ours, theirs = (Bundle.open(path, allow_unproved=True).manifest for path in both)
    assert ours.decoder == theirs.decoder == "plain" and ours.graphs == theirs.graphs
    for name in ("step.onnx", "decode.onnx", "condition.onnx"):
        assert ours.files[name] == theirs.files[name]


def test_a_bundle_of_other_sources_is_not_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "work" / "fp16").mkdir(parents=True)
    files = ModelFiles.of(tmp_path / "work" / "fp16", "tiny")
    files.bundle.mkdir()
    files.proof.touch()
    files.stamp.write_text("other sources")
    monkeypatch.setattr(gpu_check.signal, "signal", lambda *_: None)
    options = ["--tiny", "--minutes", "0.1", "--work", str(tmp_path / "work"), "--out", str(tmp_path / "out")]
    assert gpu_check.main(options) == 0  # nothing is started
    assert str(files.bundle) in capsys.readouterr().out
    result = json.loads((tmp_path / "out" / gpu_check.RESULT).read_text())
    assert result["phases"]["export tiny"]["status"] == "not measured" and not files.bundle.exists()
    used = {"backends": "('cuda', 'ort-cuda', 'tensorrt', 'tensorrt-rtx')", "precision": "fp16", "minutes": "0.1"}
    assert result["options"] == used | {"tiny": "True"}


@pytest.mark.kernels
def test_both_decoders_are_timed(
    tiny_bundles: Callable[[str], Path],
    work: Path,
    tmp_path: Path,
    graph_cache: GraphCache,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(random_models, "export_graph", graph_cache.export_graph)
    ours = ModelFiles.of(tmp_path, "tiny")
    shutil.copytree(tiny_bundles("fp16"), ours.bundle)
    shutil.copy(ModelFiles.of(work / "fp16", "tiny").proof, ours.proof)  # of any precision
    saved: list[dict[str, Any]] = []
    for _ in range(2):  # again over what is there
        phases_model("tiny", tmp_path, saved.append)
    assert saved[-1] == {"model": "tiny", "precision": "fp16", "decoder": "phases"}
    decoders(tmp_path, "tiny", "ort-cpu", (1, 2, 64), 64, Budget(warmup=1, least=2, most=2), saved.append)
    rows = saved[-1]["rows"]
    expected = [(form, batch) for form in ("plain", "phases") for batch in (1, 2, 8)]
    assert [(row["decoder"], row["batch"]) for row in rows] == expected, "the runtime decodes eight at most"
    assert all(row["psnr_db"] > 50 and row["wall_s"]["median"] > 0 and row["device_s"] is None for row in rows)
    assert rows[0]["psnr_db"] != rows[3]["psnr_db"], "two decoders"


def test_growth_of_memory(work: Path) -> None:
    saved: list[dict[str, Any]] = []
    growth(work / "fp16", "tiny", "ort-cpu", 20, saved.append)
    assert [sample["generations"] for sample in saved[-1]["samples"]] == list(range(0, 21, 2))
    assert saved[-1]["resident_grown_bytes_second_half"] is not None and saved[-1]["device_grown_bytes"] is None
    assert len(saved) > 5, "told on the way"


def test_no_time_at_all(checkout: Path, work: Path, tmp_path: Path) -> None:
    result, _ = run(checkout, tmp_path, "--backends", "ort-cpu", "--work", str(work), "--minutes", "0.11")
    states = {name: record["status"] for name, record in result["phases"].items()}
    assert states.pop("export tiny") == "done", "it is there from an earlier run"
    assert set(states.values()) <= {"not measured", "stopped"}
    assert result["phases"]["reference tiny"]["reason"].startswith("not measured: ")
    assert result["minutes_taken"] < 0.25
    assert all(goal["held"] is None for goal in result["goals"]), "nothing is guessed"


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--out", "x", "--only", "profil"], "--only"),
        (["--out", "x", "--backends", "gpu"], "gpu"),
        ([], "--out"),
        (["--stage", "first", "--out", "x"], "--carried"),
        (["--stage", "first", "--out", "x", "--carried", "nowhere"], "--carried"),
        (["--stage", "first", "--out", "x", "--carried", "y", "--minutes", "3"], "--minutes"),
        (["--out", "x", "--carried", "y"], "--carried"),
        (["--pack", "x", "--out", "y"], "--out"),
        (["--pack", "."], "--pack"),
        (["--rehearse"], "--out"),
    ],
)
def test_refusals(
    options: list[str],
    named: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert gpu_check.main(options) == 2
    said = capsys.readouterr().err
    assert said.startswith("gpu_check: ") and said.count("\n") == 1 and named in said
    assert not list(tmp_path.iterdir())


def test_help_texts_are_sentences() -> None:
    texts = [action.help or "" for action in command_line._parser("")._actions[1:]]  # after argparse's own --help
    assert len(texts) == 16
    assert [text for text in texts if not text[:1].isupper() or text[-1:] != "."] == []


def test_what_is_missing_is_said_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(gpu_check, "NEEDED", gpu_check.NEEDED | {"safetensors_gone": "safetensors"})
        assert gpu_check.main(["--out", str(tmp_path / "out")]) == 4
    assert capsys.readouterr().err.endswith("pip install safetensors\n")
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(measurement, "CUDA_PROBE", "import sys; sys.exit('no libnvrtc')")
    assert measurement.without_cuda() == "no cuda.core with NVRTC (no libnvrtc)"
    monkeypatch.setattr(measurement, "CUDA_PROBE", "print('1.2.0')")
    assert measurement.without_cuda() is None
    monkeypatch.setattr(measurement, "CUDA_PROBE", "print('0.4.1')")
    assert measurement.without_cuda() == "cuda.core 0.4.1, older than 1.0"
    monkeypatch.setattr(gpu_check.signal, "signal", lambda *_: None)
    options = ["--tiny", "--minutes", "0.1"]  # nothing is started
    assert gpu_check.main(["--out", str(tmp_path), *options]) == 0
    said = capsys.readouterr().err
    assert said.startswith("gpu_check: ") and "cuda.core 0.4.1" in said
    assert json.loads((tmp_path / gpu_check.RESULT).read_text())["missing"] == "cuda.core 0.4.1, older than 1.0"


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
    compiled = result["phases"]["compiled tiny batch 1 exact"]["result"]
    assert compiled["relative_error"] < compiled["gate"] == 1e-5, "float32 on a processor"
    assert [row["left_out"] for row in result["rows"]] == [None] * len(result["rows"])
    assert {row["decoder"] for row in result["phases"]["decoders ort-cpu tiny"]["result"]["rows"]} == {
        "phases",
        "plain",
    }
    assert result["phases"]["tiny ort-cpu"]["result"]["tokens_equal_to_ort_cpu"] == [1, 1]


def test_a_stage_keeps_the_rest_of_its_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`--stage measure --only machine` over an earlier result, and the options that are recorded."""
    (tmp_path / "pack").mkdir()
    (tmp_path / "pack" / "pack.json").write_text('{"model": "tiny"}')
    monkeypatch.setattr(gpu_check.signal, "signal", lambda *_: None)
    facts = {"minutes_taken": 3, "source_sha256": "x", "version": "1", "model": "tiny"}
    facts |= {"created": "2026-11-23T08:00:00+00:00", "options": {"precision": "fp16"}}
    path = tmp_path / "out" / "gpu_check_measure.json"
    path.parent.mkdir()
    done = {"status": "done", "reason": None, "stderr": None, "seconds": 1, "result": {}}
    write(path, document(facts, {"compiled tiny batch 64 exact": done}, "tiny"))
    monkeypatch.setattr("flexvar_bench.gpu.stages.SECONDS", {"measure": 1.0})  # nothing is started
    options = ["--stage", "measure", "--only", "machine", "--tiny", "--carried", str(tmp_path / "pack")]
    assert gpu_check.main([*options, "--out", str(path.parent), "--work", str(tmp_path / "work")]) == 0
    result = json.loads(path.read_text())
    states = {name: phase["status"] for name, phase in result["phases"].items()}
    assert states == {"compiled tiny batch 64 exact": "done", "machine": "not measured"}
    of_stage = {"stage": "measure", "only": "['machine']", "tiny": "True"}
    of_setup = {"model": "tiny", "backend": "cuda", "peer": "ort-cpu", "precision": "fp16"}
    assert result["options"] == of_stage | of_setup
