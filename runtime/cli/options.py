"""Options of the commands that make images, and functions that parse and check them."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any

import typer

from ..bundle.manifest import MANIFEST
from ..checks import invalid
from ..editing.canvas import check_sides
from ..errors import ArtifactRefused, InvalidInput
from ..files.targets import check_files, make_writable, place_of
from ..model.class_names import labels_by_name, labels_named
from ..model.noise import fresh_seed
from ..model.presets import PRESETS, Preset
from ..model.signatures import TABLES_FILE
from ..output import ScaleStep, Settings
from ..pictures.png import read_metadata, save_png
from ..pipeline import FlexVARPipeline
from .console import err, say
from .terminal import show_picture

Schedule = Annotated[
    str | None,
    typer.Option(
        help="Scales to generate, as sides in tokens: 1_2_4_8_16, where a scale may be height x width, such as 12x20. "
        "512px is the published schedule for 512 pixels. The last scale must have the size of the result."
    ),
]
Steps = Annotated[int | None, typer.Option("--steps", help="Number of scales. A schedule is derived for it.")]
Deadline = Annotated[
    float | None,
    typer.Option(
        help="Time limit for a batch, in milliseconds. The best schedule that is fast enough is used. Times that are "
        "not known yet are measured once on this machine."
    ),
]
PresetName = Annotated[
    str | None,
    typer.Option(
        "--preset",
        help="Published settings: their schedule, guidance and sampling replace the bundle's defaults. The names are "
        f"{', '.join(PRESETS)}.",
    ),
]
Cfg = Annotated[
    float | None,
    typer.Option(help="Guidance scale. Larger values follow the class more closely. 0 (ramp) or 1 (constant) is off."),
]
GuidanceRule = Annotated[
    str | None, typer.Option(help="Guidance rule. ramp: guidance grows with each scale. constant: it stays the same.")
]
TopK = Annotated[
    int | None, typer.Option(help="Draw each token from the K most likely ones. 0: from all. 1: take the most likely.")
]
TopP = Annotated[
    float | None,
    typer.Option(help="Draw from the most likely tokens that together have this probability. 0 or 1: from all."),
]
Greedy = Annotated[
    str | None,
    typer.Option(
        help="Greedy scales, which take the most likely tokens: sizes such as 7,9x12, or none, or upstream for the "
        "rule of the published code."
    ),
]
MaxSide = Annotated[
    int | None,
    typer.Option(help="Side in tokens. Above it, ramp uses the full --cfg, and --greedy-scales upstream is greedy."),
]
Seed = Annotated[int | None, typer.Option(help="Seed from 0 to 2^64 - 1. The default is a new one each time.")]
FirstIndex = Annotated[int | None, typer.Option(help="Index of the first image. 5 continues after images 0 to 4.")]
Backend = Annotated[str, typer.Option(help="A backend that flexvar doctor lists, or auto for the first that works.")]
Device = Annotated[str | None, typer.Option(help="GPU to use: cuda, or cuda:1 for the second.")]
Engines = Annotated[Path | None, typer.Option(help="Directory of flexvar build's engines, if not in the bundle.")]
Threads = Annotated[int | None, typer.Option(help="Number of CPU threads. The default is one for each processor.")]
AllowUnproved = Annotated[
    bool,
    typer.Option("--allow-unproved", help="Open a bundle that is not proved to agree with the reference, and warn."),
]
Preview = Annotated[Path | None, typer.Option(help="Directory to write a PNG of every scale of every image to.")]
Progress = Annotated[bool, typer.Option("--progress", help="Show each scale on the terminal as a small image.")]
Source = Annotated[
    Path | None,
    typer.Option("--from", help="PNG file that this command wrote. Its settings replace the bundle's defaults."),
]
Force = Annotated[bool, typer.Option("--force", help="Replace existing files.")]

_SIZE = re.compile(r"([0-9]{1,6})x([0-9]{1,6})")


def parse_size(text: str) -> tuple[int, int]:
    """ "256x512" to (height, width). Raises InvalidInput."""
    match = _SIZE.fullmatch(text)
    if match is None:
        raise invalid(f"--size is {text[:100]!r}", "height x width in pixels", "Write it like 256x512.")
    return int(match[1]), int(match[2])


def with_options(
    start: Settings,
    cfg: float | None,
    rule: str | None,
    top_k: int | None,
    top_p: float | None,
    greedy_scales: str | None,
    max_side: int | None,
    seed: int | None,
    first_index: int | None,
) -> Settings:
    """Settings in which the options that are given (not None) replace those of `start`. Raises InvalidInput."""
    guidance = _given(scale=cfg, rule=rule, max_side=max_side)
    sampling = _given(top_k=top_k, top_p=top_p, greedy_scales=greedy_scales, max_side=max_side)
    return replace(
        start,
        guidance=replace(start.guidance, **guidance),
        sampling=replace(start.sampling, **sampling),
        **_given(seed=seed, index=first_index),
    )


def _given(**options: Any) -> dict[str, Any]:
    """The options that are not None."""
    return {name: value for name, value in options.items() if value is not None}


def parse_labels(text: str, names: tuple[str, ...] | None, option: str = "--classes") -> list[int]:
    """ "7,999" or class names to labels. A bundle without names takes numbers only. Raises InvalidInput.

    Names may have commas, and are found in any case. The longest name that fits is taken: "tench, Tinca tinca,7" is two
    classes if the first name is one of the bundle.
    """
    known, by_name = names or (), labels_by_name(names or ())
    most = max(map(len, by_name), default=1)
    labels, parts = [], text.split(",")
    while parts:
        for count in range(min(most, len(parts)), 0, -1):
            part = ",".join(parts[:count]).strip()
            found = _number(part) or labels_named(part, known, by_name)
            if found:
                break
        if len(found) != 1:
            raise _ambiguous(option, part, found, known) if found else _unknown(option, part, known)
        labels += found
        parts = parts[count:]
    return labels


def _number(text: str) -> list[int]:
    """The label that a number stands for, or none."""
    return [int(text)] if text.isascii() and text.isdigit() and len(text) < 10 else []


def _ambiguous(option: str, name: str, labels: list[int], names: tuple[str, ...]) -> InvalidInput:
    candidates = ", ".join(f"{label} {names[label]!r}" for label in labels)
    return InvalidInput(
        f"{option} names {name!r:.100}, and {len(labels)} classes have this name: {candidates}.",
        expected="a name of one class",
        fix=f"Use one of the numbers {', '.join(map(str, labels))}.",
    )


def _unknown(option: str, part: str, names: tuple[str, ...]) -> InvalidInput:
    asked = part[:100].casefold()
    originals = {name.casefold(): name for name in names}
    within = [name for name in names if asked and asked in name.casefold()]
    close = within[:5] or [originals[match] for match in get_close_matches(asked, originals)] or list(names[:5])
    some = f"numbers, or names such as {', '.join(map(repr, close))}" if close else "numbers"
    return InvalidInput(
        f"{option} contains {part[:100]!r}, which is not a class of this bundle.",
        expected=some,
        fix=f"Pass {some}. To list the classes, run: flexvar inspect BUNDLE",
    )


def starting_settings(
    pipeline: FlexVARPipeline, source: Path | None, command: str, preset: Preset | None = None
) -> Settings:
    """What an image gets without options: the settings in a PNG file or of a preset, or else the bundle's defaults.

    Raises ArtifactRefused if the file was not made with this bundle by this command, "generate" or "edit".
    """
    bundle = pipeline.bundle.sha256
    if source is None:
        chosen: FlexVARPipeline | Preset = pipeline if preset is None else preset
        defaults = chosen.schedule, chosen.guidance, chosen.sampling
        return Settings(bundle, pipeline.model.null_class, fresh_seed(), 0, *defaults, pipeline.backend.name)
    found = Settings.from_json(read_metadata(source), str(source))
    if found.bundle != bundle:
        raise ArtifactRefused(
            f"{source.name} was made with bundle {found.bundle[:16]}…, but this bundle is {bundle[:16]}….",
            expected="an image of this bundle",
            fix="Pass the bundle that it was made with.",
        )
    if found.label > pipeline.model.null_class:
        raise ArtifactRefused(
            f"{source.name} names class {found.label}, but classes end at {pipeline.model.null_class}.",
            expected="a class of the bundle",
            fix="Pass a PNG file that this command wrote.",
        )
    if found.edit is not None and found.edit.edit.size is not None:
        (height, width), (up, right, down, left) = found.edit.edit.size, found.edit.edit.sides
        try:
            check_sides((height + up + down, width + left + right), pipeline.model.downsampling)
        except InvalidInput as error:
            fix = "Pass a PNG file that this command wrote."
            raise ArtifactRefused(f"In {source.name}, {error.got}", expected=error.expected, fix=fix) from error
    maker = "generate" if found.edit is None else "edit"
    if maker != command:
        raise ArtifactRefused(
            f"{source.name} was made by flexvar {maker}, not by flexvar {command}.",
            expected=f"an image of flexvar {command}",
            fix=f"To reuse its settings, pass it to flexvar {maker} with --from.",
        )
    return found


def check_targets(paths: list[Path], force: bool) -> None:
    """Refuse files that cannot be written, and make their directories. Raises InvalidInput and EnvironmentFailed."""
    for folder in dict.fromkeys(folder for path in paths for folder in place_of(path).parents):
        if os.path.exists(folder / MANIFEST) and os.path.exists(folder / TABLES_FILE):
            got, fix = f"{folder} is a bundle, whose files must not change.", "Choose another directory."
            raise InvalidInput(got, expected="a path outside of bundles", fix=fix)
    check_files(paths, force)
    for directory in dict.fromkeys(path.parent for path in paths):
        make_writable(directory)


def say_result(files: list[Path], made: str, seconds: float, settings: Settings) -> None:
    """Print the files of images, and how they were made. made: what is in them, for people."""
    for file in files:
        say(str(file))
    say(f"{made} in {seconds:.2f} s on {settings.backend}, seed {settings.seed}, schedule {settings.schedule}")


def preview_name(file: Path, scale: int, size: tuple[int, int]) -> str:
    """The file name of the preview of one scale (h, w) of the image in `file`."""
    return f"{file.stem}_scale{scale + 1:02d}_{size[0]}x{size[1]}.png"


def report_scale(
    step: ScaleStep, files: list[Path], advance: Callable[[str], None], preview: Path | None, show: bool, force: bool
) -> None:
    """Report a scale as progress. Show its images on the terminal if `show`, and write them to `preview` if given.

    files: the file of each image. advance: reports a step. preview: a directory. Raises InvalidInput.
    """
    advance(f"scale {step.index + 1}/{step.count}, {step.size[0]}x{step.size[1]} tokens")
    pictures = step.preview() if show or preview is not None else ()
    for file, pixels in zip(files, pictures, strict=False):
        if show:
            show_picture(err, pixels, f"{file.name}, scale {step.index + 1}/{step.count}")
        if preview is not None:
            path = preview / preview_name(file, step.index, step.size)
            save_png(path, pixels, {"preview_of": file.name, "scale": step.index + 1}, force=force)
