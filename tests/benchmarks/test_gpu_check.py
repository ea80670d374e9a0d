"""The whole command on a machine without a GPU, from a copy of the checkout; what it reports; runs merged."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from rich.console import Console

from flexvar_bench import gpu_check
from flexvar_bench.gpu import command_line, measurement
from flexvar_bench.gpu import models as gpu_models
from flexvar_bench.gpu import report as gpu_report
from flexvar_bench.gpu.files import ModelFiles
from flexvar_bench.gpu.models import default_guidance, export_model, load_proof, phases_model, random_model, schedule_of
from flexvar_bench.gpu.report import AS_PUBLISHED, rows
from flexvar_bench.gpu.result_file import ResultFile, merge, write
from flexvar_bench.gpu.runs import decoders, growth
from flexvar_bench.timing import Budget
from flexvar_export.proof import make_proof
from flexvar_runtime import ArtifactRefused, Bundle

if TYPE_CHECKING:
    from graph_cache import GraphCache

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
def work(checkout: Path, tiny_bundles: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model exported, as an earlier run leaves it."""
    folder = tmp_path_factory.mktemp("work")
    (folder / "fp16").mkdir()
    files = ModelFiles.of(folder / "fp16", "tiny")
    shutil.copytree(tiny_bundles("fp16"), files.bundle)
    make_proof(*random_model("tiny"), schedule_of("tiny"), default_guidance()).save(files.proof)
    files.stamp.write_text(gpu_check.source_hash(checkout))
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
    assert phases["run ort-cpu tiny"]["result"]["decoder"] == result["rows"][0]["decoder"] == "plain"
    assert result["missing"] is None
    tensorrt = phases["tiny tensorrt"]
    assert tensorrt["status"] == "failed" and "backend tensorrt: tensorrt is not installed" in tensorrt["reason"]
    assert tensorrt["result"]["probe"]["available"] is False
    assert phases["run tensorrt tiny"]["reason"].startswith("not measured: it needs 'build tensorrt tiny'")
    jobs = {"tiny ort-cpu", "tiny tensorrt", "build tensorrt tiny", "run ort-cpu tiny", "run tensorrt tiny"}
    assert set(phases) == {"machine", "export tiny"} | jobs


def test_a_run_goes_on_where_an_earlier_one_was_stopped(
    tiny_bundles: Callable[[str], Path], graph_cache: GraphCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped while the proof was written. What is measured is what `flexvar export` makes of the same model."""
    monkeypatch.setattr(gpu_models, "export_graph", graph_cache.export_graph)
    saved: list[dict[str, Any]] = []

    class Half:
        def save(self, path: Path) -> None:
            path.write_bytes(b"half")
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(gpu_models, "make_proof", lambda *_: Half())
        with pytest.raises(KeyboardInterrupt):
            export_model("tiny", tmp_path, "fp16", saved.append)
    assert saved[-1]["decoder"] == "plain" and "proof" not in saved[-1]["seconds"]
    assert {path.name for path in tmp_path.iterdir()} == {"tiny.bundle", "tiny.sources"}
    export_model("tiny", tmp_path, "fp16", saved.append)
    assert load_proof(tmp_path, "tiny").cases and set(saved[-1]["seconds"]) == {"weights", "proof"}
    both = ModelFiles.of(tmp_path, "tiny").bundle, tiny_bundles("fp16")
    ours, theirs = (Bundle.open(path).manifest for path in both)
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
    assert f"{files.bundle}: made by other sources, so it is made anew" in capsys.readouterr().out.splitlines()
    result = json.loads((tmp_path / "out" / gpu_check.RESULT).read_text())
    assert result["phases"]["export tiny"]["status"] == "not measured" and not files.bundle.exists()
    used = {"backends": "('tensorrt', 'tensorrt-rtx', 'ort-cuda')", "precision": "fp16", "minutes": "0.1"}
    assert result["options"] == used | {"tiny": "True"}


def test_both_decoders_are_timed(
    tiny_bundles: Callable[[str], Path],
    work: Path,
    tmp_path: Path,
    graph_cache: GraphCache,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(gpu_models, "export_graph", graph_cache.export_graph)
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
        (["--out", "x", "--backends", "cuda"], "backend 'cuda'"),
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


def test_a_missing_option_is_named_with_what_to_type(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_check.main([]) == gpu_check.main(["--stage", "first", "--out", "x"]) == 2
    assert capsys.readouterr().err.splitlines() == [
        "gpu_check: --out is missing. Add --out DIR.",
        "gpu_check: --stage needs --carried. Add --carried DIR, the folder that --pack made.",
    ]


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
    assert capsys.readouterr().err == ("gpu_check: Packages are missing. Install them: pip install safetensors\n")
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
    said = "gpu_check: cuda.core 0.4.1, older than 1.0: our kernels and backends on a GPU will not be measured"
    assert capsys.readouterr().err.startswith(said)
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
            common
            | {"precision": "float16", "relative_error": 1e-3, "gate": 2e-3}
            | {"rows": [timed(1, 9, shapes="dynamic"), timed(1, 6, shapes="exact")]},
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
    assert goals["d16 B=64 images/s"] == (None, None)
    assert goals["sampling share"] == (0.03, True)
    assert goals["device bytes grown"] == (2**30, False)
    assert goals["every graph within its gate"] == ("1 of 1", True)
    assert goals["draws equal the host's"] == ("0 of 0", None)
    on_gpu["run ort-cuda d16"]["result"]["rows"][0] = timed(1, 9)
    on_gpu["profile ort-cuda d16"]["result"]["rows"] = [{"classes": {"gemm": {"share": 1.0}}}]
    missed = {goal["goal"]: goal["held"] for goal in gpu_report.goals(on_gpu, "d16", rows(on_gpu))}
    assert not missed["d16 B=1 wall ms"] and not missed["times faster than torch.compile"]
    assert missed["sampling share"] is None, "no kernel of sampling was seen, which is not a share of 0"


def held(records: dict[str, Any], model: str = "d16") -> dict[str, Any]:
    return {goal["goal"]: goal["held"] for goal in gpu_report.goals(records, model, rows(records))}


def test_only_what_is_right_counts(on_gpu: dict[str, Any]) -> None:
    slow = json.loads(json.dumps(on_gpu["run ort-cuda d16"]))
    slow["result"] |= {"backend": "tensorrt", "rows": [timed(1, 20)]}
    on_gpu["run tensorrt d16"] = slow
    assert held(on_gpu)["d16 B=1 wall ms"] is True
    wrong = on_gpu["run ort-cuda d16"]["result"]["parity"]
    wrong["passed"] = False
    found = held(on_gpu)
    assert found["d16 B=1 wall ms"] is False, "of the backend that is right"
    assert found["sampling share"] is found["device bytes grown"] is None
    assert found["every graph within its gate"] is False
    assert rows(on_gpu)[0]["left_out"] == "parity failed"
    on_gpu["compiled d16"]["result"]["relative_error"] = 3e-3
    assert held(on_gpu)["times faster than torch.compile"] is None
    compiled = [row["left_out"] for row in rows(on_gpu) if row["side"].startswith("torch.compile")]
    assert compiled == ["relative error 0.003, gate 0.002"] * 2


def test_throughput_is_a_goal_for_d16_only(on_gpu: dict[str, Any]) -> None:
    rows_of_d16 = on_gpu["run ort-cuda d16"]["result"]["rows"]
    rows_of_d16[1] = timed(64, 100)
    assert held(on_gpu)["d16 B=64 images/s"] is True
    on_gpu["run ort-cuda d16"]["result"]["model"] = "d20"
    assert held(on_gpu, "d20")["d16 B=64 images/s"] is None


def test_a_processor_is_no_gpu(on_gpu: dict[str, Any]) -> None:
    on_gpu["run ort-cuda d16"]["result"] |= {"backend": "openvino", "device": "cpu"}
    assert held(on_gpu)["d16 B=1 wall ms"] is None


def test_what_is_left_out_is_shown(on_gpu: dict[str, Any]) -> None:
    on_gpu["run ort-cuda d16"]["result"]["parity"]["passed"] = False
    times = [timed(1, 2.5, decoder="phases"), timed(1, 2.25, decoder="plain")]
    on_gpu["decoders ort-cuda d16"] = record({"backend": "ort-cuda", "model": "d16", "rows": times})
    console = Console(width=140, record=True, file=io.StringIO())
    result = gpu_report.document({"minutes_taken": 9}, on_gpu, "d16")
    gpu_report.show(result, console)
    text = console.export_text()
    assert "ort-cuda d16 B=1: left out of the goals: parity failed" in text
    assert "ort-cuda d16 B=1, decoder alone, phases: 2.50 ms\nort-cuda d16 B=1, decoder alone, plain: 2.25 ms" in text
    assert not any(name.startswith("ort-cuda") for name in gpu_report.headline(result)["wall_ms"])


def test_runs_of_a_day_are_merged(on_gpu: dict[str, Any], tmp_path: Path) -> None:
    facts = {"minutes_taken": 9, "options": {}, "source_sha256": "x", "version": "1", "model": "d16"}
    facts |= {"missing": "no cuda.core"}
    names = "one", "two"
    for name, hour in zip(names, (8, 9), strict=True):
        (tmp_path / name).mkdir()
        day = {"created": f"2026-11-23T0{hour}:00:00+00:00"}
        write(tmp_path / name / "gpu_check.json", gpu_report.document(facts | day, on_gpu, "d16"))
        on_gpu["run ort-cuda d20"] = record({"backend": "ort-cuda", "model": "d20", "rows": []})
        on_gpu["machine"] = record(on_gpu["machine"]["result"])
        on_gpu["reference d16"] = record(None, "not measured")
    paths = {merge(tmp_path / name / "gpu_check.json", tmp_path) for name in names}
    assert paths == {tmp_path / "gpu_nvidia-h200_2026-11-23.json"}
    merged = json.loads(paths.pop().read_text())
    assert merged["phases"]["run ort-cuda d20"]["status"] == "done", "measured later"
    assert merged["phases"]["reference d16"]["status"] == "done", "not lost to a run that did not measure it"
    assert [run["created"] for run in merged["earlier"]] == ["2026-11-23T08:00:00+00:00"]
    assert merged["missing"] == merged["earlier"][0]["missing"] == "no cuda.core"
    assert len(merged["rows"]) == 4
    assert merged["phases"]["compiled d16"]["reason"] == "got file.so, 3/4 of it"
    assert {phase["stderr"] for phase in merged["phases"].values()} == {None}
    other = gpu_report.document(facts | day | {"model": "d20", "options": {"precision": "fp16"}}, {}, "d20")
    later = tmp_path / "two" / "gpu_check.json"
    write(later, other | {"gpu": "NVIDIA H200"})
    merged = json.loads(merge(later, tmp_path).read_text())
    assert merged["model"] == "d16", "the goals stay those of the model they are for"
    assert {goal["goal"]: goal["held"] for goal in merged["goals"]}["d16 B=1 wall ms"] is True
    write(later, other | {"gpu": "NVIDIA H200", "options": {"precision": "bf16"}})
    assert merge(later, tmp_path).name == "gpu_nvidia-h200_2026-11-23_bf16.json", "not mixed with fp16"
    on_gpu["run ort-cuda d16"]["result"]["precision"] = "fp32"
    write(later, gpu_report.document(facts | day | {"options": {"precision": "fp16"}}, on_gpu, "d16"))
    assert merge(later, tmp_path).name == "gpu_nvidia-h200_2026-11-23_fp32.json", "as measured, not as asked for"
    (tmp_path / "one" / "gpu_check.json").write_text("{}")
    with pytest.raises(ArtifactRefused, match="the result of a run, schema 1"):
        merge(tmp_path / "one" / "gpu_check.json", tmp_path)


def test_a_later_run_keeps_the_phases_that_it_does_not_run(on_gpu: dict[str, Any], tmp_path: Path) -> None:
    path, options = tmp_path / "gpu_check.json", {"precision": "fp16"}
    facts = {"minutes_taken": 9, "options": options, "source_sha256": "x", "version": "1", "model": "d16"}
    facts |= {"missing": None}
    day = {"created": "2026-11-23T08:00:00+00:00"}
    ResultFile(path, options).write(gpu_report.document(facts | day, on_gpu, "d16"))
    later = {"created": "2026-11-23T09:00:00+00:00", "options": options | {"only": "['kernels']"}}
    again = {"machine": on_gpu["machine"], "kernels": record({}), "reference d16": record(None, "failed")}
    file = ResultFile(path, options)
    for records in ({}, again, again):  # written again and again
        file.write(gpu_report.document(facts | later, records, "d16"))
    joined = json.loads(path.read_text())
    assert set(joined["phases"]) == {*on_gpu, "kernels"} and joined["created"] == later["created"]
    assert joined["phases"]["reference d16"]["status"] == "done", "the better state stays"
    assert len(joined["rows"]) == 4 and [run["created"] for run in joined["earlier"]] == [day["created"]]
    (tmp_path / "kept").mkdir()
    for _ in range(2):
        kept = json.loads(merge(path, tmp_path / "kept").read_text())
        assert [run["created"] for run in kept["earlier"]] == [day["created"]], "told once"
    path.write_text("{half")
    ResultFile(path, options).write(gpu_report.document(facts | later, again, "d16"))
    assert set(json.loads(path.read_text())["phases"]) == set(again)


@pytest.mark.parametrize(("gpu", "precision"), [("NVIDIA H100", "fp16"), (None, "fp16"), ("NVIDIA H200", "bf16")])
def test_results_of_two_gpus_or_precisions_do_not_mix(
    gpu: str | None, precision: str, on_gpu: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, facts = tmp_path / "gpu_check.json", {"minutes_taken": 9, "source_sha256": "x", "version": "1"}
    facts |= {"model": "d16", "created": "2026-11-23T08:00:00+00:00", "options": {"precision": "fp16"}}
    write(path, gpu_report.document(facts, on_gpu, "d16"))
    options = {"precision": precision}
    file, machine = ResultFile(path, options), {"machine": record({"torch": {"gpu": gpu}})}
    file.write(gpu_report.document(facts | {"options": options}, machine, "d16"))
    assert set(json.loads(path.read_text())["phases"]) == {"machine"}
    assert set(json.loads((tmp_path / "gpu_check_20261123T080000.json").read_text())["phases"]) == set(on_gpu)
    assert "gpu_check_20261123T080000.json" in capsys.readouterr().out


def test_a_stage_keeps_the_rest_of_its_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`--stage measure --only machine` over an earlier result, and the options that are recorded."""
    (tmp_path / "pack").mkdir()
    (tmp_path / "pack" / "pack.json").write_text('{"model": "tiny"}')
    monkeypatch.setattr(gpu_check.signal, "signal", lambda *_: None)
    facts = {"minutes_taken": 3, "source_sha256": "x", "version": "1", "model": "tiny"}
    facts |= {"created": "2026-11-23T08:00:00+00:00", "options": {"precision": "fp32"}}
    path = tmp_path / "out" / "gpu_check_measure.json"
    path.parent.mkdir()
    write(path, gpu_report.document(facts, {"compiled tiny batch 64 exact": record({})}, "tiny"))
    monkeypatch.setattr("flexvar_bench.gpu.stages.SECONDS", {"measure": 1.0})  # nothing is started
    options = ["--stage", "measure", "--only", "machine", "--tiny", "--carried", str(tmp_path / "pack")]
    assert gpu_check.main([*options, "--out", str(path.parent), "--work", str(tmp_path / "work")]) == 0
    result = json.loads(path.read_text())
    states = {name: phase["status"] for name, phase in result["phases"].items()}
    assert states == {"compiled tiny batch 64 exact": "done", "machine": "not measured"}
    of_stage = {"stage": "measure", "only": "['machine']", "tiny": "True"}
    assert result["options"] == of_stage | {"model": "tiny", "backend": "ort-cpu", "precision": "fp32"}
