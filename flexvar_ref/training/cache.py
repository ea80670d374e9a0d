"""Samples drawn once and kept on disk, mapped into memory: training then waits for no drawing.

A folder named after what it holds: `values.npy`, `labels.npy` and `done.npy`, one mark a block. Building it again goes
on where it stopped; a finished one is only opened.
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

from ..tokenizer import Tokenizer
from .data import Dataset, batch
from .errors import RunRefused
from .feed import signed

log = logging.getLogger(__name__)

BLOCK = 256  # samples between two marks
Array = NDArray[Any]
Progress = Callable[[int, int], None]
"""(samples done, of how many) -> None"""


def image_key(dataset: Dataset, count: int) -> str:
    """Names the images of a data set: its parameters, and the code that draws it."""
    code = b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("scenes/*.py")))
    sizes = {k: v for k, v in vars(dataset).items() if not k.startswith("_")} | {
        "classes": dataset.classes,
        "length": dataset.length,
    }
    text = f"{type(dataset).__name__} {sorted(sizes.items())} {count}"
    return f"images-{hashlib.sha256(text.encode() + code).hexdigest()[:16]}"


def keep_images(
    dataset: Dataset, count: int, folder: Path, workers: int, progress: Progress | None = None
) -> tuple[Array, Array]:
    """Samples 0 … count − 1: uint8 (N, H, W, 3) and int64 labels (N,), drawn by `workers` processes."""
    folder = folder / image_key(dataset, count)
    height, width = dataset.sample(0)[0].shape[1:]
    files = _open(folder, (count, height, width, 3), np.dtype(np.uint8))
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
            waiting = {pool.submit(_draw, dataset, files.rows(block)): block for block in blocks}
            for future in as_completed(waiting):
                finish(waiting[future], future.result())
    return files.values, files.labels


def latent_key(tokenizer: Tokenizer, images: str) -> str:
    """Names the latents of images under a tokenizer: its weights and what they encode."""
    digest = hashlib.sha256(images.encode())
    for name, value in tokenizer.state_dict().items():
        digest.update(name.encode() + value.detach().cpu().contiguous().numpy().tobytes())
    return f"latents-{digest.hexdigest()[:16]}"


def keep_latents(
    tokenizer: Tokenizer,
    images: Array,
    labels: Array,
    folder: Path,
    name: str,
    encode: Callable[[Tensor], Tensor],
    progress: Progress | None = None,
) -> tuple[Array, Array]:
    """The latents of `images`, float16 (N, D, h, w), before any resize: every schedule is quantised from them."""
    count, height, width = images.shape[:3]
    factor, dim = tokenizer.config.downsampling, tokenizer.config.code_dim
    files = _open(folder / name, (count, dim, height // factor, width // factor), np.dtype(np.float16))
    for block in range(len(files.done)):
        if files.done[block]:
            continue
        rows = files.rows(block)
        parts = torch.split(torch.from_numpy(images[rows.start : rows.stop]), 32)
        latents = torch.cat([encode(signed(part)).float().cpu() for part in parts]).numpy()
        if np.abs(latents).max() > np.finfo(np.float16).max:
            raise RunRefused(
                "a latent beyond float16", expected="a trained tokenizer", fix="train with data.samples = 0"
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
        """The block, and only when it is on the disk its mark."""
        rows = self.rows(block)
        self.values[rows.start : rows.stop] = values
        self.labels[rows.start : rows.stop] = labels
        for array in (self.values, self.labels):
            array.flush()  # type: ignore[attr-defined]
        self.done[block] = 1
        self.done.flush()  # type: ignore[attr-defined]


def _open(folder: Path, shape: tuple[int, ...], dtype: np.dtype[Any]) -> _Files:
    folder.mkdir(parents=True, exist_ok=True)
    blocks = -(-shape[0] // BLOCK)
    arrays = [
        _array(folder / f"{name}.npy", sizes, kind)
        for name, sizes, kind in (
            ("values", shape, dtype),
            ("labels", shape[:1], np.dtype(np.int64)),
            ("done", (blocks,), np.dtype(np.uint8)),  # last: where it is, the others are complete files
        )
    ]
    return _Files(*arrays)


def _array(path: Path, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    if not path.exists():
        partial = path.with_name(f".{path.name}.partial")
        open_memmap(partial, "w+", dtype, shape).flush()
        partial.replace(path)
    array: Array = open_memmap(path, "r+")
    if array.shape != shape or array.dtype != dtype:
        raise RunRefused(
            f"{path} of shape {array.shape}, {array.dtype}", expected=f"{shape}, {dtype}", fix=f"delete {path.parent}"
        )
    return array


def _draw(dataset: Dataset, rows: range) -> tuple[Array, Array]:
    images, labels = batch(dataset, rows.start, len(rows))
    pixels = ((images + np.float32(1)) * np.float32(127.5)).round().clip(0, 255).astype(np.uint8)
    return pixels.transpose(0, 2, 3, 1), labels
