"""What the trainer asks of a network that is trained: its losses, its evaluation and its pictures."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Protocol

from accelerate import Accelerator
from PIL import Image
from torch import Tensor, nn

from .ema import Average
from .feed import Source

Metrics = dict[str, float]


class Task(Protocol):
    """One network with what belongs to its training."""

    parts: dict[str, nn.Module]
    """What is optimised, the first the network's objective; each has an optimiser of its own."""
    source: Source
    unit: str
    """What speed is counted in."""

    @property
    def network(self) -> nn.Module:
        """What is trained, averaged and saved: a submodule of the first part."""

    def place(self, accelerator: Accelerator) -> None:
        """Move what is used beside the parts to the accelerator's device; compile if that was asked for."""

    def begin(self, step: int) -> int:
        """Draw what all chunks of the step share. Returns the units an image counts."""

    def losses(
        self, parts: Mapping[str, nn.Module], values: Tensor, labels: Tensor, step: int
    ) -> Iterator[tuple[str, Tensor, dict[str, Tensor]]]:
        """For one chunk, in order: a part, the loss to be propagated through it, and means to report."""

    def after_step(
        self, step: int, average: Average, optimizers: Mapping[str, Any], accelerator: Accelerator
    ) -> Metrics:
        """What follows an optimiser step."""

    def evaluate(self, network: Any, accelerator: Accelerator, thorough: bool) -> Metrics:
        """Means over the held-out samples of all processes; `thorough` at the end of a run."""

    def picture(self, network: Any) -> Image.Image:
        """What the network can do."""

    def state(self) -> dict[str, Tensor]:
        """What a resume needs beside weights and optimisers."""

    def load_state(self, state: Mapping[str, Tensor]) -> None: ...
