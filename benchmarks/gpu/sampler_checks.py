"""Compares draws and tokens of our kernels with the host, and times the sampling kernel. No graph is needed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flexvar_runtime import Sampling, ScaleSchedule
from flexvar_runtime.backends.device_arrays import DeviceArrays
from flexvar_runtime.cuda import kernels
from flexvar_runtime.cuda.array import DeviceArray
from flexvar_runtime.cuda.kernels import KernelConfig
from flexvar_runtime.model.noise import draws_of_images
from flexvar_runtime.model.sampling import sample

from ..timing import quantiles
from . import first_gpu
from .files import Save

SEEDS = (0, 1, 2**63, 2**64 - 1)
INDICES = (0, 5, 2**32, 2**64 - 1)
ROWS = 512
LAUNCHES = 20  # captured and timed together, because one takes less time than its launch
WARM_UPS, REPEATS = 2, 10
QUICK_LAUNCHES = 2


def device_kernels(
    vocabulary: int, schedule: ScaleSchedule, batches: Sequence[int], save: Save, *, quick: bool = False
) -> None:
    """Compile our kernels, then check and time them on the first GPU. quick: time few launches, for a rehearsal."""
    device = first_gpu.start_gpu()
    arrays = DeviceArrays(device)
    device.load(KernelConfig(vocabulary, 32, 64))
    result: dict[str, Any] = {"device": device.name, "capability": device.capability, "vocabulary": vocabulary}
    result["draws_equal_host"] = draws_equal(arrays, schedule)
    save(result)
    result["tokens_equal_host"] = tokens_equal(arrays, vocabulary)
    save(result)
    result["sampling"] = []
    for batch in batches:
        seconds = sampling_seconds(arrays, vocabulary, schedule, batch, QUICK_LAUNCHES if quick else LAUNCHES)
        result["sampling"].append({"batch": batch, "scale_s": seconds})
        save(result)
    device.synchronize()
    device.close()


def draws_equal(arrays: Any, schedule: ScaleSchedule) -> dict[str, Any]:
    """Compare the 24-bit draws of every scale with those of the host, for seeds and indices up to the largest."""
    checked = different = 0
    for seed in SEEDS:
        seeds = (seed,) * len(INDICES)
        streams = arrays.upload(kernels.stream_block(seeds, INDICES))
        for i, (h, w) in enumerate(schedule):
            out = arrays.empty((len(INDICES), h * w), "uint32")
            arrays.device.launch(kernels.draws(streams, out, scale=i))
            host = draws_of_images(seeds, INDICES, i, h * w)
            checked += host.size
            different += int((arrays.download(out).reshape(-1) != host).sum())
    return {"holds": different == 0, "draws": checked, "different": different}


def tokens_equal(arrays: Any, vocabulary: int) -> list[dict[str, Any]]:
    """Compare tokens drawn from random logits with `sampling.sample`, for several options."""
    logits = (4 * np.random.default_rng(0).standard_normal((1, ROWS, vocabulary))).astype(np.float32)
    rows = []
    for top_k, top_p in ((900, 0.95), (0, 0.0), (1, 0.95), (50, 0.0), (0, 0.9)):
        got = sample_on_device(arrays, logits, ((7,), (3,)), 2, top_k, top_p)
        host = sample(logits[0], draws_of_images((7,), (3,), 2, ROWS), top_k=top_k, top_p=top_p)
        different = int((got != host).sum())
        rows.append({"top_k": top_k, "top_p": top_p, "rows": ROWS, "different": different, "holds": different == 0})
    return rows


def sample_on_device(
    arrays: DeviceArrays,
    logits_BLV: NDArray[np.float32],
    streams: tuple[Sequence[int], Sequence[int]],
    scale: int,
    top_k: int,
    top_p: float,
) -> NDArray[np.int32]:
    """Tokens (B · L,) that our kernel draws from host logits. streams: the seeds and the indices of the images."""
    B, L, V = logits_BLV.shape
    tokens, status = arrays.empty((B, L, 1), "int32"), arrays.empty((kernels.STATUS_WORDS,), "uint32")
    logits = arrays.upload(np.ascontiguousarray(logits_BLV))
    block = arrays.upload(kernels.stream_block(*streams))
    options = upload_options(arrays, top_k, top_p, V)
    arrays.device.zero(status)
    arrays.device.launch(kernels.sample_rows(logits, block, tokens, status, *options, scale=scale))
    found: NDArray[np.int32] = arrays.download(tokens).reshape(-1)
    refused = kernels.read_status(arrays.download(status))
    if refused is not None:
        raise ValueError(f"The kernel refused row {refused.row} of the logits.")
    return found


def upload_options(arrays: DeviceArrays, top_k: int, top_p: float, vocabulary: int) -> tuple[DeviceArray, DeviceArray]:
    """top_k and top_p as the sampling kernel reads them."""
    return (
        arrays.upload(np.array([kernels.top_k_option(top_k, vocabulary)], np.int32)),
        arrays.upload(np.array([kernels.drop_option(top_p)], np.float64)),
    )


def sampling_seconds(
    arrays: Any, vocabulary: int, schedule: ScaleSchedule, batch: int, launches: int = LAUNCHES
) -> list[dict[str, float]]:
    """Times of the sampling kernel for each scale, with the published options and logits as peaked as a model's.

    launches: how many are captured and timed together.
    """
    device = arrays.device
    sampling = Sampling()
    streams = arrays.upload(kernels.stream_block((0,) * batch, range(batch)))
    rng = np.random.default_rng(1)
    one = (4 * rng.standard_normal((schedule.largest, vocabulary))).astype(np.float32)
    whole = arrays.empty((batch, schedule.largest, vocabulary), "float32")
    piece: DeviceArray = arrays.upload(one)
    for i in range(batch):
        device.copy(whole[i], piece)
    status = arrays.empty((kernels.STATUS_WORDS,), "uint32")
    device.zero(status)
    times = []
    for i, (h, w) in enumerate(schedule):
        L = h * w
        logits = whole.reshape(batch * schedule.largest * vocabulary)[: batch * L * vocabulary]
        tokens = arrays.empty((batch, h, w), "int32")
        options = upload_options(arrays, sampling.top_k_at(h, w), sampling.top_p, vocabulary)
        launch = kernels.sample_rows(
            logits.reshape(batch, L, vocabulary),
            streams,
            tokens,
            status,
            *options,
            scale=i,
        )
        many = device.capture(lambda launch=launch: [device.launch(launch) for _ in range(launches)])
        samples = []
        for turn in range(WARM_UPS + REPEATS):
            seconds = device.elapsed(many.launch)
            device.synchronize()
            if turn >= WARM_UPS:
                samples.append(seconds() / launches)
        many.close()
        times.append(quantiles(samples))
    return times
