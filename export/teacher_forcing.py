"""Run the module of a step through a recorded case, with the tokens of the reference as the input of every scale."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from flexvar_ref import FlexVAR
from flexvar_runtime.model.signatures import HEAD_MODULATION, MODULATION, new_names

from .modules import Step
from .proof import Case


@torch.inference_mode()
def teacher_forced(
    step: Step, model: FlexVAR, case: Case, around: AbstractContextManager[object] | None = None
) -> Iterator[Tensor]:
    """The guided logits (B, h·w, V) of every scale, with the condition of the reference in float32.

    step: made from `model`. around: a context that is entered for every run of the step.
    """
    config, B = model.config, len(case.labels)
    labels = torch.tensor([*case.labels, *[config.null_class] * B])
    condition = model.condition(labels)
    blocks = [block.ada_lin(condition)[:, None].chunk(len(MODULATION), -1) for block in model.blocks]
    modulation = [list(part) for part in zip(*blocks, strict=True)]
    head = model.head_nm.ada_lin(condition)[:, None].chunk(len(HEAD_MODULATION), -1)
    rows = torch.arange(B, dtype=torch.int32)
    cache = [torch.empty(0, 2 * B, config.heads, config.head_size, dtype=step.dtype) for _ in new_names(config.depth)]
    weights = case.guidance.weights(case.schedule)
    for i, size_hw in enumerate(case.schedule):
        if i == 0:
            codes, offset = torch.zeros(2 * B, 1, config.code_dim), model.first_input(labels)
        else:
            previous = torch.from_numpy(case.tokens[i - 1]).long()
            codes = model.next_codes(previous, case.schedule[i - 1], size_hw).repeat(2, 1, 1)
            offset = (model.positions(*size_hw) + model.word_embed.bias).expand(2 * B, -1, -1)
        past = cache[: config.depth], cache[config.depth :]
        with around or nullcontext():
            logits, keys, values = step(
                codes, offset, *modulation, *head, rows, rows + B, torch.full((B,), weights[i]), *past
            )
        cache = [torch.cat(pair) for pair in zip(cache, (*keys, *values), strict=True)]
        yield logits
