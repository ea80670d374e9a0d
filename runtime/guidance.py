"""Classifier-free guidance: how far each scale moves from the unconditional prediction."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np

from .errors import InvalidInput
from .noise import check_whole
from .schedule import ScaleSchedule

RULES = ("ramp", "constant")
MAX_SCALE = 1000.0
RAMP_STEPS = 9  # the published ramp reaches its scale at the tenth step, and goes on growing after it


@dataclass(frozen=True)
class Guidance:
    """logits = cond + t · (cond − uncond), with t per scale.

    rule "ramp" (published evaluation): t = scale · i / min(n − 1, 9) at scale i of n, and t = scale where a side is
    above `max_side`; one scale alone has t = 0. rule "constant" (published demo): t = scale − 1 everywhere.
    Where t is 0 at every scale (ramp 0, constant 1) guidance is off and a single batch is run. Raises InvalidInput.
    """

    scale: float = 2.5
    rule: str = "ramp"
    max_side: int = 16

    def __post_init__(self) -> None:
        if self.rule not in RULES:
            raise InvalidInput(f"guidance rule {self.rule!r}", expected=" or ".join(RULES), fix="name one of them")
        number = isinstance(self.scale, int | float | np.integer | np.floating) and not isinstance(self.scale, bool)
        if not number or not 0 <= self.scale <= MAX_SCALE:  # NaN compares false
            raise InvalidInput(
                f"guidance scale {self.scale!r}",
                expected=f"a number from 0 to {MAX_SCALE:g}",
                fix="2.5 is the published one",
            )
        object.__setattr__(self, "scale", float(self.scale))
        object.__setattr__(self, "max_side", check_whole("max_side", self.max_side, 1))

    def weights(self, schedule: ScaleSchedule) -> tuple[float, ...]:
        """t of every scale."""
        if self.rule == "constant":
            return (self.scale - 1,) * len(schedule)
        if len(schedule) == 1:
            return (0.0,)
        span = min(len(schedule) - 1, RAMP_STEPS)
        return tuple(
            self.scale if max(size) > self.max_side else self.scale * i / span for i, size in enumerate(schedule)
        )

    def to_json(self) -> dict[str, float | str | int]:
        return asdict(self)


UNGUIDED = Guidance(scale=0.0, rule="ramp")
