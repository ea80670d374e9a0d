"""The quality that `flexvar evaluate sweep` writes is what the benchmarks read."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from flexvar_bench.records import Quality
from flexvar_bench.workload import read_quality
from flexvar_evaluation.reference import ReferenceFacts
from flexvar_evaluation.scoring import Metrics
from flexvar_evaluation.statistics.intervals import Interval
from flexvar_evaluation.sweep import Point, Scored
from flexvar_evaluation.sweep_command import _to_json
from flexvar_runtime import Guidance, ScaleSchedule


def scored(schedule: str, fid: float, *, scale: float = 1.5, bundle: str = "fp32") -> Scored:
    metrics = Metrics(
        images=5000,
        fid=Interval(fid, fid - 1, fid + 1),
        fid_infinity=Interval(fid / 2, 0, fid),
        sfid=None,
        inception_score=None,
        precision=0.5,
        recall=0.5,
        precision_float32=0.5,
        recall_float32=0.5,
        recognised=fid / 10,
    )
    point = Point(
        name="a", bundle=Path(bundle), schedule=ScaleSchedule.parse(schedule), guidance=Guidance(scale, "ramp")
    )
    settings = SimpleNamespace(first=SimpleNamespace(bundle=bundle, seed=0))
    return Scored(point=point, precision=bundle, settings=cast(Any, settings), metrics=metrics, against=None)


def test_the_schedules_of_the_first_bundle_and_guidance(tmp_path: Path) -> None:
    facts = ReferenceFacts(
        format=1,
        source="real.npz",
        sha256="0" * 64,
        images=5000,
        height=64,
        width=64,
        network="scenes",
        network_name="scenes",
        stored=False,
        difference=None,
        spatial_difference=None,
    )
    points = [scored("1_2_4", 3), scored("1_2_4", 2, scale=2.5), scored("1_4", 4), scored("1_4", 1, bundle="fp16")]
    table = tmp_path / "sweep.json"
    table.write_text(json.dumps(_to_json(points, cast(Any, SimpleNamespace(facts=facts)))))
    assert read_quality(table, "d16") == (
        Quality(model="d16", schedule="1_2_4", accuracy=0.3, frechet=3),
        Quality(model="d16", schedule="1_4", accuracy=0.4, frechet=4),
    )
