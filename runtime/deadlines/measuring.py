"""Measure the costs of a pipeline, and choose a schedule for a deadline from them."""

from __future__ import annotations

import itertools
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING

from ..backends.base import Backend
from ..bundle.opening import Bundle
from ..checks import check_callback, check_entries, check_whole, conflict
from ..errors import CostUnknown
from ..memory.plan import MAX_BATCH
from ..model.sampling import Sampling
from ..model.schedule import ScaleSchedule, ScheduleLike
from ..request import GuidanceLike, Request, RequestDefaults
from .choice import Choice, choose, quality_order, seconds_of
from .costs import CostRow, CostTable, KeptCosts

if TYPE_CHECKING:
    from ..generation.generator import Generator
    from ..output import GenerationOutput

MAX_REPEATS = 10_000  # more is surely a mistake


class WithDeadlines(ABC):
    """The part of a pipeline that measures costs and chooses a schedule for a deadline."""

    bundle: Bundle
    backend: Backend
    generator: Generator
    defaults: RequestDefaults

    _request: Callable[..., Request]
    """Checks the arguments of a call and returns its request."""

    @abstractmethod
    def _generate(self, request: Request, keep_decoded: bool, on_scale: None, start: float, /) -> GenerationOutput:
        """Run a request."""

    @cached_property
    def _costs(self) -> KeptCosts:
        name, threads, device = self.backend.name, self.backend.threads, self.generator.hardware
        return KeptCosts(CostTable(bundle=self.bundle.sha256, backend=name, threads=threads, device=device))

    def choose_schedule(
        self, images: int, deadline_ms: float, guidance: GuidanceLike | None = None, sampling: Sampling | None = None
    ) -> Choice:
        """The best schedule of the bundle's quality order that generates `images` at once within the deadline.

        It is chosen by the costs of a warm pipeline that were measured here. 9 of 10 generations took no longer; this
        is a forecast, not a guarantee. Raises InvalidInput if no schedule is fast enough, CostUnknown if
        `measure_costs` has to run first, and ArtifactRefused if the saved costs cannot be used.
        """
        deadline, labels = seconds_of(deadline_ms), [0] * check_whole("images", images, 1, MAX_BATCH)
        return self._choose(self._request(labels, None, guidance, sampling), deadline)

    def _choose_for_call(
        self, request: Request, deadline_ms: float, schedule: ScheduleLike | None, watched: bool
    ) -> Choice:
        """The schedule for a call with a deadline. Raises InvalidInput for arguments that exclude each other."""
        if schedule is not None:
            raise conflict("schedule", "deadline_ms")
        if watched and self.generator.runs_whole:
            raise conflict("on_scale", "deadline_ms on a GPU, where costs are those of whole generations")
        return self._choose(request, seconds_of(deadline_ms))

    def _choose(self, request: Request, deadline: float) -> Choice:
        """`choose_schedule` for a request, whose own schedule is ignored. deadline: in seconds."""
        images, sampling = request.images, request.sampling
        guidance = request.guidance[0] if len(set(request.guidance)) == 1 else list(request.guidance)
        more = "" if guidance == self.defaults.guidance else f", guidance={guidance}"
        more += "" if sampling.filters == self.defaults.sampling.filters else f", sampling={sampling}"

        measure = f"pipe.measure_costs(batch_sizes=({images},){more})"

        def cost(schedule: ScaleSchedule) -> float | None:
            guided = replace(request, schedule=schedule).guided
            return self._costs.table.cost(schedule, images, guided, sampling.filters)

        try:
            return choose(quality_order(self.bundle.manifest), cost, deadline, measure)
        except CostUnknown:  # another process may have measured it since
            self._costs.read_again()
            return choose(quality_order(self.bundle.manifest), cost, deadline, measure)

    def measure_costs(
        self,
        batch_sizes: Sequence[int] = (1,),
        schedules: Sequence[ScheduleLike] | None = None,
        repeats: int = 10,
        guidance: GuidanceLike | None = None,
        sampling: Sampling | None = None,
        *,
        clock: Callable[[], float] = time.perf_counter,
        on_row: Callable[[CostRow], None] | None = None,
    ) -> CostTable:
        """Measure the time of whole generations on this machine, and save it for deadlines.

        schedules None means the bundle's quality order. Each schedule runs once to warm up, then `repeats` times with
        other classes, so that the times include their conditions. on_row is called after every schedule and batch size.
        Nothing else should run on the machine at the same time. Costs are saved even if a later schedule fails. If they
        cannot be saved, a warning is logged and they are kept in this process. Raises InvalidInput, OutOfMemory, and
        ArtifactRefused if the saved costs cannot be used."""
        repeats = check_whole("repeats", repeats, 1, MAX_REPEATS)
        check_callback("on_row", on_row)
        check_callback("clock", clock, optional=False)
        batches = check_entries("batch_sizes", batch_sizes, MAX_BATCH)
        sizes = [check_whole("batch size", batch, 1, MAX_BATCH) for batch in batches]
        order = quality_order(self.bundle.manifest)
        listed = order if schedules is None else check_entries("schedules", schedules, MAX_BATCH)
        wanted = tuple(map(ScaleSchedule.parse, listed))
        self._costs.read_again()  # refuses costs that cannot be used before it measures
        rows: list[CostRow] = []
        labels = itertools.cycle(range(self.bundle.manifest.model.classes))

        def next_request(batch: int, schedule: ScaleSchedule) -> Request:
            return self._request([*itertools.islice(labels, batch)], schedule, guidance, sampling, seed=0)

        try:
            for batch, schedule in itertools.product(sizes, wanted):
                request = next_request(batch, schedule)
                self._generate(request, False, None, 0.0)
                seconds: list[float] = []
                scales: list[list[float]] = []
                for _ in range(repeats):
                    start = clock()
                    output = self._generate(next_request(batch, schedule), False, None, start)
                    seconds.append(clock() - start)
                    scales.append([scale.step + scale.sample for scale in output.timings.scales])
                filters = request.sampling.filters
                rows.append(CostRow.of(request.schedule, batch, request.guided, filters, seconds, scales))
                if on_row is not None:
                    on_row(rows[-1])
        finally:
            if rows:
                self._costs.keep(rows)
        return self._costs.table
