"""The control groups of this process, of versions 1 and 2, as Linux mounts them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

PROC = Path("/proc")


@dataclass(frozen=True)
class ControlGroup:
    """A group that this process is in. version: 1 or 2."""

    folder: Path
    version: int

    def read(self, name: str) -> str:
        """The text of a file of the group. Raises OSError."""
        return (self.folder / name).read_text(encoding="ascii", errors="replace")

    def numbers(self, name: str) -> dict[str, int]:
        """A file of lines with a name and a whole number, such as `memory.stat`. Raises OSError, ValueError."""
        return {key: int(number) for key, number in (line.split() for line in self.read(name).splitlines())}


def control_groups(controller: str, proc: Path = PROC) -> tuple[ControlGroup, ...]:
    """The groups of this process that can limit a controller ("cpu", "memory"), each followed by the groups around it.

    The tuple is empty on a system without control groups. The mounts are read again only if the process changes group.
    """
    try:
        return _mounted(controller, proc, _text(proc / "self/cgroup"))
    except (OSError, ValueError):
        return ()


@lru_cache(maxsize=16)
def _mounted(controller: str, proc: Path, groups: str) -> tuple[ControlGroup, ...]:
    """groups: the text of /proc/self/cgroup. Raises OSError, ValueError."""
    own, found = _own_groups(groups, controller), []
    for root, point, version in _mounts(_text(proc / "self/mountinfo"), controller):
        if version not in own:
            continue
        inside = Path(own[version])
        if inside.is_relative_to(root):  # in a container, the mount may show only a part of the tree
            inside = inside.relative_to(root)
        folder = point / str(inside).lstrip("/")
        found += [ControlGroup(each, version) for each in (folder, *folder.parents) if each.is_relative_to(point)]
    return tuple(found)


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="surrogateescape")


def _own_groups(text: str, controller: str) -> dict[int, str]:
    """The path of the group of this process, by version. text: of /proc/self/cgroup."""
    found = {}
    for line in text.splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controller in controllers.split(","):
            found[1] = path
        elif number == "0" and not controllers:
            found[2] = path
    return found


def _mounts(text: str, controller: str) -> Iterator[tuple[Path, Path, int]]:
    """The root, the mount point and the version of each mounted tree of groups. text: of /proc/self/mountinfo."""
    for line in text.splitlines():
        mount, _, filesystem = line.partition(" - ")
        places, (kind, *_, options) = mount.split()[3:5], filesystem.split(" ") if " " in filesystem else ("", "")
        version = 2 if kind == "cgroup2" else 1 if kind == "cgroup" and controller in options.split(",") else None
        if version is not None and len(places) == 2:
            yield _unescaped(places[0]), _unescaped(places[1]), version


def _unescaped(path: str) -> Path:
    """A path of mountinfo, in which a space is written as \\040."""
    return Path(re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), path))
