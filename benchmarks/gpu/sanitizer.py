"""Compares our kernels with the host, then runs them under compute-sanitizer if it is installed."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

from flexvar_runtime.cuda.gpu import find_gpu
from flexvar_runtime.errors import BackendUnavailable, DeviceFailed

from .files import Save
from .kernel_checks import kernel_checks
from .tools import find_tool

TOOL = "compute-sanitizer"
FOUND_ERRORS = 7  # exit code
KEPT_CHARACTERS = 1000  # of each output
CHECKS = (sys.executable, "-m", "flexvar_bench.gpu.kernel_checks")


def sanitize(save: Save) -> None:
    """Raises DeviceFailed for a kernel whose result differs from the host's, or for an error that memcheck reports."""
    result: dict[str, Any] = {"equal_host": kernel_checks()}
    save(result)
    result["memcheck"] = memcheck()
    save(result)
    wrong = [name for name, holds in result["equal_host"].items() if not holds]
    if wrong:
        raise DeviceFailed(
            f"These kernel checks differ from the host: {', '.join(wrong)}.",
            expected="equal results",
            fix="Correct the kernel in runtime/cuda, then run python -m flexvar_bench.gpu.kernel_checks",
        )
    if result["memcheck"].get("exit_code"):
        said = result["memcheck"]["last_words"] or result["memcheck"]["stderr"]
        raise DeviceFailed(
            f"memcheck found an error in our kernels: {said}",
            expected="no error from memcheck",
            fix="Correct that kernel, then run compute-sanitizer python -m flexvar_bench.gpu.kernel_checks",
        )


def memcheck() -> dict[str, Any]:
    """The exit code and the last output of the kernel checks under memcheck, or the reason why they were not run."""
    tool = find_tool(TOOL)
    if tool is None:
        return {"reason": f"not measured: {TOOL} is not installed here"}
    try:
        find_gpu()  # a rehearsal emulates the GPU in its own process only
    except BackendUnavailable as error:
        return {"reason": f"not measured: there is no GPU here ({error.got})"}
    command = [str(tool), "--tool", "memcheck", "--error-exitcode", str(FOUND_ERRORS), *CHECKS]
    done = subprocess.run(command, capture_output=True, text=True)
    last_words, stderr = (text.strip()[-KEPT_CHARACTERS:] for text in (done.stdout, done.stderr))
    return {"tool": str(tool), "exit_code": done.returncode, "last_words": last_words, "stderr": stderr}
