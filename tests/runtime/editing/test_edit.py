"""The options of an edit: what a task has, what it refuses, and that they survive JSON."""

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
    ("options", "text"),
    [
        ({"task": "paint"}, "got task 'paint'; expected one of refine, inpaint, outpaint, expand"),
        ({"task": "refine", "fit": "squeeze"}, "got fit 'squeeze'; expected one of resize, crop, pad"),
        ({"task": "expand", "size": (8, 8), "anchor": "middle"}, "got anchor 'middle'"),
        ({"task": "refine", "strength": 1.5}, "got strength 1.5; expected a number from 0 to 1"),
        ({"task": "refine", "strength": float("nan")}, "got strength nan"),
        ({"task": "refine", "strength": True}, "got strength True"),
        ({"task": "refine", "size": (8,)}, r"got size \(8,\); expected 2 whole numbers"),
        ({"task": "refine", "size": (8, 0)}, "got size 0; expected a whole number from 1"),
        ({"task": "outpaint", "sides": (0, 0, 0, -4)}, "got sides -4"),
        ({"task": "outpaint"}, "got outpaint without sides"),
        ({"task": "expand"}, "got expand without a size"),
        ({"task": "expand", "size": (8, 16), "fit": "crop"}, "got fit for expand"),
        ({"task": "inpaint", "feather": 3}, "got a feather without paste"),
        ({"task": "inpaint", "paste": True, "feather": 5000}, "got feather 5000"),
    ],
)
def test_what_is_wrong_is_refused(options: dict[str, Any], text: str) -> None:
    with pytest.raises(InvalidInput, match=text):
        Edit(**options)


@pytest.mark.parametrize(
    ("task", "options"),
    [
        ("inpaint", {"strength": 0.5}),
        ("refine", {"paste": True}),
        ("refine", {"sides": (0, 4, 0, 0)}),
        ("outpaint", {"sides": (0, 4, 0, 0), "anchor": "top"}),
    ],
)
def test_an_option_of_another_task_is_not_ignored(task: str, options: dict[str, Any]) -> None:
    with pytest.raises(InvalidInput, match=f"{list(options)[-1]} for {task}"):
        Edit(task=task, **options)


@pytest.mark.parametrize(
    "change", [{"task": "x"}, {"size": "8x8"}, {"unknown": 1}, {"picture_sha256": None, "fit": 3}, "no object"]
)
def test_settings_with_a_spoiled_edit_are_refused(change: Any) -> None:
    data: dict[str, Any] = {
        "version": 1,
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
    with pytest.raises(ArtifactRefused, match="settings that cannot be used"):
        Settings.from_json({**data, "edit": {**record, **change} if isinstance(change, dict) else change}, "x")


def test_a_changed_edit_leaves_behind_what_it_has_no_use_for() -> None:
    pasted = Edit(task="inpaint", paste=True, feather=7, fit="pad", size=(64, 64))
    assert pasted.changed(task="refine", strength=0.5) == Edit(task="refine", strength=0.5, fit="pad", size=(64, 64))
    assert pasted.changed(paste=False) == Edit(task="inpaint", fit="pad", size=(64, 64))
    assert pasted.changed(task="expand") == Edit(task="expand", size=(64, 64), paste=True, feather=7)
    assert pasted.changed() == pasted
    with pytest.raises(InvalidInput, match="a feather without paste"):
        pasted.changed(paste=False, feather=3)
    with pytest.raises(InvalidInput, match="strength for inpaint"):
        pasted.changed(strength=0.5)
