"""`flexvar inspect`: the content of a bundle, and the memory that it needs."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Self, cast

import typer
from rich.table import Column, Table

from ..backends import KERNELS_CHECKED, LAYERS_CHECKED, planned_backend, precisions, runs
from ..backends.ort.placement import without_cuda_kernel
from ..bundle.certificate import Certificate
from ..bundle.manifest import PSNR, Manifest, ParityRecord
from ..bundle.opening import Bundle
from ..deadlines.choice import quality_order
from ..errors import ArtifactRefused
from ..files.strict_json import encode
from ..memory.available import available_bytes
from ..memory.plan import MemoryPlan, largest_batch, plan, size_text
from ..model.guidance import Guidance
from ..model.schedule import ScaleSchedule
from ..model.signatures import SCHEMA_VERSION
from .console import JsonOption, emit, out

NAMES_SHOWN = 20


def inspect(
    bundle: Annotated[Path, typer.Argument(help="Bundle directory, as flexvar export writes it.")],
    schedule: Annotated[
        str | None, typer.Option(help="Schedule to plan memory for, such as 1_2_4_8_16. The default is the bundle's.")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, max=2**20, help="Number of images at once to plan memory for.")
    ] = None,
    cfg: Annotated[
        float | None, typer.Option(help="Guidance scale to plan memory for. Guidance needs more memory.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Check the files of a bundle, and show its model, graphs, defaults and the result of the comparison.

    Pass --schedule, --batch-size or --cfg to estimate the memory of a generation on a CPU. With --json, the files are
    listed too.
    """
    opened = Bundle.open(bundle, allow_unproved=True)
    manifest, certificate = opened.manifest, Certificate.of(opened.manifest)
    on_cuda, layers = _OnCuda.of(opened), runs(LAYERS_CHECKED, opened)
    data = {
        "bundle": opened.sha256,
        **cast(dict[str, Any], encode(manifest)),
        **certificate.to_json(),
        LAYERS_CHECKED: {"runs": layers.available, "detail": layers.detail, "fix": layers.fix},
        "ort_cuda": on_cuda.to_json(),
    }
    memory = None
    if (schedule, batch_size, cfg) != (None, None, None):
        memory = _Memory.of(manifest, schedule, batch_size or 1, cfg)
        data["memory"] = memory.to_json()

    def show() -> None:
        model, defaults = manifest.model, manifest.defaults
        size = sum(record.size for record in manifest.files.values())
        facts = Table(Column(), Column(overflow="fold"), show_header=False)
        for name, value in (
            ("bundle", opened.sha256),
            ("schema version", _schema(manifest.schema_version)),
            ("precision", ", ".join([manifest.precision, *(f"float32 in {part}" for part in manifest.float32_parts)])),
            ("size", f"{size / 1e6:.1f} MB in {len(manifest.files)} files"),
            ("transformer", f"depth {model.depth}, width {model.width}, {model.heads} heads"),
            ("classes", f"{model.classes} (label {model.null_class} means no class)"),
            *((("class names", _listed(model.class_names)),) if model.class_names else ()),
            ("tokens", f"{model.vocabulary} codes of dimension {model.code_dim}, {model.downsampling} pixels a side"),
            ("decoder", manifest.decoder),
            (
                LAYERS_CHECKED,
                "can run on a GPU of compute capability 8.0 or later"
                if layers.available
                else f"does not run: {layers.detail}. {layers.advice}",
            ),
            (KERNELS_CHECKED, on_cuda.text),
            ("schedule", defaults.schedule),
            ("schedules for deadlines", ", ".join(map(str, quality_order(manifest)))),
            ("guidance", f"{defaults.guidance_scale:g}, {defaults.guidance_rule}"),
            ("sampling", f"top-k {defaults.top_k}, top-p {defaults.top_p:g}, greedy scales {defaults.greedy_scales}"),
            ("parity", _parity_text(manifest.parity)),
            (
                "proved",
                certificate.problem or "yes: the files are those of the comparison",
            ),
            ("made with", ", ".join(f"{tool} {version}" for tool, version in manifest.provenance.tools.items())),
        ):
            facts.add_row(name, value)
        out.print(facts)
        graphs = Table("graph", "inputs", "outputs", "largest activation")
        for name, graph in manifest.graphs.items():
            largest = manifest.largest_activation.get(name)
            tensors = [
                ", ".join(f"{t.name} ({', '.join(map(str, t.axes))})" for t in _shown(side))
                for side in (graph.inputs, graph.outputs)
            ]
            graphs.add_row(name, *tensors, f"{largest.value:.1f}" if largest else "")
        out.print(graphs)
        if memory is not None:
            memory.show()

    emit(data, as_json, show)


@dataclass(frozen=True)
class _OnCuda:
    """Whether ort-cuda runs a bundle, as far as can be told without a GPU.

    missing: for each graph, the operators without a CUDA kernel in ONNX Runtime, with their number of nodes. unread:
    why the graphs cannot be read, or None."""

    precision: str
    runs_precision: bool
    missing: dict[str, dict[str, int]]
    unread: str | None = None

    @classmethod
    def of(cls, bundle: Bundle) -> Self:
        precision = bundle.manifest.precision
        if precision not in precisions(KERNELS_CHECKED):
            return cls(precision, False, {})
        try:
            found = {name: without_cuda_kernel(bundle.scan(name)) for name in bundle.manifest.graphs}
        except ArtifactRefused as error:
            return cls(precision, True, {}, error.got)
        missing = {name: dict(Counter(node.operator for node in nodes)) for name, nodes in found.items() if nodes}
        return cls(precision, True, missing)

    @property
    def text(self) -> str:
        if not self.runs_precision:
            return f"does not run {self.precision}"
        if self.unread is not None:
            return f"unknown, because the graphs cannot be read: {self.unread}"
        counted = [(n, operator, graph) for graph in self.missing for operator, n in self.missing[graph].items()]
        parts = [f"{n} {operator} nodes of {graph}" for n, operator, graph in counted]
        return f"does not run: no CUDA kernel for {', '.join(parts)}" if parts else "has a CUDA kernel for every node"

    def to_json(self) -> dict[str, Any]:
        runs = self.runs_precision and not self.missing and self.unread is None
        return {"runs": runs, "without_kernel": self.missing, "detail": self.text}


def _schema(version: int) -> str:
    old = f" (this version of flexvar-deploy writes {SCHEMA_VERSION}; export the bundle again)"
    return f"{version}{'' if version == SCHEMA_VERSION else old}"


def _parity_text(parity: ParityRecord) -> str:
    """The result of the comparison. Errors whose bound is 0 have no share of it."""
    passed = parity.passed and all(row.holds for row in parity.rows)
    shares = [row.value / row.bound for row in parity.rows if row.metric != PSNR and row.bound > 0]
    return (
        f"{'passed' if passed else 'FAILED'} on {parity.backend}{' (emulated)' if parity.emulated else ''}, "
        f"{len(parity.rows)} checks{f', largest error {max(shares):.0%} of its bound' if shares else ''}"
    )


def _listed(names: tuple[str, ...]) -> str:
    more = f", and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
    return ", ".join(f"{i} {name}" for i, name in enumerate(names[:NAMES_SHOWN])) + more


def _shown(tensors: tuple[Any, ...]) -> list[Any]:
    """The tensors, but of those that every block has (past_k_0, past_k_1, …) only the first."""
    numbers = {tensor.name: tensor.name.rpartition("_")[2] for tensor in tensors}
    return [tensor for tensor in tensors if not numbers[tensor.name].isdigit() or numbers[tensor.name] == "0"]


@dataclass(frozen=True)
class _Memory:
    """The memory of a generation on the CPU backend for the precision of the bundle, and the memory free here.

    largest_batch: the largest batch that fits in the free memory. None if the free memory is not known."""

    backend: str
    plan: MemoryPlan
    available: int | None
    largest_batch: int | None

    @classmethod
    def of(cls, manifest: Manifest, schedule: str | None, images: int, cfg: float | None) -> Self:
        defaults = manifest.defaults
        scales = ScaleSchedule.parse(defaults.schedule if schedule is None else schedule)
        scale = defaults.guidance_scale if cfg is None else cfg
        guided = Guidance(scale, defaults.guidance_rule, defaults.max_side).acts(scales)
        backend, libraries = planned_backend(manifest.precision)

        def total(batch: int) -> int:
            return plan(manifest, scales, batch, guided, libraries, decoded_at_once=1).total

        available = available_bytes()
        fits = None if available is None else largest_batch(total, available)
        return cls(backend, plan(manifest, scales, images, guided, libraries), available, fits)

    def to_json(self) -> dict[str, Any]:
        return {
            "backend": self.backend,
            **self.plan.to_json(),
            "available": self.available,
            "largest_batch": self.largest_batch,
        }

    def show(self) -> None:
        plan = self.plan
        guidance = "guided" if plan.guided else "not guided"
        table = Table(
            f"memory on {self.backend}", Column("size", justify="right"), title=f"{plan.images} at once, {guidance}"
        )
        for part, size in ({"runtime": plan.runtime} | plan.parts()).items():
            table.add_row(part, size_text(size))
        table.add_section()
        table.add_row("peak", size_text(plan.total))
        table.add_row("peak of later batches with other classes", size_text(max(plan.phases.values())))
        if self.available is not None:
            table.add_row("free on this machine", size_text(self.available))
            table.add_row("largest batch that fits", str(self.largest_batch))
        out.print(table)
