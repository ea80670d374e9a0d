"""The parts of the model that run outside the graphs: codebook, position table and input bias."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..files.npz import ArrayInfo, read_npz
from .facts import ModelFacts
from .resize import area_matrix, bicubic_matrix, resize

Float32 = NDArray[np.float32]
Tokens = NDArray[np.int32]


@dataclass(frozen=True)
class Tables:
    """Tables of a model, all float32.

    codebook (V, D) with l2-normalised rows. position_table (C, S, S). input_bias (C,) of the code embedding."""

    codebook: Float32
    position_table: Float32
    input_bias: Float32

    @classmethod
    def load(cls, path: Path, model: ModelFacts) -> Tables:
        """Read `tables.npz` of a checked bundle. Raises ArtifactRefused if it does not fit the model, OutOfMemory."""
        shapes = {
            "codebook": (model.vocabulary, model.code_dim),
            "position_table": (model.width, model.position_side, model.position_side),
            "input_bias": (model.width,),
        }
        arrays = {name: ArrayInfo("float32", shape) for name, shape in shapes.items()}
        return cls(**read_npz(path, path.name, arrays, fix="Export the bundle again."))

    def save(self, path: Path) -> None:
        np.savez(path, codebook=self.codebook, position_table=self.position_table, input_bias=self.input_bias)

    def positions(self, h: int, w: int) -> Float32:
        """Position embedding (h·w, C): the table resized by adaptive average pooling, also to larger sizes."""
        side = self.position_table.shape[1]
        table = self.position_table.transpose(1, 2, 0)[None]
        resized: Float32 = resize(np.ascontiguousarray(table), area_matrix(side, h), area_matrix(side, w))
        return resized.reshape(h * w, -1)

    def offset(self, h: int, w: int) -> Float32:
        """Positions + bias (h·w, C), which is added to the embedded codes of every scale but the first."""
        offset: Float32 = self.positions(h, w) + self.input_bias
        return offset

    def next_codes(self, tokens_Bhw: Tokens, size: tuple[int, int]) -> Float32:
        """Codes (B, h'·w', D) that are the input of scale `size`: those of the scale before, resized bicubically."""
        B, h, w = tokens_Bhw.shape
        codes = self.codebook[tokens_Bhw]
        resized = resize(codes, bicubic_matrix(h, size[0]), bicubic_matrix(w, size[1]))
        return resized.reshape(B, size[0] * size[1], -1)

    def quantize(self, latent_BDhw: Float32, size: tuple[int, int], kept_Bhw: Float32 | None = None) -> Tokens:
        """Tokens (B, *size) of a latent: area resize, then l2-normalise, then the nearest code.

        kept_Bhw: weights of the latent's cells, from 0 to 1. With them the resize is a weighted mean. Where all weights
        are 0 it is the plain mean.
        """
        maps = np.ascontiguousarray(latent_BDhw.transpose(0, 2, 3, 1))
        rows, columns = area_matrix(maps.shape[1], size[0]), area_matrix(maps.shape[2], size[1])
        plain = resize(maps, rows, columns)
        if kept_Bhw is None:
            maps = plain
        else:
            weight = resize(kept_Bhw[..., None], rows, columns)
            mean = resize(maps * kept_Bhw[..., None], rows, columns) / np.where(weight > 0, weight, 1)
            maps = np.where(weight > 0, mean, plain)
        maps /= np.maximum(np.linalg.norm(maps, axis=-1, keepdims=True), 1e-12)
        nearest = [np.argmax(image.reshape(-1, image.shape[-1]) @ self.codebook.T, axis=-1) for image in maps]
        return np.stack(nearest).astype(np.int32).reshape(len(maps), *size)
