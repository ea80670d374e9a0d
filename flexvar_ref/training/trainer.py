"""The training loop of both networks, on one process or several (accelerate, torchrun)."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn

from ..errors import RunRefused, Unsupported
from ..parsing import refuse_failures
from . import checkpoint, ema
from .config import Loop, Optimisation
from .feed import BatchPlan, batches
from .optim import learning_rate, optimizer_of
from .randomness import seed_chunk
from .report import Report
from .task import Task

CHECKPOINTS = "checkpoints"
# With a sharded model, a checkpoint of the main process would hold one shard only.
_UNSHARDED = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)


def make_accelerator() -> Accelerator:
    """An accelerator on the GPUs, or on the CPU if there are none. Raises Unsupported for sharded models."""
    accelerator = Accelerator(cpu=not torch.cuda.is_available(), step_scheduler_with_optimizer=False)
    if accelerator.distributed_type not in _UNSHARDED:
        raise Unsupported(
            f"Training does not support {accelerator.distributed_type.value}: every process must hold the whole model.",
            expected="the whole model in every process",
            fix="Launch it with torchrun, or with accelerate without FSDP, DeepSpeed or Megatron.",
        )
    return accelerator


@dataclass
class Trainer:
    """Trains the network of a task.

    folder: folder of the run. config: the configuration of the run as text, which a resume must match.
    workers: processes that prepare samples. step: number of finished steps.
    """

    task: Task
    loop: Loop
    optim: Optimisation
    folder: Path
    config: str
    accelerator: Accelerator
    workers: int = 0
    step: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        processes = self.accelerator.num_processes
        self.plan = BatchPlan(self.loop.batch, processes, self.accelerator.process_index, self.optim.accumulation)
        self.parts: dict[str, nn.Module] = {}
        self.optimizers: dict[str, Any] = {}
        for name, part in self.task.parts.items():
            if self.loop.channels_last:
                part.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            self.parts[name], self.optimizers[name] = self.accelerator.prepare(part, optimizer_of(part, self.optim))
        self.task.move_to_device(self.accelerator)
        self.average = ema.start(self.task.network)
        self._sums: dict[str, Tensor] = {}
        self._count = 0

    def resume(self) -> None:
        """Continue from the newest checkpoint, if there is one. Raises RunRefused if it does not fit this run."""
        state = checkpoint.read_latest(self.folder / CHECKPOINTS, self.config)
        if state is None:
            return
        with refuse_failures(
            RunRefused,
            f"The newest checkpoint in {self.folder / CHECKPOINTS} does not fit this run",
            expected="the state of this run",
            fix="Start a new run in another --out.",
        ):
            for name, part in self.task.parts.items():
                part.load_state_dict(state["parts"][name])
                self.optimizers[name].load_state_dict(state["optimizers"][name])
            if state["average"].keys() != self.average.keys():
                raise ValueError("its averages belong to other parameters")
            self.average = {name: value.to(self.accelerator.device) for name, value in state["average"].items()}
            self.task.load_state({k: v.to(self.accelerator.device) for k, v in state["task"].items()})
            self._sums = {name: value.to(self.accelerator.device) for name, value in state["means"]["sums"].items()}
            self._count = state["means"]["count"]
        self.step = state["step"]

    def save(self) -> None:
        """Write a checkpoint, on the main process only. Raises RunRefused if a loss or gradient is not finite."""
        self._check_finite()
        sums = {name: self.accelerator.reduce(value, "mean") for name, value in sorted(self._sums.items())}
        if self.accelerator.is_main_process:
            state = {
                "step": self.step,
                "config": self.config,
                "parts": {name: part.state_dict() for name, part in self.task.parts.items()},
                "optimizers": {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()},
                "average": self.average,
                "task": self.task.state(),
                "means": {"sums": sums, "count": self._count},
            }
            checkpoint.write(self.folder / CHECKPOINTS, state)

    def run(self, quiet: bool = False) -> dict[str, float]:
        """Train to the last step and return the last evaluation. Raises RunRefused if a loss is not finite."""
        loop, main = self.loop, self.accelerator.is_main_process
        report: Any = (
            Report(self.folder, loop.steps, self.step, self.task.unit, quiet=quiet)
            if main
            else contextlib.nullcontext()
        )
        last: dict[str, float] = {}
        with report:
            chunks = batches(self.task.source, self.plan, self.step, self.workers)
            while self.step < loop.steps:
                units = self._one_step(chunks)
                if main:
                    report.count_step(units)
                done = self.step == loop.steps
                if self.step % loop.log == 0 or done:
                    metrics = self._means()
                    if main:
                        report.log_training(self.step, metrics)
                start = time.perf_counter()
                if done or _due(self.step, loop.save):
                    self.save()
                evaluate, sample = done or _due(self.step, loop.evaluate), done or _due(self.step, loop.sample)
                if evaluate or sample:
                    last = self._evaluate(report, evaluate, sample, done) or last
                if main:
                    report.exclude_time(time.perf_counter() - start)
            if not last:
                last = self._evaluate(report, True, True, True)
        return last

    def _evaluate(self, report: Any, evaluate: bool, sample: bool, thorough: bool) -> dict[str, float]:
        network, metrics = self.averaged(), {}
        if evaluate:
            metrics = self.task.evaluate(network, self.accelerator, thorough)
        if self.accelerator.is_main_process:
            if evaluate:
                report.log_evaluation(self.step, metrics)
            if sample:
                report.save_samples(self.step, self.task.draw_samples(network))
        self.accelerator.wait_for_everyone()
        return metrics

    def averaged(self) -> nn.Module:
        """A copy of the network with the averaged weights, in evaluation mode: the result of the run."""
        return ema.averaged(self.task.network, self.average)

    def _one_step(self, chunks: Iterator[tuple[Tensor, Tensor]]) -> int:
        rate = learning_rate(self.optim, self.step, self.loop.steps, self.loop.batch)
        units = self.task.begin_step(self.step) * self.loop.batch
        for part in self.parts.values():
            part.train()
        for turn in range(self.plan.accumulation):
            seed_chunk(self.loop.seed, self.step, self.plan.chunk(turn))
            values, labels = (tensor.to(self.accelerator.device) for tensor in next(chunks))
            self._one_chunk(values, labels, last=turn == self.plan.accumulation - 1)
        for name, optimizer in self.optimizers.items():
            for group in optimizer.param_groups:
                group["lr"] = rate
            norm = self.accelerator.clip_grad_norm_(self.parts[name].parameters(), self.optim.clip)
            self._add("gradient" if name == next(iter(self.parts)) else f"gradient of {name}", norm)
            optimizer.step()
            optimizer.zero_grad()
        ema.update(self.average, self.task.network, ema.decay_at(self.step, self.optim.ema))
        extra = self.task.after_step(self.step, self.average, self.optimizers, self.accelerator)
        self._latest = {"rate": rate, **extra}
        self._count += 1
        self.step += 1
        return units

    def _one_chunk(self, values: Tensor, labels: Tensor, last: bool) -> None:
        """Run the forward and backward passes. Processes exchange gradients after the last chunk of a step only."""
        share = 1 / self.plan.accumulation
        with contextlib.ExitStack() as stack:
            if not last:
                for part in self.parts.values():
                    stack.enter_context(self.accelerator.no_sync(part))
            for _, loss, metrics in self.task.losses(self.parts, values, labels, self.step):
                self.accelerator.backward(loss * share)
                for key, value in metrics.items():
                    self._add(key, value * share)

    def _add(self, name: str, value: Tensor) -> None:
        value = value.detach().float()
        self._sums[name] = self._sums[name] + value if name in self._sums else value

    def _means(self) -> dict[str, float]:
        """Means of the metrics since the last call, over all processes."""
        self._check_finite()
        names = sorted(self._sums)
        values = torch.stack([self._sums[name] for name in names]) / self._count
        means = self.accelerator.reduce(values, "mean").tolist()
        self._sums, self._count = {}, 0
        return {**dict(zip(names, means, strict=True)), **self._latest}

    def _check_finite(self) -> None:
        if any(not value.isfinite() for value in self._sums.values()):
            raise RunRefused(
                f"A loss or gradient before step {self.step} is not a finite number.",
                expected="finite numbers",
                fix="Lower optim.lr or use precision fp32, and start again.",
            )


def _due(step: int, interval: int) -> bool:
    return interval > 0 and step % interval == 0


def as_text(config: dict[str, Any]) -> str:
    """A configuration as text, for checkpoints."""
    return json.dumps(config, indent=1, sort_keys=True) + "\n"
