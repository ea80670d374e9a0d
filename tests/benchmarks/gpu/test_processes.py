"""Phases as processes: order, crashes, limits, the deadline; and the plan that they follow."""

from __future__ import annotations

import os
import re
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from flexvar_bench import gpu_check
from flexvar_bench.gpu.files import ModelFiles
from flexvar_bench.gpu.measurement import RESERVE_SECONDS
from flexvar_bench.gpu.plan import (
    REUSED,
    Phase,
    PlanOptions,
    finished_before,
    phases,
    planned_seconds,
    select,
    with_limits,
)
from flexvar_bench.gpu.processes import Record, Runner
from flexvar_runtime.errors import InvalidInput

CHILD = """
import argparse, json, os, signal, subprocess, sys, time
from pathlib import Path
parser = argparse.ArgumentParser()
parser.add_argument("job")
for name in ("--work", "--result", "--options"):
    parser.add_argument(name)
given = parser.parse_args()
log = Path(given.work) / "log"
with log.open("a") as file:
    file.write(f"{given.job} {time.monotonic()}\\n")
if given.job != "mute":
    Path(given.result).write_text(json.dumps({"job": given.job, **json.loads(given.options)}))
if given.job == "crash":
    print("last words", file=sys.stderr, flush=True)
    os.kill(os.getpid(), signal.SIGSEGV)
if given.job == "fail":
    sys.exit("Nothing was found. Try again.")
if given.job == "hang":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    grandchild = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    (Path(given.work) / "grandchild").write_text(str(grandchild.pid))
    time.sleep(60)
time.sleep({"short": 0.6, "slow": 1.2}.get(given.job, 0))
with log.open("a") as file:
    file.write(f"/{given.job} {time.monotonic()}\\n")
"""


def run(
    work: Path, plan: list[Phase], seconds: float = 60, made: dict[str, dict[str, Any]] | None = None
) -> tuple[dict[str, Record], list[dict[str, str]]]:
    """Records, and the states that were reported on the way."""
    script = work / "child.py"
    script.write_text(CHILD)
    seen: list[dict[str, str]] = []
    runner = Runner(
        plan,
        work,
        time.monotonic() + seconds,
        dict(os.environ),
        lambda records: seen.append({name: record.status for name, record in records.items()}),
        command=(sys.executable, "-S", str(script)),
        made=made,
    )
    return runner.run(), seen


def test_one_that_crashes_takes_nothing_along(tmp_path: Path) -> None:
    plan = [
        Phase("a", "crash", {"n": 1}),
        Phase("b", "fail"),
        Phase("c", "quick", {"n": 3}),
        Phase("d", "quick", needs=("a",)),
        Phase("e", "quick", needs=("d",)),
        Phase("f", "quick", needs=("nobody",)),
    ]
    records, seen = run(tmp_path, plan)
    assert (records["a"].status, records["a"].reason) == ("failed", "ended by SIGSEGV")
    assert records["a"].stderr is not None and "last words" in records["a"].stderr
    assert records["a"].result == {"job": "crash", "n": 1}, "what it had found before is kept"
    assert (records["b"].status, records["b"].reason) == ("failed", "Nothing was found. Try again.")
    assert (records["c"].status, records["c"].reason, records["c"].result) == ("done", None, {"job": "quick", "n": 3})
    assert records["d"].reason == "not measured: it needs 'a', which is failed"
    assert records["e"].reason == "not measured: it needs 'd', which is not measured"
    assert records["f"].reason == "not measured: it needs 'nobody', which was left out"
    assert seen[0] == dict.fromkeys("abcdef", "not measured"), "reported before anything runs"
    assert all({"a": state} in [{"a": states["a"]} for states in seen] for state in ("running", "failed"))
    assert seen[-1] == {name: record.status for name, record in records.items()}


def test_what_an_earlier_run_found_is_not_taken(tmp_path: Path) -> None:
    run(tmp_path, [Phase("a", "quick", {"n": 1})])
    records, _ = run(tmp_path, [Phase("a", "mute")])
    assert (records["a"].status, records["a"].result) == ("done", None)


def test_what_is_there_is_not_made_again(tmp_path: Path) -> None:
    plan = [Phase("a", "fail"), Phase("b", "quick", needs=("a",))]
    records, _ = run(tmp_path, plan, made={"a": {"reason": "there from an earlier run"}})
    assert (records["a"].status, records["a"].seconds) == ("done", None)
    assert records["b"].status == "done", "what needs it is run"


def test_one_that_hangs_is_ended_with_all_it_started(tmp_path: Path) -> None:
    records, _ = run(tmp_path, [Phase("a", "hang", limit=1.0), Phase("b", "quick")])
    assert records["a"].status == "stopped"
    assert re.fullmatch("stopped after 1 s, its limit", records["a"].reason or "")
    assert records["a"].result == {"job": "hang"}
    assert records["b"].status == "done"
    grandchild = int((tmp_path / "grandchild").read_text())
    assert _is_gone(grandchild)


def _is_gone(pid: int) -> bool:
    """Or a zombie that waits for whoever adopted it."""
    for _ in range(50):
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.05)
    return False


def test_the_deadline_is_kept(tmp_path: Path) -> None:
    plan = [
        Phase("long", "quick", seconds=300, limit=400),
        Phase("a", "hang", seconds=1, limit=100),
        Phase("b", "quick", seconds=1),
    ]
    records, _ = run(tmp_path, plan, seconds=2)
    assert records["long"].reason is not None and re.match("not measured: .* 300 s", records["long"].reason)
    assert records["a"].reason == "stopped after 2 s, the run's deadline"
    assert records["b"].status == "not measured"


def test_times_are_taken_alone_and_the_rest_runs_together(tmp_path: Path) -> None:
    plan = [
        Phase("first", "short", alone=False),
        Phase("second", "slow", alone=False),
        Phase("timed", "quick", needs=("first",)),
        Phase("behind", "other", alone=False, needs=("first",)),
    ]
    run(tmp_path, plan)
    events: dict[str, list[float]] = {}
    for line in (tmp_path / "log").read_text().splitlines():
        name, at = line.split()
        events.setdefault(name, []).append(float(at))
    assert max(events["short"][0], events["slow"][0]) < min(events["/short"][0], events["/slow"][0]), "together"
    assert events["quick"][0] > events["/slow"][0], "not beside the second, which it does not need"
    assert events["other"][0] > events["/quick"][0], "what is less important does not delay it"


@pytest.mark.parametrize("asked", [PlanOptions(), PlanOptions(backends=("ort-cuda",)), PlanOptions(tiny=True)])
def test_the_plan_is_in_order(asked: PlanOptions) -> None:
    plan = phases(asked)
    names = [phase.name for phase in plan]
    assert len(set(names)) == len(names)
    for i, phase in enumerate(plan):
        assert set(phase.needs) <= set(names[:i]), phase.name
        assert phase.seconds <= phase.limit


def test_the_plan_fits_nine_minutes() -> None:
    """With one backend that needs no engines: what the docstring says."""
    plan = phases(PlanOptions(backends=("cuda",)))
    *important, dynamic, exact = plan
    assert (dynamic.name, exact.name) == ("compiled d16 batch 1 dynamic", "compiled d16 batch 1 exact")
    total = planned_seconds(important)
    assert total < 9 * 60 - RESERVE_SECONDS
    *listed, promised = re.findall(r"^ {3,4}(\d+) ", gpu_check.__doc__ or "", re.MULTILINE)
    assert sum(map(int, listed)) == int(promised) == total
    assert planned_seconds(plan) == total + 70 + 60


def test_what_an_earlier_run_made_is_not_counted(tmp_path: Path) -> None:
    plan = select(phases(PlanOptions(depths=(16,), backends=("ort-cuda",))), ["run ort-cuda d16"])
    files = ModelFiles.of(tmp_path, "d16")
    files.bundle.mkdir()
    files.stamp.write_text("sources")
    assert finished_before(plan, tmp_path, "sources") == {}, "not without its proof"
    files.proof.touch()
    [(name, result)] = finished_before(plan, tmp_path, "sources").items()
    assert name == "export d16" and result == {"model": "d16", "precision": "fp16", "reason": REUSED}
    left = [phase for phase in plan if phase.name != name]
    assert planned_seconds(plan) - planned_seconds(left) == 90 - 35, "the tiny model is exported and tried beside it"


def test_limits_grow_with_the_time_there_is() -> None:
    plan = phases(PlanOptions(backends=("tensorrt", "ort-cuda")))
    assert planned_seconds(plan) > 9 * 60
    limits = {name: {p.name: p.limit for p in with_limits(plan, minutes)} for name, minutes in (("9", 9), ("18", 18))}
    assert limits["9"] == {phase.name: phase.limit for phase in plan}
    assert limits["18"] == {phase.name: 2 * phase.limit for phase in plan}
    one = select(plan, ["build tensorrt d16"])
    assert with_limits(one, 9)[-1].limit == pytest.approx(150 * 540 / planned_seconds(one))
    assert planned_seconds(one) == 20 + 90 + 70, "what runs beside the exports is not counted"
    assert with_limits(one, 0.1) == one, "never shorter"


def test_parts_are_chosen_with_what_they_need() -> None:
    plan = phases(PlanOptions(backends=("ort-cuda", "tensorrt")))
    chosen = [phase.name for phase in select(plan, ["profile tensorrt d20"])]
    needed = ["machine", "export tiny", "export d20", "tiny tensorrt", "build tensorrt d20", "run tensorrt d20"]
    assert chosen == [*needed, "profile tensorrt d20"]
    assert {phase.job for phase in select(plan, ["reference"])} == {"machine", "reference"}
    assert select(plan, None) == plan
    with pytest.raises(InvalidInput, match=r"--only 'profil'.*build tensorrt d16"):
        select(plan, ["profil"])
