"""KIVI (Liu et al., ICML 2024, arXiv 2402.02750): keys quantised per channel, values per token, the last ones exact.

As published and in the authors' code (github.com/jy-yuan/KIVI):

* Keys, after RoPE, in groups of GROUP tokens of one channel; values in groups of GROUP channels of one token. Codes are
  asymmetric: each group has its minimum and a scale, (maximum - minimum) / (2**BITS - 1), both in float16.
* Keys are quantised RESIDUAL at a time: of a prompt the last `tokens % RESIDUAL` stay exact, and later ones until
  RESIDUAL of them are there. Of the values the last RESIDUAL stay exact. No token at the start is exact.
* The prefill attends over exact keys and values, and a new token over itself and what was exact before it came.

Not as published:

* The authors' kernel multiplies with the codes; here they are dequantised in float32 and rounded to the model's dtype.
  Minima and scales are float16 for models of other dtypes too, and a group of equal elements has the scale 0.
* Several tokens may come at once after the prefill. What is due is quantised behind them: as if they had come one by
  one, but each of them attends to more exact tokens.
* RESIDUAL 0, which the authors' code doesn't have: only the keys' last incomplete group is exact.
* Sliding windows: keys are grouped from the oldest token that the prefill leaves in the window.
"""

from functools import partial

import torch

from spectrumkv_hf.evaluation.subjects.baselines.coded import Coded, TensorFormat
from spectrumkv_kernels import Quantized, dequantize, quantize

BITS = 4, 2
GROUPS = 32, 64, 128
"""Each with the default first."""

RESIDUAL = 128


class KiviValues(TensorFormat):
    """Values, by token.

    Args:
        bits: Of a code.
        group: Neighbouring channels with a scale and a minimum.
    """

    joins = True

    def __init__(self, bits: int, group: int) -> None:
        self.bits, self.group = bits, group

    def encode(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Packed codes, and scale and minimum of each group.

        Raises:
            ValueError: a head's channels are no whole groups.
        """
        if x.shape[-1] % self.group:
            raise ValueError(f"kivi: a head_dim of {x.shape[-1]} is no multiple of the group of {self.group}")
        return self._quantize(x.unflatten(-1, (-1, self.group)))

    def decode(self, stored: tuple[torch.Tensor, ...], shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
        return dequantize(Quantized(*stored), self.bits).reshape(shape).to(dtype)

    def due(self, tokens: int, recent: int, prefill: bool) -> int:
        return max(tokens - recent, 0)

    def _quantize(self, groups: torch.Tensor) -> tuple[torch.Tensor, ...]:
        quantized = quantize(groups.float(), self.bits)
        return quantized.codes, quantized.affine


class KiviKeys(KiviValues):
    """Keys, by channel: groups are of neighbouring tokens."""

    @property
    def for_values(self) -> KiviValues:
        return KiviValues(self.bits, self.group)

    def encode(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """As for values, but `[batch, kv_heads, groups of tokens, head_dim, ...]`."""
        return self._quantize(x.unflatten(2, (-1, self.group)).transpose(-1, -2))

    def decode(self, stored: tuple[torch.Tensor, ...], shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
        return dequantize(Quantized(*stored), self.bits).transpose(-1, -2).reshape(shape).to(dtype)

    def due(self, tokens: int, recent: int, prefill: bool) -> int:
        together = recent or self.group
        return tokens // together * together


def parse(spec: str, rest: str) -> Coded:
    """`kivi[:BITS[:GROUP[:RESIDUAL]]]`, by default 4, 32 and 128.

    Raises:
        ValueError: more fields, no such width or group, or a residual of no whole groups.
    """
    fields = rest.split(":") if rest else []
    if len(fields) > 3 or not all(field == "" or field.isdecimal() for field in fields):
        raise ValueError(f"method {spec!r}: write kivi[:BITS[:GROUP[:RESIDUAL]]], whole numbers")
    given = [int(field) if field else None for field in (*fields, "", "", "")[:3]]
    defaults = BITS[0], GROUPS[0], RESIDUAL
    bits, group, residual = (default if x is None else x for x, default in zip(given, defaults, strict=True))
    for name, number, choice in (("bits", bits, BITS), ("group", group, GROUPS)):
        if number not in choice:
            raise ValueError(f"method {spec!r}: {name} is one of {', '.join(map(str, choice))}, got {number}")
    if residual % group:
        raise ValueError(f"method {spec!r}: the residual, {residual} tokens, is no multiple of the group of {group}")
    return Coded(spec, partial(KiviKeys, bits, group), recent=residual)
