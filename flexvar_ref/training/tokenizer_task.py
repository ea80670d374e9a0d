"""The task of training a tokenizer: multi-scale reconstruction, with an optional adversarial loss.

Codes that are hardly used are reset to encoder outputs, so that the whole codebook stays in use.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from PIL import Image
from torch import Tensor, nn

from ..scales import Scales
from ..tokenizer import Tokenizer
from . import codebook, plots
from .adversarial import PatchDiscriminator, adaptive_weight, discriminator_loss, generator_loss
from .config import TokenizerRun
from .ema import Average
from .feed import Array, Source, signed
from .optim import reset_moments
from .perceptual import load_perceptual
from .randomness import REVIVAL, SCALES, WEIGHTS, generator, stream, torch_seed
from .schedules import default_sides
from .tokenizer_loss import VQObjective, VQOutput, random_scales

CODES = "quantizer.embedding.weight"
MODEL, DISCRIMINATOR = "model", "discriminator"
CHUNK = 16  # images in a batch of the evaluation
MAX_SAMPLES = 6  # images in a grid of samples


class TokenizerTask:
    """A `Task` that trains a tokenizer."""

    unit = "images"

    def __init__(self, config: TokenizerRun, source: Source, held_out: Array) -> None:
        """held_out: images of the evaluation, uint8 (N, H, W, 3)."""
        self.config, self.source, self.held_out = config, source, held_out
        torch.manual_seed(torch_seed(config.loop.seed, WEIGHTS))
        tokenizer = Tokenizer(config.model)
        with torch.no_grad():
            weight = tokenizer.quantizer.embedding.weight
            weight.copy_(F.normalize(weight, dim=-1))
        loss = config.loss
        self._perceptual = load_perceptual(loss.perceptual_weights) if loss.perceptual > 0 else None
        self._objective = VQObjective(tokenizer, loss, self._perceptual)
        self.parts: dict[str, nn.Module] = {MODEL: self._objective}
        if loss.adversarial > 0:
            self.parts[DISCRIMINATOR] = PatchDiscriminator()
        self.side = config.data.size // config.model.downsampling
        self._share_V = codebook.even_shares(config.model.vocabulary)
        self._counts_V = torch.zeros(config.model.vocabulary)
        self._vectors: list[Tensor] = []
        self._scales: Scales = ((self.side, self.side),)

    @property
    def network(self) -> Tokenizer:
        return self._objective.tokenizer

    @property
    def bf16(self) -> bool:
        return self.config.loop.precision == "bf16"

    def move_to_device(self, accelerator: Accelerator) -> None:
        self._share_V, self._counts_V = self._share_V.to(accelerator.device), self._counts_V.to(accelerator.device)
        if self._perceptual is not None:
            self._perceptual.to(accelerator.device)
        if self.config.loop.compile:
            self.network.encoder.compile()
            self.network.decoder.compile(dynamic=True)

    def begin_step(self, step: int) -> int:
        draws = stream(self.config.loop.seed, SCALES, step)
        self._scales = random_scales(self.side, self.config.loss.scales, draws)
        return 1

    def losses(
        self, parts: Mapping[str, nn.Module], values: Tensor, labels: Tensor, step: int
    ) -> Iterator[tuple[str, Tensor, dict[str, Tensor]]]:
        images = signed(values)
        out: VQOutput = parts[MODEL](images, self._scales, self.bf16)
        self._counts_V += out.counts_V
        if self._resets_codes(step):
            self._vectors.append(out.vectors_ND)
        metrics = {"reconstruction": out.reconstruction, "quantisation": out.quantisation}
        if DISCRIMINATOR not in self.parts or step < self.config.loss.adversarial_start:
            yield MODEL, out.loss, {"loss": out.loss, **metrics}
            return
        discriminator = self.parts[DISCRIMINATOR].requires_grad_(False)
        adversarial = generator_loss(discriminator(out.image_BCHW))
        weight = adaptive_weight(out.reconstruction, adversarial, self.network.decoder.conv_out.weight)
        loss = out.loss + self.config.loss.adversarial * weight * adversarial
        yield MODEL, loss, {"loss": out.loss, **metrics, "adversarial": adversarial}
        discriminator.requires_grad_(True)
        scores = parts[DISCRIMINATOR](torch.cat([images, out.image_BCHW.detach()]))
        loss = discriminator_loss(*scores.chunk(2))
        yield DISCRIMINATOR, loss, {DISCRIMINATOR: loss}

    def after_step(
        self, step: int, average: Average, optimizers: Mapping[str, Any], accelerator: Accelerator
    ) -> dict[str, float]:
        self._share_V = codebook.updated_shares(self._share_V, accelerator.reduce(self._counts_V, "sum"))
        self._counts_V.zero_()
        if self._resets_codes(step):
            self._reset_codes(step, average, optimizers[MODEL], accelerator)
            self._vectors.clear()
        if (step + 1) % self.config.loop.log and step + 1 != self.config.loop.steps:
            return {}
        return {"perplexity": codebook.perplexity(self._share_V)}

    def _resets_codes(self, step: int) -> bool:
        loss = self.config.loss
        early = step < loss.revive_until * self.config.loop.steps
        return loss.revive_every > 0 and early and (step + 1) % loss.revive_every == 0

    def _reset_codes(self, step: int, average: Average, optimizer: Any, accelerator: Accelerator) -> None:
        dead = codebook.dead_codes(self._share_V, self.config.loss.revive_below)
        gathered = accelerator.gather(torch.stack(self._vectors))  # ordered by process, then by chunk
        order = gathered.unflatten(0, (accelerator.num_processes, -1)).transpose(0, 1)  # as with one process
        vectors = order.reshape(-1, gathered.shape[-1])
        weight = self.network.quantizer.embedding.weight
        set_codes = codebook.revive(weight, dead, vectors, generator(self.config.loop.seed, REVIVAL, step))
        average[CODES][set_codes] = weight.detach()[set_codes].float()
        self._share_V[set_codes] = 1 / len(self._share_V)
        reset_moments(getattr(optimizer, "optimizer", optimizer), weight, set_codes)

    @torch.no_grad()
    def evaluate(self, network: Tokenizer, accelerator: Accelerator, thorough: bool) -> dict[str, float]:
        """PSNR (peak 2) of each scale against the resized images, and usage and perplexity of the codebook.

        The codebook's metrics are those of the largest scale. thorough: evaluate all scales of the default schedule,
        not only the smallest, the middle and the largest.
        """
        sides = default_sides(self.side)
        sides = sides if thorough else (sides[0], sides[len(sides) // 2], sides[-1])
        errors = torch.zeros(len(sides), dtype=torch.float64, device=accelerator.device)
        counts = torch.zeros_like(self._share_V)
        for images in self._held_out(accelerator):
            for i, (image, target, tokens) in enumerate(self._decoded(network, images, sides)):
                errors[i] += (image.clamp(-1, 1) - target).square().flatten(1).mean(1).double().sum()
                if sides[i] == self.side:
                    counts += torch.bincount(tokens.flatten(), minlength=len(counts))
        errors = accelerator.reduce(errors, "sum") / len(self.held_out)
        counts = accelerator.reduce(counts, "sum")
        psnr = {
            f"psnr/{s}x{s}": 10 * math.log10(4 / max(e, 1e-12)) for s, e in zip(sides, errors.tolist(), strict=True)
        }
        used = (counts > 0).float().mean().item()
        full = psnr[f"psnr/{self.side}x{self.side}"]
        return {"psnr": full, "usage": used, "perplexity": codebook.perplexity(counts), **psnr}

    def _held_out(self, accelerator: Accelerator) -> Iterator[Tensor]:
        for start in range(CHUNK * accelerator.process_index, len(self.held_out), CHUNK * accelerator.num_processes):
            yield signed(torch.from_numpy(self.held_out[start : start + CHUNK])).to(accelerator.device)

    def _decoded(
        self, network: Tokenizer, images: Tensor, sides: tuple[int, ...]
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.bf16):
            latent = network.encode(images)
        for tokens in network.quantize(latent.float(), sides):
            with torch.autocast(images.device.type, torch.bfloat16, enabled=self.bf16):
                image = network.decode(tokens).float()
            yield image, F.interpolate(images, size=image.shape[2:], mode="area"), tokens

    @torch.no_grad()
    def draw_samples(self, network: Tokenizer) -> Image.Image:
        """Rows of a held-out image and its reconstructions at all default scales, the largest first."""
        images = signed(torch.from_numpy(self.held_out[:MAX_SAMPLES])).to(next(network.parameters()).device)
        sides = default_sides(self.side)[::-1]
        columns = [plots.pixels(images)]
        columns += [plots.pixels(image) for image, _, _ in self._decoded(network, images, sides)]
        return plots.grid(list(zip(*columns, strict=True)))

    def state(self) -> dict[str, Tensor]:
        return {"share_V": self._share_V}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        self._share_V = state["share_V"]
