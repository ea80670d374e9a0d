"""Options of the commands that make images, and functions that parse and check them."""

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
from ..files.atomic import existing
from ..model.signatures import TABLES_FILE
from ..output import Settings
from ..pictures.png import read_metadata

ScheduleOption = Annotated[
    str | None,
    typer.Option(
        help="Schedule: the sizes in tokens of the scales (token maps) from 1x1 to the whole image. 1_2_4_8_16 has "
        "square scales; 1_2_3x5_12x20 ends at 12 high and 20 wide. 512px is the published schedule for 512 pixels."
    ),
]
StepsOption = Annotated[
    int | None, typer.Option("--steps", help="Number of scales. The schedule is derived for it and for the size.")
]
DeadlineOption = Annotated[
    float | None,
    typer.Option(
        help="Time limit for a batch, in milliseconds. The best schedule that is fast enough is used. Times that are "
        "not known yet are measured once on this machine."
    ),
]
CfgOption = Annotated[
    float | None,
    typer.Option(
        help="Guidance scale: how closely an image follows its class. Guidance is off at 0 with the ramp rule, and at "
        "1 with the constant rule."
    ),
]
GuidanceOption = Annotated[
    str | None,
    typer.Option(
        help="Guidance rule. ramp: guidance grows from one scale to the next. constant: it is the same at all scales."
    ),
]
TopKOption = Annotated[
    int | None,
    typer.Option(help="Draw each token from the k most likely codes only. 0 means all codes; 1 takes the most likely."),
]
TopPOption = Annotated[
    float | None,
    typer.Option(
        help="Draw each token from the most likely codes that together have this probability. 0 and 1 mean all codes."
    ),
]
GreedyOption = Annotated[
    str | None,
    typer.Option(
        help="Greedy scales: scales whose tokens are not drawn but are the most likely codes. Pass sizes such as "
        "7,9x12, or none, or upstream for the rule of the published code."
    ),
]
MaxSideOption = Annotated[
    int | None,
    typer.Option(
        help="Largest side in tokens for which the published rules were made. On larger scales, ramp applies the full "
        "guidance scale, and upstream makes square scales greedy."
    ),
]
SeedOption = Annotated[
    int | None, typer.Option(help="Seed of the random draws, from 0 to 2^64 - 1. The default is a new one each time.")
]
FirstIndexOption = Annotated[
    int | None,
    typer.Option(help="Index of the first image. The same seed, index and options give the same image."),
]
BackendOption = Annotated[
    str,
    typer.Option(
        help="Library that runs the model: a name that flexvar doctor lists, or auto for the first that works."
    ),
]
DeviceOption = Annotated[str | None, typer.Option(help="GPU to use: cuda, or cuda:1 for the second.")]
EnginesOption = Annotated[
    Path | None, typer.Option(help="Directory with the engines of flexvar build, if it is not inside the bundle.")
]
ThreadsOption = Annotated[
    int | None, typer.Option(help="Number of CPU threads. The default is one for each available processor.")
]
PreviewOption = Annotated[Path | None, typer.Option(help="Directory to write a PNG of every scale of every image to.")]
ProgressOption = Annotated[
    bool, typer.Option("--progress", help="Show each scale on the terminal as a small picture when it is done.")
]
ForceOption = Annotated[bool, typer.Option("--force", help="Replace existing files.")]

_SIZE = re.compile(r"([0-9]{1,6})x([0-9]{1,6})")


def parse_size(text: str) -> tuple[int, int]:
    """ "256x512" to (height, width). Raises InvalidInput."""
    match = _SIZE.fullmatch(text)
    if match is None:
        raise InvalidInput(
            f"--size is {text[:100]!r}, but it must be height x width in pixels.",
            expected="height x width in pixels",
            fix="Write it like 256x512.",
        )
    return int(match[1]), int(match[2])


def replaced(options: Any, **given: Any) -> Any:
    """A frozen dataclass with new values for the fields that are given and not None."""
    return replace(options, **{name: value for name, value in given.items() if value is not None})


def parse_labels(text: str, names: tuple[str, ...] | None, option: str = "--classes") -> list[int]:
    """ "7,999" or class names to labels. A bundle without names takes numbers only. Raises InvalidInput."""
    labels = []
    for part in (part.strip() for part in text.split(",")):
        if part.isascii() and part.isdigit() and len(part) < 10:
            labels.append(int(part))
        elif names and (found := [label for label, name in enumerate(names) if name == part]):
            if len(found) > 1:
                raise InvalidInput(
                    f"{option} names {part!r}, and {len(found)} classes have this name.",
                    expected="a name of one class",
                    fix=f"Use one of the numbers {', '.join(map(str, found))}.",
                )
            labels += found
        else:
            folded = {name.casefold(): name for name in names or ()}
            close = [folded[match] for match in get_close_matches(part[:100].casefold(), folded)]
            some = f"numbers, or names such as {', '.join(close or names[:5])}" if names else "numbers"
            raise InvalidInput(
                f"{option} contains {part[:100]!r}, which is not a class of this bundle.",
                expected=some,
                fix=f"Pass {some}. To see the classes, run: flexvar inspect BUNDLE",
            )
    return labels


def read_settings(source: Path, bundle_sha256: str) -> Settings:
    """The settings in a PNG file that was made with the same bundle. Raises ArtifactRefused."""
    found = Settings.from_json(read_metadata(source), str(source))
    if found.bundle != bundle_sha256:
        raise ArtifactRefused(
            f"{source.name} was made with bundle {found.bundle[:16]}…, but this bundle is {bundle_sha256[:16]}….",
            expected="an image of this bundle",
            fix="Pass the bundle that it was made with.",
        )
    return found


def _is_bundle(folder: Path) -> bool:
    return (folder / MANIFEST).exists() and (folder / TABLES_FILE).exists()


def check_targets(paths: list[Path], force: bool) -> None:
    """Refuse paths that cannot be written, and make the directories of the others. Raises InvalidInput."""
    for path in paths:
        if any(_is_bundle(parent) for parent in path.resolve().parents):
            raise InvalidInput(
                f"{path} is inside a bundle, which must not change.",
                expected="a path outside of bundles",
                fix="Choose another directory.",
            )
        if os.path.lexists(path) and not force:
            raise existing(path)
        if path.is_dir():
            raise InvalidInput(
                f"{path} is a directory, but it must be a file.",
                expected="the name of a file",
                fix="Choose another name.",
            )
    for directory in dict.fromkeys(path.parent for path in paths):
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InvalidInput(
                f"The directory {directory} cannot be made ({error.strerror}).",
                expected="a directory that can be made",
                fix="Choose another name.",
            ) from error


def preview_name(stem: str, scale: int, size: tuple[int, int]) -> str:
    """The file name of the preview of one scale (h, w)."""
    return f"{stem}_scale{scale + 1:02d}_{size[0]}x{size[1]}.png"
