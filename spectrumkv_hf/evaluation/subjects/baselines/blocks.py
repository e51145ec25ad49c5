"""NF4 and FP4, four-bit formats of bitsandbytes for weights, on keys and values: blocks of 64 with an absmax.

Blocks run through `[batch, kv_heads, tokens, head_dim]` flattened: with heads of 64 channels a block is a token and
head. The absmax is float32, as bitsandbytes stores it without its second quantisation.
"""

from functools import partial

import torch

from spectrumkv_hf.evaluation.subjects.baselines.coded import Coded, TensorFormat
from spectrumkv_hf.policy import Policy
from spectrumkv_hf.support.extras import required

BLOCK = 64


class FourBit(TensorFormat):
    """A format of bitsandbytes.

    Args:
        kind: `"nf4"` or `"fp4"`.

    Raises:
        ImportError: bitsandbytes is missing.
    """

    bits = 4

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._functional = required("bitsandbytes.functional", f"method {kind}")

    def encode(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Codes, two a byte, and the absmax of each block."""
        codes, state = self._functional.quantize_4bit(x, blocksize=BLOCK, quant_type=self.kind)
        return codes, state.absmax

    def decode(self, stored: tuple[torch.Tensor, ...], shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
        codes, absmax = stored
        state = self._functional.QuantState(absmax, shape=shape, dtype=dtype, blocksize=BLOCK, quant_type=self.kind)
        return self._functional.dequantize_4bit(codes, state)


def parse(spec: str, rest: str) -> Coded:
    """`nf4[:SINKS[:RECENT]]` or `fp4[:SINKS[:RECENT]]`: tokens at the start (default 4) and end (default 0) kept exact.

    Raises:
        ValueError: more fields, or no such numbers.
    """
    kind = spec.partition(":")[0]
    fields = rest.split(":") if rest else []
    if len(fields) > 2 or not all(field == "" or field.isdecimal() for field in fields):
        raise ValueError(f"method {spec!r}: write {kind}[:SINKS[:RECENT]], whole numbers of exact tokens")
    sinks, recent = (*fields, "", "")[:2]
    return Coded(spec, partial(FourBit, kind), int(sinks) if sinks else Policy.sinks, int(recent or 0))
