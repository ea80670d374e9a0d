"""Bundle to images: the public pipeline. The loop over scales is visible in `FlexVARPipeline._scales`."""

from __future__ import annotations

import itertools
import os
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image

from .backends import check_name, create
from .backends.base import Backend
from .backends.host import MAX_THREADS
from .bundle import Bundle
from .costs import CostRow, CostTable, KeptCosts, processor_name
from .deadline import Choice, choose, quality_order, seconds_of
from .edit import Edit
from .edit_plan import finish, plan_edit
from .engine import Engine
from .errors import ArtifactRefused, CostUnknown, InvalidInput
from .given import Given
from .guidance import UNGUIDED, Guidance
from .images import from_uint8, refuse_pixels, to_uint8
from .loop import Draws, Loop
from .noise import check_index, check_seed, check_whole, fresh_seed
from .output import GenerationOutput, ScaleTime, Settings, Timings
from .photo import PictureLike
from .sampling import Sampling
from .schedule import MAX_SIDE, ScaleSchedule, ScheduleLike

Tokens = NDArray[np.int32]
Pixels = NDArray[np.uint8]


@dataclass(frozen=True)
class ScaleStep:
    """One generated scale: number `index` of `count`, its (h, w), its tokens (B, h, w), and what it took.

    `preview()` decodes it to (B, H, W, 3) uint8: every scale is a whole image.
    """

    index: int
    count: int
    size: tuple[int, int]
    tokens: Tokens
    time: ScaleTime
    preview: Callable[[], Pixels]


class FlexVARPipeline:
    """An opened bundle on one backend. Belongs to one thread at a time; several pipelines may run at once."""

    def __init__(self, bundle: Bundle, backend: Backend) -> None:
        self.engine = Engine(bundle, backend)
        self.bundle, self.backend, self.model = bundle, backend, bundle.manifest.model
        self._owner = threading.RLock()
        defaults = bundle.manifest.defaults
        try:
            self.schedule = ScaleSchedule.parse(defaults.schedule)
            self.guidance = Guidance(defaults.guidance_scale, defaults.guidance_rule, defaults.max_side)
            self.sampling = Sampling(defaults.top_k, defaults.top_p, defaults.greedy_scales, defaults.max_side)
        except InvalidInput as error:
            raise ArtifactRefused(
                f"a bundle whose default is {error.got}", expected=error.expected, fix="export again"
            ) from error

    @classmethod
    def from_bundle(
        cls,
        path: str | os.PathLike[str],
        backend: str = "auto",
        device: str | None = None,
        threads: int | None = None,
        engines: str | os.PathLike[str] | None = None,
    ) -> Self:
        """Check a bundle's integrity and open it. Raises ArtifactRefused, BackendUnavailable, InvalidInput.

        backend "auto" takes the first that works here and runs this bundle, and logs which and why not the others.
        engines: where `flexvar build` put them, if not into the bundle.
        """
        check_name(backend)
        if threads is not None:
            check_whole("threads", threads, 1, MAX_THREADS)
        bundle = Bundle.open(path, workers=threads)
        folder = None if engines is None else Path(engines)
        return cls(bundle, create(backend, bundle, device=device, threads=threads, engines=folder))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Free weights and buffers; the pipeline cannot be used afterwards."""
        self.engine.close()

    @contextmanager
    def _in_use(self) -> Iterator[None]:
        """By one thread at a time: buffers and contexts belong to whoever is running. Raises InvalidInput."""
        if not self._owner.acquire(blocking=False):
            raise InvalidInput(
                "a pipeline that another thread is using",
                expected="one thread at a time",
                fix="open a pipeline for each thread, or take turns with a lock",
            )
        try:
            if self.backend.device is not None:
                self.backend.device.activate()
            yield
        finally:
            self._owner.release()

    def __call__(
        self,
        labels: Sequence[int | str],
        schedule: ScheduleLike | None = None,
        guidance: Guidance | None = None,
        sampling: Sampling | None = None,
        seed: int | None = None,
        first_index: int = 0,
        *,
        deadline_ms: float | None = None,
        keep_decoded: bool = False,
        on_scale: Callable[[ScaleStep], None] | None = None,
    ) -> GenerationOutput:
        """Generate one image a label, a number or one of `model.class_names`. None means the bundle's default (for the
        seed: a fresh one, returned).

        Image i draws from stream (seed, first_index + i). on_scale is called after every scale; keep_decoded keeps the
        decoder's float output. deadline_ms: in place of a schedule, the time for all of it, by which `choose_schedule`
        takes one; what on_scale takes is not in it. Raises InvalidInput, OutOfMemory, and with a deadline CostUnknown.
        """
        start = time.perf_counter()
        request = self._request(labels, schedule, guidance, sampling, seed, first_index)
        if deadline_ms is None:
            return self._generate(request, keep_decoded, on_scale, start)
        if schedule is not None:
            raise InvalidInput("a schedule with a deadline", expected="either", fix="leave out schedule or deadline_ms")
        if on_scale is not None and self.backend.device is not None:  # scale by scale is another way, and slower
            raise InvalidInput(
                "a deadline with on_scale on a GPU",
                expected="a generation that runs as a whole, as it was measured",
                fix="leave out on_scale or deadline_ms",
            )
        choice = self.choose_schedule(len(request), deadline_ms, request[0].guidance, request[0].sampling)
        request = tuple(replace(one, schedule=choice.schedule) for one in request)
        return replace(self._generate(request, keep_decoded, on_scale, start), choice=choice)

    def _generate(
        self,
        request: tuple[Settings, ...],
        keep_decoded: bool,
        on_scale: Callable[[ScaleStep], None] | None,
        start: float,
    ) -> GenerationOutput:
        with self._in_use():
            if on_scale is None:
                whole = self._replay(request, keep_decoded, start)
                if whole is not None:
                    return whole
            return self._step(request, keep_decoded, on_scale, start)

    def _replay(self, request: tuple[Settings, ...], keep_decoded: bool, start: float) -> GenerationOutput | None:
        """The whole generation as one piece of work, where the backend has a device for it."""
        first, prepared = request[0], time.perf_counter()
        done = self.engine.replay(
            [s.label for s in request], first.schedule, first.guidance, _draws(request), keep_decoded
        )
        if done is None:
            return None
        timings = Timings(prepared - start, (), 0.0, time.perf_counter() - start, done.mode, done.seconds)
        return GenerationOutput(done.pixels, done.tokens, first.seed, timings, request, done.decoded)

    def edit(
        self,
        image: PictureLike | Sequence[PictureLike],
        task: str,
        *,
        mask: PictureLike | Sequence[PictureLike] | None = None,
        labels: Sequence[int | str] | None = None,
        size: tuple[int, int] | None = None,
        fit: str = "resize",
        strength: float | None = None,
        sides: tuple[int, int, int, int] = (0, 0, 0, 0),
        anchor: str = "centre",
        paste: bool = False,
        feather: int = 0,
        steps: int | None = None,
        schedule: ScheduleLike | None = None,
        guidance: Guidance | None = None,
        sampling: Sampling | None = None,
        seed: int | None = None,
        first_index: int = 0,
        keep_decoded: bool = False,
        on_scale: Callable[[ScaleStep], None] | None = None,
    ) -> GenerationOutput:
        """Refine, inpaint, outpaint or expand a picture: a file, a PIL image or an array; see `Edit` for the options.

        A list of pictures of one size, with a mask each, is edited at once, and one picture in as many ways as there
        are labels; labels None is no class, and then no guidance unless it is given. steps: scales derived for the
        size by `ScaleSchedule.for_size`, as many as the default's if neither they nor a schedule are given.
        Raises InvalidInput, OutOfMemory; whatever happens, the pipeline stays usable.
        """
        start = time.perf_counter()
        options = Edit(
            task=task,
            size=size,
            fit=fit,
            strength=strength,
            sides=sides,
            anchor=anchor,
            paste=paste,
            feather=feather,
        )
        pictures = _listed(image)
        masks: list[Any] = _listed(mask) if isinstance(mask, list | tuple) else [mask] * len(pictures)
        plan = plan_edit(options, pictures, masks, self.model, self.schedule, schedule, steps)
        plan.say_sizes(self.schedule)
        classes = [self.model.null_class] * len(plan.canvases) if labels is None else list(labels)
        if guidance is None and all(label == self.model.null_class for label in classes):
            guidance = UNGUIDED
        request = self._request(classes, plan.schedule, guidance, sampling, seed, first_index)
        canvases = plan.for_images(len(request))
        request = tuple(replace(one, edit=done) for one, done in zip(request, plan.records(len(request)), strict=True))
        with self._in_use():
            given = plan.given(self.engine, len(request))
            output = self._step(request, keep_decoded, on_scale, start, given)
        images = [finish(canvas, options, made) for canvas, made in zip(canvases, output.images, strict=True)]
        return replace(output, images=np.stack(images))

    def _step(
        self,
        request: tuple[Settings, ...],
        keep_decoded: bool,
        on_scale: Callable[[ScaleStep], None] | None,
        start: float,
        given: Given | None = None,
    ) -> GenerationOutput:
        """Scale by scale, then the decoder."""
        first, steps = request[0], []
        with self.engine.loop([s.label for s in request], first.schedule, first.guidance) as loop:
            looping = time.perf_counter()
            for step in self._scales(request, loop, given):
                steps.append(step)
                if on_scale is not None:
                    on_scale(step)
        decoding = time.perf_counter()
        decoded = list(self._decode(steps[-1].tokens, keep_decoded))
        end = time.perf_counter()
        return GenerationOutput(
            images=np.concatenate([pixels for pixels, _ in decoded]),
            tokens=tuple(step.tokens for step in steps),
            seed=first.seed,
            timings=Timings(looping - start, tuple(step.time for step in steps), end - decoding, end - start),
            settings=request,
            decoded=np.concatenate([raw for _, raw in decoded if raw is not None]) if keep_decoded else None,
        )

    def iter_scales(
        self,
        labels: Sequence[int | str],
        schedule: ScheduleLike | None = None,
        guidance: Guidance | None = None,
        sampling: Sampling | None = None,
        seed: int | None = None,
        first_index: int = 0,
    ) -> Iterator[ScaleStep]:
        """Every scale as it comes, for progress, previews and cancelling (stop iterating). Options as in a call."""
        return self._iterate(self._request(labels, schedule, guidance, sampling, seed, first_index))

    def _iterate(self, request: tuple[Settings, ...]) -> Iterator[ScaleStep]:
        resources = ExitStack()
        with self._in_use():
            opened = self.engine.loop([s.label for s in request], request[0].schedule, request[0].guidance)
            scales = self._scales(request, resources.enter_context(opened))
        try:
            while True:
                with self._in_use():
                    step = next(scales, None)
                if step is None:
                    return
                yield step
        finally:
            with self._in_use():
                resources.close()

    def _scales(self, request: tuple[Settings, ...], loop: Loop, given: Given | None = None) -> Iterator[ScaleStep]:
        schedule, draws = request[0].schedule, _draws(request)
        forced = () if given is None else given.tokens[: given.forced]
        for i, spent in enumerate(loop.force(forced) if forced else ()):
            yield ScaleStep(i, len(schedule), schedule[i], forced[i], spent, partial(self.decode, forced[i]))
        for i in range(len(forced), len(schedule)):
            tokens, spent = loop.advance(draws, given)
            yield ScaleStep(i, len(schedule), schedule[i], tokens, spent, partial(self.decode, tokens))

    def warmup(
        self,
        schedule: ScheduleLike | None = None,
        batch_sizes: Collection[int] = (1,),
        guidance: Guidance | None = None,
        sampling: Sampling | None = None,
    ) -> None:
        """Open the graphs and run every scale of a schedule once per batch size, so that no request pays for it.

        On a CPU a class asked for the first time still costs its condition: its weights do not stay in memory. On a
        device this captures a generation with these options; others are captured when first asked for.
        """
        for batch in batch_sizes:
            self([self.model.null_class] * check_whole("batch size", batch, 1), schedule, guidance, sampling, seed=0)

    def choose_schedule(
        self, images: int, deadline_ms: float, guidance: Guidance | None = None, sampling: Sampling | None = None
    ) -> Choice:
        """The best schedule of the bundle's quality order in which `images` at once are done in time, as measured here.

        Costs are those of a warm pipeline that 9 of 10 generations keep to: a forecast, not a guarantee. Raises
        InvalidInput where none is fast enough, CostUnknown where `measure_costs` has to be called first,
        ArtifactRefused for kept costs that cannot be used.
        """
        deadline = seconds_of(deadline_ms)
        images = check_whole("images", images, 1)
        guidance = self.guidance if guidance is None else guidance
        filters = (self.sampling if sampling is None else sampling).filters
        more = "" if guidance == self.guidance else f", guidance={guidance}"
        more += "" if filters == self.sampling.filters else f", sampling={sampling}"

        def chosen(table: CostTable) -> Choice:
            return choose(
                quality_order(self.bundle.manifest),
                lambda schedule: table.cost(schedule, images, _acts(guidance, schedule), filters),
                deadline,
                measure=f"pipe.measure_costs(batch_sizes=({images},){more})",
            )

        try:
            return chosen(self._costs.table)
        except CostUnknown:  # another process may have measured it meanwhile
            return chosen(self._costs.read_again())

    def measure_costs(
        self,
        batch_sizes: Sequence[int] = (1,),
        schedules: Sequence[ScheduleLike] | None = None,
        repeats: int = 10,
        guidance: Guidance | None = None,
        sampling: Sampling | None = None,
        *,
        clock: Callable[[], float] = time.perf_counter,
        on_row: Callable[[CostRow], None] | None = None,
    ) -> CostTable:
        """Time whole generations of this bundle here, and keep that for `deadline_ms`; schedules None: the bundle's
        quality order.

        Each is run once to be warm, then `repeats` times for classes not asked for lately, as far as there are so many:
        their conditions are in the times. on_row is called after every schedule and batch size. Nothing else should
        run on the machine meanwhile. What was measured is kept even where a later schedule fails; where the cache
        folder cannot be written, in this pipeline alone, with a warning. Raises InvalidInput, OutOfMemory,
        ArtifactRefused (earlier costs).
        """
        repeats = check_whole("repeats", repeats, 1)
        sizes = [check_whole("batch size", batch, 1) for batch in batch_sizes]
        wanted = (
            quality_order(self.bundle.manifest)
            if schedules is None
            else tuple(ScaleSchedule.parse(schedule) for schedule in schedules)
        )
        guidance = self.guidance if guidance is None else guidance
        sampling = self.sampling if sampling is None else sampling
        self._costs.read_again()  # what cannot be used is refused before anything is measured
        rows: list[CostRow] = []
        classes = itertools.cycle(range(self.model.classes))
        try:
            for batch, schedule in itertools.product(sizes, wanted):
                seconds: list[float] = []
                scales: list[list[float]] = []
                self(list(itertools.islice(classes, batch)), schedule, guidance, sampling, seed=0)
                for _ in range(repeats):
                    labels = list(itertools.islice(classes, batch))
                    start = clock()
                    timings = self(labels, schedule, guidance, sampling, seed=0).timings
                    seconds.append(clock() - start)
                    scales.append([scale.step + scale.sample for scale in timings.scales])
                rows.append(CostRow.of(schedule, batch, _acts(guidance, schedule), sampling.filters, seconds, scales))
                if on_row is not None:
                    on_row(rows[-1])
        finally:
            if rows:
                self._costs.keep(rows)
        return self._costs.table

    @cached_property
    def _costs(self) -> KeptCosts:
        device = self.backend.device
        return KeptCosts(
            CostTable(
                bundle=self.bundle.sha256,
                backend=self.backend.name,
                threads=self.backend.threads,
                device=processor_name() if device is None else device.name,
            )
        )

    def decode(self, tokens: ArrayLike) -> Pixels:
        """Tokens (B, h, w) of one scale to images (B, H, W, 3). Raises InvalidInput."""
        checked = self._check_tokens(tokens)
        with self._in_use():
            return np.concatenate([pixels for pixels, _ in self._decode(checked, keep=False)])

    def _decode(self, tokens: Tokens, keep: bool) -> Iterator[tuple[Pixels, NDArray[np.float32] | None]]:
        for decoded in self.engine.decode(tokens):
            if not np.isfinite(decoded).all():
                raise refuse_pixels()
            yield to_uint8(decoded, self.model.value_range), decoded.copy() if keep else None

    def encode(self, image: Image.Image | ArrayLike, size: tuple[int, int] | None = None) -> Tokens:
        """Image, or images (B, H, W, 3) uint8, to tokens (B, h, w).

        Sides must be multiples of the downsampling factor. size: the (h, w) of the scale wanted; None is the image's
        own. Raises InvalidInput.
        """
        pixels = np.asarray(image.convert("RGB") if isinstance(image, Image.Image) else image)
        pixels = pixels[None] if pixels.ndim == 3 else pixels
        factor = self.model.downsampling
        colour = pixels.ndim == 4 and pixels.shape[3] == 3 and pixels.dtype == np.uint8 and len(pixels) > 0
        if not colour or any(side < factor or side % factor for side in pixels.shape[1:3]):
            raise InvalidInput(
                f"an image of shape {pixels.shape} {pixels.dtype}",
                expected=f"(B, H, W, 3) uint8 with sides in multiples of {factor}",
                fix="resize or pad it first",
            )
        wanted = ScaleSchedule(((1, 1), size or (pixels.shape[1] // factor, pixels.shape[2] // factor)))[-1]
        with self._in_use():
            latent = self.engine.encode(from_uint8(pixels, self.model.value_range))
        return self.engine.tables.quantize(latent, wanted)

    def check(self, labels: Sequence[int | str], seed: int | None = None, first_index: int = 0) -> None:
        """Refuse classes, seed and index that a call would refuse, before anything is computed. Raises InvalidInput."""
        self._request(labels, None, None, None, seed, first_index)

    def _request(
        self,
        labels: Sequence[int | str],
        schedule: ScheduleLike | None,
        guidance: Guidance | None,
        sampling: Sampling | None,
        seed: int | None,
        first_index: int,
    ) -> tuple[Settings, ...]:
        """Check everything that enters, once: one Settings an image."""
        seed = fresh_seed() if seed is None else check_seed(seed)
        checked = [self._check_label(label) for label in np.atleast_1d(np.asarray(labels, object))]
        if not checked:
            raise InvalidInput("no class", expected="one class per image", fix="pass a list such as [207]")
        check_index(check_index(first_index) + len(checked) - 1)
        for given, kind in ((guidance, Guidance), (sampling, Sampling)):
            if not isinstance(given, kind | None):
                name = kind.__name__
                raise InvalidInput(
                    f"{name.lower()} {given!r:.100}", expected=f"a {name} or None", fix=f"pass {name}(...)"
                )
        return tuple(
            Settings(
                bundle=self.bundle.sha256,
                label=label,
                seed=seed,
                index=int(first_index) + i,
                schedule=self.schedule if schedule is None else ScaleSchedule.parse(schedule),
                guidance=self.guidance if guidance is None else guidance,
                sampling=self.sampling if sampling is None else sampling,
                backend=self.backend.name,
            )
            for i, label in enumerate(checked)
        )

    def _check_label(self, label: object) -> int:
        null, names = self.model.null_class, self.model.class_names
        if isinstance(label, str) and names is not None and names.count(label) == 1:
            return names.index(label)
        whole = isinstance(label, int | np.integer) and not isinstance(label, bool)
        if not whole or not 0 <= int(label) <= null:  # type: ignore[call-overload]
            raise InvalidInput(
                f"class {label!r}",
                expected=f"a whole number from 0 to {null} ({null} means no class)" + (", or a name" if names else ""),
                fix="flexvar inspect says which classes a bundle has",
            )
        return int(label)  # type: ignore[call-overload, no-any-return]

    def _check_tokens(self, tokens: ArrayLike) -> Tokens:
        array = np.asarray(tokens)
        whole = array.ndim == 3 and array.size > 0 and array.dtype.kind in "iu" and max(array.shape[1:]) <= MAX_SIDE
        if not whole or array.min() < 0 or array.max() >= self.model.vocabulary:
            raise InvalidInput(
                f"tokens of shape {array.shape} {array.dtype}",
                expected=f"(B, h, w) whole numbers from 0 to {self.model.vocabulary - 1}, sides up to {MAX_SIDE}",
                fix="pass the tokens of one scale",
            )
        return np.ascontiguousarray(array, np.int32)


def _listed(given: Any) -> list[Any]:
    """One picture, or a list or tuple of several."""
    return list(given) if isinstance(given, list | tuple) else [given]


def _acts(guidance: Guidance, schedule: ScaleSchedule) -> bool:
    """Whether any scale is guided: then an image takes two sequences."""
    return any(t != 0 for t in guidance.weights(schedule))


def _draws(request: tuple[Settings, ...]) -> Draws:
    return Draws(request[0].sampling, request[0].seed, tuple(settings.index for settings in request))
