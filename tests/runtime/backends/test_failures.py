"""What failures of ONNX Runtime and OpenVINO are blamed on. The texts are those that their versions of 2026 gave."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from flexvar_runtime import Bundle
from flexvar_runtime.backends.failures import failure
from flexvar_runtime.backends.ort.cpu import OrtCpu
from flexvar_runtime.errors import ArtifactRefused, EnvironmentFailed, FlexVARError, OutOfMemory
from flexvar_runtime.machine.threads import FEWER_THREADS

ORT, CORE = "[ONNXRuntimeError] : ", "Exception from src/inference/src/cpp/core.cpp:84:\n"
FAILED = f"{CORE}Check 'false' failed at src/frontends/common/src/frontend.cpp:53:\n"
TEXTS: list[tuple[type[FlexVARError], str]] = [
    (EnvironmentFailed, "/src/env.cc:327 PosixThread pthread_create failed, error code: 12 Cannot allocate memory"),
    (EnvironmentFailed, "thread constructor failed: Resource temporarily unavailable"),
    (OutOfMemory, f"{ORT}6 : RUNTIME_EXCEPTION : Exception during initialization: std::bad_alloc"),
    (OutOfMemory, f"{FAILED}Converting input model\nCan not create file mapping for 3, err=Cannot allocate memory\n"),
    (OutOfMemory, "[CPU] Subgraph node with name 'node_transpose_3' can't alloc\n"),
    (EnvironmentFailed, f"{ORT}1 : FAIL : Load model from /b/graph.onnx failed:system error number 24"),
    (EnvironmentFailed, f"{ORT}3 : NO_SUCHFILE : Load model from /b/s.onnx failed. File doesn't exist"),
    (EnvironmentFailed, f"{ORT}1 : FAIL : initializer: embed. External data path does not exist: /b/s.onnx.data"),
    (EnvironmentFailed, f'{CORE}FrontEnd API failed with GeneralFailure:\nonnx: Could not open the file: "/b/s.onnx"'),
    (EnvironmentFailed, f'{CORE}Unable to read the model: "/b/s.onnx" Available frontends: paddle tflite ir tf \n'),
    (EnvironmentFailed, f'{CORE}Cannot load library "/x.so": failed to map segment from shared object'),
    (EnvironmentFailed, "something that nobody has seen"),
    (EnvironmentFailed, f"{ORT}6 : RUNTIME_EXCEPTION : Exception during initialization: unknown"),
    (ArtifactRefused, f"{ORT}7 : INVALID_PROTOBUF : Load model from /b/s.onnx failed:Protobuf parsing failed."),
    (ArtifactRefused, f"{ORT}10 : INVALID_GRAPH : In Node, (n, X), Error No Op registered for X with version of 23"),
    (ArtifactRefused, f"{ORT}1 : FAIL : Node (a) Op (Reshape) [ShapeInferenceError] Dimension could not be inferred"),
    (ArtifactRefused, f"{ORT}1 : FAIL : Unsupported model IR version: 99, max supported IR version: 13"),
    (ArtifactRefused, f"{FAILED}Loading input model\nInvalid usage of method for externally stored data in file (w)"),
    (ArtifactRefused, f"{FAILED}Path '../w' resolves to '/w' which is outside the base directory '/b'"),
    (ArtifactRefused, f"{FAILED}FrontEnd API failed with OpConversionFailure:\n-- No conversion rule found: X-23\n"),
    (ArtifactRefused, f'{CORE}Unable to read the model: "/b/s.onnx" Available frontends: jax onnx ir tf \n'),
]


@pytest.mark.parametrize(("kind", "text"), TEXTS)
def test_what_is_to_blame(kind: type[FlexVARError], text: str) -> None:
    error = failure("A library", "step.onnx", RuntimeError(text), "the reason.")
    assert type(error) is kind and "step.onnx" in error.got and "the reason." in error.got
    assert ".." not in error.got and ("thread" not in text or error.fix == FEWER_THREADS)


@pytest.mark.parametrize("folder", ["graph/node", "bad_alloc", "pthread_create"])
def test_the_words_of_a_path_do_not_count(folder: str) -> None:
    error = failure("A library", "step.onnx", RuntimeError(f"Load /{folder}/tensor/step.onnx failed"), "it")
    assert type(error) is EnvironmentFailed and error.fix != FEWER_THREADS


def test_weights_that_are_gone(tiny_bundle: Path, tmp_path: Path) -> None:
    """They were there when the bundle was checked."""
    bundle = Bundle.open(shutil.copytree(tiny_bundle, tmp_path / "copy"))
    for path in bundle.path.glob("*.data"):
        path.unlink()
    with pytest.raises(ArtifactRefused, match=r"changed while it was open: \S+\.data"):
        OrtCpu(1).open(bundle, "step")
