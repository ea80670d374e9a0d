"""Runs one phase in its own process, and writes its result to a file after each part, so that a crash loses little.

python -m flexvar_bench.gpu.child JOB --work DIR --result FILE --options JSON
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

PARENT_POLL_SECONDS = 1.0

Save = Callable[[dict[str, Any]], None]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("job", choices=sorted(JOBS))
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--result", type=Path, required=True)
    parser.add_argument("--options", type=json.loads, required=True)
    arguments = parser.parse_args()
    faulthandler.enable()  # a crash prints its stack
    _end_with_parent()
    try:
        JOBS[arguments.job](arguments.work, _saver(arguments.result), **arguments.options)
    except Exception as error:
        traceback.print_exc()
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 0


def _saver(path: Path) -> Save:
    partial = path.with_suffix(".partial")

    def save(result: dict[str, Any]) -> None:
        partial.write_text(json.dumps(result))
        partial.replace(path)

    return save


def _end_with_parent() -> None:
    """End this process and its children when its parent ends. Otherwise they would go on using the device."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(PARENT_POLL_SECONDS)
        if os.getpgrp() == os.getpid():  # it leads its own process group
            os.killpg(0, signal.SIGKILL)
        os._exit(1)

    threading.Thread(target=watch, name="parent watch", daemon=True).start()


# A job imports only what it needs: a library that crashes while loading then ends only the phases that use it.


def _machine(work: Path, save: Save, *, tiny: bool) -> None:
    from .hardware import machine

    machine(save, tiny)


def _export(work: Path, save: Save, *, model: str, precision: str, processes: int) -> None:
    import torch

    from .random_models import export_model

    torch.set_num_threads(max(1, (os.cpu_count() or 1) // processes))
    export_model(model, work, precision, save)


def _unpack(work: Path, save: Save, *, carried: str, bundles: list[str]) -> None:
    from .pack import unpack

    unpack(Path(carried), work, bundles, save)


def _regenerate(work: Path, save: Save, *, model: str, carried: str) -> None:
    from .pack import skeleton_of
    from .random_models import regenerate_model

    regenerate_model(model, work, skeleton_of(Path(carried), model), save)


def _sanitize(work: Path, save: Save, *, small: bool) -> None:
    from .sanitizer import sanitize

    sanitize(save, small=small)


def _in_phases(work: Path, save: Save, *, model: str) -> None:
    from .random_models import phases_model

    phases_model(model, work, save)


def _tiny(work: Path, save: Save, *, backend: str, folder: str = "") -> None:
    from .runtime_jobs import tiny

    tiny(work / folder, backend, save)


def _kernels(work: Path, save: Save, *, model: str, batches: list[int], quick: bool = False) -> None:
    from flexvar_ref import TransformerConfig
    from flexvar_ref.synthetic import tiny_transformer

    from .plan import TINY
    from .random_models import schedule_of
    from .sampler_checks import device_kernels

    config = tiny_transformer() if model == TINY else TransformerConfig.published(int(model.removeprefix("d")))
    device_kernels(config.vocabulary, schedule_of(model), batches, save, quick=quick)


def _build(work: Path, save: Save, *, model: str, backend: str, max_batch: int) -> None:
    from .runtime_jobs import build

    build(work, model, backend, max_batch, save)


def _run(work: Path, save: Save, *, model: str, backend: str, batches: list[int], budget: dict[str, Any]) -> None:
    from ..timing import Budget
    from .runtime_jobs import run

    run(work, model, backend, batches, Budget(**budget), save)


def _profile(work: Path, save: Save, *, model: str, backend: str, batches: list[int]) -> None:
    from .profile import profile_runtime

    profile_runtime(work, model, backend, batches, save)


def _growth(work: Path, save: Save, *, model: str, backend: str, generations: int) -> None:
    from .runtime_jobs import growth

    growth(work, model, backend, generations, save)


def _decoders(
    work: Path, save: Save, *, model: str, backend: str, batches: list[int], max_batch: int, budget: dict[str, Any]
) -> None:
    from ..timing import Budget
    from .runtime_jobs import decoders

    decoders(work, model, backend, batches, max_batch, Budget(**budget), save)


def _reference(work: Path, save: Save, *, model: str, batches: list[int], budget: dict[str, Any]) -> None:
    from ..timing import Budget
    from .torch_peers import reference

    reference(model, batches, Budget(**budget), save)


def _compiled(work: Path, save: Save, *, model: str, batch: int, dynamic: bool, budget: dict[str, Any]) -> None:
    from ..timing import Budget
    from .torch_peers import compiled

    compiled(work, model, batch, Budget(**budget), dynamic, save)


def _proof(
    work: Path,
    save: Save,
    *,
    model: str,
    batches: list[int],
    generations: int,
    seeds: list[int],
    budget: dict[str, Any],
) -> None:
    from ..timing import Budget
    from .torch_proof import proof

    proof(work, model, batches, generations, seeds, Budget(**budget), save)


JOBS: dict[str, Callable[..., None]] = {
    "machine": _machine,
    "export": _export,
    "unpack": _unpack,
    "regenerate": _regenerate,
    "sanitize": _sanitize,
    "in-phases": _in_phases,
    "tiny": _tiny,
    "kernels": _kernels,
    "build": _build,
    "run": _run,
    "profile": _profile,
    "growth": _growth,
    "decoders": _decoders,
    "reference": _reference,
    "compiled": _compiled,
    "proof": _proof,
}

if __name__ == "__main__":
    sys.exit(main())
