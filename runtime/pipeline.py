"""Bundle to images: the public pipeline. `_generate` runs a request."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Self, Unpack

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .backends import check_options, create
from .backends.base import Backend
from .bundle.opening import Bundle
from .checks import check_entries, check_keys, check_whole
from .deadlines.measuring import WithDeadlines
from .editing.options import EDIT_OPTIONS, Edit, EditOptions
from .generation.opening import open_generator
from .generation.scale_loop import ScaleLoop
from .memory.plan import MAX_BATCH
from .model.guidance import UNGUIDED
from .model.sampling import Sampling
from .model.schedule import ScaleSchedule, ScheduleLike
from .output import GenerationOutput, ScaleStep, Timings, settings_of
from .pictures.pixels import check_images, from_uint8
from .request import GuidanceLike, Labels, Numbers, Request, RequestDefaults, check_tokens, check_wishes, parse_request

if TYPE_CHECKING:
    from PIL import Image

    from .editing.plan import Pictures

log = logging.getLogger(__name__)

OnScale = Callable[[ScaleStep], None]


class FlexVARPipeline(WithDeadlines):
    """An opened bundle on one backend. One thread at a time uses it. Several pipelines may run at once."""

    def __init__(self, bundle: Bundle, backend: Backend, shapes_kept: int | None = None) -> None:
        self._close_bundle: Callable[[], None] = lambda: None  # the bundle belongs to the caller
        self.generator = open_generator(bundle, backend, shapes_kept)
        self.bundle, self.backend, self.model = bundle, backend, bundle.manifest.model
        self.defaults = given = RequestDefaults.of(bundle.manifest.defaults)
        self.schedule, self.guidance, self.sampling = given.schedule, given.guidance, given.sampling
        self._request = partial(parse_request, self.model, self.defaults)  # checks the arguments of every call

    @classmethod
    def from_bundle(
        cls,
        path: str | os.PathLike[str],
        backend: str = "auto",
        device: str | None = None,
        threads: int | None = None,
        engines: str | os.PathLike[str] | None = None,
        shapes_kept: int | None = None,
        *,
        allow_unproved: bool = False,
    ) -> Self:
        """Check the integrity of a bundle and open it.

        backend: "auto" takes the first that works here and runs this bundle, and logs why it passes over the others.
        engines: the folder of `flexvar build`, if it is not in the bundle. shapes_kept: how many shapes
        (schedule, batch size, guided or not) a GPU keeps beside those of `warmup`; None means 4. allow_unproved: only
        warn if the bundle is not proved to agree with the reference.
        Raises ArtifactRefused, BackendUnavailable, InvalidInput.
        """
        folder = check_options(backend, device, engines)
        bundle = Bundle.open(path, workers=threads, allow_unproved=allow_unproved)
        started = create(backend, bundle, device=device, threads=threads, engines=folder)
        if shapes_kept is not None and backend == "auto" and started.device is None:
            log.warning("shapes_kept is not used: backend %s captures no CUDA graphs", started.name)
            shapes_kept = None
        pipeline = cls(bundle, started, shapes_kept)
        pipeline._close_bundle = bundle.close
        return pipeline

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Free weights and buffers. The pipeline cannot be used afterwards."""
        self.generator.close()
        self._close_bundle()

    def __call__(
        self,
        labels: Labels,
        schedule: ScheduleLike | None = None,
        guidance: GuidanceLike | None = None,
        sampling: Sampling | None = None,
        seed: Numbers | None = None,
        first_index: Numbers = 0,
        *,
        deadline_ms: float | None = None,
        keep_decoded: bool = False,
        on_scale: OnScale | None = None,
    ) -> GenerationOutput:
        """Generate one image for each label: a number, or one of `model.class_names`.

        None means the default of the bundle; for the seed a fresh one, which is returned. With one seed, image i draws
        from stream (seed, first_index + i). seed, guidance and first_index may be lists with one entry for each image;
        see `request.parse_request`. on_scale is called after every scale. keep_decoded keeps the float output of the
        decoder. deadline_ms: instead of a schedule, the time for the whole call, for which `choose_schedule` finds a
        schedule; time in on_scale does not count. Raises InvalidInput, OutOfMemory, and with a deadline CostUnknown.
        """
        start, keep_decoded = time.perf_counter(), check_wishes(keep_decoded, on_scale)
        request = self._request(labels, schedule, guidance, sampling, seed, first_index)
        choice = None
        if deadline_ms is not None:
            choice = self._choose_for_call(request, deadline_ms, schedule, watched=on_scale is not None)
            request = replace(request, schedule=choice.schedule)
        return replace(self._generate(request, keep_decoded, on_scale, start), choice=choice)

    def _generate(
        self, request: Request, keep_decoded: bool, on_scale: OnScale | None, start: float
    ) -> GenerationOutput:
        """Run a request. Without `on_scale`, `finish` runs all scales: on a GPU without waiting between them."""
        with self.generator.in_use(), self.generator.loop(request) as loop:
            begun = time.perf_counter()
            if on_scale is not None:
                for step in self._steps(loop):
                    on_scale(step)
            done = loop.finish(keep_decoded)
        timings = Timings(begun - start, done.scales, done.decode, time.perf_counter() - start, done.mode, done.device)
        settings = settings_of(request, self.bundle.sha256, self.backend.name)
        return GenerationOutput(done.pixels, done.tokens, request.seed, timings, settings, done.decoded)

    def _steps(self, loop: ScaleLoop) -> Iterator[ScaleStep]:
        schedule = loop.request.schedule
        for i, (tokens, spent) in enumerate(loop):
            yield ScaleStep(i, len(schedule), schedule[i], tokens, spent, partial(self.decode, tokens))

    def iter_scales(
        self,
        labels: Labels,
        schedule: ScheduleLike | None = None,
        guidance: GuidanceLike | None = None,
        sampling: Sampling | None = None,
        seed: Numbers | None = None,
        first_index: Numbers = 0,
    ) -> Iterator[ScaleStep]:
        """Every scale as it comes, for progress, previews and cancelling (stop iterating). Arguments as in a call."""
        return self._iterate(self._request(labels, schedule, guidance, sampling, seed, first_index))

    def _iterate(self, request: Request) -> Iterator[ScaleStep]:
        resources = ExitStack()
        with self.generator.in_use():
            steps = self._steps(resources.enter_context(self.generator.loop(request)))
        try:
            while True:
                with self.generator.in_use():
                    step = next(steps, None)
                if step is None:
                    return
                yield step
        finally:
            if not self.generator.inherited:
                with self.generator.in_use():
                    resources.close()

    def edit(
        self,
        image: Pictures,
        task: str,
        *,
        mask: Pictures | None = None,
        labels: Labels | None = None,
        schedule: ScheduleLike | None = None,
        steps: int | None = None,
        guidance: GuidanceLike | None = None,
        sampling: Sampling | None = None,
        seed: Numbers | None = None,
        first_index: Numbers = 0,
        keep_decoded: bool = False,
        on_scale: OnScale | None = None,
        earlier: ScaleSchedule | None = None,
        **options: Unpack[EditOptions],
    ) -> GenerationOutput:
        """Refine, inpaint, outpaint or expand a picture: a file, its bytes, a PIL image or an array. See `Edit`.

        A list of pictures of one size, with one mask each, is edited at once; one picture is edited in as many ways as
        there are labels. labels None means no class, and then no guidance unless it is given. steps: a number of
        scales, derived for the size by `ScaleSchedule.for_size`; None means as many as the default schedule has.
        earlier: the schedule of an edit that is repeated, which is used if it ends in the size of the canvas.
        Raises InvalidInput, OutOfMemory. The pipeline stays usable after any error.
        """
        from .editing.plan import plan_edit  # imports pillow, which is slow

        start, keep_decoded = time.perf_counter(), check_wishes(keep_decoded, on_scale)
        edit = Edit(task=task, **check_keys("edit", options, EDIT_OPTIONS))
        plan = plan_edit(edit, image, mask, self.model, self.defaults.schedule, schedule, steps, earlier)
        classes = [self.model.null_class] * len(plan.canvases) if labels is None else labels
        request = self._request(classes, plan.schedule, guidance, sampling, seed, first_index)
        if guidance is None and set(request.labels) == {self.model.null_class}:
            request = replace(request, guidance=(UNGUIDED,) * request.images)
        plan.require_images(request.images)
        with self.generator.in_use():
            given = plan.given(self.generator.encode, self.generator.tables, self.model.value_range, request.images)
            return plan.finished(self._generate(replace(request, given=given), keep_decoded, on_scale, start))

    def check(self, labels: Labels, seed: Numbers | None = None, first_index: Numbers = 0) -> None:
        """Check classes, seed and index before anything is computed. Raises InvalidInput."""
        self._request(labels, seed=seed, first_index=first_index)

    def warmup(
        self,
        schedule: ScheduleLike | None = None,
        batch_sizes: Collection[int] = (1,),
        guidance: GuidanceLike | None = None,
        sampling: Sampling | None = None,
    ) -> None:
        """Open the graphs and run every scale of a schedule once for each batch size, so that no request pays for it.

        On a GPU this keeps the buffers and CUDA graphs of each shape until the pipeline is closed. The first
        request for a class still costs its condition, for which `ort-cpu` and `ort-openvino` open the graph again.
        """
        for batch in check_entries("batch_sizes", batch_sizes, MAX_BATCH):
            labels = [self.model.null_class] * check_whole("batch size", batch, 1, MAX_BATCH)
            request = self._request(labels, schedule, guidance, sampling, seed=0)
            self._generate(request, False, None, time.perf_counter())
            self.generator.pin(request)

    def decode(self, tokens: ArrayLike) -> NDArray[np.uint8]:
        """Tokens (B, h, w) of one scale to images (B, H, W, 3). Raises InvalidInput."""
        checked = check_tokens(self.model, tokens)
        with self.generator.in_use():
            return self.generator.images(checked)[0]

    def encode(self, image: Image.Image | ArrayLike, size: tuple[int, int] | None = None) -> NDArray[np.int32]:
        """An image, or images (B, H, W, 3) uint8, to tokens (B, h, w) of a scale.

        Sides must be multiples of the downsampling factor. size: (h, w) of the scale; None means that of the image.
        Raises InvalidInput.
        """
        pixels, factor = check_images(image, self.model.downsampling), self.model.downsampling
        size = (pixels.shape[1] // factor, pixels.shape[2] // factor) if size is None else size
        wanted = ScaleSchedule(((1, 1), size))[-1]
        with self.generator.in_use():
            latent = self.generator.encode(from_uint8(pixels, self.model.value_range))
        return self.generator.tables.quantize(latent, wanted)
