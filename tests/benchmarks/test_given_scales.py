"""Given scales in one pass against one by one: turns, and the whole program on the tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from flexvar_bench import given_scales
from flexvar_bench.given_scales import Row, main, measure
from flexvar_runtime import FlexVARPipeline, Guidance
from flexvar_runtime.backends.base import Graph
from flexvar_runtime.generation.generator import Generator
from flexvar_runtime.request import Request


def test_both_ways_take_turns(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    passes: list[Graph] = []
    real = Generator.prefill_graph

    def prefill_graph(generator: Generator, request: Request) -> Graph | None:
        graph = real(generator, request)
        passes.extend([] if graph is None else [graph])
        return graph

    monkeypatch.setattr(Generator, "prefill_graph", prefill_graph)
    asked: list[tuple[int, bool, bool]] = []
    force = given_scales.force

    def spy(pipe: FlexVARPipeline, count: int, guidance: Guidance, prefills: bool) -> float:
        before = len(passes)
        took = force(pipe, count, guidance, prefills)
        asked.append((count, prefills, len(passes) > before))
        return took

    monkeypatch.setattr(given_scales, "force", spy)
    with FlexVARPipeline.from_bundle(tiny_bundle, "ort-cpu", threads=1) as pipe:
        rows = measure(pipe, [2, 3], turns=2)
    assert [(row.scales, row.guided, len(row.one_pass), len(row.one_by_one)) for row in rows] == [
        (count, guided, 2, 2) for guided in (True, False) for count in (2, 3)
    ]
    assert all(prefills == passed for _, prefills, passed in asked)
    assert [prefills for _, prefills, _ in asked[:6]] == [False, True, True, False, False, True]
    assert all(seconds > 0 for row in rows for seconds in (*row.one_pass, *row.one_by_one))


def test_a_ratio_is_that_of_the_turns() -> None:
    assert Row(scales=2, guided=True, one_by_one=(3.0, 2.0, 8.0), one_pass=(1.0, 2.0, 4.0)).ratio == 2.0


def test_the_program(tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main([str(tiny_bundle), "--scales", "2,4", "--turns", "1", "--threads", "1", "--json", str(tmp_path / "a.json")])
    found = json.loads((tmp_path / "a.json").read_text())
    assert [(row["scales"], row["guided"]) for row in found["rows"]] == [(2, True), (4, True), (2, False), (4, False)]
    assert "times as fast" in capsys.readouterr().out
    for wrong in ("1", "10", "two"):
        with pytest.raises(SystemExit):
            main([str(tiny_bundle), "--scales", wrong])
        assert "--scales" in capsys.readouterr().err.splitlines()[-1]
