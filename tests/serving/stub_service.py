"""A service whose model is a stand-in: images are a function of class, seed and index, and some classes misbehave.

Run as a program: stub_service.py '{"layout": {...}, "limits": {...}, ...}'. It prints one JSON line when it is ready.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np

from flexvar_runtime import OutOfMemory
from flexvar_runtime.bundle.manifest import Defaults, Manifest, ParityRecord, Provenance
from flexvar_runtime.errors import DeviceFailed
from flexvar_runtime.model.facts import ModelFacts
from flexvar_runtime.model.signatures import SCHEMA_VERSION
from flexvar_runtime.output import GenerationOutput, ScaleStep, ScaleTime, Timings, settings_of
from flexvar_runtime.request import Request, RequestDefaults, parse_request
from flexvar_serving.command import _schedules
from flexvar_serving.settings import Layout, Limits, ModelSettings, ServiceSettings
from flexvar_serving.workers.process import WorkerSetup

PLAIN, SLOW, NO_MEMORY, BROKEN, DIES, HANGS, CROWDED, OTHER, NOISE, NO_GPU, NO_FILE, LONG = range(12)
"""Classes: quick; 40 ms a scale; OutOfMemory; RuntimeError; the process ends; no answer; no memory for two at once;
quick; an image that cannot be compressed; DeviceFailed; OSError; 1.5 s for the second scale."""
CLASSES = (
    *(
        "plain",
        "slow",
        "no memory",
        "broken",
        "dies",
        "hangs",
        "crowded",
        "other",
        "noise",
        "no gpu",
        "no file",
        "long",
    ),
)
SCHEDULE, SIDE = "1_2_3_4", 4
SLOW_SCALE = 0.04


def manifest() -> Manifest:
    return Manifest(
        schema_version=SCHEMA_VERSION,
        precision="fp32",
        model=ModelFacts(
            depth=1,
            width=8,
            heads=1,
            head_size=8,
            classes=len(CLASSES),
            class_names=CLASSES,
            null_class=len(CLASSES),
            vocabulary=64,
            code_dim=8,
            downsampling=16,
            value_range=(-1.0, 1.0),
            position_side=8,
        ),
        graphs={},
        defaults=Defaults(
            schedule=SCHEDULE,
            guidance_scale=2.5,
            guidance_rule="ramp",
            top_k=0,
            top_p=0.9,
            greedy_scales="none",
            max_side=16,
            quality_order=(SCHEDULE, "1_2_4", "1_4"),
        ),
        provenance=Provenance(transformer_sha256="0" * 64, tokenizer_sha256="f" * 64, tools={}),
        parity=ParityRecord(backend="stub", emulated=False, passed=True, rows=(), free_running_agreement=None),
        largest_activation={},
        files={},
    )


def pixels_of(label: int, seed: int, index: int, height: int, width: int) -> np.ndarray:
    if label == NOISE:
        return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    digest = hashlib.sha256(f"{label} {seed} {index}".encode()).digest()
    colours = np.frombuffer(digest, np.uint8)[:27].reshape(3, 3, 3)
    return np.kron(colours, np.ones((-(-height // 3), -(-width // 3), 1), np.uint8))[:height, :width]


@dataclass
class _Named:
    """Something with the few attributes that a worker reads."""

    name: str = "stub"
    runs_whole: bool = False
    sha256: str = "a" * 64
    manifest: Any = None
    device: None = None


class StubPipeline:
    """The part of a pipeline that a worker uses."""

    def __init__(self) -> None:
        facts = manifest()
        self.model, self.defaults = facts.model, RequestDefaults.of(facts.defaults)
        self.schedule, self.guidance, self.sampling = (
            self.defaults.schedule,
            self.defaults.guidance,
            self.defaults.sampling,
        )
        self.bundle, self.backend, self.generator = _Named(manifest=facts), _Named(), _Named()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def warmup(self, *_: object) -> None:
        pass

    def __call__(
        self, labels: Any, schedule: Any, guidance: Any, sampling: Any = None, **more: Any
    ) -> GenerationOutput:
        on_scale = more.pop("on_scale", None)
        request = parse_request(self.model, self.defaults, labels, schedule, guidance, sampling, **more)
        return self._generate(request, on_scale)

    def edit(
        self, image: Any, task: str, *, labels: Any, schedule: Any, guidance: Any, **more: Any
    ) -> GenerationOutput:
        chosen = {name: more[name] for name in ("sampling", "seed", "first_index", "on_scale")}
        return self(labels, schedule or SCHEDULE, guidance, **chosen)

    def _generate(self, request: Request, on_scale: Any) -> GenerationOutput:
        started = time.perf_counter()
        labels = set(request.labels)
        if NO_MEMORY in labels or (CROWDED in labels and request.images > 1):
            raise OutOfMemory(
                "A batch needs 9 GiB, but only 1 GiB is available.", expected="less", fix="Use a smaller one."
            )
        if NO_GPU in labels:
            raise DeviceFailed("The GPU reported an error.", expected="a GPU that works", fix="Restart.")
        if NO_FILE in labels:
            raise FileNotFoundError("weights.bin")
        if BROKEN in labels:
            raise RuntimeError("secret /etc/passwd")
        factor = self.model.downsampling
        for i, (h, w) in enumerate(request.schedule):
            if SLOW in labels:
                time.sleep(SLOW_SCALE)
            if DIES in labels and i == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            if LONG in labels and i == 1:
                time.sleep(1.5)
            if HANGS in labels and i == 1:
                time.sleep(3600)
            if on_scale is not None:
                tokens = np.zeros((request.images, h, w), np.int32)

                def preview(size: tuple[int, int] = (h * factor, w * factor)) -> np.ndarray:
                    return self._images(request, *size)

                on_scale(ScaleStep(i, len(request.schedule), (h, w), tokens, ScaleTime((h, w), 0.0, 0.0), preview))
        h, w = request.schedule[-1]
        images = self._images(request, h * factor, w * factor)
        spent = time.perf_counter() - started
        settings = settings_of(request, "a" * 64, "stub")
        return GenerationOutput(images, (), request.seed, Timings(0.0, (), spent / 4, spent), settings)

    def _images(self, request: Request, height: int, width: int) -> np.ndarray:
        each = zip(request.labels, request.seeds, request.indices, strict=True)
        return np.stack([pixels_of(label, seed, index, height, width) for label, seed, index in each])


def open_stub(setup: WorkerSetup) -> StubPipeline:
    if setup.device == "refused":
        raise OutOfMemory("It does not fit.", expected="more", fix="Free memory.")
    return StubPipeline()


def settings_from(given: dict[str, Any]) -> ServiceSettings:
    schedules = _schedules(given.pop("command", {}).get("schedules"))  # as text, like an option
    model = ModelSettings(bundle=Path("stub.bundle"), schedules=schedules, **given.pop("model", {}))
    layout, limits = Layout(**given.pop("layout", {})), Limits(**given.pop("limits", {}))
    return ServiceSettings(model=model, layout=layout, limits=limits, name="stub", **given)


def main() -> None:
    from flexvar_serving.service import serve
    from flexvar_serving.web.server import listen, url

    with listen("127.0.0.1", 0) as listener:

        def on_ready(service: Any) -> None:
            print(json.dumps({"url": url(listener), "pids": service.dispatcher.pool.pids}), flush=True)

        ended = asyncio.run(
            serve(settings_from(json.loads(sys.argv[1])), listener, on_ready=on_ready, opener=open_stub)
        )
    sys.exit(130 if ended == signal.SIGINT else 0)


if __name__ == "__main__":
    from flexvar_runtime import FlexVARError

    try:
        main()
    except FlexVARError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
