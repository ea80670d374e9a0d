"""Reports of a run: progress on the terminal, metrics.jsonl, a TensorBoard log, curves and sample images."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from ..files import write_whole
from . import plots

METRICS, CURVES, SAMPLES, TENSORBOARD = "metrics.jsonl", "curves.png", "samples", "tensorboard"
PER_SCALE = "/"  # "loss/16x16": the curves of all scales share one panel


class Report:
    """Writes reports to a run's folder and to standard error, as a context manager.

    steps: steps of the run. first: the step that a resume starts from. unit: "images" or "tokens", for the speed.
    """

    def __init__(
        self, folder: Path, steps: int, first: int, unit: str, *, console: Console | None = None, quiet: bool = False
    ) -> None:
        self._folder, self._steps, self._first, self._unit = folder, steps, first, unit
        self._console = console or Console(stderr=True, markup=False, emoji=False, highlight=False, quiet=quiet)
        self._path = folder / METRICS
        self.rows = truncate_metrics(self._path, first)
        self._file = self._path.open("a", encoding="utf-8")
        self._start, self._last, self._paused = time.perf_counter(), time.perf_counter(), 0.0
        self._units = 0
        self._board: Any = None
        self._bar: Progress | None = None
        if self._console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
            self._bar = Progress(*columns, console=self._console, transient=True)
            self._task = self._bar.add_task("training", total=steps, completed=first)

    def __enter__(self) -> Report:
        from torch.utils.tensorboard import SummaryWriter

        self._board = SummaryWriter(str(self._folder / TENSORBOARD), purge_step=self._first)
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        self._file.close()
        self._board.close()

    def count_step(self, units: int) -> None:
        """Count a finished step with `units` images or tokens."""
        self._units += units
        if self._bar is not None:
            self._bar.advance(self._task)

    def log_training(self, step: int, metrics: Mapping[str, float]) -> None:
        """Log the means of the metrics since the last call, after `step` steps, with speed and remaining time."""
        now = time.perf_counter()
        speed = self._units / max(now - self._last - self._paused, 1e-9)
        self._last, self._units, self._paused = now, 0, 0.0
        left = (now - self._start) / max(step - self._first, 1) * (self._steps - step)
        self._write("train", step, {**metrics, f"{self._unit}_per_s": speed})
        text = f"loss {metrics['loss']:.4f}  {speed:,.1f} {self._unit}/s  ETA {_clock(left)}"
        if self._bar is not None:
            self._bar.update(self._task, description=text)
        else:
            self._print(f"step {step}/{self._steps}  {text}")

    def log_evaluation(self, step: int, metrics: Mapping[str, float]) -> None:
        """Log the metrics of the held-out samples after `step` steps, and draw the curves."""
        self._write("held out", step, metrics)
        shown = "  ".join(f"{name} {value:.4g}" for name, value in metrics.items() if PER_SCALE not in name)
        self._print(f"step {step}/{self._steps}  held out: {shown}")
        self._save(plots.curves(panels(self.rows)), self._folder / CURVES)

    def save_samples(self, step: int, image: Image.Image) -> None:
        """Save a grid of sample images after `step` steps."""
        folder = self._folder / SAMPLES
        folder.mkdir(exist_ok=True)
        self._save(image, folder / f"step_{step:08d}.png")

    def exclude_time(self, seconds: float) -> None:
        """Leave time that was not spent on training out of the speed."""
        self._paused += seconds

    def _write(self, kind: str, step: int, metrics: Mapping[str, float]) -> None:
        row = {"step": step, "kind": kind, "time": time.time(), **metrics}
        self.rows.append(row)
        self._file.write(json.dumps({k: v if _finite(v) else None for k, v in row.items()}) + "\n")
        self._file.flush()
        for name, value in metrics.items():
            self._board.add_scalar(f"{kind}/{name}".replace(" ", "_"), value, step)

    def _print(self, text: str) -> None:
        self._console.print(text, soft_wrap=True)

    @staticmethod
    def _save(image: Image.Image, path: Path) -> None:
        with write_whole(path) as partial:
            image.save(partial, "PNG")


def truncate_metrics(path: Path, step: int) -> list[dict[str, Any]]:
    """Remove rows after `step`, and rows that were not written completely, from the file. Returns the others."""
    rows: list[dict[str, Any]] = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int) and row["step"] <= step:
            rows.append(row)
    with write_whole(path) as partial, partial.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return rows


def panels(rows: list[dict[str, Any]]) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """The panels of the curves: one for each metric, and one for the values of a metric at all scales."""
    found: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for row in rows:
        for name, value in row.items():
            if name in ("step", "kind", "time") or not isinstance(value, int | float):
                continue
            title, _, line = name.partition(PER_SCALE)
            title = f"{title} per scale, {row['kind']}" if line else title
            found.setdefault(title, {}).setdefault(line or row["kind"], []).append((row["step"], value))
    return found


def _finite(value: object) -> bool:
    return not isinstance(value, float) or math.isfinite(value)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
