"""What the commands that make images share: their options, and how texts become values."""

from __future__ import annotations

import os
import re
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any

import typer

from ..bundle.manifest import MANIFEST
from ..errors import ArtifactRefused, InvalidInput
from ..files.atomic import already_exists
from ..model.signatures import TABLES_FILE
from ..output import Settings
from ..pictures.png import read_metadata

ScheduleOption = Annotated[str | None, typer.Option(help="Scales: 1_2_4_8_16, 1_2_3x5_12x20, or 512px.")]
StepsOption = Annotated[int | None, typer.Option("--steps", help="Number of scales, derived for the size.")]
DeadlineOption = Annotated[
    float | None,
    typer.Option(help="Milliseconds for a batch: takes the best schedule that is fast enough, measured here once."),
]
CfgOption = Annotated[float | None, typer.Option(help="Guidance scale; ramp 0 and constant 1 are off.")]
GuidanceOption = Annotated[str | None, typer.Option(help="Guidance rule: ramp or constant.")]
TopKOption = Annotated[int | None, typer.Option(help="Codes kept, 0 for all, 1 for the most likely.")]
TopPOption = Annotated[float | None, typer.Option(help="Probability mass kept, 0 or 1 for all.")]
GreedyOption = Annotated[str | None, typer.Option(help="Scales that take the argmax: upstream, none or 7,9.")]
MaxSideOption = Annotated[int | None, typer.Option(help="Largest side of the published rules for guidance and greed.")]
SeedOption = Annotated[int | None, typer.Option(help="0 to 2^64 - 1; a fresh one if left out.")]
FirstIndexOption = Annotated[int | None, typer.Option(help="Place of the first image in the seed's stream.")]
BackendOption = Annotated[str, typer.Option(help="auto, or a name from flexvar doctor.")]
DeviceOption = Annotated[str | None, typer.Option(help="GPU to use: cuda or cuda:N.")]
EnginesOption = Annotated[Path | None, typer.Option(help="Directory of flexvar build's engines, if not in the bundle.")]
ThreadsOption = Annotated[int | None, typer.Option(help="Processor threads.")]
PreviewOption = Annotated[Path | None, typer.Option(help="Directory for every scale of every image as a PNG.")]
ProgressOption = Annotated[
    bool, typer.Option("--progress", help="Show every scale as it comes, as a small picture on a terminal.")
]
ForceOption = Annotated[bool, typer.Option("--force", help="Replace existing files.")]

_SIZE = re.compile(r"([0-9]{1,6})x([0-9]{1,6})")


def parse_size(text: str) -> tuple[int, int]:
    """ "256x512" to (height, width). Raises InvalidInput."""
    match = _SIZE.fullmatch(text)
    if match is None:
        raise InvalidInput(f"size {text[:100]!r}", expected="height x width in pixels", fix="write it like 256x512")
    return int(match[1]), int(match[2])


def replaced(options: Any, **given: Any) -> Any:
    """A frozen dataclass with what was given (not None) in place."""
    return replace(options, **{name: value for name, value in given.items() if value is not None})


def parse_labels(text: str, names: tuple[str, ...] | None) -> list[int]:
    """ "7,999" or class names to labels; a bundle without names takes numbers only. Raises InvalidInput."""
    labels = []
    for part in (part.strip() for part in text.split(",")):
        if part.isascii() and part.isdigit() and len(part) < 10:
            labels.append(int(part))
        elif names and (found := [label for label, name in enumerate(names) if name == part]):
            if len(found) > 1:
                raise InvalidInput(f"class {part!r}", expected="a name of one class", fix=f"use a number: {found}")
            labels += found
        else:
            folded = {name.casefold(): name for name in names or ()}
            close = [folded[match] for match in get_close_matches(part[:100].casefold(), folded)]
            known = (
                f"numbers, or names such as {', '.join(close or names[:5])}"
                if names
                else "numbers (this bundle has no class names)"
            )
            raise InvalidInput(
                f"class {part[:100]!r}", expected=known, fix="flexvar inspect says which classes a bundle has"
            )
    return labels


def read_settings(source: Path, bundle_sha256: str) -> Settings:
    """What an image of the same bundle was made with. Raises ArtifactRefused."""
    found = Settings.from_json(read_metadata(source), str(source))
    if found.bundle != bundle_sha256:
        raise ArtifactRefused(
            f"{source.name} of bundle {found.bundle[:16]}…",
            expected=f"an image of this bundle, {bundle_sha256[:16]}…",
            fix="use the bundle it was made from",
        )
    return found


def _is_bundle(folder: Path) -> bool:
    return (folder / MANIFEST).exists() and (folder / TABLES_FILE).exists()


def check_targets(paths: list[Path], force: bool) -> None:
    """Refuse what could not be written in the end, and make the directories."""
    for path in paths:
        if any(_is_bundle(parent) for parent in path.resolve().parents):
            raise InvalidInput(f"{path}, inside a bundle", expected="a place outside", fix="choose another directory")
        if os.path.lexists(path) and not force:
            raise already_exists(path)
        if path.is_dir():
            raise InvalidInput(f"{path}, a directory", expected="the name of a file", fix="choose another name")
    for directory in dict.fromkeys(path.parent for path in paths):
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InvalidInput(
                f"{directory} ({error.strerror})", expected="a directory that can be made", fix="choose another name"
            ) from error


def preview_name(stem: str, scale: int, size: tuple[int, int]) -> str:
    """File of the preview of one scale."""
    return f"{stem}_scale{scale + 1:02d}_{size[0]}x{size[1]}.png"
