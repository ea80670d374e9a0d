"""Class names as people write them: in any case, and with commas in them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

Folded = tuple[str, ...]


def folded(text: str) -> Folded:
    """The parts of a name between its commas, without case and without spaces around words."""
    return tuple(" ".join(part.split()).casefold() for part in text.split(","))


def labels_by_name(names: Sequence[str]) -> Mapping[Folded, list[int]]:
    """The labels of every folded name."""
    found: defaultdict[Folded, list[int]] = defaultdict(list)
    for label, name in enumerate(names):
        found[folded(name)].append(label)
    return found


def labels_named(text: str, names: Sequence[str], by_name: Mapping[Folded, list[int]] | None = None) -> list[int]:
    """The labels of the classes with this name. Names of exactly these letters come first, then names of any case.

    by_name: what `labels_by_name` returned.
    """
    found = (labels_by_name(names) if by_name is None else by_name).get(folded(text), [])
    return [label for label in found if names[label] == text.strip()] or found
