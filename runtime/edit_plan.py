"""From pictures and options to what the loop needs: canvases, schedule, and the tokens that are given."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from .canvas import Canvas, make_canvas
from .edit import Edit
from .errors import InvalidInput
from .given import Given, masked, refined
from .images import from_uint8
from .manifest import ModelFacts
from .output import EditRecord
from .photo import PictureLike, read_mask, read_photo
from .schedule import ScaleSchedule, ScheduleLike

if TYPE_CHECKING:
    from .engine import Engine

log = logging.getLogger(__name__)

Pixels = NDArray[np.uint8]
TEXTURES_BREAK = 3  # times the trained side, as users of the published model report


@dataclass(frozen=True)
class EditPlan:
    """canvases: one a picture, all of one size; sources: sha256 of picture and mask; sizes: (height, width) of the
    pictures; forced: scales that a refinement keeps whole, None for the other tasks."""

    edit: Edit
    canvases: tuple[Canvas, ...]
    sources: tuple[tuple[str, str | None], ...]
    sizes: tuple[tuple[int, int], ...]
    schedule: ScaleSchedule
    forced: int | None

    def say_sizes(self, default: ScaleSchedule) -> None:
        """Where pictures are edited at another size than theirs, and where that is far from the model's."""
        for size, canvas in zip(self.sizes, self.canvases, strict=True):
            if canvas.size != size:
                log.info("a picture of %dx%d pixels, edited at %dx%d (height x width)", *size, *canvas.size)
        warn_if_large(self.schedule, default)

    def for_images(self, images: int) -> list[Canvas]:
        """One canvas an image. Raises InvalidInput where there are other numbers of pictures and images."""
        return [self.canvases[i] for i in self._picture_of(images)]

    def records(self, images: int) -> list[EditRecord]:
        return [EditRecord(self.edit, *self.sources[i]) for i in self._picture_of(images)]

    def given(self, engine: Engine, images: int) -> Given:
        """The pictures' tokens and where they are kept, for every image. Encodes."""
        pixels = np.stack([canvas.pixels for canvas in self.canvases])
        latent = engine.encode(from_uint8(pixels, engine.model.value_range))
        if self.forced is None:
            whites = [canvas.mask >= 128 for canvas in self.canvases if canvas.mask is not None]
            given = masked(engine.tables, latent, np.stack(whites), self.schedule)
        else:
            given = refined(engine.tables, latent, self.schedule, self.forced)
        picks = self._picture_of(images)
        return Given(tuple(x[picks] for x in given.tokens), tuple(x[picks] for x in given.keep))

    def _picture_of(self, images: int) -> list[int]:
        pictures = len(self.canvases)
        if pictures not in (1, images):
            raise InvalidInput(
                f"{pictures} pictures and {images} classes", expected="one class a picture", fix="give as many of both"
            )
        return list(range(images)) if pictures == images else [0] * images


def plan_edit(
    edit: Edit,
    pictures: Sequence[PictureLike],
    masks: Sequence[PictureLike | None],
    model: ModelFacts,
    default: ScaleSchedule,
    schedule: ScheduleLike | None,
    steps: int | None,
) -> EditPlan:
    """Check and place everything, before anything is computed. Raises InvalidInput."""
    if not pictures or len(masks) != len(pictures):
        raise InvalidInput(f"{len(pictures)} pictures and {len(masks)} masks", expected="a mask each", fix="add some")
    area, side = default[-1][0] * default[-1][1], max(default[-1])
    canvases, sources, sizes = [], [], []
    for picture, mask in zip(pictures, masks, strict=True):
        photo, cover = read_photo(picture), None if mask is None else read_mask(mask)
        canvases.append(make_canvas(photo, cover, edit, model.downsampling, area))
        sizes.append(photo.size)
        sources.append((photo.sha256, None if cover is None else _sha256(cover)))
    if len({(canvas.size, canvas.cut[2:]) for canvas in canvases}) > 1:
        raise InvalidInput(
            "pictures of several sizes", expected="one size", fix="give a size and no padding, or edit them apart"
        )
    size = tuple(pixels // model.downsampling for pixels in canvases[0].size)
    chosen = _schedule((size[0], size[1]), default, schedule, steps, side)
    forced = _forced_alike(edit, canvases, chosen, model.downsampling) if edit.task == "refine" else None
    return EditPlan(edit, tuple(canvases), tuple(sources), tuple(sizes), chosen, forced)


def warn_if_large(schedule: ScaleSchedule, default: ScaleSchedule) -> None:
    """Say so where a result is far larger than what the model was made for."""
    if max(schedule[-1]) > TEXTURES_BREAK * max(default[-1]):
        log.warning("more than %d times the default size: textures may repeat, or become noise", TEXTURES_BREAK)


def finish(canvas: Canvas, edit: Edit, made_HW3: Pixels) -> Pixels:
    """The decoder's image as it is returned: the picture pasted in where that is wanted, padding cut off."""
    return canvas.returned(canvas.blend(made_HW3, edit.feather) if edit.paste else made_HW3)


def _schedule(
    size: tuple[int, int], default: ScaleSchedule, schedule: ScheduleLike | None, steps: int | None, side: int
) -> ScaleSchedule:
    if schedule is not None and steps is not None:
        raise InvalidInput("a schedule and steps", expected="one of them", fix="leave out the steps")
    if schedule is None:
        if steps is None and default[-1] == size:
            return default
        return ScaleSchedule.for_size(size, len(default) if steps is None else steps, side)
    chosen = ScaleSchedule.parse(schedule)
    if chosen[-1] != size:
        h, w = size
        raise InvalidInput(
            f"schedule {chosen} for a canvas of {h}x{w} tokens", expected=f"{h}x{w} as the last scale", fix="end it so"
        )
    return chosen


def _forced_alike(edit: Edit, canvases: Sequence[Canvas], schedule: ScaleSchedule, factor: int) -> int:
    """`_forced` of all pictures. Raises InvalidInput where they differ: each is to be the same as it is alone."""
    counts = sorted({_forced(edit, canvas, schedule, factor) for canvas in canvases})
    if len(counts) > 1:
        raise InvalidInput(
            f"pictures of which {' or '.join(map(str, counts))} scales are kept, by their sizes",
            expected="as many of each",
            fix="give a strength, or edit them apart",
        )
    return counts[0]


def _forced(edit: Edit, canvas: Canvas, schedule: ScaleSchedule, factor: int) -> int:
    """Scales that a refinement keeps: all but the share that is generated, or those up to halfway, in octaves, from the
    sides that the picture itself would have in tokens to those of the result."""
    count = len(schedule)
    if edit.strength is not None:
        return count - max(1, round(edit.strength * count))
    assert canvas.resolved is not None
    height, width = (own * last / factor for own, last in zip(canvas.resolved, schedule[-1], strict=True))
    kept = sum(h * h <= height and w * w <= width for h, w in schedule)
    return min(max(1, kept), count - 1)


def _sha256(mask: Pixels) -> str:
    return hashlib.sha256(repr(mask.shape).encode() + np.ascontiguousarray(mask).tobytes()).hexdigest()
