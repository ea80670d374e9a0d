"""Several models in one run: from options matched by position, from a suite, and made where the suite brings none."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from flexvar_bench import session, suite_models
from flexvar_bench.records import Ceiling, Measured, Quality, Scenario, read, write
from flexvar_bench.suite import Entry, from_options, read_suite
from flexvar_bench.suite_models import make, model_of
from flexvar_bench.turns import Costs, measured
from flexvar_bench.variants import Sample, Subject, opened
from flexvar_bench.workload import Extent, Model, Plan, plan
from flexvar_runtime import ArtifactRefused, Bundle, InvalidInput
from flexvar_runtime.cli.main import main

STANDARD = Path(__file__).parents[2] / "benchmarks" / "standard.toml"
SECONDS_OF_D16 = {"ort-cpu": 8, "openvino": 8, "ort-plain": 10, "openvino-plain": 10, "torch-eager": 20}  # slow ones


def options(bundles: list[Path], **given: list[str]) -> tuple[Entry, ...]:
    return from_options(bundles, **({"names": [], "checkpoints": [], "vaes": [], "weights": [], "quality": []} | given))


def test_options_belong_to_bundles_by_position() -> None:
    one, two = options(
        [Path("a.bundle"), Path("b.bundle")],
        names=["a", "b"],
        checkpoints=["-", "b.pth"],
        vaes=["-", "vae.pth"],
        weights=["-", "ema"],
        quality=["a.json", "-"],
    )
    assert one == Entry(name="a", bundle="a.bundle", quality="a.json")
    assert two == Entry(name="b", bundle="b.bundle", checkpoint="b.pth", vae="vae.pth", weights="ema")


def test_a_bundle_without_a_name_is_called_by_its_size(tiny_bundle: Path) -> None:
    [entry] = options([tiny_bundle])
    assert entry.name == "d2"


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"names": ["a"]}, "--name"),
        ({"names": ["a", "b"], "quality": ["q.json"] * 3}, "--quality"),
        ({"names": ["a", "a"]}, "'a', 'a'"),
        ({"names": ["a", "b"], "checkpoints": ["c.pth", "-"]}, "'a'.*bundle and checkpoint"),
        ({"names": ["a", "b"], "checkpoints": ["c.pth", "-"], "vaes": ["-", "v.pth"]}, "'a'.*bundle and checkpoint"),
        ({"names": ["a", "b"], "weights": ["ema", "-"]}, "weights of the model 'a' needs its checkpoint"),
    ],
)
def test_options_refused(given: dict[str, list[str]], named: str) -> None:
    with pytest.raises(InvalidInput, match=named):
        options([Path("a.bundle"), Path("b.bundle")], **given)


def test_no_model_is_refused() -> None:
    with pytest.raises(InvalidInput, match="--suite"):
        options([])


def test_a_suite(tmp_path: Path) -> None:
    """Files are relative to it, and what it leaves out is as the options say."""
    path = tmp_path / "suite.toml"
    path.write_text(
        '[[model]]\nname = "a"\nbundle = "a.bundle"\nquality = "/q.json"\nrepeats = 3\nsteps = [4]\ncosts = []\n'
        '[[model]]\nname = "b"\nrandom = "d16"\nprecision = "int8"\nseconds = 60\n'
    )
    a, b = read_suite(path)
    assert a.bundle == str(tmp_path / "a.bundle") and a.quality == "/q.json" and b.bundle is None
    assert (a.precision, b.precision) == (None, "int8")
    asked = Extent(repeats=9, requests=1)
    assert a.extent(asked) == replace(asked, repeats=3, steps=(4,), costs=())
    assert b.extent(asked) == replace(asked, seconds=60.0)


@pytest.mark.parametrize(
    "text",
    [
        "model = 3",
        "[[model]",
        '[[model]]\nname = "a"\nbundel = "a.bundle"',
        '[[model]]\nname = "a"\nbundle = "a.bundle"\nrepeats = "3"',
        '[[model]]\nname = "a"',
        '[[model]]\nname = ""\nrandom = "d16"',
        '[[model]]\nname = "a"\nrandom = "d16"\nbundle = "a.bundle"',
        '[[model]]\nname = "a"\ncheckpoint = "a.pth"',
        '[[model]]\nname = "a"\nrandom = "d16"\nprecision = "int4"',
        '[[model]]\nname = "a"\nrandom = "d16"\nweights = "ema"',
        '[[model]]\nname = "a"\ncheckpoint = "a.pth"\nvae = "v.pth"\nweights = "average"',
        '[[model]]\nname = "a"\nbundle = "a.bundle"\nprecision = "int8"',
        '[[model]]\nname = "a"\nrandom = "d16"\n[[model]]\nname = "a"\nrandom = "d20"',
    ],
)
def test_suites_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "suite.toml"
    path.write_text(text)
    with pytest.raises((ArtifactRefused, InvalidInput)) as refusal:
        read_suite(path)
    assert "bundle again" not in refusal.value.fix


def test_models_of_a_suite_never_share_a_file(tmp_path: Path) -> None:
    names = ("a b", "a-b", "../a", "模")
    models = [model_of(Entry(name=name, random="d16"), tmp_path) for name in names]
    files = [file for one in models for file in (one.bundle, one.transformer)]
    assert len(set(files)) == len(files)
    assert {one.bundle.parent for one in models} == {tmp_path}
    with pytest.raises(InvalidInput, match=r"random .*'d1000'"):
        model_of(Entry(name="a", random="d1000"), tmp_path)


def test_the_standard_suite_is_small_enough() -> None:
    """Two models that are made for the run. Of d16's size every call is counted at what it takes on a slow machine, and
    every case ends once its time is used up."""
    demo, d16 = read_suite(STANDARD)
    assert all(Path(file).is_file() for file in (demo.checkpoint, demo.vae, demo.quality) if file is not None)
    assert demo.bundle is None and d16.random == "d16"
    assert plan(model_of(demo, Path()), demo.extent(Extent())).calls < 1500
    wanted = plan(model_of(d16, Path()), d16.extent(Extent()))
    seconds = 0.0
    for case in wanted.cases:
        turn = case.work.batch * sum(SECONDS_OF_D16[name] for name in case.variants)
        turns = min(case.repeats, max(3, math.ceil(case.seconds / turn)))
        seconds += (1 + turns) * turn
    assert wanted.costs is not None and wanted.costs.batches == (1,) and not wanted.loads
    seconds += 2 * 4 * (1 + wanted.costs.repeats) * SECONDS_OF_D16["ort-cpu"]  # two backends, four schedules
    assert seconds < 20 * 60


@pytest.mark.timeout(300)
@pytest.mark.slow
def test_a_model_is_made_for_the_run_and_made_again(cached_exports: None, tmp_path: Path) -> None:
    """Random weights of the tiny size stand in for d16's, and the order of its schedules goes with it."""
    table = tmp_path / "quality.json"
    table.write_text(json.dumps({"1_4_16": {"frechet": 2.0}, "1_2_16": {"frechet": 1.0}, "1_2_4": {"frechet": 0.5}}))
    entry = Entry(name="t", random="tiny", precision="int8", quality=str(table))
    model, said = model_of(entry, tmp_path / "made"), list[str]()
    make(entry, model, 1, said.append)
    assert said == ["t: random weights, export and proof"]
    manifest = Bundle.open(model.bundle).manifest
    assert manifest.parity.passed and manifest.precision == "int8"
    assert manifest.defaults.quality_order == ("1_2_16", "1_4_16")
    assert model.transformer is not None and model.transformer.is_file()
    bare = Entry(name="t", checkpoint="none.pth", vae="none.pth")
    with pytest.raises(ArtifactRefused, match=r"none\.pth"):  # as the process that exports said it
        make(bare, model_of(bare, tmp_path / "made"), 1)
    assert Bundle.open(model.bundle).manifest == manifest


def test_the_weights_of_a_checkpoint_are_chosen_for_the_export_and_for_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = Entry(name="t", checkpoint="c.pth", vae="v.pth", weights="ema")
    chosen: list[Any] = []
    monkeypatch.setattr("flexvar_export.bundle.export_bundle", lambda *_, weights, **__: chosen.append(weights))
    suite_models._make(entry, model_of(entry, Path("made")), 1)

    def load(transformer: Path, vae: Path, *, weights: str | None) -> None:
        raise LookupError(weights)

    monkeypatch.setattr("flexvar_ref.load", load)
    with pytest.raises(LookupError, match="ema"), opened(Subject("torch-eager", Path(), Path(), Path(), 1, "ema")):
        pass
    assert chosen == ["ema"]


@pytest.fixture
def faked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Nothing is measured or made: what was measured, in order, with the calls of its plan."""
    done: list[tuple[str, int]] = []

    def ceiling(threads: int) -> Ceiling:
        done.append(("ceiling", threads))
        return Ceiling(copy_bytes_per_second=1e9, flops_per_second={"fp32": 1e11})

    def measure(wanted: Plan, threads: int, progress: Callable[[str], None]) -> list[Measured | Costs]:
        done.append((wanted.model.name, wanted.calls))
        costs = Costs(model=wanted.model.name, backend="ort-cpu", file="f", rows=4, note="")
        return [row(wanted.model.name), *([costs] if wanted.costs else [])]

    def made(entry: Entry, model: Model, threads: int, progress: Callable[[str], None]) -> None:
        if entry.bundle is None:
            done.append((f"made {model.name}", threads))

    monkeypatch.setattr(session, "ceiling", ceiling)
    monkeypatch.setattr(session, "measure", measure)
    monkeypatch.setattr(session, "make", made)
    return done


def row(model: str) -> Measured:
    scenario = Scenario(
        name=model, model=model, variant="v", precision="fp32", schedule="1_2", batch=1, guided=True, threads=1
    )
    return measured(scenario, "0" * 64, [(0, Sample(1.0))], peak=None, flops=1.0, joules=None, note="")


def ended(arguments: list[str]) -> int:
    with pytest.raises(SystemExit) as end:
        main(arguments)
    return int(end.value.code or 0)


def test_two_bundles_in_one_command_then_a_third(
    tiny_bundle: Path, tmp_path: Path, faked: list[tuple[str, int]], capsys: pytest.CaptureFixture[str]
) -> None:
    """The machine is measured before and after, and the best of it stays in the file."""
    table, results = tmp_path / "q.json", tmp_path / "results.jsonl"
    table.write_text(json.dumps({"1_2_16": {"frechet": 3.0}}))
    bundle, output = str(tiny_bundle), ["-o", str(results), "--threads", "1", "--requests", "0", "--json"]
    two = ["bench", "run", bundle, bundle, "--name", "a", "--name", "b", "--quality", "-", "--quality", str(table)]
    assert ended([*two, *output]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["models"] == ["a", "b"] and [costs["model"] for costs in said["costs"]] == ["a", "b"]
    assert faked == [("ceiling", 1), ("a", 44), ("b", 44), ("ceiling", 1)]
    assert ended(["bench", "run", bundle, "--name", "c", "--append", "--no-costs", *output]) == 0
    assert json.loads(capsys.readouterr().out)["costs"] == []
    assert [name for name, _ in faked] == ["ceiling", "a", "b", "ceiling", "c", "ceiling"]
    found = read(results)
    assert [one.scenario.model for one in found.measured] == ["a", "b", "c"]
    assert found.quality == (Quality(model="b", schedule="1_2_16", accuracy=None, frechet=3.0),)


def test_what_cannot_be_appended_is_refused_before_anything_is_measured(
    tiny_bundle: Path,
    tmp_path: Path,
    faked: list[tuple[str, int]],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A model that the file has, other threads, another machine. A killed run's quality of a model that it did not come
    to is replaced."""
    results = tmp_path / "results.jsonl"
    here = session.environment(1)
    left = Quality(model="b", schedule="1_2_16", accuracy=None, frechet=9.0)
    write(results, [here, Ceiling(copy_bytes_per_second=1e9, flops_per_second={}), row("a"), left])

    def append(name: str, threads: int = 1) -> tuple[int, str]:
        table = tmp_path / "q.json"
        table.write_text(json.dumps({"1_2_16": {"frechet": 3.0}}))
        options = ["--name", name, "--quality", str(table), "--threads", str(threads), "--append", "-o", str(results)]
        return ended(["bench", "run", str(tiny_bundle), *options]), capsys.readouterr().err

    code, said = append("a")
    assert code == 2 and "results.jsonl" in said and "'a'" in said
    code, said = append("b", threads=2)
    assert code == 2 and "results.jsonl" in said and "threads" in said
    for fact, other in (("cpu", "Another"), ("cores", here.cores + 1)):
        with monkeypatch.context() as patch:
            patch.setattr(session, "environment", lambda threads, change={fact: other}: replace(here, **change))
            code, said = append("b")
        assert code == 2 and "results.jsonl" in said and fact in said
    assert not faked
    assert append("b")[0] == 0
    assert [one.frechet for one in read(results).quality] == [3.0]


def test_a_suite_in_one_command(
    tmp_path: Path, faked: list[tuple[str, int]], capsys: pytest.CaptureFixture[str]
) -> None:
    """All models are made before the machine is measured."""
    suite, results = tmp_path / "suite.toml", tmp_path / "results.jsonl"
    suite.write_text(
        '[[model]]\nname = "a"\nrandom = "tiny"\nrepeats = 1\n[[model]]\nname = "b"\nrandom = "d16"\nsteps = [4]\n'
    )
    command = ["bench", "run", "--suite", str(suite), "-o", str(results), "--threads", "1", "--requests", "0"]
    assert ended(command) == 0
    assert [name for name, _ in faked] == ["made a", "made b", "ceiling", "a", "b", "ceiling"]
    assert "2 models, " in capsys.readouterr().err
    assert ended([*command, "--force", "--name", "a"]) == 2
    assert "--suite" in capsys.readouterr().err


def test_a_bundle_that_is_not_there_is_refused_before_anything_is_measured(
    tmp_path: Path, faked: list[tuple[str, int]]
) -> None:
    results = tmp_path / "results.jsonl"
    command = ["bench", "run", str(tmp_path / "no.bundle"), "--name", "a", "-o", str(results)]
    assert ended(command) != 0 and not faked and not results.exists()


@pytest.mark.parametrize(
    "content",
    [
        b"\xff\xd8\xff\xe0 JFIF",
        b"model = " + b"[" * 100_000,
        b"a" + b".a" * 50_000 + b" = 1",
        b"[[model]",
        b"x = 0x" + b"f" * 9999,
    ],
)
def test_a_suite_that_is_none_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "s.toml").write_bytes(content)
    with pytest.raises(ArtifactRefused, match=r"s\.toml"):
        read_suite(tmp_path / "s.toml")


@pytest.mark.parametrize(
    "content", [b"\xff\xd8\xff\xe0 JFIF\n", b"[" * 100_000 + b"\n", b"", b"{}\n", b'{"schema": 1}\n']
)
def test_a_file_without_results_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "photo.jpg").write_bytes(content)
    with pytest.raises(ArtifactRefused, match=r"photo\.jpg"):
        read(tmp_path / "photo.jpg")


@pytest.mark.parametrize(
    "options",
    [
        ("--batches", "1000000000"),
        ("--batches", "1,1025"),
        ("--batches", "0"),
        ("--repeats", "1000000000000"),
        ("--requests", "1000000000000"),
        ("--threads", "1000000000"),
        ("--steps", "1000000000000"),
    ],
)
def test_absurd_amounts_are_refused_at_once(
    tiny_bundle: Path,
    tmp_path: Path,
    faked: list[tuple[str, int]],
    capsys: pytest.CaptureFixture[str],
    options: tuple[str, str],
) -> None:
    assert ended(["bench", "run", str(tiny_bundle), "-o", str(tmp_path / "r.jsonl"), *options]) == 2
    said = capsys.readouterr().err
    assert "error: " in said and options[0].removeprefix("--") in said and not faked
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["\udce9", "a\nb", "x" * 101, ""])
def test_names_that_results_cannot_have(
    tiny_bundle: Path, tmp_path: Path, faked: list[tuple[str, int]], name: str
) -> None:
    with pytest.raises(InvalidInput):
        Entry(name=name, bundle=str(tiny_bundle))


@pytest.mark.parametrize(
    ("failure", "code"), [(KeyboardInterrupt(), 130), (MemoryError(), 6), (OSError(28, "No space left on device"), 4)]
)
def test_what_was_measured_stays_if_a_run_ends_early(
    tiny_bundle: Path,
    tmp_path: Path,
    faked: list[tuple[str, int]],
    monkeypatch: pytest.MonkeyPatch,
    failure: BaseException,
    code: int,
) -> None:
    def measure(plan: Any, threads: int, progress: Any) -> Any:
        yield row("a")
        yield row("b")
        raise failure

    monkeypatch.setattr(session, "measure", measure)
    results = tmp_path / "r.jsonl"
    assert ended(["bench", "run", str(tiny_bundle), "-o", str(results), "--name", "a"]) == code
    assert [one.scenario.model for one in read(results).measured] == ["a", "b"]


def test_a_disk_that_fills_leaves_the_earlier_results(
    tiny_bundle: Path,
    tmp_path: Path,
    faked: list[tuple[str, int]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A result that is written in part is ignored."""

    def append(path: Path, record: Any) -> None:
        with path.open("a") as file:
            file.write('{"half of a')
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(session, "measure", lambda *_: iter([row("a"), row("b")]))
    monkeypatch.setattr(session, "append_record", append)
    results = tmp_path / "r.jsonl"
    assert ended(["bench", "run", str(tiny_bundle), "-o", str(results), "--name", "a"]) == 4
    said = capsys.readouterr().err
    assert "r.jsonl" in said and "No space left" in said and "in the file" in said
    assert [one.scenario.model for one in read(results).measured] == ["a"]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"hello\n",
        b"\xff\xd8\xff\xe0photo",
        bytes(100),
        b"[" * 100_000 + b"\n",
        b'{"schema": 1, "kind": 5}\n',
        b'{"schema": 1, "kind": []}\n',
        b'{"schema": 1, "kind": "ceiling", "value": {"copy_bytes_per_second": 0, "flops_per_second": {}}}\n',
        b'{"schema": 1, "kind": "quality", "value": {"model": "a", "schedule": "1", "accuracy": 1e99}}\n',
        b"5\n",
    ],
)
@pytest.mark.parametrize("command", ["report", "compare"])
def test_files_that_are_no_results(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str, content: bytes
) -> None:
    path = tmp_path / "photo.jpg"
    path.write_bytes(content)
    other = ["-o", str(tmp_path / "report")] if command == "report" else [str(path)]
    assert ended(["bench", command, str(path), *other]) == 5
    assert "photo.jpg" in capsys.readouterr().err
    assert ended(["bench", command, str(tmp_path), *other]) == 5
    assert ended(["bench", command, str(tmp_path / "missing"), *other]) == 5
