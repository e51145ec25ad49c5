"""Codecs: how keys and values of a token become integer codes, and back."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..rotation.hadamard import hadamard
from ..rotation.rotary import Rotary
from ..segment import Segment, can_pack, pack_positions
from .frame import Frame, frame_size, split_frame
from .quantize import Quantized, any_saturated, dequantize, quantize, quantize_unbiased


@dataclass(frozen=True)
class Codec:
    """What is done to a vector before it is rounded.

    Attributes:
        name: As users select it.
        center: Subtract `R(t) mean` from keys, the mean being taken in the frame before RoPE.
        hadamard: Rotate keys and values by the orthonormal Hadamard matrix.
        symmetric: Round without a zero point.
        balanced: Bring channels of keys to the scale at which they do least harm, subtract from values their mean, and
            round without bias: see `fit_frame` and `quantize_unbiased`.
        version: Raised when the name comes to stand for other codes, so that what was measured before is not taken
            for theirs.
    """

    name: str
    center: bool
    hadamard: bool
    symmetric: bool
    balanced: bool = False
    version: int = 1

    @property
    def least_bits(self) -> int:
        """Of a code: symmetric codes that round to a multiple of their scale need one more for the sign."""
        return 2 if self.symmetric and not self.balanced else 1

    def frame_size(self, key_dim: int, value_dim: int) -> int:
        """Numbers of a layer's frame, for a row and KV head; 0: there is none."""
        return frame_size(self.balanced, key_dim, value_dim) if self.center else 0

    @property
    def affine(self) -> tuple[int, torch.dtype]:
        """How many numbers a code has beside it, and of what type."""
        return (1 if self.symmetric else 2), torch.uint8 if self.balanced else torch.float16

    def parts(self, frame: torch.Tensor | None, key_dim: int) -> tuple[torch.Tensor | None, Frame | None]:
        """The mean of keys, and all parts where the codec balances."""
        if frame is None or not self.balanced:
            return frame, None
        parts = split_frame(frame, key_dim)
        return parts.mean, parts


CODECS = {
    codec.name: codec
    for codec in (
        Codec("spectrum", center=True, hadamard=True, symmetric=False),
        Codec("spectrum2", center=True, hadamard=True, symmetric=True, balanced=True),
        Codec("absmax", center=False, hadamard=False, symmetric=True),  # the paper's
    )
}
DEFAULT_CODEC = "spectrum2"


def take(tensor: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Tokens `index`, `[batch, kv_heads, n]`, of `[batch, kv_heads, tokens]` or `[batch, kv_heads, tokens, dim]`."""
    if tensor.dim() == 4:
        index = index.unsqueeze(-1).expand(*index.shape, tensor.shape[-1])
    return torch.gather(tensor, 2, index)


def encode(
    keys: torch.Tensor,
    values: torch.Tensor,
    positions: torch.Tensor,
    bits: int,
    codec: Codec,
    frame: torch.Tensor | None,
    rotary: Rotary,
    start: int | None = None,
) -> tuple[Quantized, Quantized]:
    """Quantise keys and values of the tokens of one tier.

    Args:
        keys: `[batch, kv_heads, tokens, head_dim]`, after RoPE.
        values: `[batch, kv_heads, tokens, value_dim]`.
        positions: int32 `[batch, kv_heads, n]`; slots of the tokens that are taken.
        bits: Width of a code, `codec.least_bits` to 4, or 8.
        codec: What to do before rounding.
        frame: Of the layer, float32 `[batch, kv_heads, codec.frame_size]`: `key_mean`, or where the codec balances
            `fit_frame`; None where it does not centre.
        rotary: The rotation that the frame was taken with.
        start: Position of the first of keys and values, of which those at `positions` are taken; None: all, in order.
    """
    if start is not None:
        index = positions.long() - start
        keys, values = take(keys, index), take(values, index)
    k, v = keys.float(), values.float()
    mean, parts = codec.parts(frame, k.shape[-1])
    if mean is not None:
        k = k - rotary.rotate(mean.unsqueeze(-2), positions)
    if parts is not None:
        k = k / parts.key_scale.unsqueeze(-2)
        v = (v - parts.value_mean.unsqueeze(-2)) / parts.value_scale.unsqueeze(-2)
    if codec.hadamard:
        k, v = hadamard(k), hadamard(v)
    coded = [quantize_unbiased(x, bits) if codec.balanced else quantize(x, bits, codec.symmetric) for x in (k, v)]
    return coded[0], coded[1]


def encode_tiers(
    keys: torch.Tensor,
    values: torch.Tensor,
    order: torch.Tensor,
    counts: Sequence[int],
    bits: Sequence[int],
    codec: Codec,
    frame: torch.Tensor | None,
    rotary: Rotary,
    start: int,
    flags: torch.Tensor,
    out: Sequence[Segment | None],
    packs: Sequence[bool],
) -> list[Segment]:
    """Store tokens in their tiers.

    Args:
        keys: `[batch, kv_heads, tokens, head_dim]`, after RoPE.
        values: `[batch, kv_heads, tokens, value_dim]`.
        order: Positions of the tokens, grouped by tier and ascending in each: int32 `[batch, kv_heads, tokens]`.
        counts: Tokens of each tier, in the order in which they lie in `order`; what lies behind them is dropped.
        bits: Of each tier: 16 for tokens that stay exact, else the width of a code. A tier may take no tokens.
        codec, frame, rotary: As in `encode`.
        start: Position of the first of keys and values.
        flags: bool `[1 + tiers]`. The first becomes True where no code stands for some token, see `any_saturated`; the
            others where positions of a tier are to be packed and can't be: what is returned for them says nothing then.
        out: Where to write each tier: a segment of as many tokens, with plain positions; None: to new tensors.
        packs: Of which tiers the positions are packed, see `pack_positions`; only of those without `out`.

    Returns:
        A segment for each tier.
    """
    segments, first = [], 0
    for tier, (width, count, there, packed) in enumerate(zip(bits, counts, out, packs, strict=True), start=1):
        positions = order[..., first : first + count]
        first += count
        k: torch.Tensor | Quantized
        v: torch.Tensor | Quantized
        if width == 16:
            index = positions.long() - start
            k, v = take(keys, index), take(values, index)
        else:
            k, v = encode(keys, values, positions, width, codec, frame, rotary, start)
            if count:
                flags[0] |= any_saturated(k) | any_saturated(v)
        if packed and count:
            flags[tier] |= ~can_pack(positions)
        places = pack_positions(positions) if packed else positions.clone(memory_format=torch.contiguous_format)
        segment = Segment(width, k, v, places)
        segments.append(segment if there is None else _write(there, segment))
    return segments


def _write(there: Segment, segment: Segment) -> Segment:
    """Copy a segment to where it belongs, and return it there."""
    for own, new in zip(there.tensors(), segment.tensors(), strict=True):
        own.copy_(new)
    return there


def decode(
    keys: Quantized,
    values: Quantized,
    positions: torch.Tensor,
    bits: int,
    codec: Codec,
    frame: torch.Tensor | None,
    rotary: Rotary,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The float32 keys and values that `encode` stored, `[batch, kv_heads, tokens, dim]`. Arguments as there."""
    k, v = dequantize(keys, bits), dequantize(values, bits)
    if codec.hadamard:
        k, v = hadamard(k), hadamard(v)
    mean, parts = codec.parts(frame, k.shape[-1])
    if parts is not None:
        k = k * parts.key_scale.unsqueeze(-2)
        v = v * parts.value_scale.unsqueeze(-2) + parts.value_mean.unsqueeze(-2)
    if mean is not None:
        k = k + rotary.rotate(mean.unsqueeze(-2), positions)
    return k, v


def dims(segment: Segment) -> tuple[int, int]:
    """The head dims of keys and values."""
    bits, keys, values, _ = segment
    if isinstance(keys, Quantized):
        return keys.codes.shape[-1] * 8 // bits, values.codes.shape[-1] * 8 // bits
    return keys.shape[-1], values.shape[-1]


def dense(
    segments: Sequence[Segment],
    start: int,
    size: int,
    dtype: torch.dtype,
    codec: Codec,
    frame: torch.Tensor | None,
    rotary: Rotary,
    complete: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of the positions from `start` to `start + size`, in their order.

    Args:
        segments: One at least; no position is in two of them.
        start: The first position; 0 or more.
        size: How many.
        dtype: Of the result and of 16-bit segments, which are copied.
        codec: How the other segments were encoded.
        frame: As for `encode`.
        rotary: Likewise.
        complete: Every one of these positions lies in a segment, so that no memory need be cleared.

    Returns:
        `[batch, kv_heads, size, dim]` each, 0 where no segment has the position.
    """
    batch, heads = segments[0].positions.shape[:2]
    keys, values = (
        torch.zeros(batch, heads, size + 1, dim, dtype=dtype, device=segments[0].positions.device)
        for dim in dims(segments[0])
    )  # the last slot takes what lies elsewhere, and rows' empty places
    for segment in segments:
        segment = segment.unpacked()
        k, v, positions = segment.keys, segment.values, segment.positions
        if isinstance(k, Quantized):
            k, v = decode(k, v, positions, segment.bits, codec, frame, rotary)
        slot = positions.long() - start
        slot = slot.where((slot >= 0) & (slot < size), size).unsqueeze(-1)
        keys.scatter_(2, slot.expand_as(k), k.to(dtype))
        values.scatter_(2, slot.expand_as(v), v.to(dtype))
    return keys[:, :, :size], values[:, :, :size]
