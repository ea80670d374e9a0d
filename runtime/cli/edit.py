"""`flexvar edit`: a picture refined, painted in, painted out or expanded, and the same again from the result."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..editing.options import Edit
from ..errors import ArtifactRefused, InvalidInput
from ..model.guidance import Guidance
from ..output import GenerationOutput, ScaleStep, Settings
from ..pictures.png import save_png
from ..pipeline import FlexVARPipeline
from .console import JsonOption, emit, err, out, steps
from .options import (
    BackendOption,
    CfgOption,
    DeviceOption,
    EnginesOption,
    FirstIndexOption,
    ForceOption,
    GreedyOption,
    GuidanceOption,
    MaxSideOption,
    PreviewOption,
    ProgressOption,
    ScheduleOption,
    SeedOption,
    StepsOption,
    ThreadsOption,
    TopKOption,
    TopPOption,
    check_targets,
    parse_labels,
    parse_size,
    preview_name,
    read_settings,
    replaced,
)
from .terminal import show_picture


def edit(
    bundle: Annotated[Path, typer.Argument(help="Bundle directory.")],
    image: Annotated[Path, typer.Option(help="Picture to edit: PNG, JPEG, WebP …")],
    output: Annotated[Path, typer.Option("-o", "--output", help="PNG file for the result.")],
    task: Annotated[str | None, typer.Option(help="refine, inpaint, outpaint or expand.")] = None,
    mask: Annotated[
        Path | None, typer.Option(help="inpaint: white is made anew; by default what is transparent.")
    ] = None,
    size: Annotated[str | None, typer.Option(help="Height x width in pixels; of expand that of the canvas.")] = None,
    fit: Annotated[str | None, typer.Option(help="Other proportions: resize, crop or pad.")] = None,
    strength: Annotated[float | None, typer.Option(help="refine: share of the scales generated, 0 to 1.")] = None,
    top: Annotated[int | None, typer.Option(min=0, help="outpaint: pixels to add above.")] = None,
    right: Annotated[int | None, typer.Option(min=0, help="outpaint: pixels to add on the right.")] = None,
    bottom: Annotated[int | None, typer.Option(min=0, help="outpaint: pixels to add below.")] = None,
    left: Annotated[int | None, typer.Option(min=0, help="outpaint: pixels to add on the left.")] = None,
    anchor: Annotated[
        str | None, typer.Option(help="expand: where the picture lies, centre, top, bottom, left or right.")
    ] = None,
    paste: Annotated[
        bool | None, typer.Option("--paste/--no-paste", help="Keep the picture's own pixels where nothing is new.")
    ] = None,
    feather: Annotated[int | None, typer.Option(help="Pixels over which pasted ones are blended.")] = None,
    label: Annotated[str | None, typer.Option("--class", help="Class, by number or name; none if left out.")] = None,
    schedule: ScheduleOption = None,
    scales: StepsOption = None,
    cfg: CfgOption = None,
    guidance: GuidanceOption = None,
    top_k: TopKOption = None,
    top_p: TopPOption = None,
    greedy_scales: GreedyOption = None,
    max_side: MaxSideOption = None,
    seed: SeedOption = None,
    first_index: FirstIndexOption = None,
    backend: BackendOption = "auto",
    device: DeviceOption = None,
    engines: EnginesOption = None,
    threads: ThreadsOption = None,
    preview: PreviewOption = None,
    show: ProgressOption = False,
    source: Annotated[Path | None, typer.Option("--from", help="PNG of flexvar edit whose settings are used.")] = None,
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Edit a picture. What is not given is the bundle's default, or the value in --from."""
    if output.suffix.lower() != ".png":
        raise InvalidInput(f"{output}", expected="a name that ends in .png", fix=f"write {output.with_suffix('.png')}")
    options = {
        "task": task,
        "size": None if size is None else parse_size(size),
        "fit": fit,
        "strength": strength,
        "sides": (top, right, bottom, left),
        "anchor": anchor,
        "paste": paste,
        "feather": feather,
    }
    with FlexVARPipeline.from_bundle(bundle, backend, device, threads, engines) as pipeline:
        earlier = None if source is None else _earlier(pipeline, source)
        changes = {"top_k": top_k, "top_p": top_p, "greedy_scales": greedy_scales, "max_side": max_side}
        wanted, labels = _edit(earlier, options), _labels(earlier, label, pipeline)
        said = {"scale": cfg, "rule": guidance}
        request = {
            **vars(wanted),
            "mask": mask,
            "labels": labels,
            "schedule": schedule,
            "steps": scales,
            "earlier": earlier.schedule if earlier else None,
            "guidance": _guidance(earlier, pipeline, labels, said, max_side),
            "sampling": replaced(earlier.sampling if earlier else pipeline.sampling, **changes),
            "seed": earlier.seed if earlier and seed is None else seed,
            "first_index": (earlier.index if earlier else 0) if first_index is None else first_index,
        }
        check_targets([output], force)
        with steps(None, "edit") as advance:

            def on_scale(step: ScaleStep) -> None:
                advance(f"scale {step.index + 1}/{step.count}, {step.size[0]}x{step.size[1]} tokens")
                if not show and preview is None:
                    return
                pixels = step.preview()[0]
                if show:
                    show_picture(err, pixels, f"{output.name}, scale {step.index + 1}/{step.count}")
                if preview is not None:
                    path = preview / preview_name(output.stem, step.index, step.size)
                    check_targets([path], force)
                    save_png(path, pixels, {"preview_of": output.name, "scale": step.index + 1}, force=force)

            result = pipeline.edit(image, on_scale=on_scale, **request)
    settings = result.settings[0]
    if earlier is not None:
        _warn_of_other_pictures(earlier, settings)
    save_png(output, result.images[0], settings.to_json(), force=force)
    _report(output, result, as_json)


def _earlier(pipeline: FlexVARPipeline, source: Path) -> Settings:
    """Settings of an earlier edit with this bundle. Raises ArtifactRefused."""
    found = read_settings(source, pipeline.bundle.sha256)
    if found.edit is None:
        raise ArtifactRefused(
            f"{source.name}, not an edited picture", expected="one of flexvar edit", fix="use flexvar generate --from"
        )
    return found


def _edit(earlier: Settings | None, given: dict[str, Any]) -> Edit:
    """The edit that was said, over the earlier one. Raises InvalidInput."""
    said = {name: value for name, value in given.items() if value is not None and name != "sides"}
    before = earlier.edit.edit.sides if earlier is not None and earlier.edit is not None else (0, 0, 0, 0)
    if any(side is not None for side in given["sides"]):
        said["sides"] = tuple(old if new is None else new for old, new in zip(before, given["sides"], strict=True))
    if earlier is not None and earlier.edit is not None:
        return earlier.edit.edit.changed(**said)
    if "task" not in said:
        raise InvalidInput("no task", expected="refine, inpaint, outpaint or expand", fix="name one with --task")
    return Edit(**said)


def _labels(earlier: Settings | None, text: str | None, pipeline: FlexVARPipeline) -> list[int] | None:
    """The one class that was said, or the earlier one; None for no class."""
    if text is None:
        return None if earlier is None else [earlier.label]
    labels = parse_labels(text, pipeline.model.class_names)
    if len(labels) != 1:
        raise InvalidInput(f"{len(labels)} classes", expected="one", fix="run the command once a class")
    return labels


def _guidance(
    earlier: Settings | None,
    pipeline: FlexVARPipeline,
    labels: list[int] | None,
    said: dict[str, Any],
    max_side: int | None,
) -> Guidance | None:
    """None leaves it to the pipeline: off without a class, unless a scale or rule was said."""
    if earlier is None and labels is None and all(value is None for value in said.values()):
        return None
    guidance: Guidance = replaced(earlier.guidance if earlier else pipeline.guidance, **said, max_side=max_side)
    return guidance


def _warn_of_other_pictures(earlier: Settings, now: Settings) -> None:
    """The same settings on another picture are a wish that can be meant; it is said all the same."""
    assert earlier.edit is not None and now.edit is not None
    before, after = earlier.edit, now.edit
    masks = {before.mask_sha256, after.mask_sha256} if before.edit.task == after.edit.task else set()
    if before.picture_sha256 != after.picture_sha256 or len(masks) > 1:
        err.print("another picture or mask than in --from: the result is another too", highlight=False, soft_wrap=True)


def _report(output: Path, result: GenerationOutput, as_json: bool) -> None:
    settings = result.settings[0]
    data = {"file": str(output), **settings.to_json(), "timings": result.timings.to_json()}

    def show() -> None:
        height, width = result.images.shape[1:3]
        out.print(str(output), highlight=False, markup=False, soft_wrap=True)
        out.print(
            f"{height}x{width} pixels in {result.timings.total:.2f} s on {settings.backend}, seed {settings.seed}, "
            f"schedule {settings.schedule}",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )

    emit(data, as_json, show)
