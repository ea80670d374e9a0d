"""`flexvar build`: what it prints and writes, what it refuses, and that no incomplete engine is left or loaded."""

from __future__ import annotations

import importlib.metadata
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from flexvar_export import build_command, engine_builder
from flexvar_export.build_command import choose_target
from flexvar_export.engine_builder import Plan
from flexvar_runtime import BackendUnavailable, Bundle, FlexVARError, InvalidInput
from flexvar_runtime.backends.tensorrt import library as trt_library
from flexvar_runtime.backends.tensorrt.engine_files import (
    EngineId,
    PrecisionReport,
    find_engine,
    read_engine,
    receipts_folder,
)
from flexvar_runtime.bundle.manifest import Manifest
from flexvar_runtime.model.signatures import GRAPHS

RTX = ("--backend", "tensorrt-rtx")
SMALL_GRAPHS = ["condition", "decode", "encode", "prefill"]
SMALL = (*RTX, "--schedule", "1_2x3", "--max-batch", "2", "--prefill")
FLEXVAR = Path(sys.executable).with_name("flexvar")
Run = Callable[..., tuple[int, str, str]]
Seal = Callable[[Path, Manifest], Bundle]


WITHOUT_TORCH = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"torch", "onnx", "onnxscript", "safetensors", "onnxruntime"}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Absent())
from flexvar_runtime.cli.main import main
main()
"""


@dataclass(frozen=True)
class FirstBuild:
    folder: Path
    bundle: Path
    out: str
    err: str


@pytest.fixture(autouse=True)
def own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Use folders of this test as the user's folders, and find no GPU."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(build_command, "present_gpu", lambda: None)


@pytest.fixture
def half_bundle(tiny_bundles: Callable[[str], Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_bundles("fp16"), tmp_path / "half.bundle"))


@pytest.fixture(scope="module")
def first_build(tiny_bundles: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> FirstBuild:
    """The result of `flexvar build` in a process without torch and onnx. Read-only: see `built_bundle`."""
    folder = tmp_path_factory.mktemp("built")
    bundle = Path(shutil.copytree(tiny_bundles("fp16"), folder / "half.bundle"))
    environment = os.environ | {
        "XDG_STATE_HOME": str(folder / "state"),
        "XDG_CACHE_HOME": str(folder / "cache"),
        "CUDA_VISIBLE_DEVICES": "",
    }
    command = [sys.executable, "-c", WITHOUT_TORCH, "build", str(bundle), *SMALL]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    return FirstBuild(folder, bundle, done.stdout, done.stderr)


@pytest.fixture
def built_bundle(first_build: FirstBuild, tmp_path: Path) -> Path:
    """A copy of the built bundle, and of its receipts."""
    shutil.copytree(first_build.folder / "state", tmp_path / "state")
    return Path(shutil.copytree(first_build.bundle, tmp_path / "half.bundle"))


@pytest.fixture
def fake_builds(monkeypatch: pytest.MonkeyPatch) -> list[EngineId]:
    """Let builds in this process return a fake plan at once. Returns the ids that are asked for."""
    asked: list[EngineId] = []
    report = PrecisionReport(claimed="float16", layers={"matmul": {"float16": 1}}, fused_attention=2, share=1.0)

    def build_engine(library: Any, bundle: Any, wanted: EngineId, *, timing: Path, tick: Callable[[], None]) -> Plan:
        asked.append(wanted)
        for _ in wanted.profiles:
            tick()
        return Plan(f"engine of {wanted.graph}".encode(), report)

    monkeypatch.setattr(engine_builder, "build_engine", build_engine)
    return asked


def found(bundle: Path, graph: str = "step", target: str = "8.6", engines: Path | None = None) -> Any:
    version = trt_library.load("tensorrt-rtx").version
    return find_engine(
        Bundle.open(bundle), graph, flavour="tensorrt-rtx", version=version, target=target, engines_dir=engines
    )


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def test_build_without_torch_and_onnx(first_build: FirstBuild, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(first_build.folder / "state"))
    *lines, last = first_build.out.splitlines()
    assert last == f"tensorrt-rtx {trt_library.load('tensorrt-rtx').version}, target portable"
    summaries = dict(zip((*SMALL_GRAPHS, "step"), lines, strict=True))
    for graph in GRAPHS:
        engine = found(first_build.bundle, graph)
        assert read_engine(engine) and summaries[graph].startswith(f"{engine.path}: ")
    assert "3 profiles, " in summaries["step"] and "2 attention fused)" in summaries["step"]
    assert "; 94% float16 (13 matmul float16, 1 matmul float32, 2 attention float16, " in summaries["step"]
    assert "build 1/9: condition, 16 labels\n" in first_build.err and "build 9/9: step, wide\n" in first_build.err
    assert len(files(first_build.bundle / "engines")) == 5
    assert not (first_build.folder / "cache/flexvar").exists()
    Bundle.open(first_build.bundle)  # engines are outside the manifest


def test_engines_built_before_are_kept(run_cli: Run, built_bundle: Path, fake_builds: list[EngineId]) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in (built_bundle / "engines").iterdir()}

    def built(*options: str) -> tuple[dict[str, bool], str]:
        code, out, err = run_cli("build", built_bundle, *SMALL, "--json", *options)
        assert code == 0 and "build 9/9" in err
        return {engine["graph"]: engine["built"] for engine in json.loads(out)["engines"]}, err

    assert built()[0] == dict.fromkeys(GRAPHS, False)
    assert {path.name: path.stat().st_mtime_ns for path in (built_bundle / "engines").iterdir()} == before
    # A damaged engine is built again. --force builds all again.
    condition = found(built_bundle, "condition").path
    condition.write_bytes(condition.read_bytes()[:-1] + b"x")
    again, err = built()
    assert again == dict.fromkeys(GRAPHS, False) | {"condition": True} and condition.name in err
    assert built("--force")[0] == dict.fromkeys(GRAPHS, True)
    assert len(files(built_bundle / "engines")) == 5


def test_json(run_cli: Run, half_bundle: Path, fake_builds: list[EngineId], tmp_path: Path) -> None:
    engines = tmp_path / "my engines"
    code, out, _ = run_cli(
        "build", half_bundle, *SMALL, "--target", "89", "--target", "8.6", "--engines", engines, "--json"
    )
    data = json.loads(out)
    assert code == 0
    bundle = Bundle.open(half_bundle)
    assert (data["bundle"], data["sha256"]) == (str(bundle.path), bundle.sha256)
    assert (data["backend"], data["target"]) == ("tensorrt-rtx", "8.6,8.9")
    step = data["engines"][4]
    assert step["graph"] == "step" and Path(step["file"]).parent == engines
    assert step["size_bytes"] == Path(step["file"]).stat().st_size
    assert [profile["name"] for profile in step["profiles"]] == ["1 after 0", "6 after 1", "wide"]
    assert step["profiles"][1]["axes"] == {
        "sequences": [1, 2, 4],
        "images": [1, 1, 2],
        "new": [6, 6, 6],
        "past": [1, 1, 1],
    }
    assert step["precision"]["claimed"] == "float16" and step["precision"]["fused_attention"] == 2
    assert not (half_bundle / "engines").exists()
    assert found(half_bundle, target="8.9", engines=engines).path == Path(step["file"])
    with pytest.raises(FlexVARError, match=r"8\.6.*8\.9"):
        found(half_bundle, target="9.0", engines=engines)


def test_the_schedule_of_the_bundle_is_the_default(
    run_cli: Run, half_bundle: Path, fake_builds: list[EngineId]
) -> None:
    code, _, _ = run_cli("build", half_bundle, *RTX)
    assert code == 0 and [len(wanted.profiles) for wanted in fake_builds] == [1, 2, 2, 11]
    assert fake_builds[3].profiles[-1].axes["sequences"] == (1, 2, 16)


@pytest.mark.parametrize(
    ("options", "code", "named"),
    [
        (["--backend", "cuda"], 2, ("--backend cuda", "tensorrt-rtx")),
        ([*RTX, "--target", "hopper"], 2, ("--target hopper", "80, 86, 89, 120, 121")),
        ([*RTX, "--target", "7.5"], 2, ("--target 7.5",)),
        ([*RTX, "--target", "86", "--target", "90"], 4, ("--target 90", "tensorrt-rtx")),
        ([*RTX, "--target", "10.3"], 4, ("10.3", "--backend tensorrt", "--backend ort-cuda")),
        ([*RTX, "--schedule", "2_4"], 2, ("schedule",)),
        ([*RTX, "--schedule", "1024px"], 2, ("1024px",)),
        ([*RTX, "--max-batch", "0"], 2, ("--max-batch",)),
        ([*RTX, "--max-batch", "1025"], 2, ("--max-batch",)),
        (["--backend", "tensorrt"], 4, ("tensorrt", "pip install")),
    ],
)
def test_options_that_are_refused(
    run_cli: Run, half_bundle: Path, options: list[str], code: int, named: tuple[str, ...], tmp_path: Path
) -> None:
    got, out, err = run_cli("build", half_bundle, *options, "--json")
    error = json.loads(out)["error"]
    assert got == code, err
    assert all(name in f"{error['got']} {error['fix']}" for name in named), error
    assert not (half_bundle / "engines").exists() and not (tmp_path / "state").exists()


def test_a_bundle_that_does_not_exist(run_cli: Run, tmp_path: Path) -> None:
    code, _, err = run_cli("build", tmp_path / "nothing", *SMALL)
    assert code == 5 and str(tmp_path / "nothing") in err


def test_a_bundle_that_is_not_proved(run_cli: Run, half_bundle: Path, fake_builds: list[EngineId]) -> None:
    """No engine is built of graphs that were never compared with the reference, unless it is allowed."""
    path = half_bundle / "manifest.json"
    document = json.loads(path.read_text())
    document["parity"]["files"]["step.onnx"] = "e" * 64
    path.write_text(json.dumps(document))
    code, _, err = run_cli("build", half_bundle, *SMALL)
    assert code == 5 and "step.onnx" in err and "--allow-unproved" in err
    assert not fake_builds and not (half_bundle / "engines").exists()
    code, _, err = run_cli("build", half_bundle, *SMALL, "--allow-unproved")
    assert code == 0 and fake_builds and "WARNING" in err


def test_a_damaged_bundle(run_cli: Run, half_bundle: Path) -> None:
    data = bytearray((half_bundle / "step.onnx").read_bytes())
    data[len(data) // 2] ^= 1
    (half_bundle / "step.onnx").write_bytes(data)
    code, _, err = run_cli("build", half_bundle, *SMALL)
    assert code == 5 and "step.onnx" in err and not (half_bundle / "engines").exists()


def test_a_transposed_decoder_in_bf16(
    run_cli: Run, tiny_bundles: Callable[[str], Path], tmp_path: Path, seal_proved: Seal
) -> None:
    """It is refused before anything is built."""
    bundle = Path(shutil.copytree(tiny_bundles("bf16"), tmp_path / "transposed.bundle"))
    manifest = Bundle.open(bundle).manifest
    (bundle / "manifest.json").unlink()
    seal_proved(bundle, replace(manifest, decoder="transposed", files={}))
    code, _, err = run_cli("build", bundle, *SMALL, "--target", "8.6")
    assert code == 2 and "transposed" in err and "tensorrt-rtx" in err and "--decoder phases" in err
    assert not (bundle / "engines").exists()


def test_a_folder_of_engines_that_is_a_link(run_cli: Run, half_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (half_bundle / "engines").symlink_to(tmp_path / "elsewhere")
    code, _, err = run_cli("build", half_bundle, *SMALL)
    assert code == 5 and "engines" in err and not files(tmp_path / "elsewhere")


def test_a_folder_of_receipts_that_others_can_write(run_cli: Run, half_bundle: Path) -> None:
    receipts_folder().mkdir(parents=True)
    receipts_folder().chmod(0o777)
    code, _, err = run_cli("build", half_bundle, *SMALL)
    assert code == 5 and str(receipts_folder()) in err and "777" in err
    assert not files(half_bundle / "engines")


def test_a_full_disk(
    run_cli: Run, half_bundle: Path, fake_builds: list[EngineId], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Path.write_bytes

    def write_bytes(path: Path, data: Any) -> int:
        if path.suffix == ".engine":
            real(path, memoryview(data)[:100])
            raise OSError(28, "No space left on device")
        return real(path, data)

    monkeypatch.setattr(Path, "write_bytes", write_bytes)
    code, _, err = run_cli("build", half_bundle, *SMALL)
    assert code == 4 and "No space left on device" in err and "--engines" in err
    assert not files(half_bundle / "engines") and not files(receipts_folder())


def test_the_engine_of_another_export(built_bundle: Path, seal_proved: Seal) -> None:
    """A graph that changed has no engine any more. A graph that did not change keeps its engine."""
    manifest = Bundle.open(built_bundle).manifest
    graph = built_bundle / "decode.onnx"
    graph.write_bytes(graph.read_bytes().replace(b"flexvar-deploy", b"flexvar-deplox"))
    seal_proved(built_bundle, manifest)
    assert found(built_bundle, "step").path.exists()
    with pytest.raises(FlexVARError, match="decode"):
        found(built_bundle, "decode")


# Targets


def targets(*options: str, gpu: str | None = None) -> str:
    return choose_target(trt_library.load("tensorrt-rtx"), list(options), lambda: gpu)


def test_targets(capsys: pytest.CaptureFixture[str]) -> None:
    assert targets() == "portable"
    assert targets(gpu="8.9") == "8.9"
    assert targets(gpu="12.3") == "portable"  # it runs there, but has no target of that name
    assert targets("120", "8.6", "86", gpu="8.9") == "8.6,12.0"
    assert targets("86", gpu="9.0") == "8.6"  # a target of another machine
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("gpu", ["7.5", "9.0", "10.0", "10.3"])
def test_a_gpu_that_tensorrt_rtx_does_not_run_on_is_refused_before_the_build(
    run_cli: Run, half_bundle: Path, monkeypatch: pytest.MonkeyPatch, gpu: str
) -> None:
    """A portable engine would not run either."""
    monkeypatch.setattr(build_command, "present_gpu", lambda: gpu)
    monkeypatch.setattr(engine_builder, "build_engine", lambda *_, **__: pytest.fail("it began to build"))
    code, out, err = run_cli("build", half_bundle, *RTX, "--json")
    error = json.loads(out)["error"]
    assert code == 4 and not (half_bundle / "engines").exists(), err
    assert gpu in error["got"]
    assert all(option in error["fix"] for option in ("--backend tensorrt", "--backend ort-cuda", "--target"))


def test_targets_of_tensorrt() -> None:
    """TensorRT builds only for the GPU of this machine."""
    fake: Any = type("Library", (), {"rtx": False, "flavour": "tensorrt", "version": "11.4"})()
    assert choose_target(fake, [], lambda: "9.0") == "9.0"
    with pytest.raises(BackendUnavailable, match="tensorrt") as error:
        choose_target(fake, [], lambda: None)
    assert error.value.exit_code == 4
    with pytest.raises(InvalidInput, match="--target 90"):
        choose_target(fake, ["90"], lambda: "9.0")


def test_without_a_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert build_command.present_gpu() is None


# Processes that are killed or interrupted, and two at once


def start(bundle: Path, *options: str) -> subprocess.Popen[str]:
    command = [FLEXVAR, "build", bundle, *options]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(
        [*map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )


def wait_for(process: subprocess.Popen[str], text: str) -> None:
    assert process.stderr is not None
    seen = []
    for line in process.stderr:
        seen.append(line)
        if text in line:
            return
    raise AssertionError("".join(seen))


@pytest.fixture
def without_step(built_bundle: Path) -> Path:
    """A bundle with all engines but the one of the step."""
    found(built_bundle).path.unlink()
    return built_bundle


def test_a_killed_build(run_cli: Run, without_step: Path, fake_builds: list[EngineId]) -> None:
    """Finished engines are complete. Nothing of the unfinished one loads, or stays after the next build."""
    process = start(without_step, *SMALL)
    wait_for(process, "step, 1 after 0")
    process.kill()
    process.communicate(timeout=60)
    engines = without_step / "engines"
    assert process.returncode == -signal.SIGKILL
    assert [name.split("-")[0] for name in files(engines) if name.endswith(".engine")] == SMALL_GRAPHS
    with pytest.raises(FlexVARError, match="step") as refusal:
        found(without_step)
    for graph in SMALL_GRAPHS:
        assert read_engine(found(without_step, graph))
    # The command in the error builds the missing engine and keeps the others.
    words = shlex.split(refusal.value.fix[refusal.value.fix.index("flexvar build") :])
    assert words[:3] == ["flexvar", "build", str(without_step)]
    code, out, _ = run_cli(*words[1:], *SMALL[2:], "--json")
    assert code == 0 and [one["built"] for one in json.loads(out)["engines"]] == [False] * 4 + [True]
    assert [wanted.graph for wanted in fake_builds] == ["step"]
    assert len(files(engines)) == 5 and read_engine(found(without_step))


def test_an_interrupted_build(without_step: Path) -> None:
    process = start(without_step, *SMALL)
    wait_for(process, "step, 1 after 0")
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, "") and err.endswith("interrupted\n")
    assert "Traceback" not in err and "BuildCanceled" not in err
    assert [name.split("-")[0] for name in files(without_step / "engines")] == SMALL_GRAPHS


def test_two_at_once(half_bundle: Path) -> None:
    """One process builds an engine. The other waits, and finds it built."""
    processes = [start(half_bundle, *RTX, "--schedule", "1_2", "--json") for _ in range(2)]
    results = [process.communicate(timeout=200) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], results
    one, other = ([engine["built"] for engine in json.loads(out)["engines"]] for out, _ in results)
    assert all(a != b for a, b in zip(one, other, strict=True))
    assert any("waiting for another flexvar build" in err for _, err in results)
    assert len(files(half_bundle / "engines")) == 4
    same = [[engine["sha256"] for engine in json.loads(out)["engines"]] for out, _ in results]
    assert same[0] == same[1]


def test_the_command_is_there(run_cli: Run) -> None:
    assert "export" in {entry.name for entry in importlib.metadata.entry_points(group="flexvar.commands")}
    code, out, _ = run_cli("build", "--help")
    assert code == 0
    for option in ("--backend", "--schedule", "--max-batch", "--target", "--engines", "--force", "--json"):
        assert option in out


def test_a_batch_that_will_not_fit_on_the_gpu_is_refused_before_the_build(
    half_bundle: Path, run_cli: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flexvar_runtime import Bundle, ScaleSchedule
    from flexvar_runtime.cuda.gpu import GpuFacts
    from flexvar_runtime.generation.device_memory import device_plan
    from flexvar_runtime.request import Shape

    schedule = ScaleSchedule.parse("1_2x3")
    needed = device_plan(Bundle.open(half_bundle), Shape(schedule, 5, True)).total
    monkeypatch.setattr(build_command, "gpu_facts", lambda: GpuFacts(0, "A GPU", "8.6", needed))
    code, out, err = run_cli("build", half_bundle, *RTX, "--schedule", "1_2x3", "--max-batch", "6")
    assert code == 6 and not (half_bundle / "engines").exists()
    assert "batch of 6" in err and "1_2x3" in err and "A GPU" in err and "at most 5" in err
