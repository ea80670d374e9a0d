"""Trims onnxruntime-gpu to what one Hopper GPU needs for this model: from 255 MB to about 25 MB.

The wheel (Linux x86-64, CPython 3.12, CUDA 13) holds kernels for many GPUs. Only those for sm_90 are kept. Families of
kernels that the model does not use are removed: mixture of experts, XQA, int4 products, flash attention of other head
sizes, and CUTLASS products. The archive is unpacked into a folder on PYTHONPATH. It was run on an H200 (2026-11-27).
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import tempfile
import zipfile
from pathlib import Path

from flexvar_runtime.errors import EnvironmentFailed

from .fat_binary import keep_kernels
from .tools import find_tool
from .wheels import download, leave_out, write_archive

VERSION = "1.31.1"
ARCHITECTURE = 90
CAPI = "onnxruntime/capi"
PROVIDER = f"{CAPI}/libonnxruntime_providers_cuda.so"
LEFT_OUT = (
    f"{CAPI}/libonnxruntime.so*",  # a second copy, for programs in C
    f"{CAPI}/libonnxruntime_providers_tensorrt.so*",
    *(f"onnxruntime/{part}*" for part in ("transformers", "tools", "quantization", "datasets", "backend")),
)
UNUSED = re.compile(
    rb"[Mm]oe|MOE|grouped_gemm|GroupedGemm|xqa|kernel_mha|fpA|weight_only|matmul_4bits|MatMulNBits"
    rb"|batched_half_cu|batched_bfloat16"
)
FLASH_HEAD = re.compile(rb"Flash_fwd_kernel_traitsILi(\d+)")
HEAD_SIZE = b"64"


def trim_onnxruntime(archive: Path, *, cuobjdump: Path | None = None, wheel: Path | None = None) -> None:
    """Write `archive`, a .tar.xz. It takes minutes.

    cuobjdump: see `find_cuobjdump`. wheel: the wheel of onnxruntime-gpu, which pip downloads if None. Raises
    EnvironmentFailed for a tool that is missing, and ArtifactRefused for another wheel.
    """
    tool = find_cuobjdump(cuobjdump)
    require_tools()
    with tempfile.TemporaryDirectory(prefix="onnxruntime-") as folder:
        site = Path(folder) / "site"
        with zipfile.ZipFile(wheel or download(f"onnxruntime-gpu=={VERSION}", Path(folder))) as packed:
            packed.extractall(site)
        leave_out(site, LEFT_OUT)
        keep_kernels(site / PROVIDER, ARCHITECTURE, is_used, tool)
        write_archive(site, archive)


def is_used(names: bytes) -> bool:
    """Whether a cubin with kernels of these names is needed for the model."""
    if UNUSED.search(names):
        return False
    head_sizes = set(FLASH_HEAD.findall(names))
    if head_sizes:
        return HEAD_SIZE in head_sizes
    return b"cutlass" not in names or b"AttentionKernel" in names


def find_cuobjdump(given: Path | None) -> Path:
    """NVIDIA's cuobjdump: `given`, or the one on PATH, in a CUDA folder or in an installed Triton.

    Raises EnvironmentFailed where there is none.
    """
    triton = importlib.util.find_spec("triton")
    carried = triton and triton.origin and Path(triton.origin).parent / "backends/nvidia/bin/cuobjdump"
    found = given or find_tool("cuobjdump") or carried
    if not found or not os.access(found, os.X_OK):
        raise EnvironmentFailed(
            f"There is no cuobjdump that can be run ({found or 'PATH, /usr/local/cuda*/bin and Triton have none'}).",
            expected="NVIDIA's cuobjdump",
            fix="Pass --cuobjdump FILE, or install Triton, whose wheel holds it: pip install triton",
        )
    return Path(found)


def require_tools() -> None:
    """Raises EnvironmentFailed where readelf or xz is missing."""
    for tool, package in (("readelf", "binutils"), ("xz", "xz-utils")):
        if shutil.which(tool) is None:
            raise EnvironmentFailed(
                f"The program {tool} is missing.", expected=f"{tool} on PATH", fix=f"Install the package {package}."
            )
