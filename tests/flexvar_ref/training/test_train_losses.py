"""The losses: equal to the recorded one, differentiable, and the sum of their terms."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from flexvar_ref import FlexVAR, Tokenizer, TokenizerConfig, TransformerConfig, as_scales
from flexvar_ref.errors import RunRefused
from flexvar_ref.synthetic import TINY_TOKENIZER, synthetic_state, transformer_state
from flexvar_ref.training import codebook
from flexvar_ref.training.adversarial import PatchDiscriminator, adaptive_weight, discriminator_loss, generator_loss
from flexvar_ref.training.config import VQLoss
from flexvar_ref.training.perceptual import CHANNELS, Perceptual, _shapes, load_perceptual
from flexvar_ref.training.randomness import SCALES, generator, stream
from flexvar_ref.training.tokenizer_loss import VQObjective, random_scales, scale_weights
from flexvar_ref.training.transformer_loss import TokenObjective, per_scale

GOLDEN = Path(__file__).parents[2] / "golden"
SIZES = dataclasses.replace(TINY_TOKENIZER, channels=8, groups=4, vocabulary=64)


@pytest.mark.parametrize("recording", ["d3_7step_llamagen", pytest.param("d2_10step_var", marks=pytest.mark.slow)])
def test_the_loss_of_a_recorded_checkpoint(recording: str) -> None:
    """To 1e-3: it is a mean of about 700 float32 terms around 20. Other labels give another loss."""
    with np.load(GOLDEN / f"{recording}.npz") as file:
        data = {key: file[key] for key in ("depth", "seed", "schedule", "labels", "teacher_tokens", "teacher_loss")}
    config, published = TransformerConfig.published(int(data["depth"])), TokenizerConfig()
    embedding = synthetic_state(
        {"quantize.embedding.weight": (published.vocabulary, published.code_dim)}, int(data["seed"])
    )
    model = FlexVAR(config, F.normalize(embedding["quantize.embedding.weight"], dim=-1))
    model.load_state_dict(transformer_state(config, int(data["seed"])))
    scales = as_scales(data["schedule"].tolist())
    parts = torch.from_numpy(data["teacher_tokens"]).split([h * w for h, w in scales], dim=1)
    tokens = [part.reshape(-1, h, w) for part, (h, w) in zip(parts, scales, strict=True)]
    labels = torch.from_numpy(data["labels"]).long()
    with torch.inference_mode():
        loss_BL = TokenObjective(model).eval()(labels, tokens, scales)
        wrong = TokenObjective(model).eval()(labels.flip(0) + 1, tokens, scales)
    assert loss_BL.mean().item() == pytest.approx(float(data["teacher_loss"]), abs=1e-3)
    assert wrong.mean().item() != pytest.approx(float(data["teacher_loss"]), abs=1e-3)
    shares = torch.tensor([h * w for h, w in scales]) / loss_BL.shape[1]
    assert (torch.stack(per_scale(loss_BL, scales)) * shares).sum().item() == pytest.approx(loss_BL.mean().item())


def test_scales_of_a_step() -> None:
    drawn = [random_scales(8, 3, stream(0, SCALES, step)) for step in range(400)]
    assert all(len(scales) == 3 and scales[-1] == (8, 8) and scales[0] < scales[1] < scales[2] for scales in drawn)
    seen = [side for scales in drawn for side, _ in scales[:-1]]
    assert all(abs(seen.count(side) - 800 / 7) < 50 for side in range(1, 8))  # 5 standard deviations
    assert random_scales(2, 5, stream(0, SCALES)) == ((1, 1), (2, 2))
    assert scale_weights(((1, 1), (3, 3)), 0.5) == [0.25, 0.75]


def objective(config: VQLoss | None = None) -> VQObjective:
    torch.manual_seed(0)
    return VQObjective(Tokenizer(SIZES), config or VQLoss())


def test_the_vq_loss_is_the_sum_of_its_terms() -> None:
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    config = VQLoss(l1=0.5, l2=2.0, commitment=0.1, codebook=0.3, scale_power=0)
    model = objective(config)
    scales = ((2, 2), (4, 4))
    out = model(images, scales)
    tokenizer, expected = model.tokenizer, torch.zeros(())
    latent = tokenizer.encode(images)
    for size, tokens in zip(scales, tokenizer.quantize(latent, scales), strict=True):
        z = F.normalize(F.interpolate(latent, size=size, mode="area"), dim=1)
        codes = F.embedding(tokens, tokenizer.codebook_VD)
        image = tokenizer.decode(tokens)
        assert image.shape[2:] == (4 * size[0], 4 * size[1])
        target = F.interpolate(images, size=image.shape[2:], mode="area")
        distance = (z.permute(0, 2, 3, 1) - codes).square().mean()
        expected = expected + 0.5 * (
            0.5 * (image - target).abs().mean() + 2 * (image - target).square().mean() + 0.4 * distance
        )
    assert out.loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert out.counts_V.sum() == 2 * (4 + 16) and out.vectors_ND.shape == (32, SIZES.code_dim)
    assert out.loss.item() == pytest.approx((out.reconstruction + out.quantisation).item())


def test_gradients_pass_the_quantiser() -> None:
    model = objective()
    model(torch.rand(2, 3, 16, 16) * 2 - 1, ((1, 1), (4, 4))).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name


def test_each_vq_term_moves_its_own_side() -> None:
    """The commitment term has gradients for the encoder only, the codebook term for the codes only."""
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    for config, moved, still in (
        (VQLoss(commitment=0), "quantizer.embedding.weight", "encoder.conv_in.weight"),
        (VQLoss(codebook=0), "encoder.conv_in.weight", "quantizer.embedding.weight"),
    ):
        model = objective(config)
        model(images, ((4, 4),)).quantisation.backward()
        named = dict(model.tokenizer.named_parameters())
        assert named[moved].grad is not None and named[moved].grad.abs().max() > 0
        assert named[still].grad is None or named[still].grad.abs().max() == 0


def test_half_precision_stays_near() -> None:
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    exact, half = (objective()(images, ((4, 4),), bf16).loss.item() for bf16 in (False, True))
    assert half == pytest.approx(exact, rel=0.03)  # bfloat16 has 8 bits


def test_codebook_use() -> None:
    share = codebook.even_shares(4)
    assert codebook.perplexity(share) == pytest.approx(4)
    for _ in range(200):
        share = codebook.updated_shares(share, torch.tensor([3.0, 1.0, 0.0, 0.0]))
    torch.testing.assert_close(share, torch.tensor([0.75, 0.25, 0.0, 0.0]), atol=1e-6, rtol=0)
    assert codebook.perplexity(share) == pytest.approx(1.7548, abs=1e-3)  # exp of the entropy of (3/4, 1/4)
    assert sorted(codebook.dead_codes(share, 0.05).tolist()) == [2, 3]
    assert codebook.dead_codes(codebook.even_shares(4), 0.05).numel() == 0


def test_dead_codes_become_encoder_outputs() -> None:
    vectors, dead = F.normalize(torch.randn(50, 8), dim=-1), torch.tensor([3, 9, 4])
    twins = [torch.zeros(16, 8), torch.zeros(16, 8)]
    for embedding in twins:
        assert codebook.revive(embedding, dead, vectors, generator(0, SCALES, 1)).tolist() == [3, 9, 4]
    assert torch.equal(*twins)
    rows = [next(i for i, v in enumerate(vectors) if torch.equal(v, twins[0][code])) for code in dead]
    assert len(set(rows)) == 3
    assert not twins[0][[0, 1, 2, 5]].any()
    assert codebook.revive(twins[0], torch.arange(16), vectors[:2], generator(0, SCALES, 2)).tolist() == [0, 1]


def test_the_discriminator_learns_and_the_weight_balances() -> None:
    torch.manual_seed(0)
    discriminator = PatchDiscriminator(8, 2)
    real, fake = torch.ones(4, 3, 32, 32) * 0.5, -torch.ones(4, 3, 32, 32) * 0.5
    optimizer = torch.optim.Adam(discriminator.parameters(), 1e-2)
    losses = []
    for _ in range(30):
        loss = discriminator_loss(discriminator(real), discriminator(fake))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(1, abs=0.1) and losses[-1] < 0.1
    assert generator_loss(discriminator(fake)) > generator_loss(discriminator(real))
    layer = torch.ones(3, requires_grad=True)
    assert adaptive_weight(layer.sum() * 5, layer.sum() * 2, layer).item() == pytest.approx(2.5, rel=1e-3)


@pytest.fixture(scope="module")
def vgg() -> dict[str, torch.Tensor]:
    """Random weights of a VGG-16, 59 MB."""
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) * 0.05 for name, shape in _shapes().items()}


def test_the_perceptual_distance(vgg: dict[str, torch.Tensor], tmp_path: Path) -> None:
    network = Perceptual(vgg)
    image = torch.rand(1, 3, 32, 32) * 2 - 1
    near, far = network(image + 0.01, image), network(image.flip(-1), image)
    assert network(image, image) == 0 and 0 < near < far
    assert network(image[..., :8, :8], image[..., :8, :8] + 1) == 0  # too small for four poolings
    weighted = Perceptual(
        {**vgg, **{f"lin{i}.model.1.weight": torch.zeros(1, c, 1, 1) for i, c in enumerate(CHANNELS)}}
    )
    assert weighted(image.flip(-1), image) == 0
    path = tmp_path / "vgg.safetensors"
    save_file(vgg, path)
    assert torch.equal(load_perceptual(path)(image.flip(-1), image), far)


def test_wrong_perceptual_weights_are_refused(vgg: dict[str, torch.Tensor], tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.safetensors"
    save_file({"features.0.weight": torch.zeros(64, 3, 3, 3)}, wrong)
    shape = tmp_path / "shape.pth"
    torch.save({**vgg, "features.28.bias": torch.zeros(3)}, shape)
    text = tmp_path / "text.pth"
    text.write_text("no weights", encoding="utf-8")
    for path, fault in (
        (wrong, "features.0.bias"),
        (shape, "features.28.bias"),
        (text, "text.pth"),
        (tmp_path / "absent.pth", "absent.pth"),
    ):
        with pytest.raises(RunRefused, match=fault) as caught:
            load_perceptual(path)
        assert path.name in caught.value.got and "VGG-16" in caught.value.expected
