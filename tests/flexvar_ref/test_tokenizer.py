"""The tokenizer: shapes, and the order of its operations."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

from flexvar_ref import FlexVAR, Tokenizer
from flexvar_ref.errors import InvalidInput

Pair = tuple[FlexVAR, Tokenizer]


@pytest.fixture(scope="module")
def tokenizer(tiny: Pair) -> Tokenizer:
    return copy.deepcopy(tiny[1]).requires_grad_(False)


@pytest.mark.parametrize("size", [(32, 32), (8, 48), (4, 4)])
def test_shapes(tokenizer: Tokenizer, size: tuple[int, int]) -> None:
    h, w = (side // 4 for side in size)
    latent = tokenizer.encode(torch.rand(2, 3, *size) * 2 - 1)
    assert latent.shape == (2, 8, h, w)
    tokens = tokenizer.quantize(latent, [1, (h, w), (2, 3)])
    assert [scale.shape for scale in tokens] == [(2, 1, 1), (2, h, w), (2, 2, 3)]
    assert tokenizer.decode(tokens[1]).shape == (2, 3, *size)


def test_area_comes_before_normalisation(tokenizer: Tokenizer) -> None:
    """A long vector dominates the mean of several. If vectors were normalised first, the others would."""
    strong, weak = tokenizer.codebook_VD[3], tokenizer.codebook_VD[4]
    latent = torch.stack([10 * strong, weak, weak], dim=-1)[None, :, None]
    assert tokenizer.quantize(latent, [1])[0].item() == 3
    other_order = F.normalize(latent, dim=1).mean(dim=(2, 3), keepdim=True)
    assert tokenizer.nearest(other_order).item() == 4


def test_the_length_of_a_latent_does_not_matter(tokenizer: Tokenizer) -> None:
    latent = torch.randn(1, 8, 5, 3)
    assert torch.equal(tokenizer.nearest(latent), tokenizer.nearest(1000 * latent))


def test_every_code_is_nearest_to_itself(tokenizer: Tokenizer) -> None:
    codes = tokenizer.codebook_VD.T.reshape(1, 8, 16, 32)
    assert torch.equal(tokenizer.nearest(codes).flatten(), torch.arange(512))


def test_the_nearest_code_has_the_smallest_distance(tokenizer: Tokenizer) -> None:
    latent = torch.randn(2, 8, 3, 5)
    vectors = F.normalize(latent, dim=1).permute(0, 2, 3, 1).reshape(-1, 8)
    distances = (vectors[:, None] - tokenizer.codebook_VD).square().sum(-1)
    assert torch.equal(tokenizer.nearest(latent).flatten(), distances.argmin(-1))


def test_scales_above_the_latent_repeat_it(tokenizer: Tokenizer) -> None:
    latent = torch.randn(1, 8, 2, 2)
    [tokens, doubled] = tokenizer.quantize(latent, [2, 4])
    assert torch.equal(doubled, tokens.repeat_interleave(2, 1).repeat_interleave(2, 2))


def test_decode_uses_normalised_codes(tokenizer: Tokenizer) -> None:
    tokens = torch.randint(512, (1, 3, 5), dtype=torch.int32)
    codes = F.normalize(tokenizer.quantizer.embedding.weight[tokens.long()], dim=-1)
    torch.testing.assert_close(tokenizer.decode(tokens), tokenizer.decode_codes(codes))


def test_batch_position_does_not_matter(tokenizer: Tokenizer) -> None:
    images = torch.rand(3, 3, 16, 24) * 2 - 1
    latent = tokenizer.encode(images)
    torch.testing.assert_close(tokenizer.encode(images[1:2]), latent[1:2], atol=1e-5, rtol=1e-4)
    tokens = tokenizer.nearest(latent)
    torch.testing.assert_close(tokenizer.decode(tokens)[2:], tokenizer.decode(tokens[2:]), atol=1e-5, rtol=1e-4)


def test_images_that_do_not_fit_are_refused(tokenizer: Tokenizer) -> None:
    for shape in ((1, 3, 30, 32), (1, 3, 0, 32), (1, 1, 32, 32), (3, 32, 32)):
        with pytest.raises(InvalidInput) as caught:
            tokenizer.encode(torch.zeros(shape))
        assert str(shape) in caught.value.got and "multiples of 4" in caught.value.got


def test_latents_and_tokens_that_do_not_fit_are_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(InvalidInput, match=r"latent .*\(1, 7, 4, 4\).*\(B, 8, h, w\)"):
        tokenizer.quantize(torch.zeros(1, 7, 4, 4), [1])
    with pytest.raises(InvalidInput, match=r"tokens .*\(1, 16\)"):
        tokenizer.decode(torch.zeros(1, 16))
    for token in (-1, 512):
        with pytest.raises(IndexError):
            tokenizer.decode(torch.full((1, 2, 2), token))
