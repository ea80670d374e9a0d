"""Whole training runs: files, falling losses, a resume after a kill, two processes, and the command line."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from PIL import Image
from safetensors.torch import load_file
from typer.testing import CliRunner

import flexvar_ref

pytest.importorskip("accelerate", reason="training needs the train extra")
pytest.importorskip("tensorboard", reason="training needs the train extra")

from accelerate.utils import DistributedType

from flexvar_ref.errors import RunRefused, Unsupported
from flexvar_ref.training import trainer
from flexvar_ref.training.checkpoint import find_checkpoints
from flexvar_ref.training.commands import register
from flexvar_ref.training.config import TokenizerRun, TransformerRun, build, load_config
from flexvar_ref.training.runs import Result, RunOptions, train_tokenizer, train_transformer

CONFIGS = Path(__file__).parents[3] / "configs"
STEPS = 24
TINY_TOKENIZER = {
    "data": {"size": 16, "samples": 64, "held_out": 13, "workers": 0},
    "model": {
        "channels": 8,
        "multipliers": [1, 2],
        "encoder_blocks": 1,
        "decoder_blocks": 1,
        "latent_channels": 8,
        "vocabulary": 32,
        "code_dim": 4,
        "groups": 4,
    },
    "loss": {"scales": 2, "revive_every": 3},
    "optim": {"lr": 0.02, "warmup": 2, "ema": 0.9},
    "loop": {"steps": STEPS, "batch": 8, "log": 4, "save": 2, "evaluate": 8, "sample": 8},
}
TINY_TRANSFORMER = {
    "data": {"size": 16, "samples": 64, "held_out": 13, "workers": 0},
    "model": {"depth": 2, "heads": 2, "head_size": 16, "position_side": 8, "drop_path": 0.1},
    "optim": {"algorithm": "muon", "lr": 0.02, "warmup": 2, "ema": 0.9, "accumulation": 2},  # as for the demo model
    "loop": {"steps": STEPS, "batch": 8, "log": 4, "save": 2, "evaluate": 8, "sample": 8},
}
LAUNCH = """
import sys, torch
from pathlib import Path
from accelerate import PartialState
torch.set_num_threads(1)
from flexvar_ref.training.config import TokenizerRun, TransformerRun, load_config
from flexvar_ref.training.runs import RunOptions, train_tokenizer, train_transformer
for kind, config, out, cache, *tokenizer in (line.split("|") for line in sys.argv[1:]):
    options = RunOptions(out=Path(out), cache=Path(cache), quiet=True)
    if kind == "tokenizer":
        train_tokenizer(load_config(config, TokenizerRun), "scenes", options)
    else:
        train_transformer(load_config(config, TransformerRun), "scenes", Path(tokenizer[0]), options)
PartialState().destroy_process_group()  # otherwise its threads may abort the process at its end
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def tokenizer_run() -> TokenizerRun:
    return build(TokenizerRun, TINY_TOKENIZER, "tiny")


@pytest.fixture(scope="module")
def transformer_run() -> TransformerRun:
    return build(TransformerRun, TINY_TRANSFORMER, "tiny")


@pytest.fixture(scope="module")
def trained(folder: Path, tokenizer_run: TokenizerRun) -> Result:
    """A tokenizer, trained without interruption."""
    return train_tokenizer(tokenizer_run, "scenes", options_for(folder, "tokenizer"))


@pytest.fixture(scope="module")
def generator(folder: Path, trained: Result, transformer_run: TransformerRun) -> Result:
    """A transformer on the tokens of `trained`, trained without interruption."""
    return train_transformer(transformer_run, "scenes", trained.path, options_for(folder, "transformer"))


def options_for(folder: Path, name: str, resume: bool = False) -> RunOptions:
    """Options for a run in `folder` / `name`. All runs share a cache."""
    return RunOptions(out=folder / name, cache=folder / "cache", resume=resume, quiet=True)


def weights(result: Path) -> dict[str, torch.Tensor]:
    return load_file(result)


def steps_of(folder: Path) -> list[int]:
    return [int(path.stem[5:]) for path in find_checkpoints(folder / "checkpoints")]


def launch(arguments: list[str], processes: int = 1) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", LAUNCH, *arguments]
    if processes > 1:
        script = Path(arguments[0].split("|")[1]).with_name("launch.py")
        script.write_text("if __name__ == '__main__':\n" + "".join(f"    {line}\n" for line in LAUNCH.splitlines()))
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        command += [str(script), *arguments]
    root = str(CONFIGS.parent)
    paths = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def written(path: Path, content: object) -> Path:
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def test_files_of_a_run(trained: Result, generator: Result, folder: Path) -> None:
    for result in (trained, generator):
        run = result.path.parent
        names = {path.name for path in run.iterdir()}
        assert names >= {"config.json", "classes.json", "metrics.jsonl", "curves.png", "samples", "tensorboard"}
        assert not [name for name in names if name.endswith(".partial")]
        assert len(json.loads((run / "classes.json").read_text())) == 12
        assert steps_of(run) == [STEPS - 2, STEPS]
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        assert [row["step"] for row in rows if row["kind"] == "train"] == list(range(4, STEPS + 1, 4))
        assert [row["step"] for row in rows if row["kind"] == "held out"] == [8, 16, 24]
        assert [path.name for path in sorted((run / "samples").iterdir())] == [
            f"step_{step:08d}.png" for step in (8, 16, 24)
        ]
        assert any((run / "tensorboard").iterdir())
        with Image.open(run / "curves.png") as curves:
            assert (
                len(set(curves.get_flattened_data() if hasattr(curves, "get_flattened_data") else curves.getdata())) > 3
            )
    model, tokenizer = flexvar_ref.load(generator.path, trained.path)
    assert (model.config.classes, model.config.vocabulary, tokenizer.config.downsampling) == (12, 32, 2)
    assert {f"loss/{s}x{s}" for s in (1, 2, 3, 4, 5, 6, 8)} <= generator.metrics.keys()
    assert {"psnr", "usage", "perplexity", "psnr/1x1", "psnr/8x8"} <= trained.metrics.keys()
    copied = generator.path.parent / "tokenizer.safetensors"
    assert all(torch.equal(value, weights(trained.path)[name]) for name, value in weights(copied).items())


def test_losses_fall(trained: Result, generator: Result, folder: Path, tokenizer_run: TokenizerRun) -> None:
    """On held-out images, every eight steps. A single step is worse than any of them."""

    def held_out(result: Result, name: str) -> list[float]:
        lines = (result.path.parent / "metrics.jsonl").read_text().splitlines()
        return [row[name] for row in map(json.loads, lines) if row["kind"] == "held out"]

    once = replace(tokenizer_run, loop=replace(tokenizer_run.loop, steps=1))
    first = train_tokenizer(once, "scenes", options_for(folder, "once")).metrics["psnr"]
    psnr = [first, *held_out(trained, "psnr")]
    assert psnr == sorted(psnr) and psnr[0] + 1 < psnr[1]
    loss = held_out(generator, "loss")
    assert loss == sorted(loss, reverse=True)
    assert loss[0] + 0.1 < math.log(32) and loss[-1] + 0.3 < math.log(32)  # ln 32: all codes equally likely


def test_the_result_is_the_average_and_not_the_last_weights(trained: Result) -> None:
    state = torch.load(find_checkpoints(trained.path.parent / "checkpoints")[-1], weights_only=True)
    result = weights(trained.path)
    name = "decoder.conv_out.weight"
    assert torch.equal(result[name], state["average"][name])
    assert not torch.equal(result[name], state["parts"]["model"][f"tokenizer.{name}"])


@pytest.mark.parametrize("kind", ["tokenizer", "transformer"])
def test_a_killed_and_resumed_run_has_the_same_weights(
    kind: str,
    folder: Path,
    trained: Result,
    generator: Result,
    tokenizer_run: TokenizerRun,
    transformer_run: TransformerRun,
) -> None:
    """kill -9 at a random moment, then a resume: bit for bit the weights of the uninterrupted run."""
    whole = trained if kind == "tokenizer" else generator
    out, config = folder / f"killed_{kind}", folder / f"killed_{kind}.json"
    written(config, TINY_TOKENIZER if kind == "tokenizer" else TINY_TRANSFORMER)
    process = launch([f"{kind}|{config}|{out}|{folder / 'cache'}|{trained.path}"])
    try:
        deadline = time.monotonic() + 120
        while not steps_of(out) and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.002)
        time.sleep(np.random.default_rng().uniform(0, 0.3))
        process.send_signal(signal.SIGKILL)
    finally:
        process.kill()
        output = process.communicate()[0].decode()
    assert steps_of(out), output
    if steps_of(out)[-1] == STEPS:
        pytest.skip("the run ended before it was killed")
    options = options_for(folder, f"killed_{kind}", resume=True)
    if kind == "tokenizer":
        resumed = train_tokenizer(tokenizer_run, "scenes", options)
    else:
        resumed = train_transformer(transformer_run, "scenes", trained.path, options)
    assert resumed.path.read_bytes() == whole.path.read_bytes()
    losses = [
        [
            (row["step"], row["loss"])
            for row in map(json.loads, (path / "metrics.jsonl").read_text().splitlines())
            if row["kind"] == "train"
        ]
        for path in (out, whole.path.parent)
    ]
    assert losses[0] == losses[1]


def test_a_damaged_checkpoint_is_skipped(folder: Path, trained: Result, tokenizer_run: TokenizerRun) -> None:
    out = folder / "damaged"
    short = replace(tokenizer_run, loop=replace(tokenizer_run.loop, steps=6, evaluate=0, sample=0))
    options = options_for(folder, "damaged")
    first = train_tokenizer(short, "scenes", options).path.read_bytes()
    old, new = find_checkpoints(out / "checkpoints")
    new.write_bytes(new.read_bytes()[:1000])
    (out / "checkpoints" / ".step_00000008.pt.partial").write_bytes(b"cut short")
    assert train_tokenizer(short, "scenes", replace(options, resume=True)).path.read_bytes() == first
    for path in find_checkpoints(out / "checkpoints"):
        path.write_bytes(b"nothing")
    with pytest.raises(RunRefused, match=str(out / "checkpoints")):
        train_tokenizer(short, "scenes", replace(options, resume=True))


def distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """‖a − b‖ over ‖a‖, all parameters together."""
    norm = math.sqrt(sum(float(value.double().square().sum()) for value in a.values()))
    return math.sqrt(sum(float((a[name] - b[name]).double().square().sum()) for name in a)) / norm


@pytest.mark.slow
def test_two_processes_are_as_good_as_one(folder: Path, trained: Result) -> None:
    """20 steps of the same global batch agree to float32 noise. The weights differed by 2e-6 of their norm."""
    loop = {"steps": 20, "batch": 8, "log": 4, "save": 0, "evaluate": 0, "sample": 0}
    tokenizer, transformer = {**TINY_TOKENIZER, "loop": loop}, {**TINY_TRANSFORMER, "loop": loop}
    both = {
        "tokenizer": (tokenizer, tokenizer),
        # one process accumulates two chunks, like two processes with one each, so the draws are the same
        "transformer": (transformer, {**transformer, "optim": {**transformer["optim"], "accumulation": 1}}),
    }
    arguments, alone = [], {}
    for kind, (one, two) in both.items():
        config, out = written(folder / f"two_{kind}.json", two), folder / f"two_{kind}"
        arguments.append(f"{kind}|{config}|{out}|{folder / 'cache'}|{trained.path}")
        options = options_for(folder, f"one_{kind}")
        if kind == "tokenizer":
            alone[kind] = train_tokenizer(build(TokenizerRun, one, kind), "scenes", options)
        else:
            alone[kind] = train_transformer(build(TransformerRun, one, kind), "scenes", trained.path, options)
    process = launch(arguments, processes=2)
    output = process.communicate(timeout=200)[0].decode()
    assert process.returncode == 0, output
    for kind, result in alone.items():
        mine, theirs = weights(result.path), weights(folder / f"two_{kind}" / "model.safetensors")
        assert distance(mine, theirs) < 1e-5, kind
        metrics = [
            json.loads((path / "metrics.jsonl").read_text().splitlines()[-1])
            for path in (result.path.parent, folder / f"two_{kind}")
        ]
        shared = [name for name in metrics[0] if name not in ("time", "kind")]
        assert [metrics[1][name] for name in shared] == pytest.approx([metrics[0][name] for name in shared], rel=1e-5)
    half = {**tokenizer, "loop": {**tokenizer["loop"], "batch": 4}, "optim": {**tokenizer["optim"], "lr": 0.04}}
    other = train_tokenizer(build(TokenizerRun, half, "half"), "scenes", options_for(folder, "half"))
    # negative control: half of the batch at the same learning rate gives other weights
    assert distance(weights(alone["tokenizer"].path), weights(other.path)) > 1e-2


def command(arguments: list[str]) -> tuple[int, str, str]:
    app = typer.Typer()
    register(app)
    result = CliRunner().invoke(app, ["train", *arguments])
    return result.exit_code, result.stdout, result.stderr


def test_the_command_line(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """An image folder as data, --steps, a result as JSON, and a resume of a finished run."""
    images, rng = folder / "images", np.random.default_rng(0)
    for split in ("train", "val"):
        for name in ("blue", "red"):
            (images / split / name).mkdir(parents=True)
            for i in range(5):
                pixels = rng.integers(0, 255, (20, 24, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(images / split / name / f"{i}.png")
    config = written(folder / "cli.json", {**TINY_TOKENIZER, "data": {"size": 16, "workers": 0}})
    arguments = ["tokenizer", "--data", str(images), "--out", str(folder / "cli"), "--config", str(config)]
    arguments += ["--steps", "3", "--threads", "1"]
    code, stdout, _ = command([*arguments, "--json"])
    assert code == 0
    assert json.loads(stdout)["steps"] == 3 and Path(json.loads(stdout)["result"]).is_file()
    assert json.loads((folder / "cli" / "classes.json").read_text()) == ["blue", "red"]
    assert command([*arguments, "--resume"])[0] == 0
    code, stdout, _ = command([*arguments, "--json"])
    assert code == 5 and "--resume" in json.loads(stdout)["error"]["fix"]
    code, _, _ = command([*arguments[:-4], "--steps", "4", "--resume"])
    assert code == 5


@pytest.mark.parametrize(
    ("arguments", "code", "kind"),
    [
        (["tokenizer", "--data", "absent"], 5, "DataError"),
        (["tokenizer", "--data", "scenes", "--config", "absent.toml"], 2, "ConfigError"),
        (["transformer", "--data", "scenes", "--tokenizer", "absent.safetensors"], 5, "CheckpointError"),
    ],
)
def test_errors_of_the_command_line(tmp_path: Path, arguments: list[str], code: int, kind: str) -> None:
    """The exit code, the error as JSON on standard output, and as one line on standard error. The file is named."""
    got, stdout, stderr = command([*arguments, "--out", str(tmp_path / "run"), "--json"])
    error = json.loads(stdout)["error"]
    assert (got, error["type"]) == (code, kind)
    assert "absent" in error["got"] and error["expected"]
    assert stderr == f"error: {error['got']} {error['fix']}\n"
    assert not (tmp_path / "run" / "model.safetensors").exists()


def test_adversarial_loss_bf16_and_no_cache(folder: Path, tokenizer_run: TokenizerRun) -> None:
    """The options work together. The adversarial loss starts late, and checkpoints hold the discriminator's state."""
    run = replace(
        tokenizer_run,
        data=replace(tokenizer_run.data, samples=0, size=32),
        loss=replace(tokenizer_run.loss, adversarial=0.5, adversarial_start=2),
        loop=replace(tokenizer_run.loop, steps=4, precision="bf16", channels_last=True, evaluate=0, sample=0, log=2),
    )
    options = options_for(folder, "adversarial")
    train_tokenizer(run, "scenes", options)
    rows = [json.loads(line) for line in (options.out / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if row["kind"] == "train"]
    assert "discriminator" not in rows[0] and math.isfinite(rows[1]["discriminator"])
    state = torch.load(find_checkpoints(options.out / "checkpoints")[-1], weights_only=True)
    assert set(state["parts"]) == set(state["optimizers"]) == {"model", "discriminator"}
    assert state["optimizers"]["discriminator"]["state"]


def test_an_infinite_loss_stops_the_run(folder: Path, tokenizer_run: TokenizerRun) -> None:
    wild = replace(tokenizer_run, optim=replace(tokenizer_run.optim, lr=1e30, clip=1e30, warmup=0))
    with pytest.raises(RunRefused, match="not a finite number") as caught:
        train_tokenizer(wild, "scenes", options_for(folder, "wild"))
    assert "optim.lr" in caught.value.fix


@pytest.mark.parametrize(
    ("share", "psnr", "usage", "loss"),
    [
        pytest.param(1 / 3, 15.0, 0.65, 3.6, id="a third of the steps"),
        pytest.param(1, 17.0, 0.65, 2.6, id="all steps", marks=pytest.mark.slow),
    ],
)
def test_the_smoke_configurations_learn(tmp_path: Path, share: float, psnr: float, usage: float, loss: float) -> None:
    """After a single step the bounds are missed. For comparison: images of the mean colour have 13 dB."""

    def tokenizer_run(steps: int, name: str) -> Result:
        run = load_config(CONFIGS / "smoke_tokenizer.toml", TokenizerRun)
        run = replace(run, loop=replace(run.loop, steps=steps))
        return train_tokenizer(run, "scenes", options_for(tmp_path, name))

    def transformer_run(steps: int, name: str) -> Result:
        run = load_config(CONFIGS / "smoke_transformer.toml", TransformerRun)
        run = replace(run, loop=replace(run.loop, steps=steps))
        return train_transformer(run, "scenes", tokenizer.path, options_for(tmp_path, name))

    untrained, tokenizer = tokenizer_run(1, "untrained"), tokenizer_run(round(120 * share), "tokenizer")
    assert untrained.metrics["psnr"] < psnr < tokenizer.metrics["psnr"]
    assert untrained.metrics["usage"] < usage < tokenizer.metrics["usage"]
    first, transformer = transformer_run(1, "first"), transformer_run(round(150 * share), "transformer")
    assert transformer.metrics["loss"] < loss < first.metrics["loss"]
    losses = [
        row["loss"]
        for row in map(json.loads, (tmp_path / "transformer" / "metrics.jsonl").read_text().splitlines())
        if row["kind"] == "train"
    ]
    assert losses == sorted(losses, reverse=True)


def test_sharded_training_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its checkpoints would hold one shard only."""

    class Sharded:
        distributed_type = DistributedType.FSDP

    monkeypatch.setattr(trainer, "Accelerator", lambda **options: Sharded())
    with pytest.raises(Unsupported, match="FSDP") as caught:
        trainer.make_accelerator()
    assert caught.value.exit_code == 4
