"""What attention reads: the tokens of one tier."""

import functools
from typing import Any, NamedTuple

import torch


def contiguous_rows(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, copied where its last dimension is not contiguous."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


class _Fields(NamedTuple):
    bits: int
    keys: Any
    values: Any
    positions: torch.Tensor


class Segment(_Fields):
    """Tokens of one tier: what one pass of the attention reads.

    Attributes:
        bits: 16 for exact tokens, else the width of a code.
        keys: A tensor `[batch, kv_heads, tokens, head_dim]` in the model's dtype for 16 bits, else `Quantized`.
        values: Likewise.
        positions: int32 `[batch, kv_heads, tokens]`, the slots of the tokens, ascending, -1 where a row has no token.
        known: What an implementation has found out about these tensors and need not find out at every read.
    """

    @functools.cached_property
    def known(self) -> dict[str, Any]:
        return {}
