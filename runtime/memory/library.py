"""The memory that a library takes on a CPU to run a graph: a model with measured constants.

Every constant was measured (`benchmarks/LOG.md`) and has a margin, so that a plan is never below the peak. The
constants of a library are in `memory.py` in its folder of `backends/`. OpenVINO's decoder in bfloat16 was not
measured on processors without bfloat16 instructions.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..bundle.manifest import PHASES, PLAIN, TRANSPOSED, Manifest
from ..model.precision import TOKENIZER_GRAPHS, Precision
from ..model.signatures import DECODE, STEP

MLP_MAPS = 23  # maps alive in the MLP of a block
ATTENTION_MAPS = 14  # maps alive in its attention, besides scores, keys and values
SAMPLING = 16 * 64  # bytes for each code: 16 rows are sampled at once, with 64 bytes each


@dataclass(frozen=True, kw_only=True)
class LibraryMemory:
    """Measured constants of one library. A map of the transformer is (sequences, new tokens, width) of float32.

    runtime: bytes of the library and its first session. arena: memory of its allocator, as a multiple of what is alive.
    products, half_products: transformer weights in memory, as multiples of their file in float32 and half precision.
    convolutions, half_convolutions: the same of the tokenizer's weights. half_step, half_decoder: working memory in
    half precision, as a multiple of that in float32. plain_maps, phase_maps, transposed_maps: decoder maps that are
    alive for each channel, in a block and in the upsampling before it, by form of the decoder. keeps_condition: whether
    the condition graph stays open. one_by_one: whether a bf16 decoder runs a batch of the default size one image at a
    time."""

    runtime: int
    arena: float
    products: float
    half_products: float
    convolutions: float
    half_convolutions: float
    half_step: float
    half_decoder: float
    transposed_maps: tuple[float, float]
    plain_maps: tuple[float, float] = (6.4, 4.3)
    phase_maps: tuple[float, float] = (6.4, 5.3)
    keeps_condition: bool = False
    one_by_one: bool = False

    def weights(self, manifest: Manifest, graph: str) -> int:
        """Bytes of the weights of a graph in memory."""
        half = manifest.precision.of(graph).half
        if graph in TOKENIZER_GRAPHS:
            factor = self.half_convolutions if half else self.convolutions
        else:
            factor = self.half_products if half else self.products
        return int(manifest.file_bytes(f"{graph}.onnx") * factor)

    def step(self, manifest: Manifest, sequences: int, new: int, tokens: int) -> int:
        """Working memory in bytes of the largest scale, including the sampling of its tokens."""
        model = manifest.model
        one = sequences * new * model.width * 4
        joined = 2 * sequences * tokens * model.width * 4  # keys and values of a block: past and new in one
        scores = sequences * model.heads * new * tokens * 4
        alive = max(MLP_MAPS * one, ATTENTION_MAPS * one + joined + scores)
        once = int(self.arena * alive) + SAMPLING * model.vocabulary
        return int(self.half_step * once) if manifest.precision.of(STEP).half else once

    def image(self, manifest: Manifest, size: tuple[int, int], channels: tuple[int, int]) -> int:
        """Working memory in bytes of decoding one image of (h, w) tokens. Encoding takes less.

        channels: the decoder's channels at the size of the image, and one level below.
        """
        pixels = size[0] * size[1] * manifest.model.downsampling**2
        alive = {PLAIN: self.plain_maps, PHASES: self.phase_maps, TRANSPOSED: self.transposed_maps}[manifest.decoder]
        maps = max(maps * channel for maps, channel in zip(alive, channels, strict=True))
        return int(pixels * 4 * maps * (self.half_decoder if manifest.precision.of(DECODE).half else 1))

    def decodes_one_by_one(self, manifest: Manifest, size: tuple[int, int]) -> bool:
        """Whether a batch of images of (h, w) tokens is decoded one image at a time."""
        bf16 = manifest.precision.of(DECODE) is Precision.BF16
        return self.one_by_one and bf16 and size == manifest.defaults.size
