"""Compares our kernels with the host and with float64, then runs them under compute-sanitizer if it is installed."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

from flexvar_runtime.cuda.gpu import find_gpu
from flexvar_runtime.errors import BackendUnavailable, DeviceFailed

from .files import Save
from .kernel_checks import kernel_checks
from .kernel_harness import KernelHarness
from .layer_checks import layer_checks
from .tools import find_tool

TOOL = "compute-sanitizer"
FOUND_ERRORS = 7  # exit code
KEPT_CHARACTERS = 1000  # of each output
MOST_NAMED = 8  # wrong checks in a message
CHECKS = (sys.executable, "-m", "flexvar_bench.gpu.kernel_checks")


def sanitize(save: Save, *, small: bool = False) -> None:
    """Check our kernels, then check them again under memcheck. small: check fewer sizes, for an emulated device.

    Raises DeviceFailed for a kernel whose result is wrong, or for an error that memcheck reports.
    """
    harness = KernelHarness()
    result: dict[str, Any] = {"equal_host": kernel_checks(harness)}
    save(result)
    layers = {check.name: check.to_json() for check in layer_checks(harness, small=small)}
    result["float64"] = layers
    save(result)
    harness.close()
    result["memcheck"] = memcheck()
    save(result)
    wrong = [name for name, holds in result["equal_host"].items() if not holds]
    wrong += [name for name, check in layers.items() if not check["holds"]]
    if wrong:
        raise DeviceFailed(
            f"{len(wrong)} kernel checks do not hold: {', '.join(wrong[:MOST_NAMED])}.",
            expected="results within their bounds",
            fix="Correct the kernel in runtime/cuda, then run the stage `first` again.",
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
