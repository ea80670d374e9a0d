"""What goes wrong: workers that die or hang, clients that go away, signals."""

from __future__ import annotations

import base64
import io
import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from http_client import Running, connect, flexvar_serve, png, until
from PIL import Image
from stub_service import CROWDED, pixels_of

Start = Callable[..., Running]
SLOW = b'{"prompt": "slow", "n": 1}'


def send(connection: socket.socket, body: bytes = SLOW, more: bytes = b"") -> None:
    head = b"POST /v1/images/generations HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n" + more
    connection.sendall(head + b"content-length: %d\r\n\r\n" % len(body) + body)


def test_a_worker_is_killed_in_the_middle_of_a_batch(start_stub: Start) -> None:
    running = start_stub(layout={"devices": [None, None]})
    before = running.workers
    with ThreadPoolExecutor(4) as pool:
        lost = pool.submit(running.generate, prompt="dies")
        other = pool.submit(running.generate, prompt="slow")
        assert lost.result().status == 503 and lost.result().headers["retry-after"] == "1"
        assert other.result().status == 200
    until(lambda: len(running.workers) == 2)
    assert len({*before} & {*running.workers}) == 1
    assert running.metric("flexvar_worker_restarts_total") == 1
    until(lambda: running.generate(prompt="plain").status == 200)


def test_a_worker_that_hangs_is_replaced(start_stub: Start) -> None:
    running = start_stub(hang_seconds=1.0)
    before = running.workers
    assert running.generate(prompt="hangs").status == 503
    until(lambda: running.get("/health/ready").status == 200)
    assert running.workers != before and running.generate(prompt="plain").status == 200


@pytest.mark.serving
def test_an_idle_worker_that_is_stopped_is_replaced(start_stub: Start) -> None:
    running = start_stub(hang_seconds=1.0)
    [worker] = running.workers
    os.kill(worker, signal.SIGSTOP)
    until(lambda: running.workers not in ([worker], []), 20)
    until(lambda: running.generate(prompt="plain").status == 200)


def test_exit_7_when_workers_keep_dying(start_stub: Start) -> None:
    running = start_stub()
    end = time.monotonic() + 60
    while running.process.poll() is None and time.monotonic() < end:
        try:
            assert running.generate(prompt="dies").status == 503
        except OSError:
            continue
    assert running.process.wait(10) == 7
    assert "worker processes ended within" in "".join(running.log)


def test_a_bundle_that_cannot_be_opened_ends_the_service() -> None:
    program = Path(__file__).with_name("stub_service.py")
    settings = '{"layout": {"devices": ["refused"]}}'
    done = subprocess.run([sys.executable, str(program), settings], capture_output=True, text=True, timeout=60)
    assert done.returncode == 6 and "It does not fit" in done.stderr and not done.stdout


def test_a_worker_whose_gpu_failed_gets_no_other_request(start_stub: Start) -> None:
    running = start_stub()
    [before] = running.workers
    with ThreadPoolExecutor(6) as pool:
        busy = pool.submit(running.generate, prompt="slow")
        until(lambda: running.metric("flexvar_queue_seconds_count") == 1)
        failing = pool.submit(running.generate, {"x-flexvar-exact": "1"}, prompt="no gpu")
        until(lambda: running.metric("flexvar_queue_images") == 1)
        others = [pool.submit(running.generate, prompt="plain") for _ in range(4)]
        assert busy.result().status == 200 and failing.result().status == 503
        assert {job.result().status for job in others} == {200}
    assert running.workers != [before]


def test_an_error_of_the_system_in_the_model_is_not_the_end_of_the_worker(start_stub: Start) -> None:
    running = start_stub()
    before = running.workers
    name = {"x-request-id": "the-one-that-fails"}
    assert running.generate(name, prompt="no file").status == 500
    assert running.generate(prompt="plain").status == 200 and running.workers == before
    until(lambda: "the-one-that-fails" in "".join(line for line in running.log if "worker failed on" in line))
    assert "FileNotFoundError: weights.bin" in "".join(running.log)


@pytest.mark.serving
def test_a_worker_without_clients_is_given_as_much_time(start_stub: Start) -> None:
    running = start_stub(hang_seconds=0.5)
    assert running.generate(prompt="slow").status == 200  # from now on such a batch is expected to take 0.16 s
    connection = connect(running)
    send(connection, b'{"prompt": "long"}')
    until(lambda: running.metric("flexvar_queue_seconds_count") == 2)
    connection.close()
    time.sleep(2)
    assert running.metric("flexvar_worker_restarts_total") == 0


def test_a_stream_whose_worker_ends(start_stub: Start) -> None:
    running = start_stub()
    [*_, (kind, data)] = running.generate(prompt="dies", stream=True, partial_images=3).events()
    assert kind == "error" and data["error"]["code"] == "worker_lost"
    counted = 'flexvar_requests_total{method="POST",route="/v1/images/generations",status="503"}'
    until(lambda: running.metric(counted) == 1)
    assert running.metric('flexvar_rejected_total{reason="worker_lost"}') == 1


def test_streams_that_share_a_batch_which_runs_in_parts(start_stub: Start) -> None:
    """Each client gets the scales of its own image, once."""
    running = start_stub()
    with ThreadPoolExecutor(3) as pool:
        busy = pool.submit(running.generate, prompt="slow")
        until(lambda: running.metric("flexvar_queue_seconds_count") == 1)
        streams = [
            pool.submit(running.generate, prompt="crowded", seed=seed, stream=True, partial_images=3) for seed in (1, 2)
        ]
        until(lambda: running.metric("flexvar_queue_images") == 2)
        assert busy.result().status == 200
        for seed, stream in zip((1, 2), streams, strict=True):
            events = [data for _, data in stream.result().events()]
            sides = [int(data["size"].split("x")[0]) for data in events]
            assert sides == [16, 32, 48, 64]
            for data, side in zip(events, sides, strict=True):
                found = np.asarray(Image.open(io.BytesIO(base64.b64decode(data["b64_json"]))))
                assert np.array_equal(found, pixels_of(CROWDED, seed, 0, side, side))
    assert running.metric("flexvar_batch_images_count") == 3


def test_sigterm_finishes_what_was_accepted(start_stub: Start) -> None:
    running = start_stub()
    with ThreadPoolExecutor(12) as pool:
        jobs = [pool.submit(running.generate, prompt="slow") for _ in range(12)]
        until(lambda: running.metric("flexvar_queue_images") >= 8)
        running.process.send_signal(signal.SIGTERM)
        answers = [job.result() for job in jobs]
    assert {answer.status for answer in answers} == {200}
    assert running.process.wait(10) == 0


def test_a_draining_service_is_not_ready_but_still_answers(start_stub: Start) -> None:
    running = start_stub(drain_delay=1.5)
    running.process.send_signal(signal.SIGTERM)
    until(lambda: running.get("/health/ready").status == 503)
    assert running.get("/health/live").status == 200 and running.generate(prompt="plain").status == 200
    assert running.process.wait(10) == 0


def test_a_second_signal_ends_at_once(start_stub: Start) -> None:
    """Also while a worker is busy. Its client is answered."""
    running = start_stub(drain_delay=60.0)
    with ThreadPoolExecutor(1) as pool:
        busy = pool.submit(running.generate, prompt="hangs")
        until(lambda: running.metric("flexvar_queue_seconds_count") == 1)
        running.process.send_signal(signal.SIGTERM)
        until(lambda: running.get("/health/ready").status == 503)
        running.process.send_signal(signal.SIGTERM)
        assert running.process.wait(8) == 130
        assert busy.result().status == 503
    assert "Traceback" not in "".join(running.log)


def test_workers_end_with_the_service(start_stub: Start) -> None:
    running = start_stub(layout={"devices": [None, None]})
    workers = running.workers
    assert len(workers) == 2
    running.process.kill()
    running.process.wait(10)
    until(lambda: not any(os.path.exists(f"/proc/{pid}/exe") and _alive(pid) for pid in workers))


def _alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_ctrl_c_reaches_only_the_service(start_stub: Start) -> None:
    """A terminal sends it to the workers too."""
    running = start_stub(layout={"devices": [None, None]})
    assert len(running.workers) == 2
    for worker in running.workers:
        os.kill(worker, signal.SIGINT)
        os.kill(worker, signal.SIGTERM)
    assert running.generate(prompt="plain").status == 200
    assert running.metric("flexvar_worker_restarts_total") == 0


def test_a_client_that_goes_away_in_the_queue(start_stub: Start) -> None:
    running = start_stub(model={"batch_sizes": [1]})
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(running.generate, prompt="slow")
        connections = [connect(running) for _ in range(6)]
        for connection in connections:
            send(connection)
        until(lambda: running.metric("flexvar_queue_images") >= 5)
        for connection in connections:
            connection.close()
        until(lambda: running.metric("flexvar_queue_images") == 0)
        assert first.result().status == 200
    assert running.metric('flexvar_cancelled_total{stage="queued"}') >= 5
    assert running.generate(prompt="plain").status == 200


def test_a_client_that_goes_away_at_any_scale(start_stub: Start) -> None:
    """The batch ends early, and the worker takes the next one."""
    running = start_stub()
    for i in range(6):
        connection = connect(running)
        send(connection)
        time.sleep(0.03 * i)
        connection.close()
    until(lambda: running.metric('flexvar_cancelled_total{stage="running"}') >= 3)
    started = time.monotonic()
    assert running.generate(prompt="plain").status == 200 and time.monotonic() < started + 5
    finished = running.metric("flexvar_generation_seconds_count")
    assert finished < 4, "cancelled batches ran to their end"


def test_a_client_that_leaves_a_stream(start_stub: Start) -> None:
    running = start_stub()
    for size in (1, 400, 900):
        connection = connect(running)
        send(connection, b'{"prompt": "slow", "stream": true, "partial_images": 3}')
        connection.recv(size)
        connection.close()
    until(
        lambda: sum(running.metric(f'flexvar_cancelled_total{{stage="{one}"}}') for one in ("running", "queued")) >= 3
    )
    assert running.generate(prompt="plain").status == 200


def test_one_of_two_clients_of_a_batch_goes_away(start_stub: Start) -> None:
    running = start_stub()
    with ThreadPoolExecutor(4) as pool:
        first = pool.submit(running.generate, prompt="slow")
        until(lambda: running.metric("flexvar_queue_seconds_count") == 1)
        leaving = connect(running)
        send(leaving)
        stays = pool.submit(running.generate, prompt="slow", seed=1)
        until(lambda: running.metric("flexvar_queue_seconds_count") == 3)
        leaving.close()
        assert stays.result().status == 200 and first.result().status == 200


def test_a_full_disk(tiny_bundle: Path) -> None:
    """The log cannot be written, and no byte of any file, such as a temporary one of an upload."""
    program = Path(sys.executable).parent / "flexvar"
    command = [program, "serve", str(tiny_bundle), "--port", "0", "--json", "--workers", "0", "--threads", "1"]

    def write_no_file() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))

    with open("/dev/full", "w") as full:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=full, text=True, preexec_fn=write_no_file)
    try:
        assert process.stdout is not None
        running = Running(process, json.loads(process.stdout.readline()))
        noise = np.random.default_rng(0).integers(0, 256, (1024, 1024, 3), np.uint8)
        for _ in range(3):
            assert running.generate(prompt="1").status == 200
            assert running.edit({"image": png(Image.fromarray(noise))}, prompt="1").status == 200
        assert running.stop() == 0
    finally:
        process.kill()


@pytest.mark.serving
def test_sigterm_while_a_worker_opens_the_bundle(tiny_bundle: Path) -> None:
    program = Path(sys.executable).parent / "flexvar"
    command = [program, "serve", str(tiny_bundle), "--port", "0", "--workers", "1"]
    for seconds in (0.9, 1.5):
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        time.sleep(seconds)
        process.send_signal(signal.SIGTERM)
        _, log = process.communicate(timeout=20)
        assert process.returncode in (0, -signal.SIGTERM) and "Traceback" not in log, log


def test_a_bundle_that_is_replaced(bundle_copy: Path, ordered_bundle: Callable[[str, Sequence[str]], Path]) -> None:
    """A new worker would serve another bundle under the name of the old one, so the service ends."""
    running = flexvar_serve(bundle_copy, "--workers", "1", "--threads", "1")
    try:
        assert running.generate(prompt="1").status == 200
        shutil.rmtree(bundle_copy)
        shutil.copytree(ordered_bundle("1_2_4", ["1_2_4"]), bundle_copy)
        [worker] = running.workers
        os.kill(worker, signal.SIGKILL)
        assert running.process.wait(20) == 5
        assert "replaced" in "".join(running.log)
    finally:
        running.process.kill()
