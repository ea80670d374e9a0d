"""Run the cases of some seeds in this process: `worker.py KIND DESK FIRST END`. Writes one line of JSON about each.

It ends at END, or after the first case that was wrong.
"""

from __future__ import annotations

import faulthandler
import importlib
import json
import os
import resource
import shutil
import sys
import time
from pathlib import Path

from outcome import MEMORY, PeakMemory, Wrong, described

ADDRESSES = 12 * 2**30  # bytes; protects the machine from a case that takes all memory


def main(kind: str, desk: Path, first: int, end: int) -> None:
    faulthandler.enable()
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESSES, ADDRESSES))
    report, peak = os.fdopen(os.dup(1), "w"), PeakMemory()
    os.dup2(2, 1)  # what a case prints is no report
    module = importlib.import_module(kind)
    module.prepare(desk)
    for seed in range(first, end):
        case = desk.parent / f"{kind}-{seed}"
        shutil.rmtree(case, ignore_errors=True)
        for name in ("HOME", "XDG_CACHE_HOME", "XDG_STATE_HOME"):
            os.environ[name] = str(case / "home")
        problem, ended, started = None, None, time.monotonic()
        peak.start()
        try:
            ended = module.run(desk, case, seed)
        except Wrong as error:
            problem = str(error)
        except Exception as error:  # a fault of the tests themselves
            problem = f"the test failed: {described(error)}"
        memory = peak.above()
        if problem is None and memory > MEMORY:
            problem = f"{memory >> 20} MB of memory"
        os.chdir(desk)
        shutil.rmtree(case, ignore_errors=True)
        seconds = time.monotonic() - started
        line = {"seed": seed, "ended": ended, "problem": problem, "seconds": seconds, "bytes": memory}
        report.write(json.dumps(line) + "\n")
        report.flush()
        if problem is not None:
            return  # what a wrong case has left in this process must not touch the next one


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
