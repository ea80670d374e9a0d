"""Whole training runs of a tokenizer or a transformer, from a configuration to a result.

Files in the folder of a run:
config.json                             the configuration
classes.json                            names of the classes, in the order of their labels
metrics.jsonl, curves.png, tensorboard/ losses, speed and metrics of the evaluation
samples/step_N.png                      sample images
checkpoints/step_N.pt                   states to resume from
model.safetensors, model.json           the result
tokenizer.safetensors, tokenizer.json   a copy of the tokenizer (transformer only)
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from ..checkpoint import load_tokenizer, save
from ..errors import InvalidInput, RunRefused
from ..files import write_whole
from ..tokenizer import Tokenizer
from .cache import cache_images, cache_latents, image_key, latent_key
from .config import Data, Run, TokenizerRun, TransformerRun
from .data import Dataset
from .feed import Array, CachedSource, DatasetSource, Source
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
"""(kind of samples being prepared, samples done, samples in all) -> None"""


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """Options of a run that do not change its result.

    out: folder of the run. cache: folder of prepared samples, by default in the run's folder. resume: continue the run
    in `out`. quiet: print no progress. progress: called while samples are prepared.
    """

    out: Path
    cache: Path | None = None
    resume: bool = False
    quiet: bool = False
    progress: Progress | None = None

    @property
    def cache_folder(self) -> Path:
        return self.cache or self.out / CACHE

    def progress_of(self, what: str) -> Callable[[int, int], None] | None:
        """`progress` for one kind of samples."""
        report = self.progress
        return None if report is None else lambda done, count: report(what, done, count)


@dataclass(frozen=True)
class Result:
    """The result of a run.

    path: the averaged weights, in the form that flexvar_ref.load and `flexvar export` read. steps: steps trained.
    metrics: the last evaluation.
    """

    path: Path
    steps: int
    metrics: Metrics


def train_tokenizer(run: TokenizerRun, data: str, options: RunOptions) -> Result:
    """Train a tokenizer. data: an image folder or "scenes". Raises TrainingError."""
    accelerator = make_accelerator()
    train, held_out = open_data(data, run.data)
    text = _config_text("tokenizer", run, data)
    _prepare_folder(options, text, train, accelerator)
    source, images, _ = _prepare_images(run.data, train, held_out, options, accelerator)
    return _train(TokenizerTask(run, source, images), run, text, options, accelerator)


def train_transformer(
    run: TransformerRun, data: str, tokenizer_path: Path, options: RunOptions, weights: str | None = None
) -> Result:
    """Train a transformer on the tokens of a tokenizer. data: an image folder or "scenes".

    weights: "ema" or "model", for a tokenizer file that holds both. Raises TrainingError or CheckpointError.
    """
    accelerator = make_accelerator()
    tokenizer = load_tokenizer(tokenizer_path, weights=weights)
    train, held_out = open_data(data, run.data)
    text = _config_text("transformer", run, data, tokenizer=_digest(tokenizer))
    _prepare_folder(options, text, train, accelerator)
    if accelerator.is_main_process:
        save(tokenizer, options.out / TOKENIZER)
    source, images, labels = _prepare_images(run.data, train, held_out, options, accelerator)
    task = TransformerTask(run, tokenizer, len(train.classes), source, (images, labels))
    if isinstance(source, CachedSource):
        task.source = _prepare_latents(task, source, image_key(train, run.data.samples), options, accelerator)
    return _train(task, run, text, options, accelerator)


def _train(task: Task, run: Run, text: str, options: RunOptions, accelerator: Accelerator) -> Result:
    trainer = Trainer(task, run.loop, run.optim, options.out, text, accelerator, run.data.workers)
    if options.resume:
        trainer.resume()
    metrics = trainer.run(options.quiet)
    if accelerator.is_main_process:
        save(trainer.averaged().cpu(), options.out / RESULT)  # type: ignore[arg-type]
    accelerator.wait_for_everyone()
    return Result(options.out / RESULT, trainer.step, metrics)


def _config_text(kind: str, run: Run, data: str, **more: str) -> str:
    return as_text({"kind": kind, "data_set": data, **more, "run": dataclasses.asdict(run)})


def _prepare_folder(options: RunOptions, text: str, dataset: Dataset, accelerator: Accelerator) -> None:
    """Create the run's folder and write its configuration. Raises RunRefused if the folder holds another run."""
    if not _is_utf8(options.out):
        got, fix = f"TensorBoard and safetensors cannot write in {options.out}.", "Choose another --out."
        raise InvalidInput(got, expected="the name of a folder in UTF-8", fix=fix)
    path = options.out / CONFIG
    if os.path.exists(path) and not options.resume:
        raise RunRefused(
            f"{options.out} already holds a run.", expected="a new folder", fix="Pass --resume or another --out."
        )
    if os.path.exists(path) and path.read_text(encoding="utf-8") != text:
        raise RunRefused(
            f"The configuration differs from {path}, with which the run was started.",
            expected="the configuration the run was started with",
            fix="Pass the same --config, --data and options, or start a new run in another --out.",
        )
    accelerator.wait_for_everyone()  # no process writes before all have checked
    if accelerator.is_main_process:
        try:
            (options.out / CHECKPOINTS).mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError) as error:
            got, fix = f"A file is in the way of the folder {options.out}.", "Choose another --out."
            raise InvalidInput(got, expected="the name of a folder", fix=fix) from error
        (options.out / CLASSES).write_text(json.dumps(list(dataset.classes), indent=1) + "\n", encoding="utf-8")
        with write_whole(path) as partial:
            partial.write_text(text, encoding="utf-8")


def _is_utf8(path: Path) -> bool:
    try:
        str(path).encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _prepare_images(
    config: Data, train: Dataset, held_out: Dataset, options: RunOptions, accelerator: Accelerator
) -> tuple[Source, Array, Array]:
    """The source of training samples, and the held-out images and labels."""
    count = config.held_out if held_out.length is None else min(config.held_out, held_out.length)
    with accelerator.main_process_first():
        folder, workers = options.cache_folder, config.workers
        evaluated = cache_images(held_out, count, folder, workers, options.progress_of("held-out images"))
        if config.samples == 0:
            return DatasetSource(train), *evaluated
        trained = cache_images(train, config.samples, folder, workers, options.progress_of("images"))
    return CachedSource(*trained, config.seed), *evaluated


def _prepare_latents(
    task: TransformerTask, images: CachedSource, name: str, options: RunOptions, accelerator: Accelerator
) -> CachedSource:
    """The same samples as latents, encoded once."""
    task.tokenizer.to(accelerator.device)

    def encode(part: Tensor) -> Tensor:
        with torch.autocast(accelerator.device.type, torch.bfloat16, enabled=task.bf16):
            return task.latents(part.to(accelerator.device))

    with accelerator.main_process_first():
        key = latent_key(task.tokenizer, f"{name} {task.config.loop.precision}")
        folder, progress = options.cache_folder, options.progress_of("latents")
        latents = cache_latents(task.tokenizer, images.values, images.labels, folder, key, encode, progress)
    return CachedSource(*latents, task.config.data.seed)


def _digest(tokenizer: Tokenizer) -> str:
    """sha256 of the tokenizer's weights."""
    digest = hashlib.sha256()
    for name, value in sorted(tokenizer.state_dict().items()):
        digest.update(name.encode() + value.contiguous().numpy().tobytes())
    return digest.hexdigest()


def as_json(result: Result) -> dict[str, Any]:
    """The result as plain values."""
    return {"result": str(result.path), "steps": result.steps, "metrics": result.metrics}
