"""A page with pictures of a run: those that lower and raise FID most, and some of the best and worst classes.

The pictures are generated again, because a run with features need not keep them.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from flexvar_runtime import FlexVARPipeline
from flexvar_runtime.errors import EnvironmentFailed, InvalidInput
from flexvar_runtime.files.atomic import atomic_write

from .runs.sampling import images_of
from .runs.settings import RunSettings

Pixels = NDArray[np.uint8]
SHOWN, SHOWN_CLASSES, OF_CLASS = 16, 12, 6
"""Pictures of each end, classes, and pictures of each class."""
_JPEG_QUALITY = 90


@dataclass(frozen=True)
class Row:
    """A row of the page. numbers: of its pictures."""

    title: str
    numbers: tuple[int, ...]


def rows_of(
    numbers: NDArray[np.int64], influences: NDArray[np.float64], settings: RunSettings, names: tuple[str, ...] | None
) -> list[Row]:
    """The rows of a page. influences: of the images on FID, in the order of `numbers`."""
    order = numbers[np.argsort(influences, kind="stable")]
    shown = min(SHOWN, len(order) // 2)  # no picture is in both rows
    rows = [
        Row("Pictures that lower FID most", tuple(order[:shown].tolist())),
        Row("Pictures that raise FID most", tuple(order[::-1][:shown].tolist())),
    ]
    labels = numbers % settings.classes
    present = np.unique(labels)
    means = np.array([influences[labels == label].mean() for label in present])
    by_mean = present[np.argsort(means, kind="stable")].tolist()
    half = SHOWN_CLASSES // 2
    chosen = by_mean if len(by_mean) <= SHOWN_CLASSES else by_mean[:half] + by_mean[-half:]
    for label in chosen:
        name = f"{label}" if names is None else f"{label}, {names[label]}"
        mean = influences[labels == label].mean()
        rows.append(
            Row(
                f"Class {name}: mean influence {mean:+.3g} (negative lowers FID)",
                tuple(numbers[labels == label][:OF_CLASS].tolist()),
            )
        )
    return rows


def require_same_model(pipe: FlexVARPipeline, settings: RunSettings) -> None:
    """Raise InvalidInput unless the pipeline gives the pictures of the run: same bundle, backend and model of GPU."""
    first, device = settings.first, pipe.backend.device
    if pipe.bundle.sha256 != first.bundle or pipe.backend.name != first.backend:
        raise InvalidInput(
            f"The run was made with bundle {first.bundle[:16]}… on {first.backend}, not with "
            f"{pipe.bundle.sha256[:16]}… on {pipe.backend.name}.",
            expected="the bundle and the backend of the run",
            fix="Pass the bundle of the run, and its --backend.",
        )
    if settings.device is not None and (device is None or device.name != settings.device):
        got = f"The run was made on {settings.device}, not on {'a CPU' if device is None else device.name}."
        raise InvalidInput(got, expected="the GPU of the run", fix="Run this command on that model of GPU.")


def make_again(pipe: FlexVARPipeline, settings: RunSettings, numbers: Iterable[int]) -> dict[int, Pixels]:
    """The pictures with these numbers, each (H, W, 3) uint8. On a GPU the whole batch of each is made again."""
    made: dict[int, Pixels] = {}
    wanted = set(numbers)
    for number in sorted(wanted):
        if number in made:
            continue
        span = range(number, number + 1)
        if settings.batch is not None:
            shard = settings.sharding.images(number // settings.shard_size)
            start = shard.start + (number - shard.start) // settings.batch * settings.batch
            span = range(start, min(start + settings.batch, shard.stop))
        for images in images_of(pipe, settings, span, len(span)):
            made |= {other: image for other, image in zip(span, images, strict=True) if other in wanted}
    return made


def write_page(
    path: Path,
    title: str,
    facts: list[tuple[str, str]],
    rows: list[Row],
    pictures: dict[int, Pixels],
    settings: RunSettings,
    *,
    force: bool,
) -> None:
    """Write the page as one HTML file. facts: names and values at its top."""
    try:
        from jinja2 import Environment, PackageLoader
    except ImportError as error:
        raise EnvironmentFailed(
            "flexvar evaluate page needs jinja2, which is not installed.",
            expected="the extra evaluate",
            fix="Run: pip install 'flexvar-deploy[evaluate]'",
        ) from error
    environment = Environment(loader=PackageLoader("flexvar_evaluation", "."), autoescape=True)
    shown = [
        (row.title, [(number, settings.label(number), _data_url(pictures[number])) for number in row.numbers])
        for row in rows
    ]
    text = environment.get_template("page.html.j2").render(title=title, facts=facts, rows=shown)
    with atomic_write(path, force=force) as partial:
        partial.write_text(text, encoding="utf-8")


def _data_url(pixels: Pixels) -> str:
    file = BytesIO()
    Image.fromarray(pixels).save(file, format="JPEG", quality=_JPEG_QUALITY)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
