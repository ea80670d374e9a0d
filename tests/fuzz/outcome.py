"""What a case may do: raise an error of this project with a documented exit code, in little memory."""

from __future__ import annotations

import contextlib
import re
import traceback
from collections.abc import Callable
from pathlib import Path

CODES = {0, 2, 3, 4, 5, 6, 130}
MEMORY = 2**30  # bytes above the memory before the case
PACKAGES = re.compile(
    r"flexvar_(ref|runtime|export|serving|evaluation|bench)|/(runtime|export|serving|evaluation|benchmarks|flexvar_ref)/"
)


class Wrong(Exception):
    """A case that did not end as it must. The text says how."""


def described(error: BaseException) -> str:
    """Type and text of an error, and the last line of this project that was running."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "/tests/" not in frame.filename]
    ours = [frame for frame in frames if PACKAGES.search(frame.filename) and "site-packages" not in frame.filename]
    place = "" if not (ours or frames) else " at {0.filename}:{0.lineno}".format((ours or frames)[-1])
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}{place}"


def refused(action: Callable[[], object]) -> str | None:
    """Run an action. Returns the name of the error of this project that it raised, or None. Raises Wrong for others."""
    from flexvar_runtime import FlexVARError

    try:
        action()
    except FlexVARError as error:
        return type(error).__name__
    except Exception as error:
        raise Wrong(described(error)) from error
    return None


def require_exit(code: object, arguments: list[str], out: str, err: str) -> None:
    """Raise Wrong unless a command ended as documented: exit code, no traceback, and a reason if it failed."""
    if "Traceback (most recent call last)" in out + err:
        raise Wrong(f"exit {code} with a traceback: {' '.join(err.strip().splitlines()[-1:])[:300]}")
    if code not in CODES:
        raise Wrong(f"exit {code}: {err.strip()[-300:]}")
    if code and not err.strip():
        raise Wrong(f"exit {code} without a word on standard error")
    flag = any(
        word == "--json" and not before.startswith("-")
        for before, word in zip(["", *arguments], arguments, strict=False)
    )
    if flag and code not in (0, 130) and not out.strip():
        raise Wrong(f"exit {code} with --json, and nothing on standard output")


class PeakMemory:
    """The largest memory of this process since `start`, above that at `start`, in bytes. 0 where Linux lacks it."""

    def start(self) -> None:
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # sets the peak to the present memory
        self._before = _status("VmHWM")

    def above(self) -> int:
        return max(0, _status("VmHWM") - self._before)


def _status(key: str) -> int:
    found = re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) * 1024 if found else 0
