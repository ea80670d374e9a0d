"""Sorts the kernels of a profile into classes by their names, and sums their time per class and per scale."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

OTHER = "other"
SAMPLER = "sample_rows"  # our kernel that ends every scale
SAMPLING, NEXT_INPUTS, ATTENTION, CONVOLUTION, COPIES, PRODUCT, ELEMENTWISE = (
    "sampling",
    "next_inputs",
    "attention",
    "convolution",
    "copies",
    "gemm",
    "normalisation+elementwise",
)

OURS = {
    "sample_rows": SAMPLING,
    "draws": SAMPLING,
    "next_inputs": NEXT_INPUTS,
    "gather_rows": COPIES,
    "scatter_rows": COPIES,
    "to_uint8": ELEMENTWISE,
    "embed": ELEMENTWISE,  # products of a few numbers
    "modulate_rows": ELEMENTWISE,
    "guide_rows": ELEMENTWISE,
    "split_heads": ELEMENTWISE,
    "class_rows": ELEMENTWISE,
    "attention": ATTENTION,
    "attention_rows": ATTENTION,
    "look_up": COPIES,
    "group_statistics": ELEMENTWISE,
    "group_normalise": ELEMENTWISE,
    "double_map": COPIES,
    "softmax_rows": ATTENTION,
    "im2col": CONVOLUTION,
    "to_planes": COPIES,
    "add_maps": ELEMENTWISE,
}
"""The class of each kernel of ours."""

# Tried in this order: an implicit GEMM is a convolution, and a fused attention kernel is named after its products.
_CLASSES = (
    (SAMPLING, r"topk|radix_?sort|bitonic|sort_?(?:kernel|pairs)|tensor_kernel_scan|DeviceScan"),
    (NEXT_INPUTS, r"upsample_bicubic"),
    (ATTENTION, r"fmha|flash|mha_|_mha|attention|attn|softmax"),
    (CONVOLUTION, r"conv(?!ert)|fprop|dgrad|wgrad|implicit_(?:convolve|gemm)|winograd|im2col"),
    (
        COPIES,
        r"memcpy|memset|nchw_?to_?nhwc|nhwc_?to_?nchw|transpose|copy|concat|cat_?array|gather|scatter|permute|slice|split(?!_?k)",
    ),
    (PRODUCT, r"gemm|gemv|nvjet|xmma|cutlass|cublas|matmul|tensorop_b?[a-z]\d|split_?k|triton_(?:tem|mm)"),
    (
        ELEMENTWISE,
        r"norm|element_?wise|pointwise|gelu|silu|reduce|triton_|__myl_|cast|expand|activation|welford",
    ),
)
_PATTERNS = tuple((name, re.compile(pattern, re.IGNORECASE)) for name, pattern in _CLASSES)
CLASSES = (*(name for name, _ in _CLASSES), OTHER)
NAME_LENGTH = 160  # names of templates have thousands of characters
TOP = 60  # kernels of a summary


def classify(kernel: str) -> str:
    """The class of a kernel, one of CLASSES. A name that is not ours and matches no pattern is "other"."""
    if kernel in OURS:
        return OURS[kernel]
    return next((name for name, pattern in _PATTERNS if pattern.search(kernel)), OTHER)


@dataclass(frozen=True)
class Kernel:
    """One kernel, copy or fill on the device. start, duration: microseconds."""

    name: str
    start: float
    duration: float

    @property
    def end(self) -> float:
        return self.start + self.duration


def kernels_of(trace: dict[str, Any]) -> list[Kernel]:
    """The kernels, copies and fills in a trace of torch's profiler (Chrome format), in order of their start."""
    device = {"kernel", "gpu_memcpy", "gpu_memset"}
    events = (event for event in trace.get("traceEvents", []) if event.get("cat") in device)
    return sorted((Kernel(e["name"], float(e["ts"]), float(e["dur"])) for e in events), key=lambda k: k.start)


def summary(kernels: Sequence[Kernel], scales: int, top: int = TOP) -> dict[str, Any]:
    """Seconds and shares by class, the kernels that take longest, and seconds by scale.

    A scale ends with the kernel that samples its tokens. The decoder follows the last one. If the number of sampling
    kernels differs from `scales`, `scale_s` and `decoder_s` are None.
    """
    if not kernels:
        return {"reason": "the profiler saw no kernel"}
    busy: dict[str, float] = defaultdict(float)
    names: dict[str, float] = defaultdict(float)
    counts = Counter(kernel.name for kernel in kernels)
    for kernel in kernels:
        busy[classify(kernel.name)] += kernel.duration / 1e6
        names[kernel.name] += kernel.duration / 1e6
    total, first, last = sum(busy.values()), _begin(kernels), _end(kernels)
    ends = [kernel.end for kernel in kernels if re.search(rf"\b{SAMPLER}\b", kernel.name)]
    bounds = [first, *ends, last]
    parts = [(b - a) / 1e6 for a, b in pairwise(bounds)] if len(ends) == scales else []
    return {
        "kernels": len(kernels),
        "busy_s": total,
        "span_s": (last - first) / 1e6,
        "classes": {
            name: {"seconds": busy[name], "share": busy[name] / total if total else 0.0}
            for name in CLASSES
            if name in busy
        },
        "top": [
            {
                "name": name[:NAME_LENGTH],
                "class": classify(name),
                "seconds": seconds,
                "launches": counts[name],
                "us_each": 1e6 * seconds / counts[name],
                "share": seconds / total if total else 0.0,
            }
            for name, seconds in sorted(names.items(), key=lambda item: -item[1])[:top]
        ],
        "scale_s": parts[:-1] or None,
        "decoder_s": parts[-1] if parts else None,
        "scale_how": f"from the end of one {SAMPLER} to the end of the next, in one profiled generation"
        if parts
        else f"not measured: {len(ends)} {SAMPLER} kernels for {scales} scales",
    }


def _begin(kernels: Sequence[Kernel]) -> float:
    """The start of the first scale. Before it the rows of the request are gathered and the status is cleared."""
    gathered = max((i for i, kernel in enumerate(kernels) if "gather_rows" in kernel.name), default=-1)
    rest = kernels[gathered + 1 :]
    return next((kernel.start for kernel in rest if classify(kernel.name) != "copies"), kernels[0].start)


def _end(kernels: Sequence[Kernel]) -> float:
    """The end of the decoder, which is the conversion to pixels. Only their copy to the host follows."""
    return max((kernel.end for kernel in kernels if "to_uint8" in kernel.name), default=max(k.end for k in kernels))
