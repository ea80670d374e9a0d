"""The page of results: whole, offline, and honest about what is not there."""

from __future__ import annotations

import base64
import io
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from flexvar_bench.records import Ceiling, Environment, Measured, Quality, Results, Scenario, Served
from flexvar_bench.report_numbers import parts_gap
from flexvar_bench.report_page import write_report
from flexvar_runtime.errors import BackendUnavailable

SCHEDULES = ("1_2_4", "1_2_3_4")
SECTIONS = ("environment", "limit", "peers", "steps", "parts", "quality", "load")
ENVIRONMENT = Environment(
    cpu="A processor",
    cores=2,
    threads=4,
    memory_bytes=8 * 2**30,
    gpu=None,
    python="3.11.9",
    versions={"numpy": "2.1.0"},
    commit="c0ffee",
    started="2026-01-02T03:04:05Z",
)
CEILING = Ceiling(copy_bytes_per_second=20e9, flops_per_second={"float32": 100e9})
NOTHING = Results(ENVIRONMENT, replace(CEILING, flops_per_second={}), (), (), ())


def scenario(variant: str = "ort-cpu", model: str = "demo", schedule: str = "1_2_4", batch: int = 1) -> Scenario:
    return Scenario(
        name="a",
        model=model,
        variant=variant,
        precision="float32",
        schedule=schedule,
        batch=batch,
        guided=True,
        threads=2,
    )


def measured(of: Scenario, median: float = 0.1) -> Measured:
    """Nine calls around a median, whose parts sum to 95 % of it; half of it is arithmetic at CEILING."""
    scales = of.schedule.count("_") + 1
    return Measured(
        scenario=of,
        bundle_sha256=None,
        seconds=tuple(median * (0.96 + 0.01 * i) for i in range(9)),
        turns=tuple(range(9)),
        condition=0.05 * median,
        scales=(0.5 * median / scales,) * scales,
        sampling=0.1 * median,
        decode=0.3 * median,
        peak_memory_bytes=100 * 2**20,
        flops=0.5 * median * 100e9,
        joules=None,
        note="",
    )


def without_parts(one: Measured) -> Measured:
    return replace(one, condition=None, scales=None, sampling=None)


def full() -> Results:
    rows = []
    for schedule in SCHEDULES:
        for batch in (1, 2):
            rows.append(measured(scenario("ort-cpu", schedule=schedule, batch=batch), 0.1 * batch))
            rows.append(without_parts(measured(scenario("torch-eager", schedule=schedule, batch=batch), 0.25 * batch)))
    failed = replace(measured(scenario("openvino")), seconds=(), note="no memory")
    served = [
        Served(
            scenario=scenario(),
            mode="server",
            rate=5.0,
            bound=0.25,
            latencies=tuple(0.01 * i for i in range(1, 101)),
            images_per_second=9.0,
        ),
        Served(
            scenario=scenario(), mode="offline", rate=None, bound=None, latencies=(0.5, 0.75), images_per_second=12.0
        ),
    ]
    quality = [Quality(model="demo", schedule=one, accuracy=0.75, frechet=None) for one in SCHEDULES]
    return Results(ENVIRONMENT, CEILING, (*rows, failed), tuple(served), tuple(quality))


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ...]:
    pytest.importorskip("matplotlib", reason="the bench extra is not installed")
    return write_report(full(), tmp_path_factory.mktemp("report") / "new")


@pytest.fixture(scope="module")
def page(written: tuple[Path, ...]) -> str:
    return written[0].read_text(encoding="utf-8")


def rendered(results: Results, out: Path) -> str:
    """The page of results without any chart, so that it is quick."""
    pytest.importorskip("jinja2", reason="the bench extra is not installed")
    paths = write_report(results, out)
    assert paths == (out / "report.html",) and [path.name for path in out.iterdir()] == ["report.html"]
    return paths[0].read_text(encoding="utf-8")


def rows_of(page: str, section: str) -> list[list[str]]:
    """The text of every cell of the section's tables."""
    part = page[page.index(f'id="{section}"') :].split("</section>")[0]
    rows = re.findall(r"<tr.*?</tr>", part, re.DOTALL)
    texts = [
        [re.sub(r"<[^>]*>", " ", cell).split() for cell in re.findall(r"<td.*?</td>", row, re.DOTALL)] for row in rows
    ]
    return [[" ".join(words) for words in cells] for cells in texts if cells]


def test_the_page_needs_no_network(page: str) -> None:
    assert not re.search(r"https?:|<script|<link|@import|url\(", page)
    assert all(source.startswith("data:image/png;base64,") for source in re.findall(r'src="([^"]*)"', page))


def test_every_section_in_its_order(page: str) -> None:
    assert tuple(re.findall(r'<(?:section|header) id="(\w+)"', page)) == SECTIONS


def test_environment_and_limit(page: str) -> None:
    for text in ("A processor", "2 cores, 4 threads, 8.00 GiB", "numpy 2.1.0", "c0ffee", "2026-01-02T03:04:05Z"):
        assert text in page
    assert rows_of(page, "limit") == [
        ["memory copy, read and written counted", "20.0", "GB/s"],
        ["matrix product, float32", "100", "GFLOP/s"],
    ]
    assert "GPU: not measured" in page and "Energy: not measured" in page


def test_peers_fastest_first_against_eager_and_the_limit(page: str) -> None:
    rows = [row for row in rows_of(page, "peers") if row[:1] == ["ort-cpu"]]
    assert rows[0] == ["ort-cpu", "float32", "9", "100", "±3.2 %", "10.0", "50.0 %", "2.50×", "within 5.0 %", "100"]
    of_batch = [row[0] for row in rows_of(page, "peers")]
    assert of_batch == ["ort-cpu", "torch-eager"] * 3 + ["openvino"] + ["ort-cpu", "torch-eager"]
    assert ["openvino", "float32", "0", "not measured: no memory", "100"] in rows_of(page, "peers")


def test_what_a_variant_does_not_tell(page: str) -> None:
    row = next(row for row in rows_of(page, "peers") if row[0] == "torch-eager")
    assert row[-2] == "not measured"


def test_quality_joined_with_time(page: str) -> None:
    assert rows_of(page, "quality")[0] == ["1_2_3_4", "4", "75.0 %", "not measured", "100", "ort-cpu, batch 1"]
    assert "Fréchet distance against time: not measured" in page


def test_quality_is_that_of_guided_calls(written: tuple[Path, ...], page: str, tmp_path: Path) -> None:
    """Without guidance a call is faster and its pictures are others."""
    results = full()
    unguided = [measured(replace(scenario(schedule=schedule), guided=False), 0.01) for schedule in SCHEDULES]
    again = write_report(replace(results, measured=(*results.measured, *unguided)), tmp_path)
    assert rows_of(again[0].read_text(encoding="utf-8"), "quality") == rows_of(page, "quality")
    trades = [path for path in written if path.name.startswith("accuracy-time")]
    assert trades and all((tmp_path / path.name).read_bytes() == path.read_bytes() for path in trades)


def test_load(page: str) -> None:
    server, offline = rows_of(page, "load")
    assert server[1:] == ["server 5.00 requests/s", "3", "1", "100", "505", "901", "990", "9.00", "250", "25.0 %"]
    assert offline[1:] == ["offline", "3", "1", "2", "625", "725", "748", "12.0", "none", ""]


def test_charts_are_images_beside_the_page_and_in_it(written: tuple[Path, ...], page: str) -> None:
    names = ["latency-steps", "throughput-steps", "throughput-batch", "parts", "accuracy-time"]
    assert [path.name for path in written] == ["report.html", *(f"{name}-demo.png" for name in names)]
    assert {path.name for path in written[0].parent.iterdir()} == {path.name for path in written}
    inside = [base64.b64decode(text) for text in re.findall(r"base64,([^\"]*)", page)]
    assert inside == [path.read_bytes() for path in written[1:]]
    for content in inside:
        with Image.open(io.BytesIO(content)) as image:
            image.load()
            assert image.format == "PNG" and 1000 <= image.width <= 3000 and 300 <= image.height <= 2000
            assert len(content) < 300_000


def test_charts_of_the_report_before_are_removed_and_nothing_else(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the bench extra is not installed")
    earlier = write_report(replace(NOTHING, measured=(measured(scenario(model="old")),)), tmp_path)
    assert [path.name for path in earlier[1:]] == ["parts-old.png"]
    mine = tmp_path / "parts-mine.png"
    mine.write_bytes(b"a picture of somebody's own")
    (tmp_path / "copy-of-parts.png").write_bytes(earlier[1].read_bytes())
    later = write_report(replace(NOTHING, measured=(measured(scenario(model="new")),)), tmp_path)
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {path.name for path in later} | {mine.name, "copy-of-parts.png"} and "parts-new.png" in left


def test_nothing_measured(tmp_path: Path) -> None:
    page = rendered(NOTHING, tmp_path)
    assert tuple(re.findall(r'<(?:section|header) id="(\w+)"', page)) == SECTIONS
    assert ["matrix product", "not measured", "GFLOP/s"] in rows_of(page, "limit")
    for section in SECTIONS[2:]:
        assert "not measured" in page[page.index(f'id="{section}"') :].split("</section>")[0]


def test_a_curve_needs_two_values(tmp_path: Path) -> None:
    page = rendered(replace(NOTHING, measured=(without_parts(measured(scenario())),)), tmp_path)
    assert "demo: latency against steps: not measured (one value only)" in page
    assert "demo: parts of a call: not measured" in page
    assert rows_of(page, "peers")[0][6:8] == ["not measured", "not measured"]  # no rate, no baseline


def test_energy_where_a_counter_says(tmp_path: Path) -> None:
    page = rendered(replace(NOTHING, measured=(replace(without_parts(measured(scenario())), joules=12.5),)), tmp_path)
    assert rows_of(page, "peers")[0][-1] == "12.5" and "Energy: not measured" not in page


def test_the_gpu_is_named(tmp_path: Path) -> None:
    page = rendered(replace(NOTHING, environment=replace(ENVIRONMENT, gpu="A card")), tmp_path)
    assert "<dd>A card</dd>" in page and "GPU: not measured" not in page


def test_names_are_escaped(tmp_path: Path) -> None:
    one = replace(without_parts(measured(scenario("<b>x</b>", model="<script>alert(1)</script>"))), note='"&<')
    failed = replace(measured(scenario("y", model=one.scenario.model)), seconds=(), note="<i>why</i>")
    page = rendered(replace(NOTHING, measured=(one, failed)), tmp_path)
    assert "<script" not in page and "<b>" not in page and "<i>why" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page and "&lt;b&gt;x&lt;/b&gt;" in page


def test_models_whose_names_no_file_can_have(tmp_path: Path) -> None:
    """Every chart stays in the folder and none replaces another."""
    pytest.importorskip("matplotlib", reason="the bench extra is not installed")
    names = ("../a $x_1$", "../a/$x_1$", "模")
    results = replace(NOTHING, measured=tuple(without_parts(measured(scenario(model=name))) for name in names))
    quality = tuple(Quality(model=name, schedule="1_2_4", accuracy=0.5, frechet=None) for name in names[:2])
    paths = write_report(replace(results, quality=quality), tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in paths}
    assert len(set(paths)) == 3 and all(path.parent == tmp_path for path in paths)


def test_more_than_the_limit_is_marked_in_its_row(tmp_path: Path) -> None:
    fast = replace(without_parts(measured(scenario())), flops=1.01 * 0.1 * 100e9)
    slow = without_parts(measured(scenario("torch-eager"), 0.25))
    first, second = rows_of(rendered(Results(ENVIRONMENT, CEILING, (fast, slow), (), ()), tmp_path), "peers")
    assert first[6].startswith("above 1") and second[6] == "50.0 %"


def test_a_precision_without_a_ceiling_has_no_share(tmp_path: Path) -> None:
    rounded = without_parts(measured(replace(scenario("openvino-plain"), precision="bf16")))
    [row] = rows_of(rendered(Results(ENVIRONMENT, CEILING, (rounded,), (), ()), tmp_path), "peers")
    assert row[1] == "bf16" and row[6] == "not measured"


@pytest.mark.parametrize("module", ["jinja2", "matplotlib"])
def test_without_the_extra(module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(BackendUnavailable, match=r"flexvar-deploy\[bench\]"):
        write_report(full(), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_parts_gap() -> None:
    one = measured(scenario())
    assert parts_gap(one) == pytest.approx(0.05)
    assert parts_gap(replace(one, decode=0.04)) == pytest.approx(0.05)  # as far on the other side
    assert parts_gap(replace(one, decode=0.035)) == pytest.approx(0.0)
    for part in ("condition", "scales", "sampling", "decode"):
        assert parts_gap(replace(one, **{part: None})) is None
    assert parts_gap(replace(one, seconds=())) is None
    assert parts_gap(replace(one, told=0.98)) == pytest.approx(0.02)  # call by call, whatever the medians add up to
