"""Whole runs: resumed after a kill, on two processes, from the command line, with falling losses."""

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

from flexvar_ref.training import trainer
from flexvar_ref.training.checkpoint import found
from flexvar_ref.training.commands import register
from flexvar_ref.training.config import TokenizerRun, TransformerRun, build, load_config
from flexvar_ref.training.errors import RunRefused, Unsupported
from flexvar_ref.training.runs import Place, Result, train_tokenizer, train_transformer

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
    "optim": {"algorithm": "muon", "lr": 0.02, "warmup": 2, "ema": 0.9, "accumulation": 2},  # as the demo model
    "loop": {"steps": STEPS, "batch": 8, "log": 4, "save": 2, "evaluate": 8, "sample": 8},
}
LAUNCH = """
import sys, torch
from pathlib import Path
from accelerate import PartialState
torch.set_num_threads(1)
from flexvar_ref.training.config import TokenizerRun, TransformerRun, load_config
from flexvar_ref.training.runs import Place, train_tokenizer, train_transformer
for kind, config, out, cache, *tokenizer in (line.split("|") for line in sys.argv[1:]):
    place = Place(out=Path(out), cache=Path(cache), quiet=True)
    if kind == "tokenizer":
        train_tokenizer(load_config(config, TokenizerRun), "scenes", place)
    else:
        train_transformer(load_config(config, TransformerRun), "scenes", Path(tokenizer[0]), place)
PartialState().destroy_process_group()  # left to the end of the process, its threads may abort it
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
    return train_tokenizer(tokenizer_run, "scenes", Place(out=folder / "tokenizer", cache=folder / "cache", quiet=True))


@pytest.fixture(scope="module")
def generator(folder: Path, trained: Result, transformer_run: TransformerRun) -> Result:
    """A transformer on its tokens, trained without interruption."""
    place = Place(out=folder / "transformer", cache=folder / "cache", quiet=True)
    return train_transformer(transformer_run, "scenes", trained.path, place)


def weights(result: Path) -> dict[str, torch.Tensor]:
    return load_file(result)


def steps_of(folder: Path) -> list[int]:
    return [int(path.stem[5:]) for path in found(folder / "checkpoints")]


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


def test_what_a_run_leaves(trained: Result, generator: Result, folder: Path) -> None:
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
    assert {f"loss/{s}x{s}" for s in (1, 2, 3, 4, 5, 6, 8)} <= generator.metrics.keys()  # a validation loss per scale
    assert {"psnr", "usage", "perplexity", "psnr/1x1", "psnr/8x8"} <= trained.metrics.keys()
    copied = generator.path.parent / "tokenizer.safetensors"
    assert all(torch.equal(value, weights(trained.path)[name]) for name, value in weights(copied).items())


def test_losses_fall(trained: Result, generator: Result, folder: Path, tokenizer_run: TokenizerRun) -> None:
    """On what is held out, every eight steps; one step alone is worse than any of them."""

    def held_out(result: Result, name: str) -> list[float]:
        lines = (result.path.parent / "metrics.jsonl").read_text().splitlines()
        return [row[name] for row in map(json.loads, lines) if row["kind"] == "held out"]

    once = replace(tokenizer_run, loop=replace(tokenizer_run.loop, steps=1))
    place = Place(out=folder / "once", cache=folder / "cache", quiet=True)
    psnr = [train_tokenizer(once, "scenes", place).metrics["psnr"], *held_out(trained, "psnr")]
    assert psnr == sorted(psnr) and psnr[0] + 1 < psnr[1]
    loss = held_out(generator, "loss")
    assert loss == sorted(loss, reverse=True)
    assert loss[0] + 0.1 < math.log(32) and loss[-1] + 0.3 < math.log(32)  # of codes equally likely


def test_the_result_is_the_average_and_not_the_last_weights(trained: Result) -> None:
    state = torch.load(found(trained.path.parent / "checkpoints")[-1], weights_only=True)
    result = weights(trained.path)
    name = "decoder.conv_out.weight"
    assert torch.equal(result[name], state["average"][name])
    assert not torch.equal(result[name], state["parts"]["model"][f"tokenizer.{name}"])


@pytest.mark.parametrize("kind", ["tokenizer", "transformer"])
def test_a_killed_run_goes_on_to_the_same_weights(
    kind: str,
    folder: Path,
    trained: Result,
    generator: Result,
    tokenizer_run: TokenizerRun,
    transformer_run: TransformerRun,
) -> None:
    """kill -9 at a moment that nobody chose, then --resume: bit for bit the weights of the uninterrupted run."""
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
        pytest.skip("it was done before it could be killed")
    place = Place(out=out, cache=folder / "cache", resume=True, quiet=True)
    if kind == "tokenizer":
        resumed = train_tokenizer(tokenizer_run, "scenes", place)
    else:
        resumed = train_transformer(transformer_run, "scenes", trained.path, place)
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


def test_a_damaged_checkpoint_gives_way_to_the_one_before(
    folder: Path, trained: Result, tokenizer_run: TokenizerRun
) -> None:
    out = folder / "damaged"
    short = replace(tokenizer_run, loop=replace(tokenizer_run.loop, steps=6, evaluate=0, sample=0))
    place = Place(out=out, cache=folder / "cache", quiet=True)
    first = train_tokenizer(short, "scenes", place).path.read_bytes()
    old, new = found(out / "checkpoints")
    new.write_bytes(new.read_bytes()[:1000])
    (out / "checkpoints" / ".step_00000008.pt.partial").write_bytes(b"cut short")
    assert train_tokenizer(short, "scenes", replace(place, resume=True)).path.read_bytes() == first
    for path in found(out / "checkpoints"):
        path.write_bytes(b"nothing")
    with pytest.raises(RunRefused, match="the newest unreadable"):
        train_tokenizer(short, "scenes", replace(place, resume=True))


def distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """‖a − b‖ over ‖a‖, all parameters together."""
    norm = math.sqrt(sum(float(value.double().square().sum()) for value in a.values()))
    return math.sqrt(sum(float((a[name] - b[name]).double().square().sum()) for name in a)) / norm


def test_two_processes_are_as_good_as_one(folder: Path, trained: Result) -> None:
    """20 steps of the same global batch, to float32 noise: 2e-6 of the weights' norm was seen, the bound is 1e-5."""
    tokenizer = {**TINY_TOKENIZER, "loop": {**TINY_TOKENIZER["loop"], "steps": 20}}
    transformer = {**TINY_TRANSFORMER, "loop": {**TINY_TRANSFORMER["loop"], "steps": 20}}
    both = {
        "tokenizer": (tokenizer, tokenizer),
        # one process accumulates the two chunks that two processes have: the same label dropout and drop path
        "transformer": (transformer, {**transformer, "optim": {**transformer["optim"], "accumulation": 1}}),
    }
    arguments, alone = [], {}
    for kind, (one, two) in both.items():
        config, out = written(folder / f"two_{kind}.json", two), folder / f"two_{kind}"
        arguments.append(f"{kind}|{config}|{out}|{folder / 'cache'}|{trained.path}")
        place = Place(out=folder / f"one_{kind}", cache=folder / "cache", quiet=True)
        if kind == "tokenizer":
            alone[kind] = train_tokenizer(build(TokenizerRun, one, kind), "scenes", place)
        else:
            alone[kind] = train_transformer(build(TransformerRun, one, kind), "scenes", trained.path, place)
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
    place = Place(out=folder / "half", cache=folder / "cache", quiet=True)
    other = train_tokenizer(build(TokenizerRun, half, "half"), "scenes", place)
    # negative control: a process that saw only its own half of the batch, at the same learning rate, is found
    assert distance(weights(alone["tokenizer"].path), weights(other.path)) > 1e-2


def command(arguments: list[str]) -> tuple[int, str, str]:
    app = typer.Typer()
    register(app)
    result = CliRunner().invoke(app, ["train", *arguments])
    return result.exit_code, result.stdout, result.stderr


def test_the_command_line(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A folder of images as data, steps from the command line, a result as JSON, then a resume of what is done."""
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
def test_refusals_have_a_type_a_fix_and_a_code(tmp_path: Path, arguments: list[str], code: int, kind: str) -> None:
    got, stdout, _ = command([*arguments, "--out", str(tmp_path / "run"), "--json"])
    error = json.loads(stdout)["error"]
    assert (got, error["type"]) == (code, kind)
    assert error["got"] and error["expected"] and error["fix"]
    assert not (tmp_path / "run" / "model.safetensors").exists()


def test_adversary_half_precision_and_drawing_on_the_fly(folder: Path, tokenizer_run: TokenizerRun) -> None:
    """The options together: they run, the adversary starts late, and a resume has its state."""
    run = replace(
        tokenizer_run,
        data=replace(tokenizer_run.data, samples=0, size=32),
        loss=replace(tokenizer_run.loss, adversarial=0.5, adversarial_start=2),
        loop=replace(tokenizer_run.loop, steps=4, precision="bf16", channels_last=True, evaluate=0, sample=0, log=2),
    )
    place = Place(out=folder / "adversary", cache=folder / "cache", quiet=True)
    train_tokenizer(run, "scenes", place)
    rows = [json.loads(line) for line in (place.out / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if row["kind"] == "train"]
    assert "discriminator" not in rows[0] and math.isfinite(rows[1]["discriminator"])
    state = torch.load(found(place.out / "checkpoints")[-1], weights_only=True)
    assert set(state["parts"]) == set(state["optimizers"]) == {"model", "discriminator"}
    assert state["optimizers"]["discriminator"]["state"]


def test_a_loss_that_is_no_number_stops_the_run(folder: Path, tokenizer_run: TokenizerRun) -> None:
    wild = replace(tokenizer_run, optim=replace(tokenizer_run.optim, lr=1e30, clip=1e30, warmup=0))
    with pytest.raises(RunRefused, match="no number") as refusal:
        train_tokenizer(wild, "scenes", Place(out=folder / "wild", cache=folder / "cache", quiet=True))
    assert "optim.lr" in refusal.value.fix


# Untrained weights: 10.1 dB and ln 128 = 4.85. Nothing but the data set's mean colour gives 13 dB.
BOUNDS = {"psnr": 17.0, "usage": 0.5, "loss": 2.6}


def test_the_smoke_configurations_learn(tmp_path: Path) -> None:
    """Both commands, about a minute together: the losses fall below bounds that untrained weights miss."""

    def place(name: str) -> Place:
        return Place(out=tmp_path / name, cache=tmp_path / "cache", quiet=True)

    short = load_config(CONFIGS / "smoke_tokenizer.toml", TokenizerRun)
    untrained = train_tokenizer(replace(short, loop=replace(short.loop, steps=1)), "scenes", place("untrained"))
    tokenizer = train_tokenizer(short, "scenes", place("tokenizer"))
    assert untrained.metrics["psnr"] < BOUNDS["psnr"] < tokenizer.metrics["psnr"]
    assert tokenizer.metrics["usage"] > BOUNDS["usage"]
    run = load_config(CONFIGS / "smoke_transformer.toml", TransformerRun)
    untrained = train_transformer(
        replace(run, loop=replace(run.loop, steps=1)), "scenes", tokenizer.path, place("untrained_2")
    )
    transformer = train_transformer(run, "scenes", tokenizer.path, place("transformer"))
    assert transformer.metrics["loss"] < BOUNDS["loss"] < untrained.metrics["loss"]
    losses = [
        row["loss"]
        for row in map(json.loads, (tmp_path / "transformer" / "metrics.jsonl").read_text().splitlines())
        if row["kind"] == "train"
    ]
    assert losses == sorted(losses, reverse=True)


def test_sharded_training_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint of the main process would hold one shard only."""

    class Sharded:
        distributed_type = DistributedType.FSDP

    monkeypatch.setattr(trainer, "Accelerator", lambda **options: Sharded())
    with pytest.raises(Unsupported, match="FSDP") as refusal:
        trainer.make_accelerator()
    assert refusal.value.exit_code == 4
