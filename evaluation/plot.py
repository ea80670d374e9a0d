"""The plot of a sweep: FID against steps or guidance, one line for each other setting."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from flexvar_runtime.errors import EnvironmentFailed
from flexvar_runtime.files.atomic import atomic_write

from .sweep import Scored


def require_matplotlib() -> None:
    """Raise EnvironmentFailed if matplotlib is missing, before hours of sampling."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise EnvironmentFailed(
            "flexvar evaluate sweep draws with matplotlib, which is not installed.",
            expected="the extra evaluate",
            fix="Run: pip install 'flexvar-deploy[evaluate]'",
        ) from error


def draw(path: Path, scored: Sequence[Scored], *, force: bool) -> None:
    """Draw FID with its 95 % interval as PNG. The horizontal axis is what varies: steps, or else guidance."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    by_steps = len({one.point.steps for one in scored}) > 1
    lines: dict[str, list[Scored]] = defaultdict(list)
    for one in scored:
        other = f"cfg {one.point.guidance.scale:g}" if by_steps else f"{one.point.steps} steps"
        lines[f"{one.point.bundle.name.removesuffix('.bundle')} ({one.precision}), {other}"].append(one)
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for name, some in lines.items():
        across = [one.point.steps if by_steps else one.point.guidance.scale for one in some]
        order = sorted(range(len(some)), key=lambda i: across[i])
        fids = [some[i].metrics.fid.value for i in order]
        below = [some[i].metrics.fid.value - some[i].metrics.fid.low for i in order]
        above = [some[i].metrics.fid.high - some[i].metrics.fid.value for i in order]
        axes.errorbar([across[i] for i in order], fids, yerr=(below, above), marker="o", capsize=3, label=name)
    axes.set_xlabel("steps" if by_steps else "guidance scale (cfg)")
    axes.set_ylabel(f"FID of {scored[0].metrics.images:,} images, 95 % interval")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    with atomic_write(path, force=force) as partial:
        figure.savefig(partial, format="png", dpi=150)
