"""Run many cases of one kind, report those that ended wrongly, and go on: `campaign.py KIND DESK FIRST END`.

The cases run in a worker process, one after the other. If it dies, or if a case takes longer than SECONDS, the case of
that moment is reported. After a case that was wrong, a new worker takes the next seed.
"""

from __future__ import annotations

import collections
import contextlib
import importlib
import json
import os
import re
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
SECONDS = 60  # longest time of a case
STARTING = 60  # seconds more for the first case of a worker
SHOWN = 1500  # characters of a case

Line = dict[str, Any]


def results(kind: str, desk: Path, first: int, end: int) -> Iterator[Line]:
    """A line about every seed. problem: None, or what was wrong."""
    while first < end:
        for line in _worker(kind, desk, first, end):
            yield line
            first = line["seed"] + 1


def _worker(kind: str, desk: Path, first: int, end: int) -> Iterator[Line]:
    """The lines of one worker. If it dies or is killed, the last line describes the case of that moment."""
    command = [sys.executable, str(HERE / "worker.py"), kind, str(desk), str(first), str(end)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    with tempfile.TemporaryFile() as log:
        worker = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, env=environment, start_new_session=True)
        assert worker.stdout is not None
        late = False
        try:
            with selectors.DefaultSelector() as selector:
                selector.register(worker.stdout, selectors.EVENT_READ)
                limit, rest = SECONDS + STARTING, b""
                while first < end:
                    if not selector.select(limit):
                        late = True
                        os.kill(worker.pid, signal.SIGABRT)  # faulthandler prints where it is
                        break
                    more = os.read(worker.stdout.fileno(), 65536)
                    if not more:
                        break
                    *lines, rest = (rest + more).split(b"\n")
                    for line in map(json.loads, lines):
                        if line["problem"] is None and line["seconds"] > SECONDS:
                            line["problem"] = f"{line['seconds']:.0f} s"
                        first, limit = line["seed"] + 1, SECONDS
                        yield line
            code = 0
            if first < end and not late:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    code = worker.wait(STARTING)
            if code or late:
                log.seek(0)
                text = " ".join(log.read().decode("utf-8", "replace")[-1500:].split())
                how = f"no end after {SECONDS} s" if late else f"the process ended with {code}"
                yield {"seed": first, "ended": None, "problem": f"{how}: {text}", "seconds": SECONDS, "bytes": 0}
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(worker.pid, signal.SIGKILL)  # also what a case has started
            worker.wait()
            worker.stdout.close()


def main(kind: str, desk: Path, first: int, end: int) -> int:
    """Print a summary, and of every distinct failure the first seed and what it ran. Returns the exit code."""
    started, ended, most = time.monotonic(), collections.Counter[str](), 0
    wrong: dict[str, list[Line]] = {}
    for line in results(kind, desk, first, end):
        most = max(most, line["bytes"])
        if line["problem"] is None:
            ended[line["ended"]] += 1
            continue
        alike = wrong.setdefault(_sort(line["problem"]), [])
        alike.append(line)
        if len(alike) == 1:
            show = importlib.import_module(kind).show(desk, line["seed"])
            print(f"{kind} seed {line['seed']}: {line['problem']}\n  {show[:SHOWN]}", flush=True)
    seconds = time.monotonic() - started
    counts = ", ".join(f"{count} {how}" for how, count in ended.most_common())
    total = sum(map(len, wrong.values()))
    print(f"{kind}, seeds {first} to {end - 1}: {total} wrong; {counts}; {seconds:.0f} s, {most >> 20} MB at most")
    for sort, alike in sorted(wrong.items(), key=lambda pair: -len(pair[1])):
        print(f"  {len(alike)} times {sort}: seeds {' '.join(str(line['seed']) for line in alike[:5])}")
    if wrong:
        seed = next(iter(wrong.values()))[0]["seed"]
        print(f"Run one alone: make fuzz FUZZ_FIRST={seed} FUZZ_{kind.upper()}=1 PYTEST_ARGS='-k {kind}'")
    return 1 if wrong else 0


def _sort(problem: str) -> str:
    """A problem without what differs from case to case: the type of an exception and its place, or the first words."""
    place = re.search(r" at \S+:\d+$", problem)
    kind = problem.split(":")[0]
    return kind + place[0] if place else re.sub(r"\d+", "N", kind)[:60]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], Path(sys.argv[2]).absolute(), int(sys.argv[3]), int(sys.argv[4])))
