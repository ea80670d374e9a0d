"""`flexvar edit`: a picture refined, painted in, painted out or expanded, and the same again from the result."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from ..edit import Edit
from ..errors import ArtifactRefused, InvalidInput
from ..guidance import Guidance
from ..images import read_metadata, save_png
from ..output import GenerationOutput, Settings
from ..pipeline import FlexVARPipeline, ScaleStep
from ..sampling import Sampling
from ..schedule import ScaleSchedule
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
    sides = (top, right, bottom, left)
    options = {
        "task": task,
        "size": None if size is None else parse_size(size),
        "fit": fit,
        "strength": strength,
        "sides": None if sides == (None,) * 4 else tuple(side or 0 for side in sides),
        "anchor": anchor,
        "paste": paste,
        "feather": feather,
    }
    moved = any(options[name] is not None for name in ("task", "size", "fit", "sides"))  # another canvas than --from's
    with FlexVARPipeline.from_bundle(bundle, backend, device, threads, engines) as pipeline:
        start = _start(pipeline, source)
        plan = _Plan(
            edit=_options(start, options),
            label=start.label if label is None else _one_label(label, pipeline),
            schedule=schedule or (None if scales is not None or moved else start.schedule),
            steps=scales,
            guidance=_guidance(start, pipeline, {"scale": cfg, "rule": guidance, "max_side": max_side}),
            sampling=replaced(start.sampling, top_k=top_k, top_p=top_p, greedy_scales=greedy_scales, max_side=max_side),
            seed=start.seed if seed is None else seed,
            first_index=start.first_index if first_index is None else first_index,
        )
        check_targets([output], force)
        result = _run(pipeline, plan, image, mask, output, preview, show, force)
    settings = result.settings[0]
    if start.record is not None:
        _warn_of_other_pictures(start.record, settings)
    save_png(output, result.images[0], settings.to_json(), force=force)
    _report(output, result, as_json)


@dataclass(frozen=True)
class _Start:
    """What is not said: nothing but the bundle's defaults, or an earlier edit."""

    edit: Edit | None
    label: int | None
    schedule: ScaleSchedule | None
    guidance: Guidance | None
    sampling: Sampling
    seed: int | None
    first_index: int
    record: Settings | None


@dataclass(frozen=True)
class _Plan:
    edit: Edit
    label: int | None
    schedule: ScaleSchedule | str | None
    steps: int | None
    guidance: Guidance | None
    sampling: Sampling
    seed: int | None
    first_index: int


def _start(pipeline: FlexVARPipeline, source: Path | None) -> _Start:
    if source is None:
        return _Start(None, None, None, None, pipeline.sampling, None, 0, None)
    found = Settings.from_json(read_metadata(source), str(source))
    if found.edit is None:
        raise ArtifactRefused(
            f"{source.name}, not an edited picture", expected="one of flexvar edit", fix="use flexvar generate --from"
        )
    if found.bundle != pipeline.bundle.sha256:
        raise ArtifactRefused(
            f"{source.name} of bundle {found.bundle[:16]}…",
            expected=f"a picture of this bundle, {pipeline.bundle.sha256[:16]}…",
            fix="use the bundle it was made from",
        )
    return _Start(
        found.edit.edit,
        found.label,
        found.schedule,
        found.guidance,
        found.sampling,
        found.seed,
        found.index,
        found,
    )


def _options(start: _Start, given: dict[str, Any]) -> Edit:
    """The edit that was said, over the earlier one. Raises InvalidInput."""
    said = {name: value for name, value in given.items() if value is not None}
    if start.edit is not None:
        return replace(start.edit, **said)
    if "task" not in said:
        raise InvalidInput("no task", expected="refine, inpaint, outpaint or expand", fix="name one with --task")
    return Edit(**said)


def _one_label(text: str, pipeline: FlexVARPipeline) -> int:
    labels = parse_labels(text, pipeline.model.class_names)
    if len(labels) != 1:
        raise InvalidInput(f"{len(labels)} classes", expected="one", fix="run the command once a class")
    return labels[0]


def _guidance(start: _Start, pipeline: FlexVARPipeline, given: dict[str, Any]) -> Guidance | None:
    """None leaves it to the pipeline: the bundle's for a class, off without one."""
    if start.guidance is None and all(value is None for value in given.values()):
        return None
    guidance: Guidance = replaced(start.guidance or pipeline.guidance, **given)
    return guidance


def _run(
    pipeline: FlexVARPipeline,
    plan: _Plan,
    image: Path,
    mask: Path | None,
    output: Path,
    preview: Path | None,
    show: bool,
    force: bool,
) -> GenerationOutput:
    with steps(1, "edit") as advance:

        def on_scale(step: ScaleStep) -> None:
            if not show and preview is None:
                return
            pixels = step.preview()[0]
            if show:
                show_picture(err, pixels, f"{output.name}, scale {step.index + 1}/{step.count}")
            if preview is not None:
                path = preview / preview_name(output.stem, step.index, step.size)
                check_targets([path], force)
                save_png(path, pixels, {"preview_of": output.name, "scale": step.index + 1}, force=force)

        edit = plan.edit
        result = pipeline.edit(
            image,
            edit.task,
            mask=mask,
            labels=None if plan.label is None else [plan.label],
            size=edit.size,
            fit=edit.fit,
            strength=edit.strength,
            sides=edit.sides,
            anchor=edit.anchor,
            paste=edit.paste,
            feather=edit.feather,
            steps=plan.steps,
            schedule=plan.schedule,
            guidance=plan.guidance,
            sampling=plan.sampling,
            seed=plan.seed,
            first_index=plan.first_index,
            on_scale=on_scale,
        )
        advance(plan.edit.task)
    return result


def _warn_of_other_pictures(earlier: Settings, now: Settings) -> None:
    """The same settings on another picture are a wish that can be meant; it is said all the same."""
    assert earlier.edit is not None and now.edit is not None
    if (earlier.edit.picture_sha256, earlier.edit.mask_sha256) != (now.edit.picture_sha256, now.edit.mask_sha256):
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
