"""Print the lowest versions that pyproject.toml allows for the runtime with some extras, as constraints for pip."""

from __future__ import annotations

import re
import sys
import tomllib
from collections.abc import Iterable
from pathlib import Path

PROJECT = Path(__file__).parents[2] / "pyproject.toml"


def lowest(extras: Iterable[str]) -> list[str]:
    """`name==version` for each requirement. Raises ValueError for one without a lower bound."""
    project = tomllib.loads(PROJECT.read_text(encoding="utf-8"))["project"]
    requirements = [*project["dependencies"]]
    for extra in extras:
        requirements += project["optional-dependencies"][extra]
    return [_pinned(requirement) for requirement in requirements]


def _pinned(requirement: str) -> str:
    bound = re.fullmatch(r"([\w.-]+)(?:>=|==)([\w.]+)", requirement)
    if bound is None:
        raise ValueError(f"{requirement} has no lower bound")
    return f"{bound[1]}=={bound[2]}"


if __name__ == "__main__":
    print("\n".join(lowest(sys.argv[1:])))
