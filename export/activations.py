"""The largest activation of each graph. It decides whether float16 is safe.

The modules run in bfloat16, which has the range of float32, on the inputs of a real generation. The result of every
operation is inspected. Products are summed in float32 and rounded once, as hardware does it: the bfloat16 convolutions
of torch take minutes on a processor without bfloat16 instructions.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from flexvar_ref import FlexVAR, Tokenizer
from flexvar_runtime.bundle.manifest import Range
from flexvar_runtime.errors import ArtifactRefused
from flexvar_runtime.model.signatures import CONDITION, DECODE, ENCODE, STEP

from .modules import Step, graph_module
from .proof import Proof
from .teacher_forcing import teacher_forced

FLOAT16_MAX = 65504.0
FLOAT16_MARGIN = 8.0
_aten = torch.ops.aten
_PRODUCTS = {
    _aten.addmm.default,
    _aten.bmm.default,
    _aten.conv2d.default,
    _aten.convolution.default,
    _aten.linear.default,
    _aten.matmul.default,
    _aten.mm.default,
    _aten.scaled_dot_product_attention.default,
}


class SummedInFloat32(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch leaves it untyped
    """While this mode is active, products of bfloat16 tensors are summed in float32 and rounded once."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        return _summed_in_float32(func, args, kwargs) if func in _PRODUCTS else func(*args, **kwargs)


class LargestActivation(SummedInFloat32):  # type: ignore[no-untyped-call]
    """Records the largest magnitude of all bfloat16 results and attention scores, and the module that computed it."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.value, self.where, self._path = 0.0, "", [""]
        self._hooks = [hook for name, part in module.named_modules() for hook in self._track(name, part)]

    def _track(self, name: str, part: nn.Module) -> tuple[Any, Any]:
        def enter(*_: object) -> None:
            self._path.append(name)

        def leave(*_: object) -> None:
            self._path.pop()

        return part.register_forward_pre_hook(enter), part.register_forward_hook(leave)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        result = super().__torch_dispatch__(func, types, args, kwargs)
        results = list(result) if isinstance(result, tuple | list) else [result]
        if func is _aten.scaled_dot_product_attention.default:  # its scores are half precision in the graph
            q, k = args[:2]
            results.append((q.float() @ k.float().mT * (kwargs.get("scale") or q.shape[-1] ** -0.5)).to(q.dtype))
        for tensor in results:
            if isinstance(tensor, Tensor) and tensor.dtype == torch.bfloat16 and tensor.numel():
                self._record(torch.linalg.vector_norm(tensor, torch.inf, dtype=torch.float32).item(), func)
        return result

    def _record(self, largest: float, func: Any) -> None:
        if not largest <= self.value and not np.isnan(self.value):  # a NaN counts as the largest, and stays
            self.value, self.where = largest, f"{self._path[-1] or 'graph'} ({func})"

    def release(self) -> Range:
        """Remove the hooks and return the largest magnitude."""
        for hook in self._hooks:
            hook.remove()
        return Range(value=self.value if np.isfinite(self.value) else 1e38, where=self.where)


def _summed_in_float32(func: Any, args: Any, kwargs: Mapping[str, Any]) -> Any:
    """Run an operation on float32 copies of its bfloat16 operands, and round the result back to bfloat16."""
    if not any(isinstance(value, Tensor) and value.dtype == torch.bfloat16 for value in args):
        return func(*args, **kwargs)
    args, kwargs = tree_map_only(Tensor, lambda value: value.float(), (args, dict(kwargs)))
    return tree_map_only(Tensor, lambda value: value.bfloat16(), func(*args, **kwargs))


@torch.inference_mode()
def largest_activations(model: FlexVAR, tokenizer: Tokenizer, proof: Proof) -> dict[str, Range]:
    """The largest activation of every graph, over all cases of the proof."""
    inputs = {
        CONDITION: [torch.arange(model.config.classes + 1, dtype=torch.int32)],
        DECODE: [torch.from_numpy(case.tokens[-1]) for case in proof.cases],
        ENCODE: [torch.from_numpy(proof.image)],
    }
    found = {}
    for name in (CONDITION, STEP, DECODE, ENCODE):
        module = graph_module(name, model, tokenizer, torch.bfloat16)
        watch = LargestActivation(module)
        if isinstance(module, Step):
            for case in proof.cases:
                for _ in teacher_forced(module, model, case, watch):
                    pass
        for tensor in inputs.get(name, []):
            with watch:
                module(tensor)
        found[name] = watch.release()
    return found


def refuse_overflow(found: dict[str, Range]) -> None:
    """Raise ArtifactRefused where an activation is larger than an eighth of the largest float16 number."""
    limit = FLOAT16_MAX / FLOAT16_MARGIN
    for name, largest in found.items():
        if largest.value > limit:
            raise ArtifactRefused(
                f"The graph {name} has activations up to {largest.value:.6g} in {largest.where}, but the limit of fp16 "
                f"is {limit:.0f}, an eighth of its largest number.",
                expected=f"activations of at most {limit:.0f}",
                fix="Export with --precision bf16.",
            )
