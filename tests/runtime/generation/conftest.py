"""Pipelines on a recording backend."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx_bytes import plain_graph
from recording_backend import MODEL, Open, RecordingBackend

from flexvar_export.bundle_writer import seal, write_bundle
from flexvar_runtime import Bundle, FlexVARPipeline
from flexvar_runtime.bundle.manifest import Manifest
from flexvar_runtime.model.facts import ModelFacts
from flexvar_runtime.model.signatures import TABLES_FILE, graph_specs
from flexvar_runtime.model.tables import Tables


@pytest.fixture
def open_pipeline(tmp_path: Path, manifest: Manifest) -> Open:
    """A pipeline on a recording backend: over a sealed bundle whose graphs do nothing."""

    def build(model: ModelFacts = MODEL, **options: Any) -> tuple[FlexVARPipeline, RecordingBackend]:
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.bundle"
        specs = graph_specs(model, "fp32")
        rng = np.random.default_rng(0)
        shapes = (
            (model.vocabulary, model.code_dim),
            (model.width, model.position_side, model.position_side),
            (model.width,),
        )
        with write_bundle(path) as directory:
            for spec in specs.values():
                (directory / spec.file).write_bytes(plain_graph(spec))
            Tables(*(rng.standard_normal(shape).astype(np.float32) for shape in shapes)).save(directory / TABLES_FILE)
            seal(directory, replace(manifest, model=model, graphs=specs, largest_activation={}))
        backend = RecordingBackend(**options)
        return FlexVARPipeline(Bundle.open(path, allow_unproved=True), backend), backend

    return build
