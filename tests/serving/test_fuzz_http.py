"""Random requests from the schema of the service, by schemathesis: no answer is a server error."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from http_client import Running

pytestmark = pytest.mark.serving
SECONDS = os.environ.get("SERVING_FUZZ_SECONDS", "300")


@pytest.mark.timeout(900)
def test_no_server_error(tiny_service: Running, tmp_path: Path) -> None:
    if find_spec("schemathesis") is None:
        pytest.skip("schemathesis is not installed")
    program = Path(sys.executable).parent / "schemathesis"
    checks = "not_a_server_error,status_code_conformance,content_type_conformance,response_headers_conformance"
    command = [str(program), "run", f"{tiny_service.ready['url']}openapi.json", "--max-time", SECONDS]
    command += ["--checks", checks, "--mode", "all", "--max-examples", "100000", "--no-color"]
    command += ["--phases", "coverage,fuzzing", "--include-path-regex", "images"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=850)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    print(done.stdout[-600:])
    assert tiny_service.get("/health/ready").status == 200
    assert tiny_service.metric("flexvar_worker_restarts_total") == 0
