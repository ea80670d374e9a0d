"""`flexvar generate`: images from a bundle, or again from the settings in a PNG file."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from ..deadlines.choice import Choice, seconds_of
from ..editing.canvas import check_sides
from ..editing.plan import warn_if_large
from ..errors import ArtifactRefused, CostUnknown, InvalidInput
from ..files.atomic import atomic_write
from ..model.guidance import Guidance
from ..model.noise import fresh_seed
from ..model.sampling import Sampling
from ..model.schedule import ScaleSchedule
from ..output import GenerationOutput, ScaleStep
from ..pictures.png import save_png
from ..pipeline import FlexVARPipeline
from . import options
from .console import JsonOption, emit, say, steps
from .options import check_targets, parse_labels, parse_size, preview_name, read_settings, replaced, show_scale


def generate(
    bundle: Annotated[Path, typer.Argument(help="Bundle directory, as flexvar export writes it.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Directory to write one PNG file for each image to.")],
    classes: Annotated[
        str | None, typer.Option(help="One class for each image, as numbers or names joined by commas: 7,999.")
    ] = None,
    schedule: options.Schedule = None,
    size: Annotated[
        str | None, typer.Option(help="Height x width in pixels, such as 256x512. The schedule is derived for it.")
    ] = None,
    scales: options.Steps = None,
    deadline_ms: options.Deadline = None,
    cfg: options.Cfg = None,
    guidance: options.GuidanceRule = None,
    top_k: options.TopK = None,
    top_p: options.TopP = None,
    greedy_scales: options.Greedy = None,
    max_side: options.MaxSide = None,
    seed: options.Seed = None,
    first_index: options.FirstIndex = None,
    backend: options.Backend = "auto",
    device: options.Device = None,
    engines: options.Engines = None,
    threads: options.Threads = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Number of images that are generated at once.")] = 8,
    preview: options.Preview = None,
    show: options.Progress = False,
    source: options.Source = None,
    save_arrays: Annotated[
        Path | None, typer.Option(help="NPZ file to write the tokens and the float output of the decoder to.")
    ] = None,
    force: options.Force = False,
    as_json: JsonOption = False,
) -> None:
    """Generate images, one for each class.

    Options that are left out take the value in the --from file, or else the default of the bundle.
    """
    if classes is None and source is None:
        raise InvalidInput(
            "Neither --classes nor --from is given.",
            expected="one class for each image",
            fix="Pass the classes of the images, such as --classes 7,999.",
        )
    if deadline_ms is not None:
        _check_deadline(deadline_ms, chosen=(schedule, size, scales), shown=show or preview is not None)
    with FlexVARPipeline.from_bundle(bundle, backend, device, threads, engines) as pipeline:
        start = _starting_point(pipeline, source)
        plan = _Plan(
            labels=start.labels if classes is None else parse_labels(classes, pipeline.model.class_names),
            schedule=_schedule(pipeline, start.schedule, schedule, size, scales),
            guidance=replaced(start.guidance, scale=cfg, rule=guidance, max_side=max_side),
            sampling=replaced(start.sampling, top_k=top_k, top_p=top_p, greedy_scales=greedy_scales, max_side=max_side),
            seed=start.seed if seed is None else seed,
            first_index=start.first_index if first_index is None else first_index,
        )
        warn_if_large(plan.schedule, pipeline.schedule)
        pipeline.check(plan.labels, plan.seed, plan.first_index)
        files = [output / plan.name(i) for i in range(len(plan.labels))]
        previews = [preview / name for name in plan.preview_names()] if preview else []
        check_targets([*files, *previews, *([save_arrays] if save_arrays else [])], force)
        choice = None
        if deadline_ms is not None:
            choice = _choose(pipeline, plan, batch_size, deadline_ms)
            plan = replace(plan, schedule=choice.schedule)
        results = _run(pipeline, plan, files, preview, show, batch_size, save_arrays is not None, force)
    if save_arrays is not None:
        _save_arrays(save_arrays, results, force)
    _report(files, results, plan, choice, as_json)


@dataclass(frozen=True)
class _Plan:
    labels: list[int]
    schedule: ScaleSchedule
    guidance: Guidance
    sampling: Sampling
    seed: int
    first_index: int

    def name(self, i: int) -> str:
        return f"{self.first_index + i:06d}_class{self.labels[i]:04d}.png"

    def preview_name(self, i: int, scale: int) -> str:
        return preview_name(Path(self.name(i)).stem, scale, self.schedule[scale])

    def preview_names(self) -> list[str]:
        return [self.preview_name(i, scale) for i in range(len(self.labels)) for scale in range(len(self.schedule))]


def _starting_point(pipeline: FlexVARPipeline, source: Path | None) -> _Plan:
    """The defaults of the bundle, or the settings of an image that was made with it. Raises ArtifactRefused."""
    if source is None:
        return _Plan([], pipeline.schedule, pipeline.guidance, pipeline.sampling, fresh_seed(), 0)
    found = read_settings(source, pipeline.bundle.sha256)
    if found.edit is not None:
        raise ArtifactRefused(
            f"{source.name} was made by flexvar edit, not by flexvar generate.",
            expected="a picture of flexvar generate",
            fix="Use flexvar edit --from with it.",
        )
    return _Plan([found.label], found.schedule, found.guidance, found.sampling, found.seed, found.index)


def _schedule(
    pipeline: FlexVARPipeline, start: ScaleSchedule, schedule: str | None, size: str | None, steps: int | None
) -> ScaleSchedule:
    """The given schedule, or one derived for a size and a number of steps, or else that of the starting point."""
    if schedule is not None:
        if size is not None or steps is not None:
            raise InvalidInput(
                "--schedule cannot be combined with --size or --steps.",
                expected="a schedule, or a size and steps",
                fix="Use one of them.",
            )
        return ScaleSchedule.parse(schedule)
    if size is None and steps is None:
        return start
    factor = pipeline.model.downsampling
    pixels = parse_size(size) if size is not None else (start[-1][0] * factor, start[-1][1] * factor)
    check_sides(pixels, factor)
    tokens = pixels[0] // factor, pixels[1] // factor
    return ScaleSchedule.for_size(tokens, len(start) if steps is None else steps, max(pipeline.schedule[-1]))


def _check_deadline(deadline_ms: float, chosen: tuple[object, ...], shown: bool) -> None:
    """Refuse options that cannot be combined with a deadline, before a bundle is opened. Raises InvalidInput."""
    seconds_of(deadline_ms)
    if any(value is not None for value in chosen):
        raise InvalidInput(
            "--deadline-ms cannot be combined with --schedule, --size or --steps, because it chooses the schedule.",
            expected="a deadline, or a schedule",
            fix="Use one of them.",
        )
    if shown:
        raise InvalidInput(
            "--deadline-ms cannot be combined with --preview or --progress, which take time.",
            expected="a deadline, or pictures of every scale",
            fix="Use one of them.",
        )


def _choose(pipeline: FlexVARPipeline, plan: _Plan, batch_size: int, deadline_ms: float) -> Choice:
    """The best schedule for the deadline. Unknown costs are measured first. Afterwards the pipeline is warm."""
    images, chosen = min(len(plan.labels), batch_size), (plan.guidance, plan.sampling)
    choice = None
    with steps(None, "measure") as advance:
        while choice is None:  # each round measures one more schedule, best first
            try:
                choice = pipeline.choose_schedule(images, deadline_ms, *chosen)
            except CostUnknown as unknown:
                advance(f"schedule {unknown.schedule} for {images} at once on {pipeline.backend.name}, once")
                pipeline.measure_costs((images,), [unknown.schedule], guidance=plan.guidance, sampling=plan.sampling)
    last = len(plan.labels) % batch_size
    pipeline.warmup(choice.schedule, {images, last or images}, *chosen)
    return choice


def _run(
    pipeline: FlexVARPipeline,
    plan: _Plan,
    files: list[Path],
    preview: Path | None,
    show: bool,
    batch_size: int,
    keep_decoded: bool,
    force: bool,
) -> list[GenerationOutput]:
    """Generate batch by batch. Images are written when their batch is done, and their pixels are dropped."""
    results = []
    batches = range(0, len(plan.labels), batch_size)
    with steps(len(batches) * len(plan.schedule), "generate") as advance:
        for start in batches:
            labels = plan.labels[start : start + batch_size]

            def on_scale(step: ScaleStep, start: int = start) -> None:
                advance(f"scale {step.index + 1}/{step.count}, {step.size[0]}x{step.size[1]} tokens")
                names = [plan.name(i) for i in range(start, start + len(step.tokens))]
                show_scale(step, names, preview, show, force)

            whole = preview is None and not show and pipeline.generator.runs_whole
            result = pipeline(
                labels,
                plan.schedule,
                plan.guidance,
                plan.sampling,
                plan.seed,
                plan.first_index + start,
                keep_decoded=keep_decoded,
                on_scale=None if whole else on_scale,  # without it, a GPU replays all scales at once
            )
            for _ in plan.schedule if whole else ():
                advance("generated")
            for i, (pixels, settings) in enumerate(zip(result.images, result.settings, strict=True)):
                save_png(files[start + i], pixels, settings.to_json(), force=force)
            results.append(replace(result, images=result.images[:0]))
    return results


def _save_arrays(path: Path, results: list[GenerationOutput], force: bool) -> None:
    """Write tokens (B, L) int32, all scales in order and row-major, and images (B, 3, H, W) float32 of the decoder."""
    tokens = [np.concatenate([scale.reshape(len(scale), -1) for scale in result.tokens], axis=1) for result in results]
    images = [result.decoded for result in results if result.decoded is not None]
    with atomic_write(path, force=force) as partial, partial.open("wb") as file:
        np.savez(file, tokens=np.concatenate(tokens).astype(np.int32), images=np.concatenate(images))


def _report(
    files: list[Path], results: list[GenerationOutput], plan: _Plan, choice: Choice | None, as_json: bool
) -> None:
    settings = results[0].settings[0].to_json()
    data = {
        **{key: settings[key] for key in ("bundle", "backend", "seed", "schedule", "guidance", "sampling")},
        "first_index": str(plan.first_index),
        "images": [{"file": str(path), "class": label} for path, label in zip(files, plan.labels, strict=True)],
        "timings": [result.timings.to_json() for result in results],
    }
    slowest = max(result.timings.total for result in results)
    if choice is not None:
        data["choice"] = choice.to_json() | {"took_ms": slowest * 1e3, "met": slowest <= choice.deadline}

    def show() -> None:
        for path in files:
            say(str(path))
        total = sum(result.timings.total for result in results)
        say(
            f"{len(files)} image{'s' * (len(files) != 1)} in {total:.2f} s on {settings['backend']}, "
            f"seed {plan.seed}, schedule {plan.schedule}"
        )
        if choice is not None:
            say(
                f"schedule {choice.schedule}: expected {choice.expected * 1e3:.1f} ms, took {slowest * 1e3:.1f} ms"
                f"{'' if slowest <= choice.deadline else ' (too late)'}. {choice.reason}"
            )

    emit(data, as_json, show)
