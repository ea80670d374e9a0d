"""504 images of the demo model, with processes that are killed at random: the features are those of a calm run."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

MODEL = Path(__file__).parents[3] / "demo" / "model"
COUNT, SHARD, KILLS = 504, 21, 20
COMMAND = "from flexvar_runtime.cli.main import main; main()"


@pytest.fixture(scope="module")
def demo_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from flexvar_export.bundle import export_bundle

    path = tmp_path_factory.mktemp("demo") / "demo.bundle"
    export_bundle(MODEL / "transformer.safetensors", MODEL / "vae.safetensors", path)
    return path


def started(bundle: Path, network: Path, folder: Path) -> subprocess.Popen[bytes]:
    options = ["-o", folder, "--network", network, "--count", COUNT, "--shard-size", SHARD, "--threads", 1]
    arguments = ["evaluate", "sample", bundle, *options, "--backend", "ort-cpu"]
    with (folder.parent / "messages.txt").open("ab") as messages:
        return subprocess.Popen([sys.executable, "-c", COMMAND, *map(str, arguments)], stderr=messages)


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((folder / "shards").iterdir())}


@pytest.fixture(scope="module")
def calm(demo_bundle: Path, tiny_network: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("calm") / "run"
    assert started(demo_bundle, tiny_network, folder).wait() == 0
    made = content(folder)
    assert len(made) == COUNT // SHARD
    return made


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_features_are_those_of_the_calm_run(
    demo_bundle: Path, tiny_network: Path, tmp_path: Path, calm: dict[str, bytes], workers: int
) -> None:
    folder, draw, killed = tmp_path / "run", random.Random(workers), 0
    running = [started(demo_bundle, tiny_network, folder) for _ in range(workers)]
    while killed < KILLS:
        time.sleep(draw.uniform(0.2, 2.5))
        victim = draw.randrange(workers)
        if running[victim].poll() is None:
            running[victim].send_signal(signal.SIGKILL)
        killed += running[victim].wait() == -signal.SIGKILL
        running[victim] = started(demo_bundle, tiny_network, folder)
    # one more, for shards that all others saw as claimed
    codes = [process.wait() for process in running]
    codes.append(started(demo_bundle, tiny_network, folder).wait())
    assert codes == [0] * (workers + 1), (tmp_path / "messages.txt").read_text()[-2000:]
    assert content(folder) == calm
