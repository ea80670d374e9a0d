"""The precisions of bundles and graphs."""

from __future__ import annotations

from enum import StrEnum

_DTYPES = {"fp16": "float16", "bf16": "bfloat16"}
TOKENIZER_GRAPHS = frozenset({"decode", "encode"})


class Precision(StrEnum):
    """The precision of a bundle or of one of its graphs.

    INT8 computes large matrix products on 8-bit integers and everything else in float32. In a bundle of INT8_BF16 the
    transformer is INT8 and the tokenizer BF16.
    """

    FP32 = "fp32"
    FP16 = "fp16"
    BF16 = "bf16"
    INT8 = "int8"
    INT8_BF16 = "int8-bf16"

    def of(self, graph: str) -> Precision:
        """The precision of one graph of a bundle of this precision."""
        if self is not Precision.INT8_BF16:
            return self
        return Precision.BF16 if graph in TOKENIZER_GRAPHS else Precision.INT8

    @property
    def dtype(self) -> str:
        """The dtype of keys and values, in which the step graph computes."""
        return _DTYPES.get(self, "float32")

    @property
    def half(self) -> bool:
        """Whether a graph of this precision holds its weights in half precision."""
        return self in _DTYPES
