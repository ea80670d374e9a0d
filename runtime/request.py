"""A request: the images of one batch, and what they have in common."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .bundle.manifest import Defaults
from .checks import check_array, check_callback, check_entries, check_flag, check_index, check_seed, invalid, shown
from .errors import InvalidInput
from .memory.plan import MAX_BATCH
from .model.class_names import labels_named
from .model.facts import ModelFacts
from .model.guidance import Guidance
from .model.noise import draws_of_images, fresh_seed
from .model.sampling import Sampling
from .model.schedule import MAX_SIDE, ScaleSchedule, ScheduleLike

Tokens = NDArray[np.int32]
Mask = NDArray[np.bool_]
Labels: TypeAlias = "Sequence[int | str] | int | str"
Numbers: TypeAlias = "int | Sequence[int]"
GuidanceLike: TypeAlias = "Guidance | float | Sequence[Guidance | float]"


@dataclass(frozen=True)
class Given:
    """Tokens (B, h, w) int32 of every scale, and a mask (B, h, w) bool of those that are kept, not drawn."""

    tokens: tuple[Tokens, ...]
    keep: tuple[Mask, ...]

    @property
    def forced(self) -> int:
        """Number of scales at the beginning of which every token is kept."""
        return next((i for i, keep in enumerate(self.keep) if not keep.all()), len(self.keep))

    def put_back(self, scale: int, drawn: Tokens) -> Tokens:
        """The drawn tokens of a scale, with the kept ones in their places."""
        if not self.keep[scale].any():
            return drawn
        return np.where(self.keep[scale], self.tokens[scale], drawn)


@dataclass(frozen=True)
class Shape:
    """The properties of a request that determine its buffers. A guided image takes two sequences."""

    schedule: ScaleSchedule
    images: int
    guided: bool

    @property
    def sequences(self) -> int:
        return self.images * (2 if self.guided else 1)


@dataclass(frozen=True, kw_only=True)
class Request:
    """Images of one batch.

    labels, indices and guidance have one entry for each image; all `guidance` has the same rule and max_side. seed is
    the seed of all images, or a tuple with one for each. Schedule and sampling hold for the batch. given: tokens of an
    edit.
    """

    labels: tuple[int, ...]
    seed: int | tuple[int, ...]
    indices: tuple[int, ...]
    guidance: tuple[Guidance, ...]
    schedule: ScaleSchedule
    sampling: Sampling
    given: Given | None = field(default=None, compare=False)

    @classmethod
    def of(
        cls,
        labels: Sequence[int],
        schedule: ScaleSchedule,
        guidance: Guidance,
        sampling: Sampling | None = None,
        seed: int = 0,
        first_index: int = 0,
    ) -> Request:
        """A request with one seed and one guidance for all images. Nothing is checked."""
        return cls(
            labels=tuple(labels),
            seed=seed,
            indices=tuple(range(first_index, first_index + len(labels))),
            guidance=(guidance,) * len(labels),
            schedule=schedule,
            sampling=Sampling() if sampling is None else sampling,
        )

    @property
    def images(self) -> int:
        return len(self.labels)

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seed of every image."""
        return self.seed if isinstance(self.seed, tuple) else (self.seed,) * self.images

    @property
    def guided(self) -> bool:
        """Whether guidance acts at any scale of any image. Then the batch runs two sequences for each image."""
        return any(guidance.acts(self.schedule) for guidance in set(self.guidance))

    @property
    def shape(self) -> Shape:
        return Shape(self.schedule, self.images, self.guided)

    def weights(self) -> NDArray[np.float32]:
        """Guidance weights t of every scale and image, (scales, images)."""
        return np.array([guidance.weights(self.schedule) for guidance in self.guidance], np.float32).T

    def top_k(self, scale: int) -> int:
        """top_k in force at a scale."""
        return self.sampling.top_k_at(*self.schedule[scale])

    def noise(self, scale: int) -> NDArray[np.uint32]:
        """The 24-bit draws of one scale, (images · h · w,)."""
        h, w = self.schedule[scale]
        return draws_of_images(self.seeds, self.indices, scale, h * w)


@dataclass(frozen=True)
class RequestDefaults:
    """What a request takes where the caller says nothing."""

    schedule: ScaleSchedule
    guidance: Guidance
    sampling: Sampling

    @classmethod
    def of(cls, defaults: Defaults) -> RequestDefaults:
        """The defaults of a bundle, whose manifest has checked them."""
        return cls(
            ScaleSchedule.parse(defaults.schedule),
            Guidance(defaults.guidance_scale, defaults.guidance_rule, defaults.max_side),
            Sampling(defaults.top_k, defaults.top_p, defaults.greedy_scales, defaults.max_side),
        )


def parse_request(
    model: ModelFacts,
    defaults: RequestDefaults,
    labels: Labels,
    schedule: ScheduleLike | None = None,
    guidance: GuidanceLike | None = None,
    sampling: Sampling | None = None,
    seed: Numbers | None = None,
    first_index: Numbers = 0,
) -> Request:
    """Check the arguments of a call once, and return the request. None means the default; for the seed a fresh one.

    With one seed, image i draws from stream (seed, first_index + i). With a list of seeds every image has index 0,
    unless `first_index` is a list too. Raises InvalidInput.
    """
    checked = tuple(check_label(model, label) for label in _label_list(labels))
    if not checked:
        raise InvalidInput(
            "labels is empty, but a request needs at least one class.",
            expected="one class for each image",
            fix="Pass a list such as [207].",
        )
    if not isinstance(sampling, Sampling | None):
        raise invalid(f"sampling is {shown(sampling)}", "a Sampling or None", "Pass Sampling(top_p=0.9), for example.")
    if seed is None or _is_one(seed):
        seed = fresh_seed() if seed is None else check_seed(seed)
    else:
        seed = tuple(map(check_seed, _listed("seed", seed, len(checked))))
    return Request(
        labels=checked,
        seed=seed,
        indices=_indices(first_index, len(checked), isinstance(seed, tuple)),
        guidance=_guidance(guidance, defaults.guidance, len(checked)),
        schedule=defaults.schedule if schedule is None else ScaleSchedule.parse(schedule),
        sampling=defaults.sampling if sampling is None else sampling,
    )


def check_label(model: ModelFacts, label: object) -> int:
    """The number of a class that is given by number or name. Raises InvalidInput."""
    null, names = model.null_class, model.class_names
    if isinstance(label, str) and names is not None and (found := labels_named(label, names)):
        if len(found) > 1:
            numbers = ", ".join(map(str, found))
            got = f"The class is {shown(label)}, and {len(found)} classes have this name: {numbers}."
            raise InvalidInput(got, expected="a name of one class", fix="Pass one of these numbers.")
        return found[0]
    whole = isinstance(label, int | np.integer) and not isinstance(label, bool)
    if not whole or not 0 <= int(label) <= null:  # type: ignore[call-overload]
        expected = f"a whole number from 0 to {null} ({null} means no class)" + (", or a name" if names else "")
        raise invalid(f"The class is {shown(label)}", expected, "To list the classes, run: flexvar inspect BUNDLE")
    return int(label)  # type: ignore[call-overload, no-any-return]


def _label_list(labels: Any) -> list[Any]:
    """The labels of a list, tuple, range or array, or a single label. Raises InvalidInput."""
    one = not isinstance(labels, list | tuple | range | np.ndarray)
    return check_entries("labels", np.atleast_1d(check_array("labels", labels, object)) if one else labels, MAX_BATCH)


def _is_one(value: object) -> bool:
    return value.ndim == 0 if isinstance(value, np.ndarray) else not isinstance(value, list | tuple | range)


def _listed(name: str, values: Any, images: int) -> list[Any]:
    """A list with one entry for each image. Raises InvalidInput."""
    if len(values) != images:
        raise InvalidInput(
            f"{name} has {len(values)} entries, but labels has {images} class{'es' * (images > 1)}.",
            expected=f"{images} entries",
            fix=f"Pass one entry of {name} for each class.",
        )
    return list(values)


def _indices(first_index: Any, images: int, many_seeds: bool) -> tuple[int, ...]:
    if not _is_one(first_index):
        return tuple(map(check_index, _listed("first_index", first_index, images)))
    first = check_index(first_index)
    if many_seeds and first:
        raise InvalidInput(
            f"first_index is {first}, but seed is a list, with which every image has index 0.",
            expected="0, or a list",
            fix="Leave out first_index, or pass a list with one index for each image.",
        )
    check_index(first + images - 1)
    return (0,) * images if many_seeds else tuple(range(first, first + images))


def _guidance(given: Any, default: Guidance, images: int) -> tuple[Guidance, ...]:
    """One Guidance for each image; a number is the scale of one with the default's rule. Raises InvalidInput."""
    one = given is None or isinstance(given, Guidance) or _is_one(given)
    values = [default if given is None else given] * images if one else _listed("guidance", given, images)
    found = tuple(value if isinstance(value, Guidance) else replace(default, scale=value) for value in values)
    if len({(each.rule, each.max_side) for each in found}) > 1:
        raise InvalidInput(
            "guidance has different rules or values of max_side, but all images of a call must have the same.",
            expected="one rule and one max_side for all images",
            fix="Make one call for each rule and max_side.",
        )
    return found


def check_wishes(keep_decoded: Any, on_scale: Any) -> bool:
    """`keep_decoded` as a bool. Raises InvalidInput, also unless `on_scale` is None or can be called."""
    check_callback("on_scale", on_scale)
    return check_flag("keep_decoded", keep_decoded)


def check_tokens(model: ModelFacts, tokens: ArrayLike) -> Tokens:
    """Tokens (B, h, w) of one scale as a contiguous int32 array. Raises InvalidInput."""
    array = check_array("tokens", tokens)
    whole = array.ndim == 3 and array.size > 0 and array.dtype.kind in "iu" and max(array.shape[1:]) <= MAX_SIDE
    if not whole or array.min() < 0 or array.max() >= model.vocabulary:
        expected = f"(B, h, w) whole numbers from 0 to {model.vocabulary - 1}, with sides up to {MAX_SIDE}"
        got = f"tokens has shape {array.shape} and dtype {array.dtype}"
        raise invalid(got, expected, "Pass the tokens of one scale.")
    return np.ascontiguousarray(array, np.int32)
