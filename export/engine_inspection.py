"""The types that the kernels of finished engines compute in, as reported by the engines on a GPU."""

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
    """The types that the kernels of a TensorRT backend's engines compute in, by graph.

    Raises ArtifactRefused where an engine computes in another precision than that of the bundle.
    """
    claimed, reports = bundle.manifest.precision.dtype, {}
    with closing(create(name, device=device, threads=None, engines=engines)) as backend:
        for graph in [*REQUIRED, *([PREFILL] if backend.prepared(bundle, PREFILL) else [])]:
            with closing(backend.open(bundle, graph)) as opened:
                reports[graph] = inspect_precision(opened.information(), claimed)
    for graph, report in reports.items():
        _require_share(graph, report, kept_matmuls(graph, bundle.manifest.float32_parts))
    return reports


def _require_share(graph: str, report: PrecisionReport, kept: int) -> None:
    """Raise ArtifactRefused unless enough kernels compute in the claimed precision.

    Enough is a share of LEAST_SHARE, or all kernels except the float32 islands and the `kept` products.
    """
    total = sum(count for kinds in report.layers.values() for count in kinds.values())
    declared = len(FLOAT32_ISLANDS.get(graph, ())) + kept
    if report.share < LEAST_SHARE and round(total * (1 - report.share)) > declared:
        raise ArtifactRefused(
            f"The engine of {graph} computes only {report.share:.0%} of its layers in {report.claimed} "
            f"({report.layers}); at least {LEAST_SHARE:.0%} are required.",
            expected=f"at least {LEAST_SHARE:.0%}",
            fix="Build the engines again with flexvar build --force.",
        )
