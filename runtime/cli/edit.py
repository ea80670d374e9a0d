"""`flexvar edit`: refine, inpaint, outpaint or expand a picture, or repeat an edit from its result."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from ..checks import invalid
from ..editing.options import Edit, EditRecord
from ..errors import InvalidInput
from ..model.schedule import MAX_SCALES, MAX_SIDE
from ..output import GenerationOutput, ScaleStep, Settings
from ..pictures.png import save_png
from ..pipeline import FlexVARPipeline
from . import options
from .console import JsonOption, emit, err, say, steps
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


def edit(
    bundle: Annotated[Path, typer.Argument(help="Bundle directory, as flexvar export writes it.")],
    image: Annotated[Path, typer.Option(help="Picture to edit, as PNG, JPEG, WebP or another common format.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="PNG file to write the result to.")],
    task: Annotated[str | None, typer.Option(help="refine, inpaint, outpaint or expand.")] = None,
    mask: Annotated[Path | None, typer.Option(help="For inpaint: image file whose white pixels are repainted.")] = None,
    size: Annotated[str | None, typer.Option(help="Height x width of the result in pixels, such as 256x512.")] = None,
    fit: Annotated[
        str | None, typer.Option(help="If --size has other proportions: resize stretches, crop cuts, pad adds edges.")
    ] = None,
    strength: Annotated[float | None, typer.Option(help="For refine: share of scales to generate, 0 to 1.")] = None,
    top: Annotated[int | None, typer.Option(min=0, help="For outpaint: pixels to add above.")] = None,
    right: Annotated[int | None, typer.Option(min=0, help="For outpaint: pixels to add on the right.")] = None,
    bottom: Annotated[int | None, typer.Option(min=0, help="For outpaint: pixels to add below.")] = None,
    left: Annotated[int | None, typer.Option(min=0, help="For outpaint: pixels to add on the left.")] = None,
    anchor: Annotated[
        str | None, typer.Option(help="For expand: where the picture is: centre, top, bottom, left or right.")
    ] = None,
    paste: Annotated[
        bool | None, typer.Option("--paste/--no-paste", help="Copy the kept pixels of the picture into the result.")
    ] = None,
    feather: Annotated[int | None, typer.Option(help="With --paste: width in pixels of the blended border.")] = None,
    label: Annotated[str | None, typer.Option("--class", help="Class, by number or name. The default is none.")] = None,
    schedule: options.Schedule = None,
    scales: options.Steps = None,
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
    preview: options.Preview = None,
    show: options.Progress = False,
    source: options.Source = None,
    force: options.Force = False,
    as_json: JsonOption = False,
) -> None:
    """Edit a picture.

    There are four tasks. refine generates the larger scales of the picture again, at --size. inpaint repaints the white
    part of --mask, or the transparent part of the picture. outpaint adds pixels on the sides. expand places the picture
    on a canvas of --size and generates the rest.

    Options that are left out take the value in the --from file, or else the default of the bundle.
    """
    if output.suffix.lower() != ".png":
        better = output / "edited.png" if os.path.isdir(output) else output.with_suffix(".png")
        raise invalid(f"--output is {output}", "a name that ends in .png", f"Write {better}.")
    edit_options = {
        "task": task,
        "size": None if size is None else parse_size(size),
        "fit": fit,
        "strength": strength,
        "sides": (top, right, bottom, left),
        "anchor": anchor,
        "paste": paste,
        "feather": feather,
    }
    with FlexVARPipeline.from_bundle(
        bundle, backend, device, threads, engines, allow_unproved=allow_unproved
    ) as pipeline:
        start = starting_settings(pipeline, source, "edit")
        settings = with_options(start, cfg, guidance, top_k, top_p, greedy_scales, max_side, seed, first_index)
        wanted = _edit_of(start.edit, edit_options)
        default_guidance = all(option is None for option in (source, label, cfg, guidance))
        request = {
            **vars(wanted),
            "mask": mask,
            "labels": [start.label] if label is None else _one_label(label, pipeline),
            "schedule": schedule,
            "steps": scales,
            "earlier": start.schedule,
            "guidance": None if default_guidance else settings.guidance,
            "sampling": settings.sampling,
            "seed": settings.seed,
            "first_index": settings.index,
        }
        previews = [] if preview is None else [preview / preview_name(output, MAX_SCALES - 1, (MAX_SIDE, MAX_SIDE))]
        check_targets([output, *previews], force)  # the longest name of a preview: the schedule is not known yet
        with steps(None, "edit") as advance:

            def on_scale(step: ScaleStep) -> None:
                report_scale(step, [output], advance, preview, show, force)

            result = pipeline.edit(image, on_scale=on_scale, **request)
    if source is not None:
        _warn_about_other_pictures(start, result.settings[0])
    save_png(output, result.images[0], result.settings[0].to_json(), force=force)
    _report(output, result, as_json)


def _edit_of(earlier: EditRecord | None, options: dict[str, Any]) -> Edit:
    """The earlier edit with the options that are given (not None). Raises InvalidInput."""
    given = {name: value for name, value in options.items() if value is not None and name != "sides"}
    before = (0, 0, 0, 0) if earlier is None else earlier.edit.sides
    if any(side is not None for side in options["sides"]):
        given["sides"] = tuple(old if new is None else new for old, new in zip(before, options["sides"], strict=True))
    if earlier is not None:
        return earlier.edit.changed(**given)
    if "task" not in given:
        choices = "refine, inpaint, outpaint or expand"
        raise InvalidInput("--task is missing.", expected=choices, fix=f"Pass --task {choices}.")
    return Edit(**given)


def _one_label(text: str, pipeline: FlexVARPipeline) -> list[int]:
    """The class in --class. Raises InvalidInput."""
    labels = parse_labels(text, pipeline.model.class_names, "--class")
    if len(labels) != 1:
        raise invalid(f"--class is {text[:100]!r}", "one class", "Run the command once for each class.")
    return labels


def _warn_about_other_pictures(earlier: Settings, now: Settings) -> None:
    """Log that the picture or the mask is not the one of the earlier edit. That may be what the user wants."""
    assert earlier.edit is not None and now.edit is not None
    before, after = earlier.edit, now.edit
    masks = {before.mask_sha256, after.mask_sha256} if before.edit.task == after.edit.task else set()
    if before.picture_sha256 != after.picture_sha256 or len(masks) > 1:
        say("The picture or mask differs from that of the edit in --from, so the result differs too.", err)


def _report(output: Path, result: GenerationOutput, as_json: bool) -> None:
    settings, made = result.settings[0], "{}x{} pixels".format(*result.images.shape[1:3])
    data = {"file": str(output), **settings.to_json(), "timings": result.timings.to_json()}
    emit(data, as_json, lambda: say_result([output], made, result.timings.total, settings))
