"""What the distribution says of itself: its version, its extras, the pins of its test environment."""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import flexvar_runtime
from flexvar_runtime.backends.ort.session import MINIMUM

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
REQUIRED: list[str] = PROJECT["project"]["dependencies"]
LOWEST = Path(__file__).parent / "lowest.py"
EXTRAS: dict[str, list[str]] = PROJECT["project"]["optional-dependencies"]
PINS = dict(
    line.split("==") for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").split("\n") if "==" in line
)


def names(requirements: list[str]) -> set[str]:
    return {canonicalize_name(Requirement(r).name) for r in requirements}


def test_one_version() -> None:
    source = (ROOT / "runtime" / "_version.py").read_text(encoding="utf-8")
    [written] = re.findall(r'^__version__ = "(.+)"$', source, flags=re.MULTILINE)
    assert flexvar_runtime.__version__ == written
    assert importlib.metadata.version("flexvar-deploy") == written
    assert str(Version(written)) == written


def test_cpu_and_gpu_exclude_each_other() -> None:
    assert not names(EXTRAS["cpu"]) & names(EXTRAS["gpu"])
    assert [{"extra": "cpu"}, {"extra": "gpu"}] in PROJECT["tool"]["uv"]["conflicts"]


@pytest.mark.parametrize("extra", sorted(EXTRAS.keys() - {"cpu", "gpu"}))
def test_no_other_extra_decides_between_cpu_and_gpu(extra: str) -> None:
    assert not names(EXTRAS[extra]) & {"onnxruntime", "onnxruntime-gpu"}


def test_the_runtime_has_lower_bounds() -> None:
    """`make test-lowest` installs these versions. Each satisfies its own requirement, and none is left out."""
    lines = subprocess.run([sys.executable, LOWEST, "cpu"], capture_output=True, text=True, check=True).stdout.split()
    declared = {canonicalize_name(Requirement(line).name): Requirement(line) for line in (*REQUIRED, *EXTRAS["cpu"])}
    lowest = dict(line.split("==") for line in lines)
    assert lowest.keys() == declared.keys()
    assert all(Version(version) in declared[name].specifier for name, version in lowest.items())
    assert lowest["onnxruntime"] == MINIMUM  # older ones are refused when a bundle is opened


def test_the_test_environment_is_pinned() -> None:
    """Each of its requirements has one exact version, within the bounds declared for users."""
    pins = {canonicalize_name(name): Version(version) for name, version in PINS.items()}
    extras = ("cpu", "export", "tensorrt-rtx", "serve", "dev", "serve-dev")
    declared = [*REQUIRED, *(line for extra in extras for line in EXTRAS[extra])]
    for requirement in map(Requirement, declared):
        assert pins[canonicalize_name(requirement.name)] in requirement.specifier, requirement
