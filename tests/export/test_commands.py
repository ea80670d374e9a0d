"""`flexvar export` and `flexvar verify`: what they print, to which stream, and their exit codes."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from graph_cache import GraphCache
from safetensors.torch import save_file
from torch import Tensor

import flexvar_ref
from flexvar_export import bundle as bundle_module
from flexvar_export import proof
from flexvar_export.bundle import UNPROVEN
from flexvar_export.bundle_writer import seal
from flexvar_ref import FlexVAR, Tokenizer
from flexvar_ref.synthetic import TINY_TOKENIZER, tiny_transformer, write_checkpoints
from flexvar_runtime import Bundle
from flexvar_runtime.cli.main import main
from flexvar_runtime.errors import ParityFailed
from flexvar_runtime.model.schedule import ScaleSchedule

Checkpoint = tuple[Path, Path]
Run = Callable[..., tuple[int, str, str]]
STEPS = 9


def states(checkpoint: Checkpoint) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    transformer, tokenizer = (torch.load(path, weights_only=True) for path in checkpoint)
    return transformer["trainer"]["var_wo_ddp"], tokenizer["model"]


# flexvar export


@pytest.fixture(scope="module", params=["condition", pytest.param("every graph", marks=pytest.mark.slow)])
def exported(
    request: pytest.FixtureRequest,
    tiny_checkpoint: Checkpoint,
    tiny_bundle: Path,
    graph_cache: GraphCache,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, str, str]:
    """The bundle, standard output and standard error of one export of the tiny model, in a separate process.

    The checkpoint is a bare state with a mask buffer. The condition, or every graph, is not taken from the cache.
    """
    directory = tmp_path_factory.mktemp("exported")
    known = GraphCache(directory / "graphs")
    known.folder.mkdir()
    for path in graph_cache.folder.glob("*/*.onnx") if request.param == "condition" else ():
        if path.stem != "condition":
            shutil.copytree(path.parent, known.folder / path.parent.name)
    transformer, tokenizer = states(tiny_checkpoint)
    tokens = ScaleSchedule.parse("1_2_3_4_5_6_8_10_13_16").tokens
    torch.save({**transformer, "attn_bias_for_masking": torch.zeros(1, 1, tokens, tokens)}, directory / "bare.pth")
    torch.save(tokenizer, directory / "vae.pth")
    (directory / "names.json").write_text(json.dumps([f"clás {i}" for i in range(10)], ensure_ascii=False), "utf-8")
    command = "export bare.pth --vae vae.pth -o named.bundle --class-names names.json --json"
    done = run_flexvar(command.split(), directory, known=known)
    assert done.returncode == 0, done.stderr
    return directory / "named.bundle", done.stdout, done.stderr


def run_flexvar(
    arguments: list[str], directory: Path, prelude: str = "", known: GraphCache | None = None
) -> subprocess.CompletedProcess[str]:
    """`flexvar …` in a fresh process, where text files default to ASCII; `prelude` runs first."""
    program = f"{prelude}\nfrom flexvar_runtime.cli.main import main\nmain()"
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    environment = {**os.environ, **ascii_only, "PYTHONHASHSEED": "7", "OMP_NUM_THREADS": "1"}
    environment |= known.environment if known is not None else {}
    command = [sys.executable, "-c", program, *arguments]
    return subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True, check=False)


def test_export_prints_one_json_object_and_its_progress_to_standard_error(exported: tuple[Path, str, str]) -> None:
    path, out, err = exported
    data = json.loads(out)
    bundle = Bundle.open(path)
    assert data.keys() == {"bundle", "sha256", "precision", "float32_parts", "decoder", "size_bytes", "parity"}
    assert data["float32_parts"] == [] and data["decoder"] == "phases"
    assert (data["bundle"], data["sha256"], data["precision"]) == ("named.bundle", bundle.sha256, "fp32")
    assert (
        data["size_bytes"]
        == sum(file.stat().st_size for file in path.iterdir()) - (path / "manifest.json").stat().st_size
    )
    assert data["parity"]["passed"] is True and len(data["parity"]["rows"]) == 22
    lines = err.splitlines()
    assert [line.split(":")[0] for line in lines] == [f"export {i + 1}/{STEPS}" for i in range(STEPS)]
    assert "Traceback" not in err and "Warning" not in err


def test_class_names_are_read_as_utf8_in_every_locale(exported: tuple[Path, str, str]) -> None:
    assert Bundle.open(exported[0]).manifest.model.class_names == tuple(f"clás {i}" for i in range(10))


def test_every_layout_and_process_gives_the_same_files(
    exported: tuple[Path, str, str], tiny_bundle: Path, same_files: Callable[[Bundle, Bundle], None]
) -> None:
    """This export had a bare state with a mask buffer, class names, and another process."""
    made, known = Bundle.open(exported[0]), Bundle.open(tiny_bundle)
    same_files(made, known)
    assert made.manifest.graphs == known.manifest.graphs
    ours, theirs = made.manifest.provenance, known.manifest.provenance
    assert ours.tools == theirs.tools and ours.transformer_sha256 != theirs.transformer_sha256


def test_a_checkpoint_with_float16_weights(
    cached_exports: None, tiny_checkpoint: Checkpoint, tmp_path: Path, run_cli: Run
) -> None:
    """Here the weights of the condition are float16."""
    transformer, _ = states(tiny_checkpoint)
    half = {k: v.half() if "ada_lin" in k or k == "class_emb.weight" else v for k, v in transformer.items()}
    torch.save({"trainer": {"var_wo_ddp": half}}, tmp_path / "half.pth")
    code, out, _ = run_cli("export", tmp_path / "half.pth", "--vae", tiny_checkpoint[1], "-o", tmp_path / "b", "--json")
    assert code == 0 and json.loads(out)["parity"]["passed"]
    code, out, _ = run_cli("verify", tmp_path / "b", "--checkpoint", tmp_path / "half.pth", "--vae", tiny_checkpoint[1])
    assert code == 0


def test_export_prints_a_table_for_people(
    quick_export: None, tiny_checkpoint: Checkpoint, tmp_path: Path, run_cli: Run
) -> None:
    transformer, vae = tiny_checkpoint
    code, out, err = run_cli("export", transformer, "--vae", vae, "-o", tmp_path / "b.bundle")
    assert code == 0
    first = out.splitlines()[0]
    assert first.startswith(f"{tmp_path / 'b.bundle'}: fp32, ") and Bundle.open(tmp_path / "b.bundle").sha256 in first
    assert "parity on ort-cpu" in out and out.count(" ok") >= 22 and "FAILED" not in out
    assert "100.00%" in out.splitlines()[-1]
    assert err.splitlines()[-1] == f"export {STEPS}/{STEPS}: proving parity"


def test_exit_codes_of_export(quick_export: None, tiny_checkpoint: Checkpoint, tmp_path: Path, run_cli: Run) -> None:
    transformer, vae = tiny_checkpoint
    names = tmp_path / "names.json"
    out = tmp_path / "b.bundle"
    bad_names = {
        "{": "names.json",
        "[1, 2]": "names.json",
        "{}": "names.json",
        json.dumps(["cat"]): "10 classes",
        json.dumps(["\n", *"abcdefghi"]): "'\\n'",
    }
    for text, named in bad_names.items():
        names.write_text(text)
        code, _, err = run_cli("export", transformer, "--vae", vae, "-o", out, "--class-names", names)
        assert code == 2 and named in " ".join(err.split()), (text, err)
    names.write_bytes(b'["\xff"]')
    assert run_cli("export", transformer, "--vae", vae, "-o", out, "--class-names", names)[0] == 2
    assert run_cli("export", transformer, "--vae", vae, "-o", out, "--class-names", tmp_path / "none.json")[0] == 2
    assert run_cli("export", transformer, "--vae", vae, "-o", out, "--precision", "int4")[0] == 2
    assert run_cli("export", transformer, "--vae", vae, "-o", out, "--threads", "0")[0] == 2
    assert run_cli("export", transformer, "--vae", vae, "-o", tmp_path / "no" / "where")[0] == 2
    assert run_cli("export", transformer, "-o", out)[0] == 2
    assert run_cli("export", vae, "--vae", transformer, "-o", out)[0] == 5
    assert [path.name for path in tmp_path.iterdir()] == ["names.json"]

    assert run_cli("export", transformer, "--vae", vae, "-o", out)[0] == 0
    code, _, err = run_cli("export", transformer, "--vae", vae, "-o", out)
    assert code == 2 and str(out) in err and "--force" in err
    assert run_cli("export", transformer, "--vae", vae, "-o", out, "--force")[0] == 0


def test_an_error_is_one_json_object_too(tiny_checkpoint: Checkpoint, tmp_path: Path, run_cli: Run) -> None:
    transformer, vae = tiny_checkpoint
    code, out, err = run_cli("export", vae, "--vae", transformer, "-o", tmp_path / "b", "--json")
    assert code == 5
    error = json.loads(out)["error"]
    assert error["type"] == "ArtifactRefused" and all(error[key] in err for key in ("got", "fix"))


def test_interrupted_export_ends_with_130(
    tiny_checkpoint: Checkpoint, tmp_path: Path, run_cli: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flexvar_export import bundle

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(bundle, "make_proof", interrupt)
    transformer, vae = tiny_checkpoint
    code, out, err = run_cli("export", transformer, "--vae", vae, "-o", tmp_path / "b")
    assert (code, out) == (130, "") and "interrupted" in err
    assert list(tmp_path.iterdir()) == []


BLOCKED = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == {name!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Blocked())
"""


@pytest.mark.parametrize("missing", ["torch", "onnx", "onnxscript", "safetensors"])
@pytest.mark.parametrize("command", ["export", "verify"])
def test_without_the_export_extra_errors_name_the_missing_module(
    tiny_checkpoint: Checkpoint,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    run_cli: Run,
    missing: str,
    command: str,
) -> None:
    transformer, vae = tiny_checkpoint
    arguments = {
        "export": ["export", str(transformer), "--vae", str(vae), "-o", str(tmp_path / "b")],
        "verify": ["verify", str(tmp_path)],
    }[command]
    if missing == "torch" and command == "export":  # in a process that really cannot import it
        done = run_flexvar(arguments, tmp_path, BLOCKED.format(name=missing))
        code, out, err = done.returncode, done.stdout, done.stderr
    else:
        monkeypatch.setitem(sys.modules, missing, None)
        code, out, err = run_cli(*arguments)
    assert (code, out) == (4, "")
    assert missing in err and "pip install 'flexvar-deploy[cpu,export]'" in err
    assert list(tmp_path.iterdir()) == []


# flexvar verify


def test_verify_prints_one_json_object_and_writes_nothing(tiny_bundle: Path, run_cli: Run) -> None:
    def state(directory: Path) -> dict[str, Any]:
        return {path.name: path.stat().st_mtime_ns for path in (directory, *directory.iterdir())}

    before = state(tiny_bundle)
    code, out, _ = run_cli("verify", tiny_bundle, "--json")
    assert code == 0 and state(tiny_bundle) == before
    data = json.loads(out)
    assert data.keys() == {"bundle", "proved", "unproved_because", "parity"}
    assert data["bundle"] == Bundle.open(tiny_bundle).sha256 and data["proved"] is True
    parity = data["parity"]
    assert parity["files"] == Bundle.open(tiny_bundle).manifest.parity.files
    assert parity["passed"] is True and parity["emulated"] is False
    assert (parity["backend"], len(parity["rows"])) == ("ort-cpu", 22)
    assert {"graph", "scale", "output", "metric", "value", "bound"} == parity["rows"][0].keys()


def test_verify_compares_a_bundle_that_is_not_proved(bundle_copy: Path, run_cli: Run) -> None:
    """It agrees with the reference, but needs a new record."""
    manifest = Bundle.open(bundle_copy).manifest
    seal(bundle_copy, replace(manifest, parity=UNPROVEN))
    code, out, _ = run_cli("verify", bundle_copy)
    assert code == 0 and out.splitlines()[-1].startswith("The bundle needs a new parity record.")
    code, out, _ = run_cli("verify", bundle_copy, "--json")
    data = json.loads(out)
    assert code == 0 and data["parity"]["passed"] is True and data["proved"] is False


def test_verify_prints_a_table_for_people(tiny_bundles: Callable[[str], Path], run_cli: Run) -> None:
    code, out, _ = run_cli("verify", tiny_bundles("bf16"))
    assert code == 0
    title, head, _, *rows, last = out.splitlines()
    assert title.strip() == "parity on ort-cpu, bf16 emulated in float32"
    assert head.split() == ["graph", "scale", "output", "metric", "value", "bound"]
    assert [row.split() for row in rows[1:4:2]] == [
        ["condition", "head_modulation", "rel.", "error", rows[1].split()[4], "0.015", "ok"],
        ["step", "1/10", "(1x1)", "logits", "rel.", "error", rows[3].split()[6], "0.015", "ok"],
    ]
    assert len(rows) == 22 and max(map(len, out.splitlines())) <= 80  # one line a row, in any terminal
    assert rows[13].split()[:2] == ["prefill", "10/10"]
    assert rows[14].split()[:5] == ["decode", "16x16", "image", "PSNR,", "dB"]
    assert last.endswith("%")


def test_verify_against_the_checkpoint(tiny_bundle: Path, tiny_checkpoint: Checkpoint, run_cli: Run) -> None:
    transformer, vae = tiny_checkpoint
    code, out, _ = run_cli("verify", tiny_bundle, "--checkpoint", transformer, "--vae", vae, "--json")
    assert code == 0
    recorded = [row.value for row in Bundle.open(tiny_bundle).manifest.parity.rows]
    # Every row of logits is compared, as at the export. Only the order of sums may differ, with the thread count.
    assert [row["value"] for row in json.loads(out)["parity"]["rows"]] == pytest.approx(recorded, rel=0.2)


def test_threads_are_those_of_torch_during_the_command(
    tiny_bundle: Path, tiny_checkpoint: Checkpoint, tmp_path: Path, run_cli: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reference runs on that many threads, in `export` and in `verify`."""
    seen: list[int] = []

    def make_proof(*_: object) -> None:
        seen.append(torch.get_num_threads())
        raise KeyboardInterrupt

    monkeypatch.setattr(bundle_module, "make_proof", make_proof)
    monkeypatch.setattr(proof, "make_proof", make_proof)
    transformer, vae = tiny_checkpoint
    exporting = ("export", transformer, "--vae", vae, "-o", tmp_path / "b")
    verifying = ("verify", tiny_bundle, "--checkpoint", transformer, "--vae", vae)
    for command in (exporting, verifying):
        for threads in ((), ("--threads", "3")):
            assert run_cli(*command, *threads)[0] == 130
        assert run_cli(*command, "--threads", "0")[0] == 2
    assert seen == [1, 3] * 2 and torch.get_num_threads() == 1


def test_verify_against_other_weights_fails(
    tiny_bundle: Path, tiny_pair: tuple[FlexVAR, Tokenizer], tiny_checkpoint: Checkpoint, tmp_path: Path, run_cli: Run
) -> None:
    other, vae = write_checkpoints(tmp_path / "other", tiny_transformer(), TINY_TOKENIZER, seed=1)
    arguments = ["verify", tiny_bundle, "--checkpoint", other, "--vae", tiny_checkpoint[1]]
    code, out, err = run_cli(*arguments)
    assert code == 3
    assert "condition, output modulation" in err and "FAILED" in out
    code, out, err = run_cli(*arguments, "--json")
    assert code == 3
    error = json.loads(out)["error"]
    assert error["type"] == "ParityFailed" and "condition, output modulation" in error["got"]

    transformer, _ = tiny_checkpoint
    code, _, err = run_cli("verify", tiny_bundle, "--checkpoint", transformer, "--vae", vae)
    assert code == 3 and "step, scale 2/10 (2x2), output logits" in err  # the first scale with codes


def test_verify_against_another_size_fails_and_names_the_sizes(
    tiny_bundle: Path, tiny_checkpoint: Checkpoint, tmp_path: Path, run_cli: Run
) -> None:
    model = FlexVAR(tiny_transformer(depth=1, classes=7), torch.zeros(512, 8))
    flexvar_ref.save(model, tmp_path / "deeper.safetensors")
    vae = tiny_checkpoint[1]
    code, _, err = run_cli("verify", tiny_bundle, "--checkpoint", tmp_path / "deeper.safetensors", "--vae", vae)
    assert code == 3
    for name, bundle, checkpoint in (("depth", 2, 1), ("width", 128, 64), ("classes", 10, 7)):
        assert f"{name} is {bundle} and {checkpoint}" in err


def test_exit_codes_of_verify(
    tiny_bundle: Path, tiny_checkpoint: Checkpoint, bundle_copy: Path, tmp_path: Path, run_cli: Run
) -> None:
    transformer, vae = tiny_checkpoint
    for arguments in (
        [tiny_bundle, "--checkpoint", transformer],
        [tiny_bundle, "--vae", vae],
        [tiny_bundle, "--backend", "abacus"],
        [tiny_bundle, "--threads", "0"],
        [],
    ):
        assert run_cli("verify", *arguments)[0] == 2, arguments
    assert (
        run_cli("verify", tiny_bundle, "--backend", "tensorrt")[0] == 4
    )  # it is not installed, and no other backend is used instead
    assert run_cli("verify", tmp_path / "nothing")[0] == 5
    assert run_cli("verify", tiny_bundle, "--checkpoint", vae, "--vae", transformer)[0] == 5

    step = bundle_copy / "step.onnx"
    content = bytearray(step.read_bytes())
    content[len(content) // 2] ^= 1
    step.write_bytes(content)
    code, _, err = run_cli("verify", bundle_copy)
    assert code == 5 and "step.onnx" in err


@pytest.mark.parametrize("instead", ["nothing", "tables.npz"])
def test_verify_refuses_a_bundle_without_a_proof(bundle_copy: Path, run_cli: Run, instead: str) -> None:
    manifest = Bundle.open(bundle_copy).manifest
    (bundle_copy / "proof.npz").unlink()
    if instead != "nothing":
        shutil.copy(bundle_copy / instead, bundle_copy / "proof.npz")
    seal(bundle_copy, manifest)
    code, _, err = run_cli("verify", bundle_copy)
    assert code == 5 and "proof.npz" in err


# --weights


@pytest.fixture
def stop_after_loading(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """Ends an export with exit code 3 when the checkpoint is loaded. Holds the sum of the loaded head's biases."""
    loaded: dict[str, float] = {}

    def stop(model: FlexVAR, *rest: object) -> None:
        loaded["sum"] = float(model.head.bias.detach().sum())
        raise ParityFailed("stopped.", expected="", fix="")

    monkeypatch.setattr(bundle_module, "make_proof", stop)
    return loaded


def changed(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {**state, "head.bias": state["head.bias"] + 1}


@pytest.mark.parametrize(
    "layout",
    [
        lambda t: {"model": t, "ema": changed(t)},
        lambda t: {"trainer": {"var_wo_ddp": t, "var_wo_ddp_ema": changed(t)}},
        lambda t: {**t, "model_ema": {"module": changed(t)}},
    ],
)
def test_the_advice_about_two_sets_of_weights_works_when_typed(
    layout: Callable[[dict[str, Tensor]], Any],
    tiny_checkpoint: Checkpoint,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    stop_after_loading: dict[str, float],
) -> None:
    transformer, _ = states(tiny_checkpoint)
    torch.save(layout(transformer), tmp_path / "both.pth")
    command = ["export", str(tmp_path / "both.pth"), "--vae", str(tiny_checkpoint[1]), "-o", str(tmp_path / "out")]

    def run(*options: str) -> tuple[int, str]:
        with pytest.raises(SystemExit) as end:
            main([*command, *options])
        return int(end.value.code or 0), capsys.readouterr().err

    code, err = run()
    assert code == 5 and "both.pth" in err
    advised = re.findall(r"--weights (\w+)", err)
    assert sorted(advised) == ["ema", "model"]
    for choice in advised:
        assert run("--weights", choice)[0] == 3
        expected = changed(transformer) if choice == "ema" else transformer
        assert stop_after_loading["sum"] == float(expected["head.bias"].sum())
    assert run("--weights", "best")[0] == 2


def test_a_folder_of_shards_is_exported(
    tiny_checkpoint: Checkpoint, tmp_path: Path, stop_after_loading: dict[str, float]
) -> None:
    transformer, _ = states(tiny_checkpoint)
    (tmp_path / "sharded").mkdir()
    names, weight_map = sorted(transformer), {}
    for shard in range(2):
        save_file(
            {name: transformer[name] for name in names[shard::2]}, tmp_path / "sharded" / f"m-{shard}.safetensors"
        )
        weight_map |= dict.fromkeys(names[shard::2], f"m-{shard}.safetensors")
    (tmp_path / "sharded" / "m.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    for path in (tmp_path / "sharded", tmp_path / "sharded" / "m.safetensors.index.json"):
        stop_after_loading.clear()
        with pytest.raises(SystemExit) as end:
            main(["export", str(path), "--vae", str(tiny_checkpoint[1]), "-o", str(tmp_path / "out")])
        assert end.value.code == 3 and stop_after_loading
