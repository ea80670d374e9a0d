"""Our kernels alone: against the host, then once more under compute-sanitizer, where it is installed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

from flexvar_runtime.errors import DeviceFailed

from .files import Save
from .kernel_checks import kernel_checks
from .tools import find_tool

TOOL = "compute-sanitizer"
FOUND_ERRORS = 7  # exit code
LAST_WORDS = 1000  # letters
CHECKS = (sys.executable, "-m", "flexvar_bench.gpu.kernel_checks")


def sanitize(save: Save) -> None:
    """Raises DeviceFailed for a kernel that computes something else, or that memcheck finds at fault."""
    result: dict[str, Any] = {"equal_host": kernel_checks()}
    save(result)
    tool = find_tool(TOOL)
    result["memcheck"] = _memcheck(tool) if tool else {"reason": f"not measured: no {TOOL} here"}
    save(result)
    wrong = [name for name, holds in result["equal_host"].items() if not holds]
    if wrong:
        raise DeviceFailed(f"other results in {', '.join(wrong)}", expected="those of the host", fix="see the kernel")
    if result["memcheck"].get("exit_code"):
        raise DeviceFailed(f"memcheck: {result['memcheck']['last_words']}", expected="no error", fix="see its report")


def _memcheck(tool: Path) -> dict[str, Any]:
    command = [str(tool), "--tool", "memcheck", "--error-exitcode", str(FOUND_ERRORS), *CHECKS]
    done = subprocess.run(command, capture_output=True, text=True)
    return {"tool": str(tool), "exit_code": done.returncode, "last_words": done.stdout.strip()[-LAST_WORDS:]}
