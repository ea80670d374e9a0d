"""`flexvar generate --deadline-ms`: unknown costs are measured, and a schedule is chosen and reported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from flexvar_runtime.pictures.png import read_metadata

BEST, FAST = ORDER = ("1_2_3_4", "1_4")


@pytest.fixture
def bundle(bundle_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The tiny bundle with a small default and an order of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = bundle_copy / "manifest.json"
    document = json.loads(path.read_text())
    document["defaults"] |= {"schedule": BEST, "quality_order": ORDER}
    path.write_text(json.dumps(document))
    return bundle_copy


def costs_file(tmp_path: Path) -> Path:
    [path] = (tmp_path / "cache" / "flexvar" / "costs").iterdir()
    return path


def set_costs(path: Path, **p90: float) -> None:
    """Other seconds for schedules, in every batch that was measured."""
    document = json.loads(path.read_text())
    for row in document["rows"]:
        row["median"] = row["p90"] = p90["s" + row["schedule"]]
    path.write_text(json.dumps(document))


def test_a_deadline(flexvar: Any, bundle: Path, tmp_path: Path) -> None:
    """The first call measures costs, later ones use those that are saved."""
    out = tmp_path / "out"
    arguments = ("generate", bundle, "-o", out, "--classes", "1,2,3", "--batch-size", 2, "--backend", "ort-cpu")
    ended = flexvar(*arguments, "--deadline-ms", 600_000)
    assert ended.code == 0
    assert f"schedule {BEST} for 2 at once on ort-cpu, once" in ended.err and FAST not in ended.err
    last = ended.out.splitlines()[-1]
    assert BEST in last and "600000.0 ms" in last and "too late" not in last
    set_costs(costs_file(tmp_path), s1_2_3_4=3e5)
    ended = flexvar(*arguments, "--deadline-ms", 200_000, "--force")  # the next schedule is measured only now
    assert ended.code == 0 and f"schedule {FAST} for 2 at once" in ended.err and f"{BEST} for" not in ended.err
    set_costs(costs_file(tmp_path), s1_2_3_4=0.25, s1_4=0.125)
    ended = flexvar(*arguments, "--deadline-ms", "200.5", "--force", "--json")
    assert ended.code == 0 and "measur" not in ended.err
    assert ended.json["schedule"] == FAST
    choice = dict(ended.json["choice"])
    assert BEST in choice["reason"] and "250.0 ms" in choice.pop("reason")
    took = max(timings["total"] for timings in ended.json["timings"]) * 1e3
    assert (choice.pop("took_ms"), choice.pop("met")) == (took, took <= 200.5)
    assert choice == {
        "schedule": FAST,
        "expected_ms": 125.0,
        "deadline_ms": 200.5,
        "considered": [{"schedule": BEST, "expected_ms": 250.0}, {"schedule": FAST, "expected_ms": 125.0}],
    }
    assert [len(timings["scales"]) for timings in ended.json["timings"]] == [2, 2]
    first = out / "000000_class0001.png"
    assert read_metadata(first)["schedule"] == FAST
    ended = flexvar("generate", bundle, "-o", tmp_path / "again", "--from", first, "--json")
    assert ended.json["schedule"] == FAST and "choice" not in ended.json
    assert (tmp_path / "again" / first.name).read_bytes() == first.read_bytes()
    ended = flexvar(*arguments, "--deadline-ms", 100, "--force")
    assert ended.refused(2, "100.0 ms", FAST, "125.0 ms")
    costs_file(tmp_path).write_text("{")
    ended = flexvar(*arguments, "--deadline-ms", 100, "--force")
    assert ended.refused(5, costs_file(tmp_path))


@pytest.mark.parametrize(
    "extra",
    [
        ("--schedule", "1_2"),
        ("--size", "16x16"),
        ("--steps", "3"),
        ("--preset", "flexvar-d16"),
        ("--preview", "scales"),
        ("--progress",),
        ("--deadline-ms", "nan"),
    ],
)
def test_refusals(flexvar: Any, tmp_path: Path, extra: tuple[str, ...]) -> None:
    """Before a bundle is opened."""
    ended = flexvar("generate", "none", "-o", tmp_path / "out", "--classes", "1", "--deadline-ms", "100", *extra)
    assert (
        ended.refused(2, extra[0].removeprefix("--").replace("deadline-ms", "deadline"))
        and not (tmp_path / "out").exists()
    )


def test_nothing_is_measured_for_a_request_that_is_refused(flexvar: Any, bundle: Path, tmp_path: Path) -> None:
    ended = flexvar("generate", bundle, "-o", tmp_path / "out", "--classes", "11", "--deadline-ms", "100")
    assert ended.refused(2, "11") and not (tmp_path / "cache").exists()


def test_a_cache_that_cannot_be_written(flexvar: Any, bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file where the folder would be")
    ended = flexvar("generate", bundle, "-o", tmp_path / "out", "--classes", "1", "--deadline-ms", 600_000)
    assert ended.code == 0 and (tmp_path / "out" / "000000_class0001.png").exists()
    assert "XDG_CACHE_HOME" in ended.err
