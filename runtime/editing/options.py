"""The task and the options of an edit, and the record that makes it again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, TypedDict

from ..checks import check_choice, check_flag, check_keys, check_number, check_whole, invalid, short, shown
from ..errors import InvalidInput

TASKS = ("refine", "inpaint", "outpaint", "expand")
FITS = ("resize", "crop", "pad")
ANCHORS = {
    "centre": (0.5, 0.5),
    "top": (0.0, 0.5),
    "bottom": (1.0, 0.5),
    "left": (0.5, 0.0),
    "right": (0.5, 1.0),
}
"""Shares of the free height above the picture and of the free width left of it, by anchor."""
MAX_FEATHER = 1024
_OWN = {
    "strength": ("refine",),
    "sides": ("outpaint",),
    "anchor": ("expand",),
    "fit": ("refine", "inpaint", "outpaint"),
    "paste": TASKS[1:],
    "feather": TASKS[1:],
}


class EditOptions(TypedDict, total=False):
    """The options of `Edit` besides the task."""

    size: tuple[int, int] | None
    fit: str
    strength: float | None
    sides: tuple[int, int, int, int]
    anchor: str
    paste: bool
    feather: int


EDIT_OPTIONS = tuple(EditOptions.__annotations__)


@dataclass(frozen=True, kw_only=True)
class Edit:
    """The task of an edit and its options. Raises InvalidInput, also for an option that the task does not have.

    task: "refine" generates the larger scales of a picture again. "inpaint" generates what is white in a mask.
    "outpaint" generates the pixels that `sides` add around it. "expand" generates the part of a canvas of `size` that
    the picture does not cover.

    size: (height, width) in pixels to which the picture is brought; for expand the size of the canvas. None means the
    area of the bundle's default in the proportions of the picture. fit (not expand): what to do about other
    proportions. "resize" stretches the picture, "crop" cuts from its middle, "pad" continues its edges and cuts the
    result again. strength (refine): share of the scales that are generated, from 0 to 1, at least one scale. None keeps
    the scales up to halfway, in octaves, between the size of the picture and that of the result. sides (outpaint):
    pixels to add above, right, below and left. anchor (expand): where the picture lies on the canvas. paste (not
    refine): put the kept pixels themselves in the result, blended over `feather` pixels around the generated part."""

    task: str
    size: tuple[int, int] | None = None
    fit: str = "resize"
    strength: float | None = None
    sides: tuple[int, int, int, int] = (0, 0, 0, 0)
    anchor: str = "centre"
    paste: bool = False
    feather: int = 0

    def __post_init__(self) -> None:
        for name, choices in (("task", TASKS), ("fit", FITS), ("anchor", tuple(ANCHORS))):
            check_choice(name, getattr(self, name), choices)
        for field in fields(self):
            owners = _OWN.get(field.name, TASKS)
            if self.task not in owners and _differs(getattr(self, field.name), field.default):
                raise wrong_task(field.name, self.task, owners)
        if self.size is not None:
            object.__setattr__(self, "size", _whole_numbers("size", self.size, 2, 1))
        object.__setattr__(self, "sides", _whole_numbers("sides", self.sides, 4, 0))
        object.__setattr__(self, "paste", check_flag("paste", self.paste))
        object.__setattr__(self, "feather", check_whole("feather", self.feather, 0, MAX_FEATHER))
        if self.strength is not None:
            strength = check_number("strength", self.strength, 0, 1, "Pass 0.5 to generate half of the scales.")
            object.__setattr__(self, "strength", strength)
        if self.task == "outpaint" and not any(self.sides):
            fix = "Pass sides: the number of pixels to add."
            raise InvalidInput("Outpainting needs sides.", expected="pixels to add", fix=fix)
        if self.task == "expand" and self.size is None:
            fix = "Pass size: height and width of the canvas in pixels."
            raise InvalidInput("Expanding needs a size.", expected="the size of the canvas", fix=fix)
        if self.feather and not self.paste:
            got, fix = "feather cannot be used without paste.", "Pass paste too."
            raise InvalidInput(got, expected="paste as well", fix=fix)

    def changed(self, **given: Any) -> Edit:
        """This edit with other options. Options that the new task does not have are dropped. Raises InvalidInput."""
        task, paste = given.get("task", self.task), given.get("paste", self.paste)
        kept = {name: value for name, value in vars(self).items() if task in _OWN.get(name, TASKS)}
        if not paste:
            kept.pop("feather", None)
        return Edit(**{**kept, **given})

    def to_json(self) -> dict[str, Any]:
        """The task and its options as JSON values."""
        values = {name: value for name, value in asdict(self).items() if self.task in _OWN.get(name, TASKS)}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Edit:
        """The edit that `to_json` wrote. Raises InvalidInput."""
        check_keys("edit", data, [field.name for field in fields(cls)])
        lists = {name: tuple(value) for name, value in data.items() if isinstance(value, list)}
        return cls(**{**data, **lists})


@dataclass(frozen=True)
class EditRecord:
    """The options of an edit, and the sha256 of the pixels of its picture and mask."""

    edit: Edit
    picture_sha256: str
    mask_sha256: str | None

    def to_json(self) -> dict[str, Any]:
        return {**self.edit.to_json(), "picture_sha256": self.picture_sha256, "mask_sha256": self.mask_sha256}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> EditRecord:
        """The record that `to_json` wrote. Raises InvalidInput, KeyError."""
        hashes = ("picture_sha256", "mask_sha256")
        check_keys("edit", data, [*(field.name for field in fields(Edit)), *hashes])
        for name in hashes:
            if not isinstance(data[name], str) and (data[name] is not None or name == "picture_sha256"):
                raise invalid(f"{name} is {short(data[name])}", "a hash", "Leave the settings as they were written.")
        options = {name: value for name, value in data.items() if name not in hashes}
        return cls(Edit.from_json(options), data["picture_sha256"], data["mask_sha256"])


def _differs(value: Any, default: Any) -> bool:
    try:
        return bool(value != default)
    except Exception:  # arrays have no truth value, and other objects may raise anything
        return True


def wrong_task(option: str, task: str, owners: Sequence[str]) -> InvalidInput:
    """The error for an option of other tasks, `owners`."""
    *first, last = owners
    tasks = f"{', '.join(first)} and {last}" if first else last
    got = f"{option} cannot be used with task {task}. It works with {tasks}."
    return InvalidInput(got, expected=f"{option} with {tasks} only", fix=f"Leave out {option}.")


def _whole_numbers(name: str, values: object, count: int, least: int) -> tuple[int, ...]:
    if not isinstance(values, tuple | list) or len(values) != count:
        raise invalid(f"{name} is {shown(values)}", f"{count} whole numbers", f"Pass {count} numbers.")
    return tuple(check_whole(name, value, least, 2**20) for value in values)
