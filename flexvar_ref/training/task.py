"""The interface between the trainer and a network: losses, evaluation and sample images."""

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
    """A network, its losses and its data."""

    parts: dict[str, nn.Module]
    """The modules to optimise, each with its own optimiser. The first one holds the network and its loss."""
    source: Source
    """The training samples."""
    unit: str
    """The unit of the speed: "images" or "tokens"."""

    @property
    def network(self) -> nn.Module:
        """The network that is averaged and saved: a submodule of the first part."""

    def move_to_device(self, accelerator: Accelerator) -> None:
        """Move tensors and modules that are not in `parts` to the accelerator's device, and compile if configured."""

    def begin_step(self, step: int) -> int:
        """Make the draws that all chunks of a step share. Returns the number of units in each image."""

    def losses(
        self, parts: Mapping[str, nn.Module], values: Tensor, labels: Tensor, step: int
    ) -> Iterator[tuple[str, Tensor, dict[str, Tensor]]]:
        """For each part to be trained on a chunk, in order: its name, its loss, and metrics to report."""

    def after_step(
        self, step: int, average: Average, optimizers: Mapping[str, Any], accelerator: Accelerator
    ) -> Metrics:
        """Update the task's own state after an optimiser step. Returns metrics to report."""

    def evaluate(self, network: Any, accelerator: Accelerator, thorough: bool) -> Metrics:
        """Metrics over the held-out samples of all processes. thorough: at all scales, at the end of a run."""

    def draw_samples(self, network: Any) -> Image.Image:
        """A grid of sample images."""

    def state(self) -> dict[str, Tensor]:
        """The task's own state, for checkpoints."""

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Restore what `state` returned."""
