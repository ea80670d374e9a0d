"""Runs: what a plan holds, turns and parts, loads against a fake clock, and the whole command on the tiny model."""

from __future__ import annotations

import json
import math
import multiprocessing as mp
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from flexvar_bench import energy, machine, turns, variants, workers
from flexvar_bench.against_reference import unavoidable_flops
from flexvar_bench.limits import PHASE_SAVING, decoder_flops
from flexvar_bench.records import Measured, Scenario, Served, read
from flexvar_bench.turns import Costs, call_flops, measure, measured, serve
from flexvar_bench.variants import CostWork, PlainCaller, RuntimeCaller, Sample, Subject, Work, opened
from flexvar_bench.workers import started
from flexvar_bench.workload import STEPS, Case, Extent, Load, Model, Plan, calls_of, plan, read_quality, schedule
from flexvar_runtime import ArtifactRefused, Bundle, FlexVARPipeline, InvalidInput
from flexvar_runtime.cli.main import main
from flexvar_runtime.deadlines.choice import quality_order

WORK = Work(schedule(4), 2, True)
SCENARIO = Scenario(
    name="m, 4 steps",
    model="m",
    variant="ort-cpu",
    precision="fp32",
    schedule=str(WORK.schedule),
    batch=2,
    guided=True,
    threads=1,
)


@pytest.fixture
def model(tiny_bundle: Path) -> Model:
    return Model(name="tiny", bundle=tiny_bundle)


def test_a_plan(model: Model) -> None:
    extent = Extent(variants=("ort-cpu", "torch-eager"), steps=(10, 6, 4), batches=(1, 4), repeats=6, requests=5)
    wanted = plan(model, extent)
    said = [(case.variants, len(case.work.schedule), case.work.batch, case.work.guided) for case in wanted.cases]
    both, ours = ("ort-cpu", "torch-eager"), ("ort-cpu",)
    assert said == [
        (both, 10, 1, True),
        (ours, 6, 1, True),
        (both, 4, 1, True),
        (ours, 10, 4, True),
        (ours, 10, 1, False),
    ]
    assert [(load.mode, load.work.batch) for load in wanted.loads] == [
        ("single-stream", 1),
        ("offline", 4),
        ("server", 1),
    ]
    assert {load.variant for load in wanted.loads} == {"ort-cpu"}
    assert [calls_of(load) for load in wanted.loads] == [5, 1, 5]
    assert wanted.calls == 2 * 7 + 7 + 2 * 7 + 4 + 7 + (6 + 2 + 6)
    assert wanted.costs == CostWork((1, 4), 6)
    assert plan(model, replace(extent, costs=(2,), repeats=80)).costs == CostWork((2,), 10)
    least = plan(model, Extent(steps=(4,), batches=(1,), repeats=1, requests=0, costs=()))
    assert not least.loads and least.costs is None


def test_schedules_have_as_many_steps_as_they_say() -> None:
    assert all(len(schedule(steps)) == steps and schedule(steps)[-1] == (16, 16) for steps in STEPS)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("variants", ("torch",)),
        ("variants", ()),
        ("steps", (10, 3)),
        ("steps", ()),
        ("batches", ()),
        ("batches", (0,)),
        ("costs", (0,)),
        ("repeats", 0),
        ("requests", -1),
        ("seconds", 0.0),
        ("seconds", math.nan),
    ],
)
def test_plans_refused(model: Model, option: str, value: Any) -> None:
    with pytest.raises(InvalidInput, match=f"^{option} "):
        plan(model, replace(Extent(), **{option: value}))


def test_quality_tables(tmp_path: Path) -> None:
    path = tmp_path / "quality.json"
    path.write_text(json.dumps({"1_2_4": {"frechet": 3.5}}))
    [row] = read_quality(path, "m")
    assert (row.model, row.schedule, row.accuracy, row.frechet) == ("m", "1_2_4", None, 3.5)


def test_the_demo_models_quality_is_a_table() -> None:
    rows = read_quality(Path(__file__).parents[2] / "demo" / "model" / "quality.json", "demo")
    assert sorted(len(row.schedule.split("_")) for row in rows) == [4, 5, 6, 7, 8, 9, 10]


def test_samples_become_medians_with_their_turns() -> None:
    samples = [(turn, Sample(turn + 1.0, 0.1, (0.2, turn / 10), 0.3, 0.4)) for turn in (3, 0, 5)]
    record = measured(SCENARIO, "0" * 64, samples, 7, 1e9, 3.0, "")
    assert (record.seconds, record.turns) == ((4.0, 1.0, 6.0), (3, 0, 5))
    assert (record.condition, record.scales, record.sampling, record.decode) == (0.1, (0.2, 0.3), 0.3, 0.4)
    assert measured(SCENARIO, "0" * 64, [], None, 1e9, None, "no such backend").note == "not measured: no such backend"
    partly = measured(SCENARIO, "0" * 64, [(0, Sample(1.0, decode=0.5))], None, 1e9, None, "")
    assert (partly.condition, partly.scales, partly.decode) == (None, None, 0.5)


def test_operations_of_a_call_grow_with_its_batch_and_guidance(tiny_bundle: Path) -> None:
    model = Bundle.open(tiny_bundle).manifest.model
    one = call_flops(model, Work(WORK.schedule, 1, False))
    assert call_flops(model, Work(WORK.schedule, 3, False)) == 3 * one
    assert one < call_flops(model, Work(WORK.schedule, 1, True)) < 2 * one
    published = replace(model, downsampling=16, vocabulary=8912, code_dim=32)
    assert call_flops(published, WORK) > 250e9 > call_flops(model, WORK)  # with its decoder
    for other in ({"downsampling": 8}, {"vocabulary": 8192}, {"code_dim": 16}):
        assert call_flops(replace(published, **other), WORK) < 250e9


def test_the_reference_is_held_against_the_decoder_that_the_bundle_has(tiny_bundle: Path) -> None:
    manifest = Bundle.open(tiny_bundle).manifest
    phases, plain = (
        unavoidable_flops(replace(manifest, decoder=decoder), WORK.schedule) for decoder in ("phases", "plain")
    )
    assert plain - phases == pytest.approx(PHASE_SAVING * decoder_flops(WORK.schedule))


@pytest.fixture
def clock(clock_of: Any) -> Any:
    return clock_of(turns)


def caller(clock: Any, seconds: float = 2.0) -> Callable[[Work], Sample | str]:
    def call(work: Work) -> Sample:
        clock.now += seconds
        return Sample(seconds)

    return call


def test_one_after_the_other(clock: Any) -> None:
    load = Load(variant="ort-cpu", work=replace_batch(1), mode="single-stream", requests=5)
    served = serve(load, caller(clock), SCENARIO)
    assert served is not None and served.latencies == (2.0,) * 5 and served.images_per_second == 0.5


def test_all_at_once_waits_for_the_batches_before(clock: Any) -> None:
    served = serve(Load(variant="ort-cpu", work=replace_batch(2), mode="offline", requests=6), caller(clock), SCENARIO)
    assert served is not None and served.latencies == (2.0, 2.0, 4.0, 4.0, 6.0, 6.0) and served.images_per_second == 1


def test_a_server_queues(clock: Any) -> None:
    """At 0.7 of what it can do a request waits for those before it: Pollaczek and Khinchin say 1 + 0.7 / 0.6 times."""
    load = Load(variant="ort-cpu", work=replace_batch(1), mode="server", requests=4000, rate=0.7, bound=3)
    served = serve(load, caller(clock), SCENARIO)
    assert served is not None and served.rate == 0.35 and served.bound == 6.0
    assert min(served.latencies) == pytest.approx(2.0)
    assert np.mean(served.latencies) == pytest.approx(2 * (1 + 0.7 / 0.6), rel=0.15)
    assert served.images_per_second == pytest.approx(0.35, rel=0.05)


def test_a_load_on_what_cannot_run(clock: Any) -> None:
    assert serve(Load(variant="x", work=WORK, mode="offline", requests=2), lambda work: "no", SCENARIO) is None


def replace_batch(batch: int) -> Work:
    return Work(WORK.schedule, batch, True)


def fake_workers(
    clock: Any, seconds: float = 2.0, precision: str | None = None, resets: tuple[str, ...] = ("ort-cpu",)
) -> Any:
    """In place of `started`: workers whose every call takes so long, and of which these can reset their peak."""

    class Worker:
        def __init__(self, subject: Subject) -> None:
            self.subject, self.call, self.precision = subject, caller(clock, seconds), precision

        def reset_peak(self) -> bool:
            return self.subject.variant in resets

        def peak_bytes(self) -> int:
            return 1

        def joules(self, work: Work) -> float | None:
            return 2.5 if self.subject.variant == "ort-cpu" else None

        def save_costs(self, work: CostWork) -> str:
            return "no folder for them"

    @contextmanager
    def fakes(subjects: list[Subject]) -> Iterator[list[Worker]]:
        yield [Worker(subject) for subject in subjects]

    return fakes


def test_a_case_ends_when_its_time_is_used_up(model: Model, clock: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """After whole turns, and never before three of them."""
    monkeypatch.setattr(turns, "started", fake_workers(clock))
    for limit, count in ((math.inf, 9), (19.0, 5), (1.0, 3)):
        case = Case(variants=("ort-cpu", "ort-plain"), work=WORK, repeats=9, seconds=limit)
        rows = list(measure(Plan(model=model, cases=(case,), loads=(), costs=None), 1))
        assert [len(row.seconds) for row in rows if isinstance(row, Measured)] == [count, count]


def test_every_call_comes_after_a_rest(model: Model, clock: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else it may pay for the threads of the one before, which spin on."""
    monkeypatch.setattr(turns, "started", fake_workers(clock))
    case = Case(variants=("ort-cpu", "ort-plain"), work=WORK, repeats=4)
    rests: list[tuple[float, float]] = []
    monkeypatch.setattr(clock, "sleep", lambda seconds: rests.append((clock.now, seconds)))
    list(measure(Plan(model=model, cases=(case,), loads=(), costs=None), 1))
    assert rests == [(2.0 * calls, 0.1) for calls in range(2, 10)]  # two were warm-ups


def test_energy_is_that_of_the_variant_that_counts_it(
    model: Model, clock: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(turns, "started", fake_workers(clock))
    case = Case(variants=("ort-cpu", "ort-plain"), work=WORK, repeats=3)
    rows = list(measure(Plan(model=model, cases=(case,), loads=(), costs=None), 1))
    assert [row.joules for row in rows if isinstance(row, Measured)] == [2.5, None]


def test_only_calls_on_a_gpu_are_counted(tiny_bundle: Path, clock_of: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = clock_of(energy)
    monkeypatch.setattr(variants, "gpu_counter", lambda: lambda: 300 * clock.now)
    monkeypatch.setattr(RuntimeCaller, "__call__", lambda self, work: clock.sleep(0.02))
    with FlexVARPipeline.from_bundle(tiny_bundle, "ort-cpu", threads=1) as pipeline:
        assert RuntimeCaller(pipeline).joules(WORK) is None
        monkeypatch.setattr(pipeline.backend, "device", object())
        assert RuntimeCaller(pipeline).joules(WORK) == pytest.approx(300 * 0.02)


def test_costs_that_cannot_be_kept_say_why(model: Model, clock: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The results stand; peers have none."""
    monkeypatch.setattr(turns, "started", fake_workers(clock))
    case = Case(variants=("ort-cpu", "ort-plain"), work=WORK, repeats=1)
    said: list[str] = []
    *rows, costs = measure(Plan(model=model, cases=(case,), loads=(), costs=CostWork((1, 4), 3)), 1, said.append)
    assert len(rows) == 2
    assert costs == Costs(model="tiny", backend="ort-cpu", file=None, rows=0, note="no folder for them")
    assert said[0] == "tiny: opening ort-cpu, ort-plain for 4 calls"
    assert said[-1] == "tiny: costs for deadlines on ort-cpu, batch 1, 4"


def test_a_row_has_a_peak_of_its_own_or_none(model: Model, clock: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns, "started", fake_workers(clock))
    case = Case(variants=("ort-cpu", "ort-plain"), work=WORK, repeats=1)
    rows = list(measure(Plan(model=model, cases=(case,), loads=(), costs=None), 1))
    assert [row.peak_memory_bytes for row in rows if isinstance(row, Measured)] == [1, None]


def test_a_peak_is_counted_anew() -> None:
    if not workers._reset_peak():
        pytest.skip("/proc/self/clear_refs cannot be written here")
    np.ones(2**27, np.uint8)
    before = workers._peak_bytes()
    assert workers._reset_peak() and workers._peak_bytes() < before - 2**26


def test_the_precision_of_a_row_is_what_the_library_computes_in(
    model: Model, clock: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a peer says; of those that do not, the bundle's."""
    work = replace_batch(1)
    case = Case(variants=("openvino-plain",), work=work, repeats=1)
    load = Load(variant="openvino-plain", work=work, mode="offline", requests=1)
    for said, precision in (("bf16", "bf16"), (None, "fp32")):
        monkeypatch.setattr(turns, "started", fake_workers(clock, precision=said))
        rows = list(measure(Plan(model=model, cases=(case,), loads=(load,), costs=None), 1))
        assert [row.scenario.precision for row in rows if isinstance(row, Measured | Served)] == [precision] * 2


class FakeOpenVino:
    """A processor with bfloat16: compiled models remember how long the past was at every call."""

    def __init__(self, hint: str) -> None:
        self.hint, self.pasts = hint, list[int]()

    def compile_model(self, path: str, device: str, settings: dict[str, Any]) -> FakeOpenVino:
        assert "INFERENCE_PRECISION_HINT" not in settings  # the library's own default
        return self

    def get_property(self, name: str) -> Any:
        return SimpleNamespace(get_type_name=lambda: self.hint)

    def __call__(self, feeds: dict[str, Any]) -> Any:
        self.pasts.append(len(feeds["past_k_0"]))
        return defaultdict(lambda: np.zeros(1))


@pytest.mark.parametrize(("hint", "precision"), [("f32", "fp32"), ("bf16", "bf16")])
def test_plain_openvino_says_its_precision_and_meets_a_past_first(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch, hint: str, precision: str
) -> None:
    core = FakeOpenVino(hint)
    monkeypatch.setattr(variants, "shared_core", lambda: core)
    with opened(Subject("openvino-plain", tiny_bundle, None, None, 1)) as call:
        assert isinstance(call, PlainCaller) and call.precision == precision
    assert core.pasts == [1]


@pytest.mark.parametrize(
    ("peer", "precision"), [("ort-plain", "fp16"), ("ort-plain", "int8"), ("openvino-plain", "bf16")]
)
def test_the_past_of_plain_graphs_has_the_type_they_declare(
    tiny_bundles: Callable[[str], Path], peer: str, precision: str
) -> None:
    if peer == "openvino-plain":
        pytest.importorskip("openvino")
    with opened(Subject(peer, tiny_bundles(precision), None, None, 1)) as call:
        assert call(replace_batch(1)).total > 0


class LibraryError(Exception):
    """As ONNX Runtime's: of no kind that Python knows."""


def test_why_a_library_failed_is_said(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(work: Work) -> Sample:
        raise LibraryError("no such kernel")

    assert workers._answer(fail, WORK) == "LibraryError: no such kernel"

    def fails_to_open(subject: Subject) -> Any:
        raise LibraryError("no such operator")

    monkeypatch.setattr(workers, "opened", fails_to_open)
    near, far = mp.Pipe()
    workers._serve(far, Subject("ort-plain", tiny_bundle, None, None, 1))
    assert near.recv() == ("LibraryError: no such operator", None)


def test_a_worker_keeps_costs_that_a_pipeline_finds(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every schedule of the quality order at every batch, measured in the worker's own process."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with started([Subject("ort-cpu", tiny_bundle, None, None, 1)]) as [worker]:
        saved = worker.save_costs(CostWork((1, 2), 1))
    assert not isinstance(saved, str), saved
    with FlexVARPipeline.from_bundle(tiny_bundle, "ort-cpu", threads=1) as pipe:
        order = quality_order(pipe.bundle.manifest)
        assert saved.rows == 2 * len(order) == len(json.loads(Path(saved.file).read_text())["rows"])
        assert pipe.choose_schedule(2, 3.6e6).schedule == order[0]
        assert all(cost is not None for _, cost in pipe.choose_schedule(1, 3.6e6).considered)


@pytest.mark.timeout(300)
@pytest.mark.slow
def test_the_whole_command(
    tiny_bundle: Path,
    tiny_checkpoint: tuple[Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A backend, a peer on the same graphs and the reference, in turns; a variant that is not there says so."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(machine, "CEILING_SECONDS", 0.1)
    results = tmp_path / "results.jsonl"
    transformer, vae = tiny_checkpoint
    call = [
        *("bench", "run", str(tiny_bundle), "-o", str(results), "--name", "tiny", "--threads", "1"),
        *("--variants", "ort-cpu,ort-plain,torch-eager,tensorrt", "--checkpoint", str(transformer), "--vae", str(vae)),
        *("--steps", "4", "--batches", "1", "--repeats", "3", "--requests", "3", "--json"),
    ]
    assert ended([*call, "--no-costs"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["models"], said["records"], said["costs"]) == (["tiny"], 8, [])
    assert not (tmp_path / "cache" / "flexvar").exists()
    found = read(results)
    rates = found.ceiling.flops_per_second
    assert rates.keys() == {"fp32", "bf16"} and 1e8 < rates["fp32"] <= rates["bf16"] and found.environment.threads == 1
    rows = {(row.scenario.variant, row.scenario.guided): row for row in found.measured}
    assert {name for name, _ in rows} == {"ort-cpu", "ort-plain", "torch-eager", "tensorrt"}
    for (name, _), row in rows.items():
        assert (len(row.seconds) == 3) == (name != "tensorrt")
    assert rows["tensorrt", True].note.startswith("not measured: ")
    told = [row for row in found.measured if row.scales is not None]
    assert {row.scenario.variant for row in told} == {"ort-cpu", "ort-plain"}
    assert all(len(row.scales or ()) == 4 for row in told)
    assert all((row.told is not None) == (row in told) for row in found.measured)
    assert all(0.5 < row.told <= 1 + 1e-6 for row in told if row.told is not None)
    turns = [turn for row in found.measured if row.scenario.guided for turn in row.turns]
    assert sorted(turns) == list(range(9))  # one at a time, in turns
    assert [load.mode for load in found.served] == ["single-stream", "offline", "server"]
    assert ended(call) == 2 and results.name in capsys.readouterr().out  # replaced with --force only
    assert ended(["bench", "compare", str(results), str(results), "--json"]) == 0
    compared = json.loads(capsys.readouterr().out)
    assert {change["verdict"] for change in compared["changes"]} == {"too few calls"} and not compared["warnings"]
    assert ended(["bench", "report", str(results), "-o", str(tmp_path / "page")]) == 0
    assert "tiny" in (tmp_path / "page" / "report.html").read_text(encoding="utf-8")


def test_workers_open_what_the_session_allowed(bundle_copy: Path) -> None:
    path = bundle_copy / "manifest.json"
    document = json.loads(path.read_text())
    document["parity"]["passed"] = False
    path.write_text(json.dumps(document))
    with opened(Subject("ort-cpu", bundle_copy, None, None, 1)) as call:
        assert call(WORK).total > 0


def test_time_per_scale_sums_to_the_total(tiny_bundle: Path) -> None:
    """What the runtime tells of its parts is all there is, but for a few microseconds between them."""
    with opened(Subject("ort-cpu", tiny_bundle, None, None, 1)) as call:
        call(WORK)
        gaps = []
        for _ in range(5):
            sample = call(WORK)
            assert sample.condition is not None and sample.scales and sample.sampling and sample.decode
            gaps.append(1 - (sample.condition + sum(sample.scales) + sample.sampling + sample.decode) / sample.total)
    assert min(gaps) > -1e-6 and min(gaps) < 0.03


def ended(arguments: list[str]) -> int:
    with pytest.raises(SystemExit) as end:
        main(arguments)
    return int(end.value.code or 0)


def test_files_of_results(tmp_path: Path) -> None:
    """A run that was killed leaves half a line at most; anything else that is no result is refused."""
    from flexvar_bench.machine import environment
    from flexvar_bench.records import Ceiling, line, write

    path = tmp_path / "results.jsonl"
    row = measured(SCENARIO, "0" * 64, [(0, Sample(1.0))], None, 1.0, None, "")
    load = Served(scenario=SCENARIO, mode="offline", rate=None, bound=None, latencies=(1.0,), images_per_second=1.0)
    ceiling = Ceiling(copy_bytes_per_second=1e9, flops_per_second={"fp32": 1e11})
    write(path, [environment(1), ceiling, row, load])
    whole = read(path)
    assert whole.measured == (row,) and whole.served == (load,)
    with path.open("a") as file:
        file.write(line(row)[:40])
    assert read(path).measured == (row,)
    for text in ("{}\n", "[1]\n", '{"schema": 2}\n', line(row) + "\n"):
        path.write_text(text)
        with pytest.raises(ArtifactRefused):
            read(path)
    assert isinstance(row, Measured)
