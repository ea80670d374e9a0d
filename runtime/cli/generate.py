"""`flexvar generate`: images from a bundle, and the same images again from a PNG."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from ..atomic import atomic_write, existing
from ..errors import ArtifactRefused, InvalidInput
from ..guidance import Guidance
from ..images import read_metadata, save_png
from ..manifest import MANIFEST
from ..noise import fresh_seed
from ..output import GenerationOutput, Settings
from ..pipeline import FlexVARPipeline, ScaleStep
from ..sampling import Sampling
from ..schedule import ScaleSchedule
from .console import JsonOption, emit, out, steps


def generate(
    bundle: Annotated[Path, typer.Argument(help="Bundle directory.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Directory for the PNG files, one an image.")],
    classes: Annotated[str | None, typer.Option(help="Classes, by number or name, joined by commas: 7,999.")] = None,
    schedule: Annotated[str | None, typer.Option(help="Scales: 1_2_4_8_16, 1_2_3x5_12x20, or 512px.")] = None,
    cfg: Annotated[float | None, typer.Option(help="Guidance scale; ramp 0 and constant 1 are off.")] = None,
    guidance: Annotated[str | None, typer.Option(help="Guidance rule: ramp or constant.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Codes kept, 0 for all, 1 for the most likely.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Probability mass kept, 0 or 1 for all.")] = None,
    greedy_scales: Annotated[
        str | None, typer.Option(help="Scales that take the argmax: upstream, none or 7,9.")
    ] = None,
    max_side: Annotated[
        int | None, typer.Option(help="Largest side of the published rules for guidance and greed.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="0 to 2^64 - 1; a fresh one if left out.")] = None,
    first_index: Annotated[int | None, typer.Option(help="Place of the first image in the seed's stream.")] = None,
    backend: Annotated[str, typer.Option(help="auto, or a name from flexvar doctor.")] = "auto",
    device: Annotated[str | None, typer.Option(help="GPU to use: cuda or cuda:N.")] = None,
    engines: Annotated[
        Path | None, typer.Option(help="Directory of flexvar build's engines, if not in the bundle.")
    ] = None,
    threads: Annotated[int | None, typer.Option(help="Processor threads.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images run at a time.")] = 8,
    preview: Annotated[Path | None, typer.Option(help="Directory for every scale of every image as a PNG.")] = None,
    source: Annotated[
        Path | None, typer.Option("--from", help="PNG of flexvar generate whose settings are used.")
    ] = None,
    save_arrays: Annotated[
        Path | None, typer.Option(help="NPZ file for tokens and the decoder's float output.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace existing files.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Generate one PNG an image. What is not given is the bundle's default, or the value in --from."""
    with FlexVARPipeline.from_bundle(bundle, backend, device, threads, engines) as pipeline:
        start = _starting_point(pipeline, source)
        plan = _Plan(
            labels=start.labels if classes is None else _labels(classes, pipeline.model.class_names),
            schedule=start.schedule if schedule is None else ScaleSchedule.parse(schedule),
            guidance=_replaced(start.guidance, scale=cfg, rule=guidance, max_side=max_side),
            sampling=_replaced(
                start.sampling, top_k=top_k, top_p=top_p, greedy_scales=greedy_scales, max_side=max_side
            ),
            seed=start.seed if seed is None else seed,
            first_index=start.first_index if first_index is None else first_index,
        )
        pipeline.check(plan.labels, plan.seed, plan.first_index)
        files = [output / plan.name(i) for i in range(len(plan.labels))]
        previews = [preview / name for name in plan.preview_names()] if preview else []
        _check_targets([*files, *previews, *([save_arrays] if save_arrays else [])], force)
        results = _run(pipeline, plan, files, preview, batch_size, save_arrays is not None, force)
    if save_arrays is not None:
        _save_arrays(save_arrays, results, force)
    _report(files, results, plan, as_json)


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
        h, w = self.schedule[scale]
        return f"{Path(self.name(i)).stem}_scale{scale + 1:02d}_{h}x{w}.png"

    def preview_names(self) -> list[str]:
        return [self.preview_name(i, scale) for i in range(len(self.labels)) for scale in range(len(self.schedule))]


def _check_targets(paths: list[Path], force: bool) -> None:
    """Refuse what could not be written in the end, and make the directories."""
    for path in paths:
        if any((parent / MANIFEST).exists() for parent in path.absolute().parents):
            raise InvalidInput(f"{path}, inside a bundle", expected="a place outside", fix="choose another directory")
        if os.path.lexists(path) and not force:
            raise existing(path)
        if path.is_dir():
            raise InvalidInput(f"{path}, a directory", expected="the name of a file", fix="choose another name")
    for directory in dict.fromkeys(path.parent for path in paths):
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InvalidInput(
                f"{directory} ({error.strerror})", expected="a directory that can be made", fix="choose another name"
            ) from error


def _starting_point(pipeline: FlexVARPipeline, source: Path | None) -> _Plan:
    """The bundle's defaults, or the settings of an image made from the same bundle."""
    if source is None:
        return _Plan([], pipeline.schedule, pipeline.guidance, pipeline.sampling, fresh_seed(), 0)
    found = Settings.from_json(read_metadata(source), str(source))
    if found.bundle != pipeline.bundle.sha256:
        raise ArtifactRefused(
            f"{source.name} of bundle {found.bundle[:16]}…",
            expected=f"an image of this bundle, {pipeline.bundle.sha256[:16]}…",
            fix="use the bundle it was made from",
        )
    return _Plan([found.label], found.schedule, found.guidance, found.sampling, found.seed, found.index)


def _replaced(options: Any, **given: Any) -> Any:
    return replace(options, **{name: value for name, value in given.items() if value is not None})


def _labels(text: str, names: tuple[str, ...] | None) -> list[int]:
    """ "7,999" or class names to labels; a bundle without names takes numbers only."""
    labels = []
    for part in (part.strip() for part in text.split(",")):
        if part.isascii() and part.isdigit() and len(part) < 10:
            labels.append(int(part))
        elif names and (found := [label for label, name in enumerate(names) if name == part]):
            if len(found) > 1:
                raise InvalidInput(f"class {part!r}", expected="a name of one class", fix=f"use a number: {found}")
            labels += found
        else:
            known = (
                f"numbers, or names such as {', '.join(names[:5])}"
                if names
                else "numbers (this bundle has no class names)"
            )
            raise InvalidInput(f"class {part[:100]!r}", expected=known, fix="join them by commas: --classes 7,999")
    return labels


def _run(
    pipeline: FlexVARPipeline,
    plan: _Plan,
    files: list[Path],
    preview: Path | None,
    batch_size: int,
    keep_decoded: bool,
    force: bool,
) -> list[GenerationOutput]:
    """Batch by batch; every image is written as soon as its batch is done."""
    results = []
    batches = range(0, len(plan.labels), batch_size)
    with steps(len(batches) * len(plan.schedule), "generate") as advance:
        for start in batches:
            labels = plan.labels[start : start + batch_size]

            def on_scale(step: ScaleStep, start: int = start) -> None:
                advance(f"scale {step.index + 1}/{step.count}, {step.size[0]}x{step.size[1]} tokens")
                if preview is not None:
                    for i, pixels in enumerate(step.preview()):
                        path = preview / plan.preview_name(start + i, step.index)
                        save_png(
                            path, pixels, {"preview_of": plan.name(start + i), "scale": step.index + 1}, force=force
                        )

            whole = preview is None and pipeline.backend.device is not None
            result = pipeline(
                labels,
                plan.schedule,
                plan.guidance,
                plan.sampling,
                plan.seed,
                plan.first_index + start,
                keep_decoded=keep_decoded,
                on_scale=None if whole else on_scale,  # a device runs all scales without asking
            )
            for _ in plan.schedule if whole else ():
                advance("generated")
            for i, (pixels, settings) in enumerate(zip(result.images, result.settings, strict=True)):
                save_png(files[start + i], pixels, settings.to_json(), force=force)
            results.append(result)
    return results


def _save_arrays(path: Path, results: list[GenerationOutput], force: bool) -> None:
    """tokens (B, L) int32, all scales in order, row-major; images (B, 3, H, W) float32 as the decoder gave them."""
    tokens = [np.concatenate([scale.reshape(len(scale), -1) for scale in result.tokens], axis=1) for result in results]
    images = [result.decoded for result in results if result.decoded is not None]
    with atomic_write(path, force=force) as partial, partial.open("wb") as file:
        np.savez(file, tokens=np.concatenate(tokens).astype(np.int32), images=np.concatenate(images))


def _report(files: list[Path], results: list[GenerationOutput], plan: _Plan, as_json: bool) -> None:
    settings = results[0].settings[0].to_json()
    data = {
        **{key: settings[key] for key in ("bundle", "backend", "seed", "schedule", "guidance", "sampling")},
        "first_index": str(plan.first_index),
        "images": [{"file": str(path), "class": label} for path, label in zip(files, plan.labels, strict=True)],
        "timings": [result.timings.to_json() for result in results],
    }

    def show() -> None:
        for path in files:
            out.print(str(path), highlight=False, markup=False, soft_wrap=True)
        total = sum(result.timings.total for result in results)
        out.print(
            f"{len(files)} image{'s' * (len(files) != 1)} in {total:.2f} s on {settings['backend']}, "
            f"seed {plan.seed}, schedule {plan.schedule}",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )

    emit(data, as_json, show)
