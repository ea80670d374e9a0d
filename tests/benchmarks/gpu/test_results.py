"""The result of a run on a GPU: its rows, its goals, its file, and runs that are merged."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from flexvar_bench.gpu import rows_and_goals
from flexvar_bench.gpu.markdown_table import markdown_table
from flexvar_bench.gpu.result_file import ResultFile, merge, write
from flexvar_bench.gpu.rows_and_goals import AS_PUBLISHED, rows
from flexvar_runtime import ArtifactRefused


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
    goals = {goal["goal"]: (goal["measured"], goal["held"]) for goal in rows_and_goals.goals(on_gpu, "d16", flat)}
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
    missed = {goal["goal"]: goal["held"] for goal in rows_and_goals.goals(on_gpu, "d16", rows(on_gpu))}
    assert not missed["d16 B=1 wall ms"] and not missed["times faster than torch.compile"]
    assert missed["sampling share"] is None, "no kernel of sampling was seen, which is not a share of 0"


@pytest.fixture
def with_cuda(on_gpu: dict[str, Any]) -> dict[str, Any]:
    """Records of a run with the backend cuda, too."""
    common = {"model": "d16", "schedule": "1_2_3_4_5_6_8_10_13_16", "device": "NVIDIA H200", "precision": "fp16"}
    parity = {"passed": True, "teacher_forced_tokens": {"holds": True}, "again_equal": 1, "scale_by_scale_equal": 1}
    ours = common | {"backend": "cuda", "parity": parity, "substituted": []}
    modes = {"mode": ["cuda-graph"]}
    parts = [{"batch": 1, "decoder_s": 0.002, "transformer_and_sampling_s": 0.007}]
    kinds = [{"kind": "attention", "times_bound": 1.5}, {"kind": "head", "times_bound": 2.5}]
    times = [timed(1, 9, **modes), timed(8, 26, **modes), timed(64, 160, **modes)]
    profiled = [{"batch": 1, "bounds": {"kinds": kinds}}, {"batch": 8, "bounds": {"reason": "not measured"}}]
    profiled.append({"batch": 64, "bounds": {"kinds": [*kinds[:1], {"kind": "zero", "times_bound": None}]}})
    return on_gpu | {
        "tiny cuda fp16": record(ours | {"model": "tiny", "mode": ["cuda-graph"] * 2}),
        "run cuda d16": record(ours | {"rows": times, "parts": parts}),
        "profile cuda d16": record(ours | {"rows": profiled}),
        "compiled d16 batch 8 exact": record(common | {"precision": "float16", "rows": [timed(8, 30, shapes="exact")]}),
    }


def test_goals_of_the_backend_cuda(with_cuda: dict[str, Any]) -> None:
    found = {goal["goal"]: goal for goal in rows_and_goals.goals(with_cuda, "d16", rows(with_cuda))}
    for batch, most, measured, state in ((1, 9.5, 9, True), (8, 25, 26, False), (64, 165, 160, True)):
        goal = found[f"cuda d16 B={batch} wall ms"]
        assert (goal["at_most"], goal["measured"], goal["held"]) == (most, pytest.approx(measured), state)
    assert found["times faster than torch.compile, B=8"]["measured"] == pytest.approx(30 / 26)
    assert found["times faster than torch.compile, B=64"]["held"] is None
    bounds = "kinds of kernels within 2 times their bound"
    of_bounds = [found[f"{bounds}, B={batch}"] for batch in (1, 8, 64)]
    states = [(goal["measured"], goal["held"]) for goal in of_bounds]
    assert states == [("1 of 2", False), ("0 of 0", None), ("1 of 1", True)]
    assert found["cuda runs as one CUDA graph"]["measured"] == "5 of 5"
    assert found["cuda gives the same again, and scale by scale"]["measured"] == "2 of 2"
    assert found["cuda needs no im2col in the place of cuDNN"]["held"] is True
    run = with_cuda["run cuda d16"]["result"]
    run["substituted"], run["parity"]["again_equal"], run["rows"][0]["mode"] = ["x (1, 2)"], 0.5, ["stream"]
    missed = held(with_cuda)
    assert missed["cuda runs as one CUDA graph"] is False
    assert missed["cuda gives the same again, and scale by scale"] is False
    assert missed["cuda needs no im2col in the place of cuDNN"] is False


def test_goals_of_cuda_without_cuda(on_gpu: dict[str, Any]) -> None:
    found = held(on_gpu)
    assert {found[name] for name in found if "cuda" in name or "bound" in name} == {None}


def test_parts_and_substitutes_are_shown(with_cuda: dict[str, Any]) -> None:
    with_cuda["run cuda d16"]["result"]["substituted"] = ["x (1, 2)"]
    console = Console(width=140, record=True, file=io.StringIO())
    rows_and_goals.show(rows_and_goals.document({"minutes_taken": 9}, with_cuda, "d16"), console)
    text = console.export_text()
    assert "cuda d16 B=1: decoder 2.00 ms, transformer and sampling 7.00 ms" in text
    assert "cuda d16: im2col in the place of cuDNN: x (1, 2)" in text


def test_the_table_of_the_documents(with_cuda: dict[str, Any]) -> None:
    lines = markdown_table(rows(with_cuda)).splitlines()
    assert lines[0] == "| | precision | mode | batch 1 | batch 8 | batch 64 |"
    assert lines[1] == "|---|---|---|---|---|---|"
    assert lines[2] == "| `cuda` | fp16 | cuda-graph | 9.0 (111) | 26 (308) | 160 (400) |"
    assert lines[3] == "| `ort-cuda` | fp16 | cuda-graph | 5.0 (200) | not measured | not measured |"
    with_cuda["run cuda d16"]["result"]["parity"]["passed"] = False
    wrong = markdown_table(rows(with_cuda)).splitlines()[2]
    assert wrong == "| `cuda` | fp16 | cuda-graph | not measured | not measured | not measured |", "wrong, so no time"


def test_the_precision_of_a_stage(with_cuda: dict[str, Any]) -> None:
    """The tiny model runs in two precisions, before anything else has run."""
    tiny = with_cuda["tiny cuda fp16"]
    tiny["result"]["precision"] = "bf16"
    early = {"phases": {"tiny cuda bf16": tiny}, "options": {"precision": "fp16"}}
    assert rows_and_goals.measured_precision(early) == "fp16"


def held(records: dict[str, Any], model: str = "d16") -> dict[str, Any]:
    return {goal["goal"]: goal["held"] for goal in rows_and_goals.goals(records, model, rows(records))}


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
    result = rows_and_goals.document({"minutes_taken": 9}, on_gpu, "d16")
    rows_and_goals.show(result, console)
    text = console.export_text()
    assert "ort-cuda d16 B=1: left out of the goals: parity failed" in text
    assert "ort-cuda d16 B=1, decoder alone, phases: 2.50 ms\nort-cuda d16 B=1, decoder alone, plain: 2.25 ms" in text
    assert not any(name.startswith("ort-cuda") for name in rows_and_goals.headline(result)["wall_ms"])


def test_runs_of_a_day_are_merged(on_gpu: dict[str, Any], tmp_path: Path) -> None:
    facts = {"minutes_taken": 9, "options": {}, "source_sha256": "x", "version": "1", "model": "d16"}
    facts |= {"missing": "no cuda.core"}
    names = "one", "two"
    for name, hour in zip(names, (8, 9), strict=True):
        (tmp_path / name).mkdir()
        day = {"created": f"2026-11-23T0{hour}:00:00+00:00"}
        write(tmp_path / name / "gpu_check.json", rows_and_goals.document(facts | day, on_gpu, "d16"))
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
    other = rows_and_goals.document(facts | day | {"model": "d20", "options": {"precision": "fp16"}}, {}, "d20")
    later = tmp_path / "two" / "gpu_check.json"
    write(later, other | {"gpu": "NVIDIA H200"})
    merged = json.loads(merge(later, tmp_path).read_text())
    assert merged["model"] == "d16", "the goals stay those of the model they are for"
    assert {goal["goal"]: goal["held"] for goal in merged["goals"]}["d16 B=1 wall ms"] is True
    write(later, other | {"gpu": "NVIDIA H200", "options": {"precision": "bf16"}})
    assert merge(later, tmp_path).name == "gpu_nvidia-h200_2026-11-23_bf16.json", "not mixed with fp16"
    on_gpu["run ort-cuda d16"]["result"]["precision"] = "fp32"
    write(later, rows_and_goals.document(facts | day | {"options": {"precision": "fp16"}}, on_gpu, "d16"))
    assert merge(later, tmp_path).name == "gpu_nvidia-h200_2026-11-23_fp32.json", "as measured, not as asked for"
    (tmp_path / "one" / "gpu_check.json").write_text("{}")
    with pytest.raises(ArtifactRefused, match=r"gpu_check\.json"):
        merge(tmp_path / "one" / "gpu_check.json", tmp_path)


def test_a_later_run_keeps_the_phases_that_it_does_not_run(on_gpu: dict[str, Any], tmp_path: Path) -> None:
    path, options = tmp_path / "gpu_check.json", {"precision": "fp16"}
    facts = {"minutes_taken": 9, "options": options, "source_sha256": "x", "version": "1", "model": "d16"}
    facts |= {"missing": None}
    day = {"created": "2026-11-23T08:00:00+00:00"}
    ResultFile(path, options).write(rows_and_goals.document(facts | day, on_gpu, "d16"))
    later = {"created": "2026-11-23T09:00:00+00:00", "options": options | {"only": "['kernels']"}}
    again = {"machine": on_gpu["machine"], "kernels": record({}), "reference d16": record(None, "failed")}
    file = ResultFile(path, options)
    for records in ({}, again, again):  # written again and again
        file.write(rows_and_goals.document(facts | later, records, "d16"))
    joined = json.loads(path.read_text())
    assert set(joined["phases"]) == {*on_gpu, "kernels"} and joined["created"] == later["created"]
    assert joined["phases"]["reference d16"]["status"] == "done", "the better state stays"
    assert len(joined["rows"]) == 4 and [run["created"] for run in joined["earlier"]] == [day["created"]]
    (tmp_path / "kept").mkdir()
    for _ in range(2):
        kept = json.loads(merge(path, tmp_path / "kept").read_text())
        assert [run["created"] for run in kept["earlier"]] == [day["created"]], "told once"
    path.write_text("{half")
    ResultFile(path, options).write(rows_and_goals.document(facts | later, again, "d16"))
    assert set(json.loads(path.read_text())["phases"]) == set(again)


@pytest.mark.parametrize(("gpu", "precision"), [("NVIDIA H100", "fp16"), (None, "fp16"), ("NVIDIA H200", "bf16")])
def test_results_of_two_gpus_or_precisions_do_not_mix(
    gpu: str | None, precision: str, on_gpu: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, facts = tmp_path / "gpu_check.json", {"minutes_taken": 9, "source_sha256": "x", "version": "1"}
    facts |= {"model": "d16", "created": "2026-11-23T08:00:00+00:00", "options": {"precision": "fp16"}}
    write(path, rows_and_goals.document(facts, on_gpu, "d16"))
    options = {"precision": precision}
    file, machine = ResultFile(path, options), {"machine": record({"torch": {"gpu": gpu}})}
    file.write(rows_and_goals.document(facts | {"options": options}, machine, "d16"))
    assert set(json.loads(path.read_text())["phases"]) == {"machine"}
    assert set(json.loads((tmp_path / "gpu_check_20261123T080000.json").read_text())["phases"]) == set(on_gpu)
    assert "gpu_check_20261123T080000.json" in capsys.readouterr().out
