"""Classifier-free guidance: the weight with which each scale moves away from the unconditional prediction."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from ..checks import check_choice, check_number, check_whole
from .schedule import ScaleSchedule

RULES = ("ramp", "constant")
MAX_SCALE = 1000.0
RAMP_STEPS = 9  # the published ramp reaches the guidance scale at the tenth step and grows beyond it afterwards


@dataclass(frozen=True)
class Guidance:
    """logits = cond + t · (cond − uncond), with a weight t for each scale. Raises InvalidInput.

    rule "ramp" (published evaluation): t = scale · i / min(n − 1, 9) at scale i of n. t = scale where a side is above
    `max_side`. A schedule of one scale has t = 0. rule "constant" (published demo): t = scale − 1 at every scale.
    If t is 0 at every scale (ramp 0, constant 1), guidance is off and an image takes one sequence.
    """

    scale: float = 2.5
    rule: str = "ramp"
    max_side: int = 16

    def __post_init__(self) -> None:
        check_choice("guidance rule", self.rule, RULES)
        fix = "Pass a number in that range, such as 2.5."
        scale = check_number("guidance scale", self.scale, 0, MAX_SCALE, fix)
        object.__setattr__(self, "scale", scale)
        object.__setattr__(self, "max_side", check_whole("max_side", self.max_side, 1))

    def weights(self, schedule: ScaleSchedule) -> tuple[float, ...]:
        """The weight t of every scale."""
        schedule = ScaleSchedule.parse(schedule)
        if self.rule == "constant":
            return (self.scale - 1,) * len(schedule)
        if len(schedule) == 1:
            return (0.0,)
        span = min(len(schedule) - 1, RAMP_STEPS)
        return tuple(
            self.scale if max(size) > self.max_side else self.scale * i / span for i, size in enumerate(schedule)
        )

    def acts(self, schedule: ScaleSchedule) -> bool:
        """Whether the weight of any scale is not 0. Then an image takes two sequences."""
        return any(t != 0 for t in self.weights(schedule))

    def to_json(self) -> dict[str, float | str | int]:
        return asdict(self)


UNGUIDED = Guidance(scale=0.0, rule="ramp")
