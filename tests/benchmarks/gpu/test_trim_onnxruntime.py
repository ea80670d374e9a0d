"""A CUDA library, made by the C compiler, cut down to the kernels that are used; what is missing is named."""

from __future__ import annotations

import shutil
import stat
import struct
import subprocess
import tarfile
import zipfile
from pathlib import Path

import pytest

from flexvar_bench.gpu import trim_onnxruntime as trim
from flexvar_bench.gpu import wheels
from flexvar_bench.gpu.fat_binary import CUBIN, MAGIC, containers, keep_kernels, section
from flexvar_bench.gpu.tools import find_tool
from flexvar_runtime import ArtifactRefused
from flexvar_runtime.backends.cuda import loading
from flexvar_runtime.errors import EnvironmentFailed

PTX = 1
# kind, architecture, kernel, of two containers; numbers count from 1
ENTRIES = [
    [(CUBIN, 80, "used"), (CUBIN, 90, "used"), (CUBIN, 90, "moe_of_no_use"), (PTX, 90, "used")],
    [(CUBIN, 90, "cutlass_product"), (PTX, 90, "cutlass_product")],
]


def entry(kind: int, architecture: int, size: int) -> bytes:
    header = bytearray(0x40)
    struct.pack_into("<HHIQ", header, 0, kind, 0x101, len(header), size)
    struct.pack_into("<I", header, 0x1C, architecture)
    return bytes(header) + bytes([architecture]) * size


@pytest.fixture
def library(tmp_path: Path) -> Path:
    """An ELF file with a fat binary; the first container is followed by eight bytes of nothing."""
    if shutil.which("gcc") is None or shutil.which("readelf") is None:
        pytest.skip("no C compiler here")
    data = b""
    for i, group in enumerate(ENTRIES):
        held = b"".join(entry(kind, architecture, 64 * (3 - i)) for kind, architecture, _ in group)
        data += struct.pack("<IHHQ", MAGIC, 1, 16, len(held)) + held + bytes(8)
    numbers = ",".join(map(str, data))
    source = tmp_path / "library.c"
    attribute = '__attribute__((section(".nv_fatbin"), aligned(8), used))'
    source.write_text(f"static {attribute} unsigned char fat[] = {{{numbers}}};\n")
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", str(tmp_path / "library.so"), str(source)], check=True)
    return tmp_path / "library.so"


@pytest.fixture
def cuobjdump(tmp_path: Path) -> Path:
    """A stand-in that writes a file for each cubin, named as NVIDIA's tool names them."""
    lines = ["#!/bin/sh"]
    for number, (kind, architecture, kernel) in enumerate((one for group in ENTRIES for one in group), 1):
        if kind == CUBIN:
            lines.append(f"printf '.text.{kernel}' > cuda.{number}.sm_{architecture}.cubin")
    path = tmp_path / "cuobjdump"
    path.write_text("\n".join(lines) + "\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def test_only_kernels_that_are_used_stay(library: Path, cuobjdump: Path) -> None:
    offset, size = section(library)
    before = list(containers(library.read_bytes(), offset, offset + size))
    nbytes = library.stat().st_size
    kept = keep_kernels(library, 90, trim.is_used, cuobjdump)
    after = list(containers(library.read_bytes(), offset, offset + size))
    assert library.stat().st_size == nbytes and [c.start for c in after] == [c.start for c in before]
    used, smallest = before[0].entries[1].data, before[1].entries[0].data
    assert [[e.data for e in container.entries] for container in after] == [[used], [smallest]]
    assert kept == len(used) + len(smallest)


def test_another_library_is_refused(library: Path, cuobjdump: Path) -> None:
    with pytest.raises(ArtifactRefused, match="sm_120"):
        keep_kernels(library, 120, trim.is_used, cuobjdump)


@pytest.mark.parametrize(
    ("names", "used"),
    [
        (b"gemm_h16816", True),
        (b"moe_gemm", False),
        (b"Flash_fwd_kernel_traitsILi64", True),
        (b"Flash_fwd_kernel_traitsILi128", False),
        (b"cutlass_Gemm", False),
        (b"cutlass_AttentionKernel", True),
    ],
)
def test_families_of_kernels(names: bytes, used: bool) -> None:
    assert trim.is_used(names) is used


def test_a_tool_that_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(trim.importlib.util, "find_spec", lambda _: None)  # type: ignore[attr-defined]
    monkeypatch.setattr(trim, "find_tool", lambda _: None)
    with pytest.raises(EnvironmentFailed, match="--cuobjdump") as refusal:
        trim.find_cuobjdump(None)
    assert refusal.value.exit_code == 4
    with pytest.raises(EnvironmentFailed, match="nowhere"):
        trim.find_cuobjdump(tmp_path / "nowhere")
    with pytest.raises(EnvironmentFailed, match="readelf"):
        trim.require_tools()
    (tmp_path / "readelf").symlink_to("/bin/true")
    with pytest.raises(EnvironmentFailed, match="xz"):
        trim.require_tools()


def test_cuobjdump_in_a_folder_of_cuda(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "usr" / "local" / "cuda-13" / "bin" / "cuobjdump"
    tool.parent.mkdir(parents=True)
    tool.symlink_to("/bin/true")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(trim, "find_tool", lambda name: find_tool(name, tmp_path))
    assert trim.find_cuobjdump(None) == tool


def test_the_archive_is_the_same_again(tmp_path: Path) -> None:
    if shutil.which("xz") is None:
        pytest.skip("no xz here")
    site = tmp_path / "site"
    (site / "onnxruntime").mkdir(parents=True)
    (site / "onnxruntime" / "__init__.py").write_text("version = 1\n")
    for name in ("one.tar.xz", "two.tar.xz"):
        wheels.write_archive(site, tmp_path / name)
    assert (tmp_path / "one.tar.xz").read_bytes() == (tmp_path / "two.tar.xz").read_bytes()
    with tarfile.open(tmp_path / "one.tar.xz") as tar:
        assert tar.getnames() == ["onnxruntime", "onnxruntime/__init__.py"]


def test_what_is_left_out_of_a_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Folders where a pattern ends in a slash, and files of any name that matches."""
    if shutil.which("xz") is None:
        pytest.skip("no xz here")
    wheel = tmp_path / "given.whl"
    kept = ["cudnn/__init__.py", "cudnn/_compiled_module.so", "nvidia_cudnn_frontend-1.24.1.dist-info/METADATA"]
    with zipfile.ZipFile(wheel, "w") as packed:
        for name in (*kept, "include/cudnn.h", "cudnn/sdpa/bwd.py"):
            packed.writestr(name, "")
    asked = list[str]()
    monkeypatch.setattr(wheels, "download", lambda requirement, _: asked.append(requirement) or wheel)
    wheels.pack_libraries(tmp_path / "libraries.tar.xz", wheels.LIBRARIES[1:])
    with tarfile.open(tmp_path / "libraries.tar.xz") as tar:
        assert sorted(member.name for member in tar if member.isfile()) == sorted(kept)
    assert asked == ["nvidia-cudnn-frontend==1.24.1"]


def test_versions_are_those_that_the_backend_takes() -> None:
    versions = {wheel.package: wheel.version for wheel in wheels.LIBRARIES}
    loading._check_version("nvmath-python", versions["nvmath-python"], *loading._NVMATH_VERSIONS)
    loading._check_version("nvidia-cudnn-frontend", versions["nvidia-cudnn-frontend"], *loading._CUDNN_VERSIONS)
    assert wheels.libraries_name() == "libraries-1.0.0-1.24.1.tar.xz"


@pytest.mark.parametrize("code", [0, 1])
def test_a_download_that_fails_is_named(code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = subprocess.CompletedProcess("pip", code, "", "ERROR: no such version\n")
    commands = list[list[str]]()
    monkeypatch.setattr(wheels.subprocess, "run", lambda command, **_: commands.append(command) or done)
    with pytest.raises(EnvironmentFailed, match=r"nvmath-python 1\.0\.0 \(ERROR: no such version\)"):
        wheels.download("nvmath-python==1.0.0", tmp_path)
    assert "--only-binary=:all:" in commands[0] and commands[0][-1] == "nvmath-python==1.0.0"
    (tmp_path / "nvmath_python-1.0.0-cp312-cp312-manylinux_2_28_x86_64.whl").touch()
    if code == 0:
        assert wheels.download("nvmath-python==1.0.0", tmp_path).suffix == ".whl"
