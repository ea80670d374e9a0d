"""The task of training a transformer on the tokens of a frozen tokenizer, with a random schedule in each step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor, nn

from ..config import TransformerConfig
from ..errors import ConfigError, InvalidInput
from ..generation import Options, generate
from ..scales import Scales, token_count
from ..tokenizer import Tokenizer
from ..transformer import FlexVAR
from . import plots
from .config import TransformerRun
from .ema import Average
from .feed import Array, Source, signed
from .randomness import NOISE, SCHEDULE, WEIGHTS, stream, torch_seed
from .schedules import ScheduleRule, random_schedule
from .transformer_loss import TokenObjective, per_scale

MODEL = "model"
CHUNK = 16  # images in a batch of the evaluation
MAX_SAMPLES, SAMPLES_PER_ROW = 24, 6  # images in a grid of samples


def model_config(run: TransformerRun, classes: int, tokenizer: Tokenizer) -> TransformerConfig:
    """Sizes of the transformer, from the configuration, the number of classes and the tokenizer. Raises ConfigError."""
    sizes = run.model
    try:
        return TransformerConfig(
            depth=sizes.depth,
            heads=sizes.heads,
            head_size=sizes.head_size,
            mlp_ratio=sizes.mlp_ratio,
            classes=classes,
            vocabulary=tokenizer.config.vocabulary,
            code_dim=tokenizer.config.code_dim,
            position_side=sizes.position_side,
            label_dropout=sizes.label_dropout,
            drop_path=0.1 * sizes.depth / 24 if sizes.drop_path is None else sizes.drop_path,
        )
    except InvalidInput as error:
        raise ConfigError(f"model.{error.got}", expected=error.expected, fix=error.fix) from error


class TransformerTask:
    """A `Task` that trains a transformer."""

    unit = "tokens"

    def __init__(
        self,
        config: TransformerRun,
        tokenizer: Tokenizer,
        classes: int,
        source: Source,
        held_out: tuple[Array, Array],
    ) -> None:
        """source: images, or their latents (B, D, h, w). held_out: images, uint8 (N, H, W, 3), and labels (N,)."""
        self.config, self.tokenizer, self.source = config, tokenizer.eval().requires_grad_(False), source
        self.held_out, self.labels = held_out
        factor = tokenizer.config.downsampling
        if config.data.size % factor:
            raise ConfigError(
                f"data.size is {config.data.size}, but it must be a multiple of {factor}, the downsampling.",
                expected=f"a multiple of {factor}, the downsampling",
                fix="Change data.size.",
            )
        self.rule = ScheduleRule(config.data.size // factor, config.token_budget)
        sizes = model_config(config, classes, tokenizer)
        torch.manual_seed(torch_seed(config.loop.seed, WEIGHTS))
        self._objective = TokenObjective(FlexVAR(sizes, tokenizer.codebook_VD))
        self.parts: dict[str, nn.Module] = {MODEL: self._objective}
        self._scales: Scales = ((1, 1),)

    @property
    def network(self) -> FlexVAR:
        return self._objective.model

    @property
    def bf16(self) -> bool:
        return self.config.loop.precision == "bf16"

    def move_to_device(self, accelerator: Accelerator) -> None:
        self.tokenizer.to(accelerator.device)
        if self.config.loop.compile:
            for block in self.network.blocks:
                block.compile(dynamic=True)

    def begin_step(self, step: int) -> int:
        self._scales = random_schedule(self.rule, stream(self.config.loop.seed, SCHEDULE, step))
        return token_count(self._scales)

    def losses(
        self, parts: Mapping[str, nn.Module], values: Tensor, labels: Tensor, step: int
    ) -> Iterator[tuple[str, Tensor, dict[str, Tensor]]]:
        with torch.no_grad():
            tokens = self.tokenizer.quantize(self.latents(values), self._scales)
        loss = parts[MODEL](labels, tokens, self._scales, self.bf16).mean()
        yield MODEL, loss, {"loss": loss}

    @torch.no_grad()
    def latents(self, values: Tensor) -> Tensor:
        """Latents, float32, of images. Cached latents (float16) are only converted."""
        if values.ndim == 4 and values.shape[1] == self.tokenizer.config.code_dim and values.dtype == torch.float16:
            return values.float()
        return self.tokenizer.encode(signed(values))

    def after_step(
        self, step: int, average: Average, optimizers: Mapping[str, Any], accelerator: Accelerator
    ) -> dict[str, float]:
        return {}

    @torch.no_grad()
    def evaluate(self, network: FlexVAR, accelerator: Accelerator, thorough: bool) -> dict[str, float]:
        """The loss of the held-out images with the default schedule: the mean of all tokens, and of each scale."""
        scales: Scales = tuple((side, side) for side in self.rule.default)
        sums = torch.zeros(len(scales), dtype=torch.float64, device=accelerator.device)
        objective = TokenObjective(network).eval()
        for start in range(CHUNK * accelerator.process_index, len(self.labels), CHUNK * accelerator.num_processes):
            images = torch.from_numpy(self.held_out[start : start + CHUNK]).to(accelerator.device)
            labels = torch.from_numpy(self.labels[start : start + CHUNK]).to(accelerator.device)
            tokens = self.tokenizer.quantize(self.latents(images), scales)
            loss = objective(labels, tokens, scales, self.bf16)
            sums += torch.stack(per_scale(loss, scales)).double() * len(labels)
        means = (accelerator.reduce(sums, "sum") / len(self.labels)).tolist()
        total = sum(mean * h * w for mean, (h, w) in zip(means, scales, strict=True)) / token_count(scales)
        return {"loss": total, **{f"loss/{h}x{w}": m for m, (h, w) in zip(means, scales, strict=True)}}

    @torch.no_grad()
    def draw_samples(self, network: FlexVAR) -> Image.Image:
        """A grid with one image of each class, up to 24. The draws are the same every time."""
        count, pictures = min(network.config.classes, MAX_SAMPLES), self.config.pictures
        options = Options(
            cfg=pictures.cfg,
            rule=pictures.rule,
            top_k=pictures.top_k,
            top_p=pictures.top_p,
            upstream_greedy=False,
            max_side=self.rule.side,
        )
        torch.manual_seed(torch_seed(self.config.loop.seed, NOISE))
        images = list(plots.pixels(generate(network, self.tokenizer, range(count), self.rule.default, options)[1]))
        return plots.grid([images[i : i + SAMPLES_PER_ROW] for i in range(0, count, SAMPLES_PER_ROW)])

    def state(self) -> dict[str, Tensor]:
        return {}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        return
