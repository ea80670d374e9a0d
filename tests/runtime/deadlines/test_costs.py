"""Measured costs: they are saved, loaded for the same setup only, and refused if they are damaged."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from flexvar_runtime import ArtifactRefused, CostRow, CostTable, ScaleSchedule
from flexvar_runtime.backends.host_arrays import processor_name

SHORT, LONG = ScaleSchedule.parse("1_2_4"), ScaleSchedule.parse("1_2_3_4")
ROW = CostRow(
    schedule="1_2_4",
    batch=1,
    guided=True,
    filters="top-k",
    p90=0.02,
    median=0.01,
    samples=10,
    scales=(0.001, 0.002, 0.003),
)
TABLE = CostTable(bundle="a" * 64, backend="ort-cpu", threads=2, device="A processor", rows=(ROW,))


@pytest.fixture
def environ(tmp_path: Path) -> dict[str, str]:
    return {"XDG_CACHE_HOME": str(tmp_path / "cache")}


@pytest.fixture
def path(environ: dict[str, str]) -> Path:
    return TABLE.save(environ)


def refusal(environ: dict[str, str], table: CostTable = TABLE) -> ArtifactRefused:
    with pytest.raises(ArtifactRefused) as refused:
        table.load(environ)
    return refused.value


# Rows ----------------------------------------------------------------------------------------------------------------


def test_p90_of_ten_generations() -> None:
    row = CostRow.of(SHORT, 2, False, "top-k", [0.3, 0.1, 0.2, 0.9, 0.8, 0.7, 0.4, 0.5, 0.6, 1.0])
    assert (row.p90, row.median, row.samples, row.scales) == (0.9, 0.5, 10, ())
    assert (row.schedule, row.batch, row.guided, row.filters) == ("1_2_4", 2, False, "top-k")


@pytest.mark.parametrize("seconds", [[0.5], [0.1, 0.5], [0.5] + [0.1] * 8])
def test_p90_of_fewer_than_ten_is_the_slowest(seconds: list[float]) -> None:
    assert CostRow.of(SHORT, 1, True, "none", seconds).p90 == 0.5


def test_the_median_of_every_scale() -> None:
    row = CostRow.of(SHORT, 1, True, "none", [1, 1, 1], [[0.1, 0.5, 0.6], [0.3, 0.4, 0.9], [0.2, 0.6, 0.3]])
    assert row.scales == (0.2, 0.5, 0.6)
    assert CostRow.of(SHORT, 1, True, "none", [1, 1], [[], []]).scales == ()  # as on a GPU


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("schedule", "2_4"),
        ("batch", 0),
        ("samples", 0),
        ("filters", "top-q"),
        ("median", 0.0),
        ("median", 0.03),  # above p90
        ("p90", float("inf")),
        ("scales", (0.1,)),
    ],
)
def test_a_row_checks_its_fields(field: str, value: Any) -> None:
    with pytest.raises(ArtifactRefused, match=field):
        replace(ROW, **{field: value})


# A table -------------------------------------------------------------------------------------------------------------


def test_costs_by_schedule_batch_guidance_and_filters() -> None:
    assert TABLE.cost(SHORT, 1, True, "top-k") == 0.02
    assert TABLE.cost(ScaleSchedule.parse("1_2x2_4"), 1, True, "top-k") == 0.02  # the same, written otherwise
    assert TABLE.cost(SHORT, 2, True, "top-k") is None and TABLE.cost(SHORT, 1, False, "top-k") is None
    assert TABLE.cost(LONG, 1, True, "top-k") is None and TABLE.cost(SHORT, 1, True, "none") is None


def test_new_rows_replace_earlier_ones() -> None:
    again, other = replace(ROW, p90=0.5), replace(ROW, batch=2)
    assert TABLE.with_rows([again, other]).rows == (again, other)
    assert TABLE.with_rows([]) == TABLE
    with pytest.raises(ArtifactRefused, match="rows"):
        replace(TABLE, rows=(ROW, again))


def test_a_saved_table_is_loaded(environ: dict[str, str], path: Path) -> None:
    device = hashlib.sha256(b"A processor").hexdigest()[:16]
    assert path == Path(environ["XDG_CACHE_HOME"]) / "flexvar" / "costs" / f"{'a' * 64}-ort-cpu-2-{device}.json"
    assert replace(TABLE, rows=()).load(environ) == TABLE
    assert path.stat().st_mode & 0o777 == 0o600 and path.parent.stat().st_mode & 0o777 == 0o700
    more = TABLE.with_rows([replace(ROW, batch=4)])
    more.save(environ)
    assert TABLE.load(environ) == more and [file.name for file in path.parent.iterdir()] == [path.name]


def test_load_returns_none_for_another_setup(environ: dict[str, str]) -> None:
    assert TABLE.load(environ) is None
    TABLE.save(environ)
    for change in ({"bundle": "b" * 64}, {"backend": "ort-cuda"}, {"threads": 1}, {"device": "Another"}):
        assert replace(TABLE, **change).load(environ) is None  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("field", "value"), [("bundle", "b" * 64), ("backend", "ort-cuda"), ("threads", 1), ("device", "Another")]
)
def test_a_renamed_table_is_refused(environ: dict[str, str], path: Path, field: str, value: Any) -> None:
    other: CostTable = replace(TABLE, **{field: value})
    path.rename(other.path(environ))
    assert f": {field} is " in refusal(environ, other).got


@pytest.mark.parametrize(
    ("spoil", "text"),
    [
        (lambda data: data[: len(data) // 2], "JSON"),
        (lambda data: data.replace(b'"samples": 10', b'"samples": 10, "colour": 1'), "colour"),
        (lambda data: data.replace(b'"samples": 10', b'"samples": true'), "samples"),
        (lambda data: data.replace(b"0.02", b"-0.02"), "median"),
        (lambda data: data.replace(b"0.02", b"NaN"), "NaN"),
        (lambda data: data.replace(b'"version": 2', b'"version": 1'), "version"),
        (lambda data: data + b" " * 2**22, "bytes"),
    ],
)
def test_a_spoiled_file_is_refused(
    environ: dict[str, str], path: Path, spoil: Callable[[bytes], bytes], text: str
) -> None:
    path.write_bytes(spoil(path.read_bytes()))
    error = refusal(environ)
    assert text in str(error) and str(path) in error.fix and error.exit_code == 5


def test_files_that_others_can_write_are_refused(environ: dict[str, str], path: Path, tmp_path: Path) -> None:
    path.chmod(0o666)
    assert "only this user" in refusal(environ).got
    path.chmod(0o600)
    path.parent.chmod(0o777)
    for act in (TABLE.load, TABLE.save):
        with pytest.raises(ArtifactRefused, match="777"):
            act(environ)
    path.parent.chmod(0o700)
    assert TABLE.load(environ) == TABLE
    path.rename(tmp_path / "elsewhere.json")
    path.symlink_to(tmp_path / "elsewhere.json")
    assert refusal(environ).expected == "a regular file"


def test_the_processors_name(tmp_path: Path) -> None:
    info = tmp_path / "cpuinfo"
    info.write_text("processor\t: 0\nmodel name\t: A Processor 9000\nmodel name\t: Another\n")
    assert processor_name(info) == "A Processor 9000"
    info.write_text("processor\t: 0\n")
    assert processor_name(info) and processor_name(tmp_path / "none")
