"""The options of an edit: which a task has, which are refused, and that they survive JSON."""

from __future__ import annotations

import json
from typing import Any

import pytest

from flexvar_runtime import InvalidInput
from flexvar_runtime.editing.options import Edit
from flexvar_runtime.errors import ArtifactRefused
from flexvar_runtime.output import EditRecord, Settings

EDITS = [
    Edit(task="refine", strength=0.25, size=(64, 96), fit="crop"),
    Edit(task="inpaint", paste=True, feather=7, fit="pad"),
    Edit(task="outpaint", sides=(0, 16, 0, 32)),
    Edit(task="expand", size=(64, 128), anchor="left", paste=True),
]


@pytest.mark.parametrize("edit", EDITS, ids=lambda edit: edit.task)
def test_options_survive_json(edit: Edit) -> None:
    data = json.loads(json.dumps(edit.to_json()))
    assert Edit.from_json(data) == edit
    assert ("strength" in data) == (edit.task == "refine") and ("sides" in data) == (edit.task == "outpaint")
    record = EditRecord(edit, "0" * 64, None)
    assert EditRecord.from_json(json.loads(json.dumps(record.to_json()))) == record


@pytest.mark.parametrize(
    ("named", "options"),
    [
        ("task is 'paint'", {"task": "paint"}),
        ("fit is 'squeeze'", {"task": "refine", "fit": "squeeze"}),
        ("anchor is 'middle'", {"task": "expand", "size": (8, 8), "anchor": "middle"}),
        ("strength is 1.5", {"task": "refine", "strength": 1.5}),
        ("strength is nan", {"task": "refine", "strength": float("nan")}),
        ("strength is True", {"task": "refine", "strength": True}),
        ("size is (8,)", {"task": "refine", "size": (8,)}),
        ("size is 0", {"task": "refine", "size": (8, 0)}),
        ("sides is -4", {"task": "outpaint", "sides": (0, 0, 0, -4)}),
        ("feather is 5000", {"task": "inpaint", "paste": True, "feather": 5000}),
        ("sides", {"task": "outpaint"}),
        ("size", {"task": "expand"}),
        ("feather", {"task": "inpaint", "feather": 3}),
        ("fit cannot be used with task expand", {"task": "expand", "size": (8, 16), "fit": "crop"}),
        ("strength cannot be used with task inpaint", {"task": "inpaint", "strength": 0.5}),
        ("paste cannot be used with task refine", {"task": "refine", "paste": True}),
        ("sides cannot be used with task refine", {"task": "refine", "sides": (0, 4, 0, 0)}),
        ("anchor cannot be used with task outpaint", {"task": "outpaint", "sides": (0, 4, 0, 0), "anchor": "top"}),
    ],
)
def test_invalid_options_are_refused(named: str, options: dict[str, Any]) -> None:
    """Also options of another task: they are never ignored."""
    with pytest.raises(InvalidInput) as refusal:
        Edit(**options)
    assert named in refusal.value.got and refusal.value.exit_code == 2


@pytest.mark.parametrize(
    "change", [{"task": "x"}, {"size": "8x8"}, {"unknown": 1}, {"picture_sha256": None, "fit": 3}, "no object"]
)
def test_settings_with_a_spoiled_edit_are_refused(change: Any) -> None:
    data: dict[str, Any] = {
        "version": 1,
        "runtime": "1.0",
        "bundle": "b",
        "class": 3,
        "seed": "1",
        "index": "0",
        "schedule": "1_2",
        "guidance": {"scale": 2.5, "rule": "ramp", "max_side": 16},
        "sampling": {"top_k": 1, "top_p": 0.0, "greedy_scales": "none", "max_side": 16},
        "backend": "ort-cpu",
    }
    assert Settings.from_json(data, "x").edit is None
    record = EditRecord(EDITS[0], "a", None).to_json()
    assert Settings.from_json({**data, "edit": record}, "x").edit == EditRecord(EDITS[0], "a", None)
    with pytest.raises(ArtifactRefused, match=r"^x "):
        Settings.from_json({**data, "edit": {**record, **change} if isinstance(change, dict) else change}, "x")


def test_a_changed_edit_drops_options_of_other_tasks() -> None:
    pasted = Edit(task="inpaint", paste=True, feather=7, fit="pad", size=(64, 64))
    assert pasted.changed(task="refine", strength=0.5) == Edit(task="refine", strength=0.5, fit="pad", size=(64, 64))
    assert pasted.changed(paste=False) == Edit(task="inpaint", fit="pad", size=(64, 64))
    assert pasted.changed(task="expand") == Edit(task="expand", size=(64, 64), paste=True, feather=7)
    assert pasted.changed() == pasted
    with pytest.raises(InvalidInput, match="feather"):
        pasted.changed(paste=False, feather=3)
    with pytest.raises(InvalidInput, match=r"strength .*inpaint"):
        pasted.changed(strength=0.5)
