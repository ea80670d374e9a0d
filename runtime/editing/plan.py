"""An edit from its pictures and options to canvases, a schedule and given tokens."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ..checks import conflict, invalid, shown
from ..errors import InvalidInput
from ..model.facts import ModelFacts
from ..model.schedule import ScaleSchedule, ScheduleLike, scale_text
from ..model.tables import Tables
from ..output import GenerationOutput
from ..pictures.photo import PictureLike, read_mask, read_photo
from ..pictures.pixels import from_uint8
from ..request import Given
from .canvas import Canvas, Size, make_canvas
from .given import masked, refined
from .options import Edit, EditRecord

log = logging.getLogger(__name__)

Pixels = NDArray[np.uint8]
Float32 = NDArray[np.float32]
Pictures: TypeAlias = "PictureLike | Sequence[PictureLike]"
TEXTURES_BREAK = 3  # times the trained side, as users of the published model report


@dataclass(frozen=True)
class EditPlan:
    """An edit that is ready to run.

    canvases: one for each picture, all of one size. sources: sha256 of each picture and its mask. forced: number of
    scales that a refinement keeps as they are; None for the other tasks.
    """

    edit: Edit
    canvases: tuple[Canvas, ...]
    sources: tuple[tuple[str, str | None], ...]
    schedule: ScaleSchedule
    forced: int | None

    def given(
        self, encode: Callable[[Float32], Float32], tables: Tables, value_range: tuple[float, float], images: int
    ) -> Given:
        """The tokens of the pictures, and where they are kept, for every image. encode: images to latents."""
        pixels = np.stack([canvas.pixels for canvas in self.canvases])
        latent = encode(from_uint8(pixels, value_range))
        if self.forced is None:
            white = [canvas.mask > 0 for canvas in self.canvases if canvas.mask is not None]
            given = masked(tables, latent, np.stack(white), self.schedule)
        else:
            given = refined(tables, latent, self.schedule, self.forced)
        picks = self._picture_of(images)
        return Given(tuple(x[picks] for x in given.tokens), tuple(x[picks] for x in given.keep))

    def finished(self, output: GenerationOutput) -> GenerationOutput:
        """The output with pictures pasted in if that was asked for, padding cut off, and the edit in its settings."""
        picks = self._picture_of(len(output.images))
        images = [self._returned(self.canvases[i], made) for i, made in zip(picks, output.images, strict=True)]
        records = [EditRecord(self.edit, *self.sources[i]) for i in picks]
        settings = tuple(replace(one, edit=record) for one, record in zip(output.settings, records, strict=True))
        return replace(output, images=np.stack(images), settings=settings)

    def _returned(self, canvas: Canvas, made_HW3: Pixels) -> Pixels:
        return canvas.returned(canvas.blend(made_HW3, self.edit.feather) if self.edit.paste else made_HW3)

    def require_images(self, images: int) -> None:
        """Raise InvalidInput unless there is one picture, or one for each image."""
        if len(self.canvases) not in (1, images):
            raise _other_number(len(self.canvases), images, "label")

    def _picture_of(self, images: int) -> list[int]:
        return list(range(images)) if len(self.canvases) == images else [0] * images


def plan_edit(
    edit: Edit,
    image: Pictures,
    mask: Pictures | None,
    model: ModelFacts,
    default: ScaleSchedule,
    schedule: ScheduleLike | None = None,
    steps: int | None = None,
    earlier: ScaleSchedule | None = None,
) -> EditPlan:
    """Check and place pictures and masks, and choose the schedule. Nothing is computed by the model.

    default: the bundle's schedule. earlier: the schedule of an edit that is repeated; without `schedule` and `steps` it
    is used if it fits the canvas, else one of as many scales. Raises InvalidInput."""
    if not isinstance(earlier, ScaleSchedule | None):
        raise invalid(f"earlier is {shown(earlier)}", "a ScaleSchedule or None", "Pass the schedule of an edit.")
    pictures, masks = _listed(image), _listed(mask)
    if not isinstance(mask, list | tuple):
        masks = masks * len(pictures)
    if not pictures or len(masks) != len(pictures):
        raise _other_number(len(pictures), len(masks), "mask")
    area, side, factor = default[-1][0] * default[-1][1], max(default[-1]), model.downsampling
    placed = [_place(picture, own, edit, factor, area) for picture, own in zip(pictures, masks, strict=True)]
    canvases, sources = [canvas for canvas, _ in placed], [source for _, source in placed]
    if len({(canvas.size, canvas.cut[2:]) for canvas in canvases}) > 1:
        fix = "Pass size with fit resize or crop, or edit them one by one."
        raise InvalidInput("The pictures have different sizes.", expected="pictures of one size", fix=fix)
    chosen = _schedule(canvases[0].size, factor, earlier or default, schedule, steps, side)
    warn_if_large(chosen, default)
    forced = _forced_alike(edit, canvases, chosen, factor) if edit.task == "refine" else None
    return EditPlan(edit, tuple(canvases), tuple(sources), chosen, forced)


def _place(
    picture: PictureLike, mask: PictureLike | None, edit: Edit, factor: int, area: int
) -> tuple[Canvas, tuple[str, str | None]]:
    """The canvas of one picture, and the sha256 of the picture and its mask. The picture itself is dropped."""
    photo, cover = read_photo(picture), None if mask is None else read_mask(mask)
    canvas = make_canvas(photo, cover, edit, factor, area)
    if canvas.size != photo.size:
        log.info("a picture of %dx%d pixels is edited at %dx%d (height x width)", *photo.size, *canvas.size)
    return canvas, (photo.sha256, None if cover is None else _sha256(cover))


def warn_if_large(schedule: ScaleSchedule, default: ScaleSchedule) -> None:
    """Log a warning if a result is far larger than the images that the model was trained on."""
    if max(schedule[-1]) > TEXTURES_BREAK * max(default[-1]):
        log.warning("more than %d times the default size: textures may repeat, or become noise", TEXTURES_BREAK)


def _other_number(pictures: int, count: int, kind: str) -> InvalidInput:
    """The error for a number of labels or masks that does not fit the number of pictures."""
    got, fix = f"There are {pictures} pictures and {count} {kind}s.", f"Pass one {kind} for each picture."
    return InvalidInput(got, expected=f"one {kind} for each picture", fix=fix)


def _listed(given: Any) -> list[Any]:
    """One picture, or a list or tuple of pictures, as a list."""
    return list(given) if isinstance(given, list | tuple) else [given]


def _schedule(
    canvas: Size, factor: int, default: ScaleSchedule, schedule: ScheduleLike | None, steps: int | None, side: int
) -> ScaleSchedule:
    size = canvas[0] // factor, canvas[1] // factor
    if schedule is not None and steps is not None:
        raise conflict("schedule", "steps")
    if schedule is None:
        if steps is None and default[-1] == size:
            return default
        return ScaleSchedule.for_size(size, len(default) if steps is None else steps, side)
    chosen = ScaleSchedule.parse(schedule)
    if chosen[-1] != size:
        last = "{}x{}".format(*size)
        raise InvalidInput(
            f"schedule {chosen} must end in {last} tokens, because the canvas has {canvas[0]}x{canvas[1]} pixels.",
            expected=f"{last} as the last scale",
            fix=f"End the schedule in {scale_text(*size)}, or leave it out.",
        )
    return chosen


def _forced_alike(edit: Edit, canvases: Sequence[Canvas], schedule: ScaleSchedule, factor: int) -> int:
    """`_forced` of all pictures. Raises InvalidInput if they differ, because each must be edited as it would be
    alone."""
    counts = sorted({_forced(edit, canvas, schedule, factor) for canvas in canvases})
    if len(counts) > 1:
        got = f"The pictures have different sizes, so that {' or '.join(map(str, counts))} scales of them are kept."
        raise InvalidInput(got, expected="as many scales of each", fix="Pass strength, or edit them one by one.")
    return counts[0]


def _forced(edit: Edit, canvas: Canvas, schedule: ScaleSchedule, factor: int) -> int:
    """The number of scales that a refinement keeps.

    With a strength, that share of the scales is generated. Without one, the scales are kept up to halfway, in octaves,
    between the size that the picture itself would have in tokens and the size of the result.
    """
    count = len(schedule)
    if edit.strength is not None:
        return count - max(1, round(edit.strength * count))
    assert canvas.resolved is not None
    height, width = (own * last / factor for own, last in zip(canvas.resolved, schedule[-1], strict=True))
    kept = sum(h * h <= height and w * w <= width for h, w in schedule)
    return min(max(1, kept), count - 1)


def _sha256(mask: Pixels) -> str:
    return hashlib.sha256(repr(mask.shape).encode() + np.ascontiguousarray(mask).tobytes()).hexdigest()
