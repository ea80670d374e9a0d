"""The reference reproduces the recorded outputs of the published implementation (tests/golden)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from flexvar_ref import (
    FlexVAR,
    Options,
    ScaleOutput,
    Tokenizer,
    TokenizerConfig,
    TransformerConfig,
    iter_scales,
    load_tokenizer,
    load_transformer,
)
from flexvar_ref.sampling import probabilities
from flexvar_ref.scales import Scales, as_scales
from flexvar_ref.synthetic import synthetic_state, tokenizer_state, transformer_state

GOLDEN = Path(__file__).parents[1] / "golden"
RULES = {"var": "ramp", "llamagen": "constant"}
LOGITS = 1e-4  # of their standard deviation: float32 sums in another order
IMAGE = 1e-2  # rounding of the recorded float16 is up to 1e-3; the rest is float32 noise of the decoder
LATENT = 1e-4


@dataclass(frozen=True)
class Recording:
    data: dict[str, Any]
    model: FlexVAR

    @property
    def scales(self) -> Scales:
        return as_scales(self.data["schedule"].tolist())

    def per_scale(self, tokens_BL: np.ndarray) -> list[torch.Tensor]:
        parts = torch.from_numpy(tokens_BL).split([h * w for h, w in self.scales], dim=1)
        return [part.reshape(-1, h, w) for part, (h, w) in zip(parts, self.scales, strict=True)]


# Both recordings have a tokenizer of the published sizes, with different weights. One is enough to test the tokenizer.
ONE_IMAGE_TOKENIZER = pytest.mark.parametrize(
    "recording", ["d3_7step_llamagen", pytest.param("d2_10step_var", marks=pytest.mark.slow)], indirect=True
)


@pytest.fixture(scope="module", params=["d2_10step_var", "d3_7step_llamagen"])
def recording(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Recording:
    """A recording, and the transformer it was made with."""
    with np.load(GOLDEN / f"{request.param}.npz") as file:
        data = {name: file[name] for name in file.files}
    path = tmp_path_factory.mktemp("checkpoint") / "transformer.pth"
    torch.save(transformer_state(TransformerConfig.published(int(data["depth"])), int(data["seed"])), path)
    return Recording(data, load_transformer(path, F.normalize(codebook(data), dim=-1)))


def codebook(data: dict[str, Any]) -> torch.Tensor:
    """The codebook of a recording's tokenizer, as it is stored."""
    sizes, name = TokenizerConfig(), "quantize.embedding.weight"
    return synthetic_state({name: (sizes.vocabulary, sizes.code_dim)}, int(data["seed"]))[name]


@pytest.fixture(scope="module")
def tokenizer(recording: Recording, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """The tokenizer that the recording was made with."""
    path = tmp_path_factory.mktemp("checkpoint") / "vae.pth"
    torch.save({"model": tokenizer_state(TokenizerConfig(), int(recording.data["seed"]))}, path)
    loaded = load_tokenizer(path)
    path.unlink()  # 290 MB
    return loaded


@pytest.fixture(scope="module")
def greedy(recording: Recording) -> list[ScaleOutput]:
    data = recording.data
    options = Options(cfg=float(data["cfg"]), rule=RULES[str(data["cfg_mode"])], top_k=1, max_side=int(data["max_pn"]))
    return list(iter_scales(recording.model, data["labels"].tolist(), recording.scales, options))


@pytest.fixture(scope="module")
def teacher_logits(recording: Recording) -> torch.Tensor:
    tokens = recording.per_scale(recording.data["teacher_tokens"])
    with torch.inference_mode():
        return recording.model(recording.data["labels"].tolist(), tokens, recording.scales)


def recorded_images(seed: int, batch: int, side: int) -> torch.Tensor:
    """The input images of a recording, as golden/README.md defines them."""
    y, x = np.mgrid[:side, :side].astype(np.float32)
    images = []
    for i in range(batch):
        rng = np.random.default_rng(seed + i)
        channels = []
        for _ in range(3):
            terms = (
                rng.normal()
                * np.sin(2 * np.pi * (rng.uniform(0.5, 6) * x / side + rng.uniform(0.5, 6) * y / side + rng.uniform()))
                for _ in range(6)
            )
            channels.append(sum(terms))
        image = np.stack(channels)
        images.append(image / np.abs(image).max())
    return torch.from_numpy(np.stack(images).astype(np.float32))


def largest(difference: torch.Tensor) -> float:
    return difference.abs().max().item()


def test_greedy_tokens(recording: Recording, greedy: list[ScaleOutput]) -> None:
    tokens_BL = torch.cat([scale.tokens.flatten(1) for scale in greedy], dim=1)
    np.testing.assert_array_equal(tokens_BL.numpy(), recording.data["greedy_tokens"])


def test_greedy_logits(recording: Recording, greedy: list[ScaleOutput]) -> None:
    recorded = torch.from_numpy(recording.data["greedy_logits_head"])
    logits_BLV = torch.cat([scale.logits for scale in greedy], dim=1)
    assert largest(logits_BLV[..., : recorded.shape[-1]] - recorded) <= LOGITS * recorded.std().item()
    top = logits_BLV.topk(2).values
    margin = (top[..., 0] - top[..., 1]).min().item()
    assert margin == pytest.approx(float(recording.data["greedy_min_margin"]), rel=0.1)


@ONE_IMAGE_TOKENIZER
def test_greedy_image(recording: Recording, tokenizer: Tokenizer, greedy: list[ScaleOutput]) -> None:
    with torch.inference_mode():
        image = tokenizer.decode(greedy[-1].tokens)
    assert largest(image - torch.from_numpy(recording.data["greedy_image"]).float()) <= IMAGE


@ONE_IMAGE_TOKENIZER
def test_encoder(recording: Recording, tokenizer: Tokenizer) -> None:
    recorded = torch.from_numpy(recording.data["encoder_latent"])
    side = tokenizer.config.downsampling * recording.scales[-1][0]
    images = recorded_images(int(recording.data["image_seed"]), len(recorded), side)
    with torch.inference_mode():
        assert largest(tokenizer.encode(images) - recorded) <= LATENT


def test_multi_scale_tokens(recording: Recording) -> None:
    latent = torch.from_numpy(recording.data["encoder_latent"])
    with torch.device("meta"):  # the codebook is all that counts here
        tokenizer = Tokenizer(TokenizerConfig())
    tokenizer.quantizer.embedding.weight = torch.nn.Parameter(codebook(recording.data))
    with torch.inference_mode():
        tokens = tokenizer.quantize(latent, recording.scales)
    tokens_BL = torch.cat([scale.flatten(1) for scale in tokens], dim=1).numpy()
    # the smallest margin between two codes is 7e-6, so one position may differ
    assert (tokens_BL != recording.data["teacher_tokens"]).sum() <= 1


def test_teacher_input(recording: Recording) -> None:
    tokens = recording.per_scale(recording.data["teacher_tokens"])
    scales = recording.scales
    codes = [recording.model.next_codes(tokens[i], scales[i], scales[i + 1]) for i in range(len(scales) - 1)]
    assert largest(torch.cat(codes, dim=1) - torch.from_numpy(recording.data["teacher_input"])) <= 1e-6


def test_teacher_logits(recording: Recording, teacher_logits: torch.Tensor) -> None:
    recorded = torch.from_numpy(recording.data["teacher_logits_head"])
    assert largest(teacher_logits[..., : recorded.shape[-1]] - recorded) <= LOGITS * recorded.std().item()


def test_teacher_loss(recording: Recording, teacher_logits: torch.Tensor) -> None:
    target = torch.from_numpy(recording.data["teacher_tokens"]).long()
    loss = F.cross_entropy(teacher_logits.flatten(0, 1), target.flatten()).item()
    assert loss == pytest.approx(float(recording.data["teacher_loss"]), abs=1e-4)


@ONE_IMAGE_TOKENIZER
def test_decode_of_a_non_square_map(recording: Recording, tokenizer: Tokenizer) -> None:
    tokens = torch.from_numpy(recording.data["rect_tokens"]).view(1, 12, 20)
    with torch.inference_mode():
        image = tokenizer.decode(tokens)
    assert largest(image - torch.from_numpy(recording.data["rect_image"]).float()) <= IMAGE


def test_positions(recording: Recording) -> None:
    for side in (5, 13):
        recorded = torch.from_numpy(recording.data[f"pos_{side}"])
        positions = recording.model.positions(side, side)
        assert largest(positions[:, : recorded.shape[1]] - recorded) <= 1e-6


def test_shifted_positions_exceed_the_bound(recording: Recording) -> None:
    """Negative control: a position table that is shifted by one exceeds the bound on the logits."""
    recorded = torch.from_numpy(recording.data["teacher_logits_head"])
    tokens = recording.per_scale(recording.data["teacher_tokens"])[:3]
    scales = recording.scales[:4]
    table = recording.model.pos_1LC
    original = table.detach().clone()
    try:
        with torch.inference_mode():
            table.copy_(original.roll(1, dims=-1))
            logits = recording.model(recording.data["labels"].tolist(), tokens, scales)
    finally:
        with torch.no_grad():
            table.copy_(original)
    difference = logits[..., : recorded.shape[-1]] - recorded[:, : logits.shape[1]]
    assert largest(difference) > 100 * LOGITS * recorded.std().item()


def test_sampler() -> None:
    """The kept sets are equal; the probabilities agree to float32, the recording's type."""
    with np.load(GOLDEN / "sampler.npz") as data:
        logits = torch.from_numpy(data["logits"])
        for i, (top_k, top_p) in enumerate(data["combos"]):
            recorded = data[f"probs_{i}"]
            probs = probabilities(logits, int(top_k), float(top_p)).numpy()
            np.testing.assert_array_equal(probs > 0, recorded > 0)
            np.testing.assert_allclose(probs, recorded, rtol=1e-5)
