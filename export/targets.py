"""The target of an export: the form of the decoder that suits it, and the CUDA kernels that must exist."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from flexvar_runtime.backends.ort.cuda import PRECISIONS as CUDA_PRECISIONS
from flexvar_runtime.backends.ort.placement import count_operators, without_cuda_kernel
from flexvar_runtime.bundle.manifest import DECODERS, PHASES, PLAIN, TRANSPOSED
from flexvar_runtime.bundle.onnx_scan import scan
from flexvar_runtime.checks import check_choice, conflict
from flexvar_runtime.errors import ArtifactRefused
from flexvar_runtime.model.precision import Precision
from flexvar_runtime.model.tensors import GraphSpec

AUTO = "auto"
CPU, GPU = TARGETS = ("cpu", "gpu")


def choose_target(target: str, precision: Precision) -> str:
    """The target of an export, CPU or GPU. "auto" is GPU for fp16, which CPUs compute in float32, else CPU.

    Raises InvalidInput.
    """
    check_choice("--target", target, (AUTO, *TARGETS))
    if target == AUTO:
        return GPU if precision is Precision.FP16 else CPU
    if target == GPU and precision not in CUDA_PRECISIONS:
        fix = f"Leave --target out, or use --precision {' or '.join(sorted(CUDA_PRECISIONS))}."
        raise conflict("--target gpu", f"--precision {precision}, which no GPU backend runs", fix)
    return target


def choose_decoder(decoder: str, precision: Precision, target: str) -> str:
    """The form in which the decoder upsamples. "auto" is the fastest form on the target. Raises InvalidInput.

    GPUs convolve one doubled map faster than four small ones. On CPUs "phases" saves a tenth of the decoder.
    OpenVINO runs "transposed" faster in bfloat16, but TensorRT-RTX cannot build it in bf16.
    """
    check_choice("--decoder", decoder, (AUTO, *DECODERS))
    if decoder == AUTO:
        if target == GPU:
            return PLAIN
        return TRANSPOSED if precision is Precision.INT8_BF16 else PHASES
    if decoder == TRANSPOSED and precision is Precision.BF16 and target == GPU:
        others, fix = (
            "--precision bf16 and --target gpu, because ONNX Runtime has no CUDA kernel for it",
            "Leave --decoder out, or pass --target cpu.",
        )
        raise conflict("--decoder transposed", others, fix)
    return decoder


def require_cuda_kernels(directory: Path, graphs: Mapping[str, GraphSpec]) -> None:
    """Raise ArtifactRefused where ONNX Runtime's CUDA provider would run a node of a graph on the CPU."""
    for name, spec in graphs.items():
        missing = without_cuda_kernel(scan(directory / spec.file))
        if missing:
            counts = count_operators(node.operator for node in missing)
            raise ArtifactRefused(
                f"ONNX Runtime has no CUDA kernel for {counts} in graph {name}. The first node is {missing[0].name}.",
                expected="a graph that runs entirely on a GPU",
                fix="Leave --decoder out, or pass --target cpu for a bundle for CPUs only.",
            )
