"""`flexvar generate`: images from a bundle, or again from the settings in a PNG file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from ..checks import conflict
from ..deadlines.choice import Choice, seconds_of
from ..editing.canvas import check_sides
from ..editing.plan import warn_if_large
from ..errors import CostUnknown, InvalidInput
from ..files.atomic import atomic_write
from ..model.presets import preset
from ..model.schedule import ScaleSchedule
from ..output import GenerationOutput, ScaleStep, Settings
from ..pictures.png import save_png
from ..pipeline import FlexVARPipeline
from . import options
from .console import JsonOption, emit, say, steps
from .options import (
    check_targets,
    parse_labels,
    parse_size,
    preview_name,
    report_scale,
    say_result,
    starting_settings,
    with_options,
)


def generate(
    bundle: Annotated[Path, typer.Argument(help="Bundle directory, as flexvar export writes it.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Directory to write one PNG file for each image to.")],
    classes: Annotated[
        str | None, typer.Option(help="One class for each image, as numbers or names joined by commas: 7,999.")
    ] = None,
    schedule: options.Schedule = None,
    size: Annotated[
        str | None, typer.Option(help="Height x width in pixels, such as 256x512. A schedule is derived for it.")
    ] = None,
    scales: options.Steps = None,
    deadline_ms: options.Deadline = None,
    preset_name: options.PresetName = None,
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
    allow_unproved: options.AllowUnproved = False,
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

    --schedule cannot be combined with --size or --steps. --deadline-ms cannot be combined with any of them, or with
    --preset. --preset cannot be combined with --from.

    Options that are left out take the value of the --preset or of the --from file, or else the default of the bundle.
    """
    if classes is None and source is None:
        raise InvalidInput(
            "Neither --classes nor --from is given.",
            expected="one class for each image",
            fix="Pass the classes of the images, such as --classes 7,999.",
        )
    if deadline_ms is not None:
        _check_deadline(deadline_ms, chosen=(schedule, size, scales, preset_name), shown=show or preview is not None)
    if preset_name is not None and source is not None:
        raise conflict("--preset", "--from")
    published = None if preset_name is None else preset(preset_name)
    with FlexVARPipeline.from_bundle(
        bundle, backend, device, threads, engines, allow_unproved=allow_unproved
    ) as pipeline:
        start = starting_settings(pipeline, source, "generate", published)
        labels = [start.label] if classes is None else parse_labels(classes, pipeline.model.class_names)
        start = replace(start, schedule=_schedule(pipeline, start.schedule, schedule, size, scales))
        settings = with_options(start, cfg, guidance, top_k, top_p, greedy_scales, max_side, seed, first_index)
        warn_if_large(settings.schedule, pipeline.schedule)
        pipeline.check(labels, settings.seed, settings.index)
        files = [output / f"{i:06d}_class{label:04d}.png" for i, label in enumerate(labels, settings.index)]
        targets = files if save_arrays is None else [*files, save_arrays]
        if preview is not None:
            scale_sizes = list(enumerate(settings.schedule))
            previews = [preview_name(file, scale, size) for file in files for scale, size in scale_sizes]
            targets = [*targets, *(preview / name for name in previews)]
        check_targets(targets, force)
        choice = None
        if deadline_ms is not None:
            choice = _choose(pipeline, settings, len(labels), batch_size, deadline_ms)
            settings = replace(settings, schedule=choice.schedule)
        results = _run(pipeline, labels, settings, files, preview, show, batch_size, save_arrays is not None, force)
    if save_arrays is not None:
        _save_arrays(save_arrays, results, force)
    _report(files, results, choice, as_json)


def _schedule(
    pipeline: FlexVARPipeline, start: ScaleSchedule, schedule: str | None, size: str | None, steps: int | None
) -> ScaleSchedule:
    """The given schedule, or one derived for a size and a number of steps, or else that of the starting point."""
    if schedule is not None:
        if size is not None or steps is not None:
            raise conflict("--schedule", "--size or --steps")
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
        raise conflict(
            "--deadline-ms", "--schedule, --size, --steps or --preset", "Leave them out: it chooses the schedule."
        )
    if shown:
        raise conflict("--deadline-ms", "--preview or --progress, because they take time", "Leave them out.")


def _choose(pipeline: FlexVARPipeline, settings: Settings, count: int, batch_size: int, deadline_ms: float) -> Choice:
    """The best schedule for the deadline. Unknown costs are measured first. Afterwards the pipeline is warm."""
    images, guidance, sampling = min(count, batch_size), settings.guidance, settings.sampling
    choice = None
    with steps(None, "measure") as advance:
        while choice is None:  # each round measures one more schedule, best first
            try:
                choice = pipeline.choose_schedule(images, deadline_ms, guidance, sampling)
            except CostUnknown as unknown:
                advance(f"schedule {unknown.schedule} for {images} at once on {pipeline.backend.name}, once")
                pipeline.measure_costs((images,), [unknown.schedule], guidance=guidance, sampling=sampling)
    last = count % batch_size
    pipeline.warmup(choice.schedule, {images, last or images}, guidance, sampling)
    return choice


def _run(
    pipeline: FlexVARPipeline,
    labels: list[int],
    settings: Settings,
    files: list[Path],
    preview: Path | None,
    show: bool,
    batch_size: int,
    keep_decoded: bool,
    force: bool,
) -> list[GenerationOutput]:
    """Generate batch by batch. Images are written when their batch is done, and their pixels are dropped."""
    results = []
    batches = range(0, len(labels), batch_size)
    whole = preview is None and not show and pipeline.generator.runs_whole
    with steps(len(batches) * len(settings.schedule), "generate") as advance:
        for start in batches:
            batch = slice(start, start + batch_size)

            def on_scale(step: ScaleStep, batch: slice = batch) -> None:
                report_scale(step, files[batch], advance, preview, show, force)

            result = pipeline(
                labels[batch],
                settings.schedule,
                settings.guidance,
                settings.sampling,
                settings.seed,
                settings.index + start,
                keep_decoded=keep_decoded,
                on_scale=None if whole else on_scale,  # without it, a GPU replays all scales at once
            )
            for _ in settings.schedule if whole else ():
                advance("generated")
            for file, pixels, own in zip(files[batch], result.images, result.settings, strict=True):
                save_png(file, pixels, own.to_json(), force=force)
            results.append(replace(result, images=result.images[:0]))
    return results


def _save_arrays(path: Path, results: list[GenerationOutput], force: bool) -> None:
    """Write tokens (B, L) int32, all scales in order and row-major, and images (B, 3, H, W) float32 of the decoder."""
    tokens = [np.concatenate([scale.reshape(len(scale), -1) for scale in result.tokens], axis=1) for result in results]
    images = [result.decoded for result in results if result.decoded is not None]
    with atomic_write(path, force=force) as partial, partial.open("wb") as file:
        np.savez(file, tokens=np.concatenate(tokens).astype(np.int32), images=np.concatenate(images))


def _report(files: list[Path], results: list[GenerationOutput], choice: Choice | None, as_json: bool) -> None:
    settings = [own for result in results for own in result.settings]
    common = settings[0].to_json()
    data = {
        **{key: common[key] for key in ("bundle", "backend", "seed", "schedule", "guidance", "sampling")},
        "first_index": common["index"],
        "images": [{"file": str(file), "class": own.label} for file, own in zip(files, settings, strict=True)],
        "timings": [result.timings.to_json() for result in results],
    }
    slowest = max(result.timings.total for result in results)
    if choice is not None:
        data["choice"] = choice.to_json() | {"took_ms": slowest * 1e3, "met": slowest <= choice.deadline}

    def show() -> None:
        total = sum(result.timings.total for result in results)
        say_result(files, f"{len(files)} image{'s' * (len(files) != 1)}", total, settings[0])
        if choice is not None:
            say(
                f"schedule {choice.schedule}: expected {choice.expected * 1e3:.1f} ms, took {slowest * 1e3:.1f} ms"
                f"{'' if slowest <= choice.deadline else ' (too late)'}. {choice.reason}"
            )

    emit(data, as_json, show)
