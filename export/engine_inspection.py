"""What engines on a GPU say of themselves: in which types their kernels compute, after all the builder's choices."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

from flexvar_runtime import Bundle
from flexvar_runtime.backends.tensorrt.backend import create
from flexvar_runtime.backends.tensorrt.engine_files import PrecisionReport
from flexvar_runtime.errors import ArtifactRefused
from flexvar_runtime.model.signatures import PREFILL, REQUIRED

from .engine_precision import FLOAT32_ISLANDS, inspect_precision, kept_matmuls

LEAST_SHARE = 0.95  # of matmul, convolution and attention kernels in the precision of the bundle


def inspect_engines(
    bundle: Bundle, name: str, *, device: str | None = None, engines: Path | None = None
) -> dict[str, PrecisionReport]:
    """Of a TensorRT backend's engines, by graph. Raises ArtifactRefused where one computes in another precision."""
    claimed, reports = bundle.manifest.precision.dtype, {}
    with closing(create(name, device=device, threads=None, engines=engines)) as backend:
        for graph in [*REQUIRED, *([PREFILL] if backend.prepared(bundle, PREFILL) else [])]:
            with closing(backend.open(bundle, graph)) as opened:
                reports[graph] = inspect_precision(opened.information(), claimed)
    for graph, report in reports.items():
        _require(graph, report, kept_matmuls(graph, bundle.manifest.float32_parts))
    return reports


def _require(graph: str, report: PrecisionReport, kept: int) -> None:
    """At least LEAST_SHARE, or all but the declared islands and the layers that are kept in float32."""
    total = sum(count for kinds in report.layers.values() for count in kinds.values())
    declared = len(FLOAT32_ISLANDS.get(graph, ())) + kept
    if report.share < LEAST_SHARE and round(total * (1 - report.share)) > declared:
        raise ArtifactRefused(
            f"{graph}: an engine with {report.share:.0%} of its arithmetic in {report.claimed} ({report.layers})",
            expected=f"at least {LEAST_SHARE:.0%}",
            fix="build the engines again with --force, and compare tool versions with the bundle's provenance",
        )
