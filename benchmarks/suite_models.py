"""The files of the models of a suite: bundles that exist, or bundles that are exported for the run."""

from __future__ import annotations

import multiprocessing as mp
import re
import signal
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from urllib.parse import quote

from flexvar_export.quality import best_first, read_quality
from flexvar_runtime import ScaleSchedule
from flexvar_runtime.errors import BackendUnavailable, InvalidInput, OutOfMemory
from flexvar_runtime.machine.signals import blocked_in_children

from .suite import Entry
from .workload import Model

TINY = "tiny"
_PUBLISHED = re.compile(r"d[1-9]\d?")

Progress = Callable[[str], None]


def model_of(entry: Entry, folder: Path) -> Model:
    """The places of a model's files. Those that `make` writes lie in `folder`. Raises InvalidInput."""
    file = quote(entry.name, safe="")  # quoted, so that two names never share a file
    bundle = folder / f"{file}.bundle" if entry.bundle is None else Path(entry.bundle)
    if entry.random is None:
        given = [None if name is None else Path(name) for name in (entry.checkpoint, entry.vae)]
        return Model(name=entry.name, bundle=bundle, transformer=given[0], vae=given[1], weights=entry.weights)
    if entry.random != TINY and _PUBLISHED.fullmatch(entry.random) is None:
        raise InvalidInput(
            f"random of the model {entry.name!r:.100} is {entry.random!r:.100}, which is no size.",
            expected=f"d16, d20, d24 or {TINY}",
            fix=f"Use d16, d20, d24 or {TINY}.",
        )
    weights = folder / f"{file}.weights"
    return Model(name=entry.name, bundle=bundle, transformer=weights / "transformer.pth", vae=weights / "vae.pth")


def make(entry: Entry, model: Model, threads: int, progress: Progress = lambda _: None) -> None:
    """Write the files of a model that has no bundle: random weights if needed, and a bundle with its proof.

    Files of an earlier run are replaced. The export runs in its own process, so that it leaves nothing in memory when
    times are measured. Raises the errors of `flexvar_export.bundle.export_bundle`.
    """
    if entry.bundle is not None:
        return
    progress(f"{model.name}: {'random weights, ' if entry.random else ''}export and proof")
    model.bundle.parent.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(1, mp_context=mp.get_context("spawn")) as pool:
        try:
            with blocked_in_children({signal.SIGINT}):
                made = pool.submit(_make, entry, model, threads)
            made.result()
        except KeyboardInterrupt:
            for process in mp.active_children():
                process.kill()
            raise
        except BrokenProcessPool as error:
            raise OutOfMemory(
                f"The export of {model.name!r:.100} was killed, probably because memory ran out.",
                expected="memory for the checkpoint, its reference and its graphs",
                fix="End other programs, or leave the model out of the suite.",
            ) from error


def _make(entry: Entry, model: Model, threads: int) -> None:
    try:
        from flexvar_export.bundle import export_bundle
        from flexvar_export.facts import PUBLISHED_DEFAULTS
    except ImportError as error:
        raise BackendUnavailable(
            f"The module {error.name} is not installed.",
            expected="the export extra",
            fix="Install it: pip install 'flexvar-deploy[cpu,export]'",
        ) from error
    assert model.transformer is not None and model.vae is not None  # a model without a bundle has a checkpoint
    if entry.random is not None:
        _write_random(entry.random, model.transformer.parent)
    order: tuple[str, ...] = ()
    if entry.quality is not None:
        order = best_first(read_quality(Path(entry.quality)), ScaleSchedule.parse(PUBLISHED_DEFAULTS.schedule))
    export_bundle(
        model.transformer,
        model.vae,
        model.bundle,
        precision=entry.precision or "fp32",
        force=True,
        threads=threads,
        quality_order=order,
        weights=entry.weights,
    )


def _write_random(size: str, folder: Path) -> None:
    from flexvar_ref import TokenizerConfig, TransformerConfig
    from flexvar_ref.synthetic import TINY_TOKENIZER, tiny_transformer, write_checkpoints

    if size == TINY:
        write_checkpoints(folder, tiny_transformer(), TINY_TOKENIZER)
    else:
        write_checkpoints(folder, TransformerConfig.published(int(size[1:])), TokenizerConfig())
