"""What runs before a worker is ready."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi")

from stub_service import SCHEDULE, StubPipeline

from flexvar_runtime import ScaleSchedule
from flexvar_serving.settings import ModelSettings
from flexvar_serving.workers.warmup import warm_up


class Recording(StubPipeline):
    """A pipeline that keeps the shapes that it was warmed up for."""

    def __init__(self, runs_whole: bool) -> None:
        super().__init__()
        self.generator.runs_whole = runs_whole
        self.shapes: set[tuple[str, int, bool]] = set()

    def warmup(self, schedule: Any, sizes: Any, guidance: Any) -> None:
        self.shapes |= {(str(schedule), size, guidance.acts(schedule)) for size in sizes}


@pytest.mark.parametrize(
    ("schedules", "expected"),
    [
        (None, {SCHEDULE, "1_2_4", "1_4"}),
        ((ScaleSchedule.parse("1_4"),), {"1_4"}),
    ],
)
def test_on_a_gpu_every_allowed_shape_is_warm(schedules: Any, expected: set[str]) -> None:
    pipeline = Recording(runs_whole=True)
    ready = warm_up(pipeline, ModelSettings(bundle=Path("x"), batch_sizes=(1, 4), schedules=schedules))
    assert pipeline.shapes == {(name, size, guided) for name in expected for size in (1, 4) for guided in (True, False)}
    measured = {(str(schedule), images, guided) for schedule, guided, images, _ in ready.measured}
    assert measured == pipeline.shapes and all(seconds > 0 for *_, seconds in ready.measured)


def test_on_a_cpu_one_generation_is_enough() -> None:
    pipeline = Recording(runs_whole=False)
    ready = warm_up(pipeline, ModelSettings(bundle=Path("x")))
    assert pipeline.shapes == {(SCHEDULE, 1, True)} and len(ready.measured) == 1
