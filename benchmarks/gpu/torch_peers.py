"""Times the peers in torch: the reference as published, the reference in bfloat16, and torch.compile.

Every timed call ends with images as bytes on the host, as calls of the runtime do.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import flexvar_ref
from flexvar_export.parity import GATES
from flexvar_export.proof import reference_options
from flexvar_ref import FlexVAR, Tokenizer
from flexvar_ref.sampling import draw, probabilities
from flexvar_runtime import Sampling

from ..energy import gpu_counter
from ..timing import Budget, memory_watch, repeat, timed_row
from .files import Save
from .hardware import device_seconds, used_bytes, uses_gpu
from .random_models import default_guidance, load_proof, random_model, schedule_of
from .torch_compiled import CompiledPeer, Eager, to_pixels

AUTOCAST, RESIDENT = "autocast-fp16", "resident-bf16"
VARIANTS = {
    AUTOCAST: "frozen float32 weights, cast again at every use by torch.autocast(float16), as the published evaluation",
    RESIDENT: "weights and activations in bfloat16",
}
PART_REPEATS = 3
SAMPLED_BATCH = 8  # sampling larger batches is not timed, because its sorts take gigabytes


def place() -> torch.device:
    return torch.device("cuda" if uses_gpu() else "cpu")


def reference(model_name: str, batches: Sequence[int], budget: Budget, save: Save) -> None:
    """Time both variants of the eager reference, batch by batch."""
    model, tokenizer = random_model(model_name)
    model, tokenizer = model.to(place()), tokenizer.to(place())
    resident = copy.deepcopy(model).to(torch.bfloat16), copy.deepcopy(tokenizer).to(torch.bfloat16)
    pairs = {AUTOCAST: (model, tokenizer), RESIDENT: resident}
    result = _facts(model_name) | {"variants": VARIANTS, "rows": []}
    for batch in batches:
        for variant, (transformer, vae) in pairs.items():
            row = _eager_row(variant, transformer, vae, model_name, batch, budget)
            result["rows"].append({"variant": variant, **row})
            save(result)


def _facts(model: str) -> dict[str, Any]:
    return {
        "model": model,
        "schedule": str(schedule_of(model)),
        "guidance": default_guidance().to_json(),
        "device": torch.cuda.get_device_name() if uses_gpu() else "cpu",
        "torch": torch.__version__,
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
    }


def _autocast(variant: str) -> AbstractContextManager[object]:
    return torch.autocast(place().type, torch.float16) if variant == AUTOCAST and uses_gpu() else nullcontext()


def _eager_row(
    variant: str, model: FlexVAR, tokenizer: Tokenizer, name: str, batch: int, budget: Budget
) -> dict[str, Any]:
    labels = [i % model.config.classes for i in range(batch)]
    options, schedule = reference_options(default_guidance(), Sampling()), str(schedule_of(name))

    def whole() -> Tensor:
        with _autocast(variant):
            _, image = flexvar_ref.generate(model, tokenizer, labels, schedule, options)
        return to_pixels(image).cpu()

    row = _row(whole, batch, budget)
    with _autocast(variant):
        scales = list(flexvar_ref.iter_scales(model, labels, schedule, options))
        with torch.inference_mode():
            row["decode_s"] = _part(lambda: tokenizer.decode(scales[-1].tokens))
            if batch <= SAMPLED_BATCH:
                row["sampling_s"] = sum(_part(lambda logits=s.logits: _sample(logits)) for s in scales)  # type: ignore[misc]
    return row


def _sample(logits: Tensor) -> Tensor:
    uniforms = torch.rand(logits.shape[:2], dtype=torch.float64, device=logits.device)
    return draw(probabilities(logits, Sampling().top_k, Sampling().top_p), uniforms)


def _part(work: Callable[[], object]) -> float:
    work()
    return sorted(device_seconds(work) for _ in range(PART_REPEATS))[PART_REPEATS // 2]


def _row(whole: Callable[[], object], batch: int, budget: Budget) -> dict[str, Any]:
    """Times of calls, between events if there is a GPU, and the peak of memory in a call that is not timed."""
    times = repeat(lambda: device_seconds(whole) if uses_gpu() else _none(whole()), budget, gpu_counter())
    row = timed_row(batch, times, budget)
    with memory_watch(used_bytes()) as memory:
        whole()
    row["device_memory_bytes"] = memory or None
    return row


def _none(_: object) -> None:
    return None


def compiled(work: Path, model_name: str, batch: int, budget: Budget, dynamic: bool, save: Save) -> None:
    """Time torch.compile: blocks and decoder compiled, the whole generation captured as one CUDA graph.

    dynamic: compile the blocks for all shapes at once, else for each. First the peer is compared with the proof,
    without compilation.
    """
    result = _facts(model_name) | {"precision": "float16" if uses_gpu() else "float32", "rows": []}
    torch.backends.cudnn.benchmark = True  # cuDNN times its convolutions in the warm-up and picks the fastest
    eager = Eager(*random_model(model_name), schedule_of(model_name), place())
    result["relative_error"] = CompiledPeer(eager, compiler=None).relative_error(load_proof(work, model_name).cases[0])
    result["gate"] = GATES["fp16" if uses_gpu() else "fp32"].relative
    save(result)
    compiler = "inductor" if uses_gpu() else "eager"  # a rehearsal compiles nothing
    peer = CompiledPeer(eager, compiler=compiler, dynamic=dynamic)
    labels = [i % eager.classes for i in range(batch)]
    seconds = device_seconds(lambda: peer.prepare(labels))
    row = _row(peer.run, batch, budget)
    row |= {"shapes": "dynamic" if dynamic else "exact", "mode": peer.mode, "prepare_s": seconds}
    save(result | {"rows": [row]})
    peer.release()
