"""The result file of a run: written while the run lasts, continued by a later run, and merged into the kept results."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flexvar_runtime.errors import ArtifactRefused
from flexvar_runtime.files.atomic import atomic_write

from .processes import DONE, NOT_MEASURED, RUNNING
from .rows_and_goals import MAIN, SCHEMA, document, measured_precision, results

STATES = (NOT_MEASURED, "failed", RUNNING, "stopped", DONE)  # of a phase, the best last
FACTS = ("created", "minutes_taken", "options", "source_sha256", "version", "missing")  # of one run
_FOLDERS = re.compile(r"(?<![\w.])/(?:[\w.@+-]+/)+")


class ResultFile:
    """The result file of a run. It is complete JSON at any moment.

    Phases that an earlier run left in the file stay in it, unless this run does better. A file of another GPU or
    another precision is renamed instead.
    """

    def __init__(self, path: Path, options: Mapping[str, str]) -> None:
        """options: of this run, as they are recorded."""
        self._path, self._earlier = path, _read_if_valid(path)
        precision = measured_precision({"phases": {}, "options": options})
        if self._earlier and measured_precision(self._earlier) != precision:
            self._rename_earlier(self._earlier)

    def write(self, new: Mapping[str, Any]) -> Mapping[str, Any]:
        """Write the result of this run so far, joined with that of the earlier run. Returns what was written."""
        if self._earlier and any(results(new["phases"], "machine")) and self._earlier["gpu"] != new["gpu"]:
            self._rename_earlier(self._earlier)
        whole = join(self._earlier, new) if self._earlier else new
        write(self._path, whole)
        return whole

    def _rename_earlier(self, earlier: Mapping[str, Any]) -> None:
        created = re.sub(r"[^0-9T]", "", earlier["created"][:19])
        other = self._path.with_name(f"{self._path.stem}_{created}.json")
        write(other, earlier)
        self._earlier = None
        print(f"{self._path} was measured on another GPU or in another precision. It is now {other.name}.", flush=True)


def join(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """One result from two. The better state of a phase stays, and the newer one where both are equal."""
    better = {name: record for name, record in new["phases"].items() if _is_better(record, old["phases"].get(name))}
    runs = [*old.get("earlier", []), _facts(old), *new.get("earlier", [])]
    earlier = [run for i, run in enumerate(runs) if run not in runs[:i] and run != _facts(new)]
    model = MAIN if MAIN in (old["model"], new["model"]) else old["model"]
    facts = {**_facts(new), "earlier": sorted(earlier, key=lambda run: str(run["created"])), "model": model}
    return document(facts, {**old["phases"], **better}, model)


def merge(run: Path, folder: Path) -> Path:
    """Put the result file of a run among the kept results in `folder`. Returns the file there.

    It is `gpu_<gpu>_<date>.json`, with `_<precision>` if the measured precision is not fp16. A file that exists is
    joined with the run. The stderr of phases and the folders of the machine are left out.

    Raises ArtifactRefused for a file that is not the result of a run.
    """
    new = read(run)
    for record in new["phases"].values():
        record["stderr"] = None
        record["reason"] = record["reason"] and _FOLDERS.sub("", record["reason"])
    name = re.sub(r"[^a-z0-9]+", "-", (new["gpu"] or "none").lower()).strip("-")
    precision = measured_precision(new)
    other = "" if precision == "fp16" else f"_{precision}"
    kept = folder / f"gpu_{name}_{new['created'][:10]}{other}.json"
    write(kept, join(read(kept), new) if kept.exists() else new)
    return kept


def read(path: Path) -> dict[str, Any]:
    """The result in a file. Raises ArtifactRefused for a file that is not the result of a run."""
    try:
        data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if data["schema"] != SCHEMA:
            raise ValueError(f"its schema is {data['schema']}")
        return data
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtifactRefused(
            f"{path} is not the result of a run ({error}).",
            expected=f"the result of a run, schema {SCHEMA}",
            fix="Pass the folder that the run was given: --out DIR",
        ) from error


def write(path: Path, result: Mapping[str, Any]) -> None:
    """Write a result as JSON, whole or not at all."""
    with atomic_write(path, force=True) as temporary:
        temporary.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def _read_if_valid(path: Path) -> dict[str, Any] | None:
    try:
        return read(path)
    except ArtifactRefused:
        return None


def _facts(result: Mapping[str, Any]) -> dict[str, Any]:
    return {key: result[key] for key in FACTS if key in result}


def _is_better(new: Mapping[str, Any], old: Mapping[str, Any] | None) -> bool:
    return old is None or STATES.index(new["status"]) >= STATES.index(old["status"])
