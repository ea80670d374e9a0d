"""Edits: the tokens that a mask keeps, tokens that do not reveal what is masked, and prefilled scales."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from flexvar_ref import FlexVAR, Given, Options, Tokenizer, as_scales, inpaint, iter_scales, refine
from flexvar_ref.editing import keep_maps, masked_tokens
from flexvar_ref.errors import InvalidInput

Pair = tuple[FlexVAR, Tokenizer]
SCALES = as_scales("1_2_3x4_6x8")
NOISE = 1e-4


def uniforms(scale: int, positions: int, batch: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(scale)
    return torch.rand(batch, positions, generator=generator, dtype=torch.float64)


def picture(tokenizer: Tokenizer, seed: int = 0) -> torch.Tensor:
    factor = tokenizer.config.downsampling
    noise = torch.rand(2, 3, 6, 8, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return F.interpolate(noise, scale_factor=float(factor), mode="bilinear").clamp(-1, 1)


def mask_like(image: torch.Tensor, top: float, left: float) -> torch.Tensor:
    """A mask of the part below `top` and to the right of `left`, both as shares of the image."""
    mask = torch.zeros(len(image), *image.shape[2:], dtype=torch.bool)
    mask[:, round(image.shape[2] * top) :, round(image.shape[3] * left) :] = True
    return mask


def test_keep_maps_by_hand() -> None:
    """A token is kept if at most half of it is masked, and at the last scale if none of it is."""
    mask = torch.zeros(1, 8, 8, dtype=torch.bool)
    mask[:, :, 4:] = True
    first, second, third = keep_maps(mask, as_scales("1_4_2"))
    assert first.all()  # exactly half is masked
    assert second[0].tolist() == [[True, True, False, False]] * 4
    assert third[0].tolist() == [[True, False]] * 2
    mask[:, 0, 0] = True
    assert not keep_maps(mask, as_scales("1_2"))[0].any()
    assert keep_maps(mask, as_scales("1_2"))[1][0].tolist() == [[False, False], [True, False]]


def test_coarse_tokens_do_not_reveal_what_is_masked(tiny: Pair) -> None:
    """Kept tokens do not depend on the latent under the mask. Without a mask they are the tokenizer's own."""
    tokenizer = tiny[1]
    latent = torch.randn(1, tokenizer.config.code_dim, 6, 8, generator=torch.Generator().manual_seed(1))
    mask = torch.zeros(1, 6, 8, dtype=torch.bool)
    mask[:, 3:, 4:] = True
    other = torch.where(mask[:, None], 10 * latent.flip(2), latent)
    keep = keep_maps(mask, SCALES)
    for one, two, stays in zip(
        masked_tokens(tokenizer, latent, mask, SCALES), masked_tokens(tokenizer, other, mask, SCALES), keep, strict=True
    ):
        assert torch.equal(one[stays], two[stays])
    plain = tokenizer.quantize(latent, SCALES)
    assert not torch.equal(plain[0], tokenizer.quantize(other, SCALES)[0])  # the plain mean does reveal it
    nothing = torch.zeros_like(mask)
    for one, two in zip(masked_tokens(tokenizer, latent, nothing, SCALES), plain, strict=True):
        assert torch.equal(one, two)


@settings(deadline=None, max_examples=10)
@given(forced=st.integers(0, 3), cfg=st.sampled_from([0.0, 2.5]))
def test_prefill_equals_scale_by_scale(tiny: Pair, forced: int, cfg: float) -> None:
    model, tokenizer = tiny
    kept = refine(tokenizer, picture(tokenizer), SCALES, forced)
    assert kept.forced == forced
    runs = [
        list(iter_scales(model, [1, 2], SCALES, Options(cfg=cfg), uniforms, given=kept, prefill=prefill))
        for prefill in (True, False)
    ]
    for i, (one, two) in enumerate(zip(*runs, strict=True)):
        assert torch.equal(one.tokens, two.tokens)
        if i < forced:
            assert torch.equal(one.tokens, kept.tokens[i]) and one.logits.shape[1] == 0
        else:
            torch.testing.assert_close(one.logits, two.logits, rtol=0, atol=NOISE)


def test_kept_tokens_are_those_of_the_image_and_are_fed_on(tiny: Pair) -> None:
    model, tokenizer = tiny
    image = picture(tokenizer)
    kept = inpaint(tokenizer, image, mask_like(image, 0.5, 0.5), SCALES)
    assert kept.forced == 1 and not kept.keep[-1].all()
    scales = list(iter_scales(model, [1, 2], SCALES, Options(), uniforms, given=kept))
    for scale, tokens, stays in zip(scales, kept.tokens, kept.keep, strict=True):
        assert torch.equal(scale.tokens[stays], tokens[stays])
    assert not torch.equal(scales[-1].tokens, kept.tokens[-1])
    forced = [scale.tokens for scale in scales]
    again = list(iter_scales(model, [1, 2], SCALES, Options(), uniforms, forced=forced))
    for one, two in zip(scales[kept.forced :], again[kept.forced :], strict=True):
        torch.testing.assert_close(one.logits, two.logits, rtol=0, atol=NOISE)


def test_a_mask_over_everything_is_a_generation(tiny: Pair) -> None:
    model, tokenizer = tiny
    image = picture(tokenizer)
    kept = inpaint(tokenizer, image, mask_like(image, 0, 0), SCALES)
    edited = [scale.tokens for scale in iter_scales(model, [1, 2], SCALES, Options(), uniforms, given=kept)]
    plain = [scale.tokens for scale in iter_scales(model, [1, 2], SCALES, Options(), uniforms)]
    assert all(torch.equal(one, two) for one, two in zip(edited, plain, strict=True))


def test_inputs_that_do_not_fit_are_refused(tiny: Pair) -> None:
    model, tokenizer = tiny
    with pytest.raises(InvalidInput, match="forced is 4"):
        refine(tokenizer, picture(tokenizer), SCALES, 4)
    kept = refine(tokenizer, picture(tokenizer), SCALES, 1)
    with pytest.raises(InvalidInput, match=r"given\.tokens"):
        next(iter_scales(model, [1], SCALES, given=kept))
    with pytest.raises(InvalidInput, match=r"given\.keep"):
        next(iter_scales(model, [1, 2], SCALES, given=Given(kept.tokens, kept.keep[:2])))
