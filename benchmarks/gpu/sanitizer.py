"""Our kernels compared with the host, and then run under compute-sanitizer where it is installed."""

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
LAST_WORDS = 1000  # letters
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
            f"other results than the host's in {', '.join(wrong)}",
            expected="equal results",
            fix="run python -m flexvar_bench.gpu.kernel_checks, and correct the kernel in runtime/cuda",
        )
    if result["memcheck"].get("exit_code"):
        said = result["memcheck"]["last_words"] or result["memcheck"]["stderr"]
        raise DeviceFailed(
            f"memcheck: {said}",
            expected="no error from memcheck",
            fix="run compute-sanitizer on python -m flexvar_bench.gpu.kernel_checks, and correct the kernel it names",
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
    last_words, stderr = (text.strip()[-LAST_WORDS:] for text in (done.stdout, done.stderr))
    return {"tool": str(tool), "exit_code": done.returncode, "last_words": last_words, "stderr": stderr}
