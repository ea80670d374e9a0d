"""`flexvar generate --deadline-ms`: measures where nothing is known, chooses, and says what and why."""

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
    """The first time is measured; the second has the costs, and is generated in another schedule when they are."""
    out = tmp_path / "out"
    arguments = ("generate", bundle, "-o", out, "--classes", "1,2,3", "--batch-size", 2, "--backend", "ort-cpu")
    ended = flexvar(*arguments, "--deadline-ms", 600_000)
    assert ended.code == 0
    assert f"schedule {BEST} for 2 at once on ort-cpu, once" in ended.err and FAST not in ended.err
    last = ended.out.splitlines()[-1]
    assert last.startswith(f"schedule {BEST}, expected ")
    assert " ms a batch: the best of 2 is fast enough for 600000.0 ms; took " in last and "too late" not in last
    set_costs(costs_file(tmp_path), s1_2_3_4=3e5)
    ended = flexvar(*arguments, "--deadline-ms", 200_000, "--force")  # the next one is measured only now
    assert ended.code == 0 and f"schedule {FAST} for 2 at once" in ended.err and f"{BEST} for" not in ended.err
    set_costs(costs_file(tmp_path), s1_2_3_4=0.25, s1_4=0.125)
    ended = flexvar(*arguments, "--deadline-ms", "200.5", "--force", "--json")
    assert ended.code == 0 and "measur" not in ended.err
    assert ended.json["schedule"] == FAST
    choice = dict(ended.json["choice"])
    took = max(timings["total"] for timings in ended.json["timings"]) * 1e3
    assert (choice.pop("took_ms"), choice.pop("met")) == (took, took <= 200.5)
    assert choice == {
        "schedule": FAST,
        "expected_ms": 125.0,
        "deadline_ms": 200.5,
        "reason": f"the best of 2 that is fast enough for 200.5 ms; the next better, {BEST}, takes 250.0 ms",
        "considered": [{"schedule": BEST, "expected_ms": 250.0}, {"schedule": FAST, "expected_ms": 125.0}],
    }
    assert [len(timings["scales"]) for timings in ended.json["timings"]] == [2, 2]
    first = out / "000000_class0001.png"
    assert read_metadata(first)["schedule"] == FAST
    ended = flexvar("generate", bundle, "-o", tmp_path / "again", "--from", first, "--json")
    assert ended.json["schedule"] == FAST and "choice" not in ended.json
    assert (tmp_path / "again" / first.name).read_bytes() == first.read_bytes()
    ended = flexvar(*arguments, "--deadline-ms", 100, "--force")
    assert ended.code == 2
    assert f"got: a deadline of 100.0 ms: the fastest, {FAST}, takes 125.0 ms\n" in ended.err
    assert "expected: a deadline of at least 125 ms" in ended.err
    costs_file(tmp_path).write_text("{")
    ended = flexvar(*arguments, "--deadline-ms", 100, "--force")
    assert ended.code == 5 and f"fix: remove {costs_file(tmp_path)}, and measure again" in ended.err


@pytest.mark.parametrize(
    ("extra", "got"),
    [
        (("--schedule", "1_2"), "a deadline with a schedule, size or steps"),
        (("--size", "16x16"), "a deadline with a schedule, size or steps"),
        (("--steps", "3"), "a deadline with a schedule, size or steps"),
        (("--preview", "scales"), "a deadline with pictures of every scale"),
        (("--progress",), "a deadline with pictures of every scale"),
        (("--deadline-ms", "0"), "a deadline of 0.0 ms"),
        (("--deadline-ms", "nan"), "a deadline of nan ms"),
    ],
)
def test_refusals(flexvar: Any, tmp_path: Path, extra: tuple[str, ...], got: str) -> None:
    """Before a bundle is looked at."""
    ended = flexvar("generate", "none", "-o", tmp_path / "out", "--classes", "1", "--deadline-ms", "100", *extra)
    assert ended.code == 2 and f"got: {got}\n" in ended.err
    assert not (tmp_path / "out").exists()


def test_nothing_is_measured_for_a_request_that_is_refused(flexvar: Any, bundle: Path, tmp_path: Path) -> None:
    ended = flexvar("generate", bundle, "-o", tmp_path / "out", "--classes", "11", "--deadline-ms", "100")
    assert ended.code == 2 and "class 11" in ended.err and not (tmp_path / "cache").exists()


def test_a_cache_that_cannot_be_written(flexvar: Any, bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file where the folder would be")
    ended = flexvar("generate", bundle, "-o", tmp_path / "out", "--classes", "1", "--deadline-ms", 600_000)
    assert ended.code == 0 and (tmp_path / "out" / "000000_class0001.png").exists()
    assert "costs are kept in this process alone" in ended.err
