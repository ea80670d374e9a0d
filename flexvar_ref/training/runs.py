"""A run from a configuration to a result: the two things that can be trained, each with its folder.

RUN/config.json              what was asked for            RUN/metrics.jsonl, curves.png, samples/, tensorboard/
RUN/checkpoints/step_N.pt    to resume from                RUN/model.safetensors, model.json    the result
RUN/classes.json             names, in label order         RUN/tokenizer.safetensors, .json     (transformer)
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from ..checkpoint import load_tokenizer, save
from ..tokenizer import Tokenizer
from .cache import image_key, keep_images, keep_latents, latent_key
from .config import Data, Run, TokenizerRun, TransformerRun
from .data import Dataset
from .errors import RunRefused
from .feed import Array, Drawn, Kept, Source
from .sources import open_data
from .task import Metrics, Task
from .tokenizer_task import TokenizerTask
from .trainer import CHECKPOINTS, Trainer, as_text, make_accelerator
from .transformer_task import TransformerTask

CONFIG, CLASSES, RESULT, TOKENIZER, CACHE = (
    "config.json",
    "classes.json",
    "model.safetensors",
    "tokenizer.safetensors",
    "cache",
)
Progress = Callable[[str, int, int], None]
"""(what is prepared, done, of how many) -> None"""


@dataclass(frozen=True, kw_only=True)
class Place:
    """out: the run's folder; cache: where prepared samples are kept (default: in the run's folder)."""

    out: Path
    cache: Path | None = None
    resume: bool = False
    quiet: bool = False
    progress: Progress | None = None

    @property
    def kept(self) -> Path:
        return self.cache or self.out / CACHE

    def prepares(self, what: str) -> Callable[[int, int], None] | None:
        report = self.progress
        return None if report is None else lambda done, count: report(what, done, count)


@dataclass(frozen=True)
class Result:
    """path: the averaged weights, as flexvar_ref.load and `flexvar export` read them; metrics: the last evaluation."""

    path: Path
    steps: int
    metrics: Metrics


def train_tokenizer(run: TokenizerRun, data: str, place: Place) -> Result:
    """Train a tokenizer on a folder or on "scenes". Raises TrainingError, DataError."""
    accelerator = make_accelerator()
    train, held_out = open_data(data, run.data)
    text = _text("tokenizer", run, data)
    _enter(place, text, train, accelerator)
    source, shown, _ = _images(run.data, train, held_out, place, accelerator)
    return _run(TokenizerTask(run, source, shown), run, text, place, accelerator)


def train_transformer(run: TransformerRun, data: str, tokenizer_path: Path, place: Place) -> Result:
    """Train a transformer on the tokens of a tokenizer. Raises TrainingError, DataError, CheckpointError."""
    accelerator = make_accelerator()
    tokenizer = load_tokenizer(tokenizer_path)
    train, held_out = open_data(data, run.data)
    text = _text("transformer", run, data, tokenizer=_digest(tokenizer))
    _enter(place, text, train, accelerator)
    if accelerator.is_main_process:
        save(tokenizer, place.out / TOKENIZER)
    source, shown, labels = _images(run.data, train, held_out, place, accelerator)
    task = TransformerTask(run, tokenizer, len(train.classes), source, (shown, labels))
    if isinstance(source, Kept):
        task.source = _latents(task, source, image_key(train, run.data.samples), place, accelerator)
    return _run(task, run, text, place, accelerator)


def _run(task: Task, run: Run, text: str, place: Place, accelerator: Accelerator) -> Result:
    trainer = Trainer(task, run.loop, run.optim, place.out, text, accelerator, run.data.workers)
    if place.resume:
        trainer.resume()
    metrics = trainer.run(place.quiet)
    if accelerator.is_main_process:
        save(trainer.averaged().cpu(), place.out / RESULT)  # type: ignore[arg-type]
    accelerator.wait_for_everyone()
    return Result(place.out / RESULT, trainer.step, metrics)


def _text(kind: str, run: Run, data: str, **more: str) -> str:
    return as_text({"kind": kind, "data_set": data, **more, "run": dataclasses.asdict(run)})


def _enter(place: Place, text: str, dataset: Dataset, accelerator: Accelerator) -> None:
    """Make the run's folder and write down what was asked for. Raises RunRefused where another run is in it."""
    path = place.out / CONFIG
    if path.exists() and not place.resume:
        raise RunRefused(
            f"{place.out}, which holds a run", expected="a new folder", fix="pass --resume or another --out"
        )
    if path.exists() and path.read_text(encoding="utf-8") != text:
        raise RunRefused(
            f"another configuration than {path}",
            expected="the one the run was started with",
            fix="pass the same --config, --data and options, or start another run with another --out",
        )
    accelerator.wait_for_everyone()  # nobody writes before everybody has looked
    if accelerator.is_main_process:
        (place.out / CHECKPOINTS).mkdir(parents=True, exist_ok=True)
        (place.out / CLASSES).write_text(json.dumps(list(dataset.classes), indent=1) + "\n", encoding="utf-8")
        partial = path.with_name(f".{path.name}.partial")
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)


def _images(
    config: Data, train: Dataset, held_out: Dataset, place: Place, accelerator: Accelerator
) -> tuple[Source, Array, Array]:
    """What is trained on, and the held-out images and labels."""
    count = config.held_out if held_out.length is None else min(config.held_out, held_out.length)
    with accelerator.main_process_first():
        shown = keep_images(held_out, count, place.kept, config.workers, place.prepares("held-out images"))
        if config.samples == 0:
            return Drawn(train), *shown
        kept = keep_images(train, config.samples, place.kept, config.workers, place.prepares("images"))
    return Kept(*kept, config.seed), *shown


def _latents(task: TransformerTask, images: Kept, name: str, place: Place, accelerator: Accelerator) -> Kept:
    """The same samples as latents, encoded once."""
    task.tokenizer.to(accelerator.device)

    def encode(part: Tensor) -> Tensor:
        with torch.autocast(accelerator.device.type, torch.bfloat16, enabled=task.bf16):
            return task.latents(part.to(accelerator.device))

    with accelerator.main_process_first():
        key = latent_key(task.tokenizer, f"{name} {task.config.loop.precision}")
        progress = place.prepares("latents")
        kept = keep_latents(task.tokenizer, images.values, images.labels, place.kept, key, encode, progress)
    return Kept(*kept, task.config.data.seed)


def _digest(tokenizer: Tokenizer) -> str:
    digest = hashlib.sha256()
    for name, value in sorted(tokenizer.state_dict().items()):
        digest.update(name.encode() + value.contiguous().numpy().tobytes())
    return digest.hexdigest()


def as_json(result: Result) -> dict[str, Any]:
    return {"result": str(result.path), "steps": result.steps, "metrics": result.metrics}
