"""The configuration of a training run: frozen dataclasses, read from TOML or JSON. Unknown keys are refused."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from ..config import TokenizerConfig
from ..errors import ConfigError
from ..parsing import first_sentence, read_json, read_toml, refuse_failures, shown, shown_value

T = TypeVar("T")
PRECISIONS = ("fp32", "bf16")
MIN_ADVERSARIAL_SIDE = 32  # pixels; the discriminator needs images of at least this side
MAX_SIDE, MAX_WORKERS, MAX_BATCH = 8192, 512, 2**20
ALGORITHMS = ("adamw", "muon")
DECAYS = ("cosine", "linear", "constant")


def _require(holds: bool, name: str, value: object, expected: str) -> None:
    if not holds:
        raise ConfigError(
            f"{name} is {shown_value(value)}, but it must be {expected}.",
            expected=expected,
            fix="Correct the configuration.",
        )


@dataclass(frozen=True, kw_only=True)
class Data:
    """Training data.

    size: side of the square training images, in pixels.
    samples: number of samples that are prepared once and kept on disk. 0 prepares each sample when it is needed.
    held_out: number of samples in the evaluation.
    flip: mirror half of the images. It applies to image folders only.
    workers: processes that prepare samples.
    seed: seed of the data set. The held-out scenes use seed + 1.
    """

    size: int = 256
    samples: int = 0
    held_out: int = 240
    flip: bool = False
    workers: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        _require(8 <= self.size <= MAX_SIDE, "data.size", self.size, f"from 8 to {MAX_SIDE} pixels")
        _require(self.workers <= MAX_WORKERS, "data.workers", self.workers, f"at most {MAX_WORKERS}")
        for name in ("samples", "workers", "seed"):
            _require(getattr(self, name) >= 0, f"data.{name}", getattr(self, name), "at least 0")
        _require(self.held_out >= 1, "data.held_out", self.held_out, "at least 1")


@dataclass(frozen=True, kw_only=True)
class Optimisation:
    """Optimiser and learning rate.

    algorithm: "adamw", or "muon" for the matrices of attention and MLP.
    lr: learning rate for 256 images a step. It is scaled in proportion to loop.batch.
    warmup: number of steps in which the rate rises from 0.
    decay: "cosine", "linear" or "constant".
    final_lr: rate at the end, as a share of the highest.
    betas, weight_decay: of AdamW.
    clip: largest norm of the gradients.
    ema: decay of the averaged weights, which are the result of the run. 0 is off.
    accumulation: number of chunks whose gradients a process adds up before each step.
    momentum: of Muon.
    """

    algorithm: str = "adamw"
    lr: float = 1e-4
    warmup: int = 100
    decay: str = "cosine"
    final_lr: float = 0.01
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.05
    clip: float = 2.0
    ema: float = 0.999
    accumulation: int = 1
    momentum: float = 0.95

    def __post_init__(self) -> None:
        _require(self.algorithm in ALGORITHMS, "optim.algorithm", self.algorithm, "one of " + ", ".join(ALGORITHMS))
        _require(0 <= self.momentum < 1, "optim.momentum", self.momentum, "at least 0 and below 1")
        _require(self.lr > 0 and math.isfinite(self.lr), "optim.lr", self.lr, "a positive number")
        _require(self.warmup >= 0, "optim.warmup", self.warmup, "at least 0")
        _require(self.decay in DECAYS, "optim.decay", self.decay, "one of " + ", ".join(DECAYS))
        _require(0 <= self.final_lr <= 1, "optim.final_lr", self.final_lr, "a share from 0 to 1")
        _require(
            all(0 <= beta < 1 for beta in self.betas),
            "optim.betas",
            self.betas,
            "two numbers of at least 0 and below 1",
        )
        _require(self.weight_decay >= 0, "optim.weight_decay", self.weight_decay, "at least 0")
        _require(self.clip > 0, "optim.clip", self.clip, "a positive number")
        _require(0 <= self.ema < 1, "optim.ema", self.ema, "0 (off) or a decay below 1")
        _require(self.accumulation >= 1, "optim.accumulation", self.accumulation, "at least 1")


@dataclass(frozen=True, kw_only=True)
class Loop:
    """The training loop.

    steps: number of steps.
    batch: images in each step, over all processes.
    seed: seed of the initial weights and of every random draw of training.
    precision: "fp32", or "bf16" (autocast; the weights stay float32).
    compile: compile blocks and convolutions.
    channels_last: lay out images and convolution weights with the channels last.
    log, evaluate, sample, save: steps between two log rows, evaluations, sample images and checkpoints. For the last
    three, 0 means at the end only.
    """

    steps: int = 1000
    batch: int = 32
    seed: int = 0
    precision: str = "fp32"
    compile: bool = False
    channels_last: bool = False
    log: int = 10
    evaluate: int = 500
    sample: int = 500
    save: int = 100

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "log"):
            _require(getattr(self, name) >= 1, f"loop.{name}", getattr(self, name), "at least 1")
        for name in ("seed", "evaluate", "sample", "save"):
            _require(getattr(self, name) >= 0, f"loop.{name}", getattr(self, name), "at least 0")
        _require(self.batch <= MAX_BATCH, "loop.batch", self.batch, f"at most {MAX_BATCH}")
        _require(self.precision in PRECISIONS, "loop.precision", self.precision, "one of " + ", ".join(PRECISIONS))


@dataclass(frozen=True, kw_only=True)
class VQLoss:
    """The tokenizer's loss.

    scales: number of scales that each step reconstructs. The largest scale is always one of them.
    scale_power: the weight of a scale with n tokens is n to this power.
    l1, l2: weights of the pixel losses.
    commitment, codebook: weights of the two quantisation losses.
    perceptual: weight of the perceptual loss. 0 is off.
    perceptual_weights: file of a VGG-16, needed if `perceptual` is not 0.
    adversarial: weight of the adversarial loss. 0 is off.
    adversarial_start: first step with the adversarial loss.
    revive_every: steps between two resets of codes that are hardly used. They become encoder outputs. 0 is off.
    revive_below: a code is reset if its share of the tokens is below this value, divided by the number of codes.
    revive_until: share of the run after which no code is reset.
    """

    scales: int = 5
    scale_power: float = 0.5
    l1: float = 1.0
    l2: float = 1.0
    commitment: float = 0.25
    codebook: float = 1.0
    perceptual: float = 0.0
    perceptual_weights: str = ""
    adversarial: float = 0.0
    adversarial_start: int = 0
    revive_every: int = 50
    revive_below: float = 0.05
    revive_until: float = 0.8

    def __post_init__(self) -> None:
        _require(self.scales >= 1, "loss.scales", self.scales, "at least 1")
        for name in ("l1", "l2", "commitment", "codebook", "perceptual", "adversarial"):
            _require(getattr(self, name) >= 0, f"loss.{name}", getattr(self, name), "at least 0")
        _require(self.l1 + self.l2 > 0, "loss.l1 and loss.l2", (self.l1, self.l2), "one of them above 0")
        _require(
            bool(self.perceptual_weights) or self.perceptual == 0,
            "loss.perceptual",
            self.perceptual,
            "0 unless loss.perceptual_weights names the file of a VGG-16",
        )


@dataclass(frozen=True, kw_only=True)
class TransformerSizes:
    """Sizes of the transformer, as in TransformerConfig. The others come from the data and the tokenizer.

    drop_path: None means 0.1 · depth / 24, as published.
    """

    depth: int = 16
    heads: int = 16
    head_size: int = 64
    mlp_ratio: int = 4
    position_side: int = 32
    label_dropout: float = 0.1
    drop_path: float | None = None


@dataclass(frozen=True, kw_only=True)
class Pictures:
    """Guidance and sampling of the images that a transformer run generates as samples. See `generation.Options`."""

    cfg: float = 2.5
    rule: str = "ramp"
    top_k: int = 900
    top_p: float = 0.95


@dataclass(frozen=True, kw_only=True)
class TokenizerRun:
    """Configuration of a tokenizer run. Raises ConfigError for values that do not fit together."""

    data: Data = field(default_factory=Data)
    model: TokenizerConfig = field(default_factory=TokenizerConfig)
    loss: VQLoss = field(default_factory=VQLoss)
    optim: Optimisation = field(default_factory=Optimisation)
    loop: Loop = field(default_factory=Loop)

    def __post_init__(self) -> None:
        _require(
            self.data.size % self.model.downsampling == 0,
            "data.size",
            self.data.size,
            f"a multiple of the downsampling, {self.model.downsampling}",
        )
        _require(
            self.loss.adversarial == 0 or self.data.size >= MIN_ADVERSARIAL_SIDE,
            "loss.adversarial",
            self.loss.adversarial,
            f"0 if data.size is below {MIN_ADVERSARIAL_SIDE}",
        )


@dataclass(frozen=True, kw_only=True)
class TransformerRun:
    """Configuration of a transformer run.

    token_budget: largest number of tokens in a random schedule. 0 means that of the default schedule.
    """

    data: Data = field(default_factory=Data)
    model: TransformerSizes = field(default_factory=TransformerSizes)
    token_budget: int = 0
    pictures: Pictures = field(default_factory=Pictures)
    optim: Optimisation = field(default_factory=Optimisation)
    loop: Loop = field(default_factory=Loop)


Run = TokenizerRun | TransformerRun


def load_config(path: str | Path, kind: type[T]) -> T:
    """The configuration in a .toml or .json file. kind: TokenizerRun or TransformerRun. Raises ConfigError."""
    path = Path(path)
    fix = "Correct the path or the file."
    expected = "a configuration in TOML or JSON"
    with refuse_failures(ConfigError, f"{path} cannot be read as a configuration", expected=expected, fix=fix):
        raw = read_json(path) if path.suffix == ".json" else read_toml(path)
        return build(kind, raw, path.name)


def build(kind: type[T], raw: Any, where: str) -> T:
    """A configuration dataclass from a dictionary of plain values. Keys that are left out keep their defaults.

    where: name of the file and table, for error messages. Raises ConfigError for an unknown key or a wrong value.
    """
    if not isinstance(raw, dict):
        raise ConfigError(
            f"{where} is {shown_value(raw)}, but it must be a table of settings.",
            expected="a table of settings",
            fix="Correct it as in the files in configs/.",
        )
    hints = typing.get_type_hints(kind)
    names = [item.name for item in dataclasses.fields(typing.cast(Any, kind))]
    if unknown := sorted(raw.keys() - set(names)):
        some = ", ".join(map(shown, unknown[:8]))
        raise ConfigError(
            f"{where} has the unknown setting {some}. The settings are {', '.join(names)}.",
            expected="only " + ", ".join(names),
            fix="Correct or remove it.",
        )
    values = {name: _value(hints[name], value, f"{where}: {name}") for name, value in raw.items()}
    try:
        return kind(**values)
    except ConfigError:
        raise
    except (TypeError, ValueError, OverflowError) as error:
        raise ConfigError(
            f"{where} has settings that do not fit together: {first_sentence(error)}",
            expected="sizes that fit together",
            fix="Correct the configuration.",
        ) from error


def _value(hint: Any, value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(hint):
        return build(typing.cast(Any, hint), value, where)
    if isinstance(value, int | float) and not -(2**63) < value < 2**63:  # NaN compares false
        _require(False, where, value, "a finite number of at most 64 bits")
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    for option in options:
        if typing.get_origin(option) is tuple and isinstance(value, list):
            inner = typing.get_args(option)
            if inner[-1] is Ellipsis or len(inner) == len(value):
                return tuple(_value(inner[0], item, where) for item in value)
        elif type(value) is option:
            return value
        elif option is float and type(value) is int:
            return float(value)
    names = " or ".join(getattr(option, "__name__", str(option)) for option in options)
    raise ConfigError(
        f"{where} is {shown_value(value)}, but it must be of type {names}.",
        expected=f"a value of type {names}",
        fix="Correct the value.",
    )
