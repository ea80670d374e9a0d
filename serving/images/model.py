"""What the service knows of its model: defaults, classes, and what is allowed."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property

from flexvar_runtime import ScaleSchedule
from flexvar_runtime.bundle.manifest import Manifest
from flexvar_runtime.deadlines.choice import quality_order
from flexvar_runtime.errors import InvalidInput
from flexvar_runtime.model.schedule import MAX_SIDE
from flexvar_runtime.request import RequestDefaults

_LARGER = 4
"""Without --max-tokens, an image may have this many times the tokens of the default schedule."""


@dataclass(frozen=True, kw_only=True)
class Model:
    """What the service knows of its model. name: in the API. schedules: those that are allowed; None means any."""

    name: str
    manifest: Manifest
    defaults: RequestDefaults
    schedules: tuple[ScaleSchedule, ...] | None
    max_tokens: int

    @classmethod
    def of(
        cls, name: str, manifest: Manifest, schedules: tuple[ScaleSchedule, ...] | None, max_tokens: int | None
    ) -> Model:
        defaults = RequestDefaults.of(manifest.defaults)
        most = max_tokens or _LARGER * max(one.tokens for one in (defaults.schedule, *(schedules or ())))
        return cls(name=name, manifest=manifest, defaults=defaults, schedules=schedules, max_tokens=most)

    @property
    def start(self) -> RequestDefaults:
        """The defaults of the bundle. If its schedule is not allowed, the first that is takes its place."""
        if self.schedules is None or self.defaults.schedule in self.schedules:
            return self.defaults
        return replace(self.defaults, schedule=self.schedules[0])

    @cached_property
    def largest_side(self) -> int:
        """Side in pixels of the largest square with as many steps as the default. 0 if there is none."""
        steps, trained = len(self.start.schedule), max(self.defaults.schedule[-1])
        side = 0
        for tokens in range(1, MAX_SIDE + 1):
            with suppress(InvalidInput):  # more steps than the size needs, or fewer
                if ScaleSchedule.for_size((tokens, tokens), steps, trained).tokens <= self.max_tokens:
                    side = tokens
        return side * self.manifest.model.downsampling

    @property
    def largest_text(self) -> str:
        """A sentence that says which sizes are possible."""
        return f"The largest square is {self.largest_side}x{self.largest_side}."

    @property
    def order(self) -> tuple[ScaleSchedule, ...]:
        """The schedules from which a deadline chooses, best first."""
        named = quality_order(self.manifest)
        if self.schedules is None:
            return named
        return tuple(one for one in named if one in self.schedules) or self.schedules
