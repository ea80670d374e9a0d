"""What a run is: frozen dataclasses, read strictly from TOML or JSON and written into the run's folder."""

from __future__ import annotations

import dataclasses
import json
import math
import tomllib
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from ..config import TokenizerConfig
from .errors import ConfigError

T = TypeVar("T")
PRECISIONS = ("fp32", "bf16")
SMALLEST_JUDGED = 32  # pixels a side that the adversary's network needs
ALGORITHMS = ("adamw", "muon")
DECAYS = ("cosine", "linear", "constant")


def _require(holds: bool, name: str, value: object, expected: str) -> None:
    if not holds:
        raise ConfigError(f"{name} = {value!r}", expected=expected, fix="correct the configuration")


@dataclass(frozen=True, kw_only=True)
class Data:
    """size: side of the square training images, pixels; samples: how many are prepared once and kept on disk (0: each
    is drawn when it is needed); held_out: samples of the evaluation; flip: also mirrored images (folders);
    workers: processes that draw; seed: of the data set, the held-out one has the next.
    """

    size: int = 256
    samples: int = 0
    held_out: int = 240
    flip: bool = False
    workers: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        _require(self.size >= 8, "data.size", self.size, "at least 8 pixels")
        for name in ("samples", "workers", "seed"):
            _require(getattr(self, name) >= 0, f"data.{name}", getattr(self, name), "at least 0")
        _require(self.held_out >= 1, "data.held_out", self.held_out, "at least 1")


@dataclass(frozen=True, kw_only=True)
class Optimisation:
    """lr: learning rate for 256 images a step, in proportion for others; warmup: steps it rises from 0; decay:
    "cosine", "linear" or "constant" to final_lr (a share of the peak); clip: largest gradient norm; ema: decay of the
    averaged weights, which the result consists of; accumulation: chunks a process adds up before a step; algorithm:
    "adamw", or "muon" for the matrices of attention and MLP, with its momentum.
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
        _require(0 <= self.momentum < 1, "optim.momentum", self.momentum, "from 0, below 1")
        _require(self.lr > 0 and math.isfinite(self.lr), "optim.lr", self.lr, "a positive number")
        _require(self.warmup >= 0, "optim.warmup", self.warmup, "at least 0")
        _require(self.decay in DECAYS, "optim.decay", self.decay, "one of " + ", ".join(DECAYS))
        _require(0 <= self.final_lr <= 1, "optim.final_lr", self.final_lr, "a share from 0 to 1")
        _require(all(0 <= beta < 1 for beta in self.betas), "optim.betas", self.betas, "two numbers from 0, below 1")
        _require(self.weight_decay >= 0, "optim.weight_decay", self.weight_decay, "at least 0")
        _require(self.clip > 0, "optim.clip", self.clip, "a positive number")
        _require(0 <= self.ema < 1, "optim.ema", self.ema, "0 (off) or a decay below 1")
        _require(self.accumulation >= 1, "optim.accumulation", self.accumulation, "at least 1")


@dataclass(frozen=True, kw_only=True)
class Loop:
    """batch: images a step, all processes together; precision: "fp32" or "bf16" (autocast; weights stay float32);
    log, evaluate, sample, save: steps between two of each (0: at the end only).
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
        _require(self.precision in PRECISIONS, "loop.precision", self.precision, "one of " + ", ".join(PRECISIONS))


@dataclass(frozen=True, kw_only=True)
class VQLoss:
    """Terms of the tokenizer's loss and their weights.

    scales: reconstructed at once, the largest among them; scale_power: a scale of n tokens weighs n to this power;
    perceptual_weights: file of a VGG-16, needed where `perceptual` is not 0; adversarial: against a PatchGAN from step
    adversarial_start on (0: off). A code used less than revive_below times its even share is looked for every
    revive_every steps (0: never), up to the share revive_until of the run, and starts anew as an encoder output.
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
            "0, or perceptual_weights = the file of a VGG-16",
        )


@dataclass(frozen=True, kw_only=True)
class TransformerSizes:
    """Sizes that the data and the tokenizer do not tell; see TransformerConfig."""

    depth: int = 16
    heads: int = 16
    head_size: int = 64
    mlp_ratio: int = 4
    position_side: int = 32
    label_dropout: float = 0.1
    drop_path: float | None = None
    """None: 0.1 · depth / 24, as published."""


@dataclass(frozen=True, kw_only=True)
class Pictures:
    """How the pictures shown while training are generated; top_k 0 and top_p 0 are off."""

    cfg: float = 2.5
    rule: str = "ramp"
    top_k: int = 900
    top_p: float = 0.95


@dataclass(frozen=True, kw_only=True)
class TokenizerRun:
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
            self.loss.adversarial == 0 or self.data.size >= SMALLEST_JUDGED,
            "loss.adversarial",
            self.loss.adversarial,
            f"0 for images below {SMALLEST_JUDGED} pixels a side",
        )


@dataclass(frozen=True, kw_only=True)
class TransformerRun:
    """token_budget: most tokens of a random schedule (0: those of the default schedule)."""

    data: Data = field(default_factory=Data)
    model: TransformerSizes = field(default_factory=TransformerSizes)
    token_budget: int = 0
    pictures: Pictures = field(default_factory=Pictures)
    optim: Optimisation = field(default_factory=Optimisation)
    loop: Loop = field(default_factory=Loop)


Run = TokenizerRun | TransformerRun


def load_config(path: str | Path, kind: type[T]) -> T:
    """The run in a .toml or .json file. Raises ConfigError for an unknown key or a value of another type."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
        raw = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{path} ({error})", expected="a configuration in TOML or JSON", fix="correct the path or the file"
        ) from error
    return build(kind, raw, path.name)


def build(kind: type[T], raw: Any, where: str) -> T:
    """A frozen dataclass from plain values, nothing missing in silence, nothing too many. Raises ConfigError."""
    if not isinstance(raw, dict):
        raise ConfigError(f"{where} = {raw!r:.80}", expected="a table of settings", fix="see the committed configs")
    hints = typing.get_type_hints(kind)
    names = [item.name for item in dataclasses.fields(typing.cast(Any, kind))]
    if unknown := sorted(raw.keys() - set(names)):
        raise ConfigError(
            f"unknown {', '.join(unknown)} in {where}", expected="only " + ", ".join(names), fix="correct the name"
        )
    values = {name: _value(hints[name], value, f"{where}: {name}") for name, value in raw.items()}
    try:
        return kind(**values)
    except ConfigError:
        raise
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{where} ({error})", expected="sizes that fit together", fix="correct them") from error


def _value(hint: Any, value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(hint):
        return build(typing.cast(Any, hint), value, where)
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
    raise ConfigError(f"{where} = {value!r:.80}", expected=f"a value of type {names}", fix="correct the value")
