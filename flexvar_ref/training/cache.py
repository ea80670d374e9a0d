"""A cache on disk of samples that are prepared once, mapped into memory.

Each data set has a folder with `values.npy`, `labels.npy` and `done.npy`, which marks the finished blocks. The name of
the folder is a hash of what its content depends on. An unfinished cache is continued, and a finished one is opened.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.lib.format import open_memmap
from numpy.typing import NDArray
from torch import Tensor

from ..errors import RunRefused
from ..files import write_whole
from ..tokenizer import Tokenizer
from .data import Dataset, batch
from .feed import signed

log = logging.getLogger(__name__)

BLOCK = 256  # samples in a block
Array = NDArray[Any]
Progress = Callable[[int, int], None]
"""(samples done, samples in all) -> None"""


def image_key(dataset: Dataset, count: int) -> str:
    """The folder name for `count` images of a data set: a hash of its settings and of the code that makes images."""
    folder = Path(__file__).parent
    code = b"".join(path.read_bytes() for path in [*sorted(folder.glob("scenes/*.py")), folder / "pictures.py"])
    sizes = {k: v for k, v in vars(dataset).items() if not k.startswith("_")} | {
        "classes": dataset.classes,
        "length": dataset.length,
    }
    text = f"{type(dataset).__name__} {sorted(sizes.items())} {count}"
    return f"images-{hashlib.sha256(text.encode() + code).hexdigest()[:16]}"


def cache_images(
    dataset: Dataset, count: int, folder: Path, workers: int, progress: Progress | None = None
) -> tuple[Array, Array]:
    """Samples 0 … count − 1 of a data set: images, uint8 (N, H, W, 3), and labels, int64 (N,).

    workers: processes that draw them. Raises RunRefused if the folder holds arrays of another shape.
    """
    folder = folder / image_key(dataset, count)
    height, width = dataset.sample(0)[0].shape[1:]
    files = _open_files(folder, (count, height, width, 3), np.dtype(np.uint8))
    blocks = [block for block in range(len(files.done)) if not files.done[block]]
    done = count - sum(len(files.rows(block)) for block in blocks)

    def finish(block: int, drawn: tuple[Array, Array]) -> None:
        nonlocal done
        files.write(block, *drawn)
        done += len(files.rows(block))
        if progress is not None:
            progress(done, count)

    if workers < 2 or len(blocks) < 2:
        for block in blocks:
            finish(block, _draw(dataset, files.rows(block)))
    else:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(workers, mp_context=context) as pool:
            futures = {pool.submit(_draw, dataset, files.rows(block)): block for block in blocks}
            for future in as_completed(futures):
                finish(futures[future], future.result())
    return files.values, files.labels


def latent_key(tokenizer: Tokenizer, images: str) -> str:
    """The folder name for the latents of images: a hash of the tokenizer's weights and of `images`."""
    digest = hashlib.sha256(images.encode())
    for name, value in tokenizer.state_dict().items():
        digest.update(name.encode() + value.detach().cpu().contiguous().numpy().tobytes())
    return f"latents-{digest.hexdigest()[:16]}"


def cache_latents(
    tokenizer: Tokenizer,
    images: Array,
    labels: Array,
    folder: Path,
    name: str,
    encode: Callable[[Tensor], Tensor],
    progress: Progress | None = None,
) -> tuple[Array, Array]:
    """Latents of `images`, float16 (N, D, h, w), and `labels`. Tokens of any schedule are quantized from them.

    name: folder name, see `latent_key`. encode: images (B, 3, H, W) in −1…1 to latents. Raises RunRefused for latents
    beyond the range of float16.
    """
    count, height, width = images.shape[:3]
    factor, dim = tokenizer.config.downsampling, tokenizer.config.code_dim
    files = _open_files(folder / name, (count, dim, height // factor, width // factor), np.dtype(np.float16))
    for block in range(len(files.done)):
        if files.done[block]:
            continue
        rows = files.rows(block)
        parts = torch.split(torch.from_numpy(images[rows.start : rows.stop]), 32)
        latents = torch.cat([encode(signed(part)).float().cpu() for part in parts]).numpy()
        if np.abs(latents).max() > np.finfo(np.float16).max:
            raise RunRefused(
                "The tokenizer's latents exceed the range of float16, in which they are cached.",
                expected="latents in the range of float16",
                fix="Set data.samples = 0 to train without a cache.",
            )
        files.write(block, latents.astype(np.float16), labels[rows.start : rows.stop])
        if progress is not None:
            progress(rows.stop, count)
    return files.values, files.labels


@dataclasses.dataclass(frozen=True)
class _Files:
    values: Array
    labels: Array
    done: Array

    def rows(self, block: int) -> range:
        return range(block * BLOCK, min((block + 1) * BLOCK, len(self.labels)))

    def write(self, block: int, values: Array, labels: Array) -> None:
        """Write a block, and mark it as done once it is on the disk."""
        rows = self.rows(block)
        self.values[rows.start : rows.stop] = values
        self.labels[rows.start : rows.stop] = labels
        for array in (self.values, self.labels):
            array.flush()  # type: ignore[attr-defined]
        self.done[block] = 1
        self.done.flush()  # type: ignore[attr-defined]


def _open_files(folder: Path, shape: tuple[int, ...], dtype: np.dtype[Any]) -> _Files:
    folder.mkdir(parents=True, exist_ok=True)
    blocks = -(-shape[0] // BLOCK)
    arrays = [
        _open_array(folder / f"{name}.npy", sizes, kind)
        for name, sizes, kind in (
            ("values", shape, dtype),
            ("labels", shape[:1], np.dtype(np.int64)),
            ("done", (blocks,), np.dtype(np.uint8)),  # last: where it exists, the others are complete files
        )
    ]
    return _Files(*arrays)


def _open_array(path: Path, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    if not path.exists():
        with write_whole(path) as partial:
            open_memmap(partial, "w+", dtype, shape).flush()
    array: Array = open_memmap(path, "r+")
    if array.shape != shape or array.dtype != dtype:
        raise RunRefused(
            f"{path} holds {array.dtype} of shape {array.shape}, but it must hold {dtype} of shape {shape}.",
            expected=f"{shape}, {dtype}",
            fix=f"Delete {path.parent}.",
        )
    return array


def _draw(dataset: Dataset, rows: range) -> tuple[Array, Array]:
    images, labels = batch(dataset, rows.start, len(rows))
    pixels = ((images + np.float32(1)) * np.float32(127.5)).round().clip(0, 255).astype(np.uint8)
    return pixels.transpose(0, 2, 3, 1), labels
