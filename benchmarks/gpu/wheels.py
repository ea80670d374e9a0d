"""Packages of the GPU machine that are carried there: downloaded as wheels, cut down, and archived."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from flexvar_runtime.errors import EnvironmentFailed
from flexvar_runtime.files.atomic import atomic_write

PYTHON = "3.12"  # of the machine that they are for
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_27_x86_64", "manylinux2014_x86_64")


@dataclass(frozen=True)
class Wheel:
    """A package, and patterns of what is left out of it."""

    package: str
    version: str
    left_out: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.package} {self.version}"


LIBRARIES = (
    Wheel(
        "nvmath-python",
        "1.0.0",
        ("nvmath/device", "nvmath/distributed", "nvmath/bindings/mathdx*", "nvmath/bindings/_internal/mathdx*"),
    ),
    Wheel("nvidia-cudnn-frontend", "1.24.1", ("include", "cudnn/*/")),  # headers, and kernels in Python
)
"""Python modules of cuBLASLt and cuDNN. The libraries themselves come with torch."""


def libraries_name() -> str:
    """A file name for the archive of LIBRARIES that holds their versions."""
    return f"libraries-{'-'.join(wheel.version for wheel in LIBRARIES)}.tar.xz"


def pack_libraries(archive: Path, wheels: Sequence[Wheel] = LIBRARIES) -> None:
    """Write `archive`, a .tar.xz of these packages. Raises EnvironmentFailed where pip cannot download one."""
    with tempfile.TemporaryDirectory(prefix="libraries-") as folder:
        site = Path(folder) / "site"
        for wheel in wheels:
            with zipfile.ZipFile(download(f"{wheel.package}=={wheel.version}", Path(folder))) as packed:
                packed.extractall(site)
            leave_out(site, wheel.left_out)
        write_archive(site, archive)


def leave_out(site: Path, patterns: Sequence[str]) -> None:
    """Delete what matches. A pattern that ends in a slash matches folders only."""
    for pattern in patterns:
        for path in sorted(site.glob(pattern)):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def download(requirement: str, folder: Path) -> Path:
    """The wheel of a requirement such as "name==1.0", which pip downloads. Raises EnvironmentFailed."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    command += ["--python-version", PYTHON, "--implementation", "cp"]
    command += [part for platform in PLATFORMS for part in ("--platform", platform)]
    name = requirement.partition("=")[0].replace("-", "_")
    done = subprocess.run([*command, "--dest", str(folder), requirement], capture_output=True, text=True)
    found = next(folder.glob(f"{name}-*.whl"), None)
    if done.returncode or found is None:
        reason = (done.stderr.strip().splitlines() or ["it printed nothing"])[-1]
        raise EnvironmentFailed(
            f"pip could not download {requirement.replace('==', ' ')} ({reason:.200}).",
            expected="its wheel from the package index",
            fix="Run --pack where pip reaches a package index.",
        )
    return found


def write_archive(site: Path, archive: Path) -> None:
    """Write the archive in order of names, without times or owners, so that equal files give an equal archive."""

    def plain(info: tarfile.TarInfo) -> tarfile.TarInfo:
        info.mtime = info.uid = info.gid = 0
        info.uname = info.gname = ""
        return info

    with atomic_write(archive, force=True) as temporary, temporary.open("wb") as target:
        command = ["xz", "-9", "--threads=2", "--stdout"]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=target) as packer:
            assert packer.stdin is not None
            with tarfile.open(fileobj=packer.stdin, mode="w|") as tar:
                for path in sorted(site.rglob("*")):
                    tar.add(path, str(path.relative_to(site)), recursive=False, filter=plain)
            packer.stdin.close()
        if packer.returncode:
            raise EnvironmentFailed(
                f"xz ended with exit code {packer.returncode}.", expected="exit code 0", fix="See its message above."
            )
