"""The whole way against the record of OpenAI's evaluator: its network file and pictures in, its metrics out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from graphdef_file import inception
from recorded_images import recorded_images

from flexvar_runtime.cli.main import main as command_line

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def main(*arguments: object) -> None:
    with pytest.raises(SystemExit) as ended:
        command_line(["evaluate", *map(str, arguments)])
    assert not ended.value.code


def test_metrics_of_the_record(golden: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = np.load(golden / "openai_evaluator.npz")
    inception(biases=True).write(tmp_path / "classify_image_graph_def.pb")
    np.savez(tmp_path / "ref256.npz", recorded_images("ref256", 160))
    np.savez(tmp_path / "smp256.npz", recorded_images("smp256", 192))
    network, reference = tmp_path / "inception.onnx", tmp_path / "ref256.ref"
    main("import", tmp_path / "classify_image_graph_def.pb", "-o", network)
    main("reference", tmp_path / "ref256.npz", "--network", network, "-o", reference)
    capsys.readouterr()
    main("score", tmp_path / "smp256.npz", "--reference", reference, "--network", network, "--json")
    metrics: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert metrics["fid"] == pytest.approx(float(record["fid_pool_192_160"]), rel=1e-6)
    assert metrics["sfid"] == pytest.approx(float(record["fid_spatial_192_160"]), rel=1e-6)
    assert metrics["inception_score"] == pytest.approx(float(record["is_192"]), rel=1e-6)
    # Not pr_160_192: with random weights the squared norms are 3,500, where half precision has steps of 2, and the
    # nearest neighbours are at a distance of 2. There, precision and recall depend on the order of additions.
    assert metrics["precision_float32"] == pytest.approx(0.8646, abs=1e-4)
