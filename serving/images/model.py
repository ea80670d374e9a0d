"""What the service knows of its model: defaults, classes, and what is allowed."""

from __future__ import annotations

from dataclasses import dataclass, replace

from flexvar_runtime import ScaleSchedule
from flexvar_runtime.bundle.manifest import Manifest
from flexvar_runtime.deadlines.choice import quality_order
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

    @property
    def order(self) -> tuple[ScaleSchedule, ...]:
        """The schedules from which a deadline chooses, best first."""
        named = quality_order(self.manifest)
        if self.schedules is None:
            return named
        return tuple(one for one in named if one in self.schedules) or self.schedules
