"""What an edit is: its task and options, checked once, and part of what makes an image again."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

from .errors import InvalidInput
from .noise import check_whole

TASKS = ("refine", "inpaint", "outpaint", "expand")
FITS = ("resize", "crop", "pad")
ANCHORS = {
    "centre": (0.5, 0.5),
    "top": (0.0, 0.5),
    "bottom": (1.0, 0.5),
    "left": (0.5, 0.0),
    "right": (0.5, 1.0),
}
"""Where a picture lies on a larger canvas: shares of the free height above it and of the free width left of it."""
MAX_FEATHER = 1024
_OWN = {
    "strength": ("refine",),
    "sides": ("outpaint",),
    "anchor": ("expand",),
    "fit": ("refine", "inpaint", "outpaint"),
    "paste": TASKS[1:],
    "feather": TASKS[1:],
}


@dataclass(frozen=True, kw_only=True)
class Edit:
    """task: "refine" generates the larger scales of a picture anew; "inpaint" what a mask shows white; "outpaint" what
    `sides` add around it; "expand" what a canvas of `size` has more than the picture.

    size: (height, width) in pixels that the picture is brought to, of "expand" those of the canvas; None is the area
    of the bundle's default, in the picture's own proportions. fit: how proportions that differ are met: "resize"
    stretches, "crop" cuts from the middle, "pad" continues the edges and cuts the result again; not of "expand".
    strength (refine): share of the scales that are generated, 0 … 1, at least one; None forces the scales up to
    halfway, in octaves, from the picture's own size to the result's. sides (outpaint): pixels to add above, right,
    below, left. anchor (expand): where the picture lies. paste: the kept pixels themselves in the result, blended over
    `feather` pixels around what is new.
    Raises InvalidInput, also for an option that the task does not have.
    """

    task: str
    size: tuple[int, int] | None = None
    fit: str = "resize"
    strength: float | None = None
    sides: tuple[int, int, int, int] = (0, 0, 0, 0)
    anchor: str = "centre"
    paste: bool = False
    feather: int = 0

    def __post_init__(self) -> None:
        choices = (("task", self.task, TASKS), ("fit", self.fit, FITS), ("anchor", self.anchor, tuple(ANCHORS)))
        for name, value, names in choices:
            if value not in names:
                expected = f"one of {', '.join(names)}"
                raise InvalidInput(f"{name} {value!r:.100}", expected=expected, fix="name one of them")
        for field in fields(self):
            owners = _OWN.get(field.name, TASKS)
            if getattr(self, field.name) != field.default and self.task not in owners:
                raise InvalidInput(
                    f"{field.name} for {self.task}",
                    expected=f"that with {' or '.join(owners)} only",
                    fix="leave it out",
                )
        if self.size is not None:
            object.__setattr__(self, "size", _whole_numbers("size", self.size, 2, 1))
        object.__setattr__(self, "sides", _whole_numbers("sides", self.sides, 4, 0))
        object.__setattr__(self, "feather", check_whole("feather", self.feather, 0, MAX_FEATHER))
        if self.strength is not None:
            number = isinstance(self.strength, int | float) and not isinstance(self.strength, bool)
            if not number or not 0 <= self.strength <= 1:  # NaN compares false
                raise InvalidInput(f"strength {self.strength!r}", expected="a number from 0 to 1", fix="0.5 is half")
            object.__setattr__(self, "strength", float(self.strength))
        if self.task == "outpaint" and not any(self.sides):
            raise InvalidInput("outpaint without sides", expected="pixels to add", fix="say how many, and where")
        if self.task == "expand" and self.size is None:
            raise InvalidInput("expand without a size", expected="that of the canvas", fix="say it, as 256x512")
        if self.feather and not self.paste:
            raise InvalidInput("a feather without paste", expected="paste as well", fix="turn paste on")

    def changed(self, **given: Any) -> Edit:
        """This edit with other options; what the task, or an edit that does not paste, has no use for is left behind.

        Raises InvalidInput.
        """
        task, paste = given.get("task", self.task), given.get("paste", self.paste)
        kept = {name: value for name, value in vars(self).items() if task in _OWN.get(name, TASKS)}
        if not paste:
            kept.pop("feather", None)
        return Edit(**{**kept, **given})

    def to_json(self) -> dict[str, Any]:
        """All that decides something for this task."""
        values = {name: value for name, value in asdict(self).items() if self.task in _OWN.get(name, TASKS)}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Edit:
        """What `to_json` gave, through JSON. Raises InvalidInput, TypeError."""
        lists = {name: tuple(value) for name, value in data.items() if isinstance(value, list)}
        return cls(**{**data, **lists})


def _whole_numbers(name: str, values: object, count: int, least: int) -> tuple[int, ...]:
    if not isinstance(values, tuple | list) or len(values) != count:
        raise InvalidInput(f"{name} {values!r:.100}", expected=f"{count} whole numbers", fix="give them all")
    return tuple(check_whole(name, value, least, 2**20) for value in values)
