"""The wheel's exact contents: the renamed packages with their types, and nothing else."""

from __future__ import annotations

import configparser
import email
import re
import shutil
import subprocess
import sys
import zipfile
from email.message import Message
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = {
    "flexvar_ref": "flexvar_ref",
    "runtime": "flexvar_runtime",
    "export": "flexvar_export",
    "serving": "flexvar_serving",
    "evaluation": "flexvar_evaluation",
    "benchmarks": "flexvar_bench",
}
# Files other than modules that the packages read, as named in the wheel.
KERNELS = {"attention.cu", "common.cu", "half.cu", "kernels.cu", "maps.cu", "rows.cu"}
TIMES = "flexvar_bench/results/libraries_nvidia-h200_2026-11-28.json"  # the time model reads it
PAGE = "flexvar_serving/page/index.html"
DATA = {
    "flexvar_bench/report.html.j2",
    "flexvar_evaluation/page.html.j2",
    TIMES,
    PAGE,
    *(f"flexvar_runtime/cuda/{name}" for name in KERNELS),
}
SOURCE_ONLY = {"py.typed", "ruff.toml"}  # py.typed is checked on its own
DIST_INFO = {"METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE", "top_level.txt"}
DEPENDENCIES = {
    "": {"numpy", "pillow", "rich", "typer"},
    "cpu": {"onnxruntime"},
    "gpu": {
        "cuda-python",
        "nvidia-cublas",
        "nvidia-cuda-nvrtc",
        "nvidia-cudnn-cu13",
        "nvidia-cudnn-frontend",
        "nvmath-python",
        "onnxruntime-gpu",
    },
    "tensorrt": {"cuda-python", "nvidia-cuda-nvrtc", "tensorrt"},
    "tensorrt-rtx": {
        "cuda-python",
        "nvidia-cuda-nvrtc",
        "onnxruntime-ep-nv-tensorrt-rtx-cu13",
        "tensorrt-rtx-cu13-bindings",
    },
    "openvino": {"openvino"},
    "export": {"onnx", "onnxscript", "polygraphy", "safetensors", "torch"},
    "train": {"accelerate", "safetensors", "tensorboard", "torch"},
    "bench": {"jinja2", "matplotlib"},
    "serve": {"fastapi", "httptools", "prometheus-client", "python-multipart", "uvicorn"},
    "evaluate": {"jinja2", "matplotlib", "onnx", "threadpoolctl"},
    "serve-dev": {"openai", "playwright", "schemathesis"},
    "dev": {
        "build",
        "hypothesis",
        "isal",
        "mypy",
        "nvidia-cuda-nvdisasm",
        "nvidia-cudnn-frontend",
        "nvmath-python",
        "pre-commit",
        "pytest",
        "pytest-timeout",
        "pytest-xdist",
        "ruff",
        "setuptools",
    },
}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy: nothing left by an earlier build can get in, and the checkout stays clean."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "LICENSE", "README.md"):
        shutil.copy(ROOT / name, source)
    for folder in (*FOLDERS, "tests"):
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    build = ["wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(out), str(source)]
    subprocess.run([sys.executable, "-m", "pip", *build], check=True)
    [path] = out.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def metadata(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        [name] = [n for n in archive.namelist() if n.endswith(".dist-info/METADATA")]
        return email.message_from_bytes(archive.read(name))


def test_contents(wheel: Path, metadata: Message) -> None:
    modules = {
        f"{package}/{source.relative_to(ROOT / folder).as_posix()}"
        for folder, package in FOLDERS.items()
        for source in (ROOT / folder).rglob("*.py")
    }
    markers = {f"{package}/py.typed" for package in FOLDERS.values()}
    dist_info = {f"flexvar_deploy-{metadata['Version']}.dist-info/{name}" for name in DIST_INFO}
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert sorted(names) == sorted(modules | markers | DATA | dist_info)
    assert {name.partition("/")[0] for name in names if ".dist-info/" not in name} == set(FOLDERS.values())


@pytest.mark.parametrize("folder", ["flexvar_ref", "runtime", "export", "serving", "evaluation"])
def test_no_data_file_is_left_behind(folder: str) -> None:
    """A file that a module reads must be in package-data, else it works in a checkout and nowhere else."""
    others = {
        f"{FOLDERS[folder]}/{path.relative_to(ROOT / folder).as_posix()}"
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and path.suffix not in {".py", ".pyc", ".md"} and path.name not in SOURCE_ONLY
    }
    assert others == {name for name in DATA if name.startswith(f"{FOLDERS[folder]}/")}


def test_platform_independent(wheel: Path) -> None:
    assert wheel.name.endswith("-py3-none-any.whl")


def test_entry_points(wheel: Path) -> None:
    parser = configparser.ConfigParser(delimiters=("=",))
    with zipfile.ZipFile(wheel) as archive:
        [name] = [n for n in archive.namelist() if n.endswith(".dist-info/entry_points.txt")]
        parser.read_string(archive.read(name).decode())
    assert {section: dict(parser[section]) for section in parser.sections()} == {
        "console_scripts": {"flexvar": "flexvar_runtime.cli.main:main"},
        "flexvar.commands": {
            "runtime": "flexvar_runtime.cli.commands:register",
            "export": "flexvar_export.commands:register",
            "ref": "flexvar_ref.training.commands:register",
            "bench": "flexvar_bench.commands:register",
            "serve": "flexvar_serving.command:register",
            "evaluate": "flexvar_evaluation.commands:register",
        },
    }


def test_dependencies(metadata: Message) -> None:
    found: dict[str, set[str]] = {extra: set() for extra in ["", *metadata.get_all("Provides-Extra", [])]}
    for requirement in metadata.get_all("Requires-Dist", []):
        [name] = re.findall(r"^[\w.-]+", requirement)
        extra = re.search(r'extra == "([\w-]+)"', requirement)
        found[extra[1] if extra else ""].add(name)
    assert found == DEPENDENCIES


def test_licence_and_python(metadata: Message) -> None:
    assert metadata["License-Expression"] == "MIT"
    assert metadata["Requires-Python"] == ">=3.11"


def test_the_wheel_runs_without_the_checkout(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    probe = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "import flexvar_runtime, flexvar_runtime.backends, flexvar_runtime.cli\n"
        "import flexvar_runtime.cuda.kernels as kernels; assert 'sample_rows' in kernels.kernel_source()\n"
        "print(flexvar_runtime.__version__, flexvar_runtime.__file__, sep='\\n')"
    )
    run = subprocess.run([sys.executable, "-I", "-c", probe], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    version, file = run.stdout.splitlines()
    assert version == wheel.name.split("-")[1]
    assert Path(file) == tmp_path / "flexvar_runtime" / "__init__.py"
