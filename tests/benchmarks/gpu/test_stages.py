"""The two stages for a lent GPU machine: order, limits, what is used again; and a rehearsal of both."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from flexvar_bench import gpu_check
from flexvar_bench.gpu import child
from flexvar_bench.gpu import rehearsal as gpu_rehearsal
from flexvar_bench.gpu.measurement import RESERVE_SECONDS
from flexvar_bench.gpu.plan import REUSED, Phase, finished_before, planned_seconds
from flexvar_bench.gpu.rehearsal import REFUSED, rehearse, steps_of
from flexvar_bench.gpu.sources import source_hash
from flexvar_bench.gpu.stages import FIRST, MEASURE, SECONDS, StageSetup, rehearsal, stage_plan

ROOT = Path(gpu_check.__file__).resolve().parent.parent
SETUP = StageSetup(Path("pack"))


def names(stage: str, setup: StageSetup = SETUP) -> list[str]:
    return [phase.name for phase in stage_plan(stage, setup)]


@pytest.mark.parametrize("stage", SECONDS)
@pytest.mark.parametrize("setup", [SETUP, rehearsal(Path("pack"))], ids=["d16", "rehearsal"])
def test_a_stage_fits_its_time(stage: str, setup: StageSetup) -> None:
    """On a fresh machine, where all has to be made."""
    plan = stage_plan(stage, setup)
    assert planned_seconds(plan) <= SECONDS[stage] - RESERVE_SECONDS
    for i, phase in enumerate(plan):
        assert 0 < phase.seconds <= phase.limit < SECONDS[stage], phase.name
        assert set(phase.needs) <= {before.name for before in plan[:i]}, phase.name
        assert phase.job in child.JOBS
    assert len({phase.name for phase in plan}) == len(plan)


def test_the_first_stage_asks_whether_all_works() -> None:
    found = names(FIRST)
    assert found[0] == "machine"
    tiny = ["tiny cuda fp16", "tiny cuda bf16", "tiny ort-cuda fp16"]
    assert found[1:] == ["unpack", "regenerate d16", "sanitize", *tiny, "run cuda d16", "kernels", "proof d16"]
    plan = {phase.name: phase for phase in stage_plan(FIRST, SETUP)}
    assert plan["run cuda d16"].options["batches"] == (1, 8)
    assert plan["tiny cuda bf16"].options == {"backend": "cuda", "folder": "tiny-bf16"}
    beside = {name for name, phase in plan.items() if not phase.alone}
    assert beside == {"regenerate d16", "unpack", "sanitize", *tiny}, "d16 is made beside the first steps"
    assert plan["proof d16"].options.keys() == {"model", "batches", "generations", "seeds", "budget"}


def test_the_second_stage_measures_cuda_first_and_its_peers_in_the_same_run() -> None:
    cuda = ["run cuda d16", "profile cuda d16", "growth cuda d16"]
    peers = ["run ort-cuda d16", "reference d16", "compiled d16 batch 8 exact", "compiled d16 batch 64 exact"]
    assert names(MEASURE) == ["machine", "unpack", "regenerate d16", *cuda, *peers]
    plan = {phase.name: phase for phase in stage_plan(MEASURE, SETUP)}
    for name in ("run cuda d16", "profile cuda d16", "run ort-cuda d16", "reference d16"):
        assert plan[name].options["batches"] == (1, 8, 64)
    assert plan["growth cuda d16"].options["generations"] == 300


def test_a_rehearsal_has_the_same_steps() -> None:
    """Except bfloat16, and with stand-ins for d16 and for ort-cuda."""
    for stage in SECONDS:
        rehearsed = names(stage, rehearsal(Path("pack")))
        left = [name for name in names(stage) if name != "tiny cuda bf16"]
        left = [name.replace("d16", "tiny").replace("run ort-cuda", "run ort-cpu") for name in left]
        assert rehearsed == left
    plan = {phase.name: phase for phase in stage_plan(FIRST, rehearsal(Path("pack")))}
    assert plan["tiny cuda fp16"].options["folder"] == "", "the model that was regenerated"
    assert plan["tiny cuda fp16"].needs == ("regenerate tiny",)


def test_rows_of_torch_compile_are_phases_of_their_own() -> None:
    plan = [phase for phase in stage_plan(MEASURE, SETUP) if phase.job == "compiled"]
    rows = [(phase.options["batch"], phase.options["dynamic"]) for phase in plan]
    assert rows == [(8, False), (64, False)], "with dynamic shapes both are known"
    assert plan[0].name == "compiled d16 batch 8 exact" and plan[-1].name == "compiled d16 batch 64 exact"
    assert all(phase.needs == ("regenerate d16",) for phase in plan), "one that is interrupted costs only itself"
    assert names(MEASURE)[-len(plan) :] == [phase.name for phase in plan], "after what is measured of ours"


def test_what_the_first_stage_made_is_not_made_again(tmp_path: Path) -> None:
    plan = stage_plan(MEASURE, SETUP)
    (tmp_path / "d16.bundle").mkdir()
    (tmp_path / "d16.proof.npz").touch()
    assert finished_before(plan, tmp_path, "new sources") == {}, "nobody knows what made it"
    (tmp_path / "d16.sources").write_text("sources")
    assert finished_before(plan, tmp_path, "new sources") == {}
    made = finished_before(plan, tmp_path, "sources")
    assert made == {"regenerate d16": {"model": "d16", "reason": REUSED}}, "without folders of the machine"
    left = [phase for phase in plan if phase.name not in made]
    assert planned_seconds(left) == planned_seconds(plan) - 35 + 10, "only the library is unpacked"


def test_a_step_of_a_rehearsal_is_judged() -> None:
    plan = [Phase("a", "quick", limit=10), Phase(REFUSED, "tiny", limit=10)]
    good, refused = (
        {"status": "done", "seconds": 9.0, "reason": None},
        {"status": "failed", "seconds": 1.0, "reason": "no GPU"},
    )
    assert [step.as_expected for step in steps_of(plan, {"a": good, REFUSED: refused})] == [True, True]
    assert [step.as_expected for step in steps_of(plan, {"a": refused, REFUSED: good})] == [False, False]
    assert [step.as_expected for step in steps_of(plan, {"a": good | {"seconds": 11.0}})] == [False, False]
    [there, _] = steps_of(plan, {"a": good | {"seconds": None}})
    assert there.as_expected and replace(there, state="stopped").as_expected is False


STAND_IN = """
import json, sys, time
from pathlib import Path
out = Path(sys.argv[sys.argv.index("--out") + 1]) if "--out" in sys.argv else None
if out:
    stage, phases = sys.argv[sys.argv.index("--stage") + 1], json.loads(Path(__file__).with_name("phases").read_text())
    BEHAVIOUR
    done = {"status": "done", "seconds": 1.0, "reason": None}
    (out / f"gpu_check_{stage}.json").write_text(json.dumps({"phases": dict.fromkeys(phases[stage], done)}))
"""


@pytest.mark.parametrize(
    ("behaviour", "code", "said"),
    [
        ("pass", 0, "went well"),
        ("sys.exit(0)", 1, "missing !"),
        ("sys.exit(2)", 1, "exit code 2 !"),
        ("time.sleep(60)", 1, "too long !"),
    ],
    ids=["works", "writes nothing", "fails", "hangs"],
)
def test_an_old_result_does_not_pass_for_a_new_one(
    behaviour: str,
    code: int,
    said: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The stages are stand-ins. A good result of an earlier rehearsal lies in the folder."""
    root, out, done = tmp_path / "root", tmp_path / "out", {"status": "done", "seconds": 1.0, "reason": None}
    monkeypatch.setattr(gpu_rehearsal, "REFUSED", "nothing is refused")
    if behaviour.startswith("time"):
        monkeypatch.setattr(gpu_rehearsal, "SECONDS", dict.fromkeys(SECONDS, 0.2))
        monkeypatch.setattr(gpu_rehearsal, "GRACE_SECONDS", 0.2)
    (root / "benchmarks").mkdir(parents=True)
    out.mkdir()
    phases = {stage: [phase.name for phase in stage_plan(stage, rehearsal(root))] for stage in SECONDS}
    (root / "benchmarks" / "phases").write_text(json.dumps(phases))
    (root / "benchmarks" / "gpu_check.py").write_text(STAND_IN.replace("BEHAVIOUR", behaviour))
    monkeypatch.setattr(gpu_rehearsal, "tracked_files", lambda _: ["benchmarks/phases", "benchmarks/gpu_check.py"])
    for stage in SECONDS:
        old = {"phases": dict.fromkeys(phases[stage], done)}
        (out / f"gpu_check_{stage}.json").write_text(json.dumps(old))
    assert rehearse(root, out) == code
    printed = capsys.readouterr().out
    assert said in printed and printed.count("rehearsed") == 2, "the table of each stage is shown"


@pytest.mark.slow
def test_a_rehearsal(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Both stages from a copy of the tracked files, about two minutes. Nothing of ours is found but the copy."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert rehearse(ROOT, tmp_path) == 0, capsys.readouterr().out
    printed = capsys.readouterr().out
    assert "Stage first, rehearsed" in printed and "compiled tiny batch 64 exact" in printed
    first, measured = (json.loads((tmp_path / f"gpu_check_{stage}.json").read_text()) for stage in SECONDS)
    assert first["source_sha256"] == source_hash()
    assert first["phases"]["kernels"]["result"]["device"] == "emulated GPU"
    checks = first["phases"]["sanitize"]["result"]
    assert all(checks["equal_host"].values()) and all(check["holds"] for check in checks["float64"].values())
    for phase in (first["phases"]["tiny cuda fp16"], measured["phases"]["run cuda tiny"]):
        found = phase["result"]
        assert (found["device"], found["precision"], found["substituted"]) == ("emulated GPU", "fp16", [])
        parity = found["parity"]
        assert parity["passed"] and parity["again_equal"] == parity["scale_by_scale_equal"] == 1
    assert [row["mode"] for row in found["rows"]] == [["cuda-graph"]] * 2 and len(found["parts"]) == 2
    assert first["phases"]["regenerate tiny"]["result"]["made"] > 0, "weights were made, not carried"
    proof = first["phases"]["proof tiny"]["result"]
    assert proof["device"] == "emulated GPU" and proof["parity"]["passed"] and proof["replays"]["holds"]
    assert "built without CUDA" in first["phases"][REFUSED]["reason"]
    assert measured["phases"]["regenerate tiny"]["result"]["reason"] == REUSED
    assert {row["side"] for row in measured["rows"]} >= {"cuda", "ort-cpu", "torch.compile exact"}
    assert sys.executable not in (tmp_path / "gpu_check_first.json").read_text()
