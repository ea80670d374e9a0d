"""What a bundle is exported for, and what follows from it: the form of the decoder, and which kernels must exist."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from flexvar_runtime.backends.ort.cuda import PRECISIONS as CUDA_PRECISIONS
from flexvar_runtime.backends.ort.placement import count_operators, without_cuda_kernel
from flexvar_runtime.bundle.manifest import DECODERS, PHASES, PLAIN, TRANSPOSED
from flexvar_runtime.bundle.onnx_scan import scan
from flexvar_runtime.errors import ArtifactRefused, InvalidInput
from flexvar_runtime.model.precision import Precision
from flexvar_runtime.model.tensors import GraphSpec

AUTO = "auto"
CPU, GPU = TARGETS = ("cpu", "gpu")


def choose_target(target: str, precision: str) -> str:
    """CPU or GPU; "auto" is GPU for fp16, which no CPU backend computes in. Raises InvalidInput."""
    if target == AUTO:
        return GPU if precision == Precision.FP16 else CPU
    if target not in TARGETS:
        raise InvalidInput(
            f"--target {target!r:.100}", expected=", ".join((AUTO, *TARGETS)), fix="name one of them, or leave it out"
        )
    if target == GPU and precision not in CUDA_PRECISIONS:
        raise InvalidInput(
            f"--target gpu with --precision {precision}",
            expected=f"a precision that a GPU backend runs: {', '.join(sorted(CUDA_PRECISIONS))}",
            fix="leave --target out, or use --precision fp16",
        )
    return target


def choose_decoder(decoder: str, precision: str, target: str) -> str:
    """How the decoder upsamples; "auto" is what pays on the target. Raises InvalidInput.

    GPUs convolve a doubled map faster than four small ones; CPUs save a tenth of the decoder in phases.
    """
    if decoder == AUTO:
        if target == GPU:
            return PLAIN
        return TRANSPOSED if precision == "int8-bf16" else PHASES  # TensorRT-RTX builds no transposed layer in bf16
    if decoder == TRANSPOSED and precision == Precision.BF16 and target == GPU:
        raise InvalidInput(
            "--decoder transposed with --precision bf16 for a GPU",
            expected="a decoder that GPU backends have kernels for in bf16",
            fix="leave --decoder out, or pass --target cpu",
        )
    if decoder not in DECODERS:
        raise InvalidInput(
            f"--decoder {decoder!r:.100}",
            expected=", ".join((AUTO, *DECODERS)),
            fix="name one of them",
        )
    return decoder


def require_cuda_kernels(directory: Path, graphs: Mapping[str, GraphSpec]) -> None:
    """Raise ArtifactRefused where ONNX Runtime's CUDA provider would run a part of a graph on the processor."""
    for name, spec in graphs.items():
        missing = without_cuda_kernel(scan(directory / spec.file))
        if missing:
            counts = count_operators(node.operator for node in missing)
            raise ArtifactRefused(
                f"graph {name}: ONNX Runtime has no CUDA kernel for {counts}; the first is {missing[0].name}",
                expected="a graph that runs on a GPU as a whole",
                fix="leave --decoder out, or pass --target cpu for a bundle that is for CPUs only",
            )
