"""Attention of a few queries over tiers of compressed tokens, read where they lie."""

import functools
from collections.abc import Sequence

import torch
from torch.nn.functional import linear

from ..codec.quantize import Quantized, unpack
from ..codec.reference import Codec
from ..rotation.hadamard import hadamard_matrix
from ..rotation.rotary import LARGEST_TABLE, Rotary
from ..segment import Segment

FEW = 512
"""Exact tokens that are rather copied together than read apart."""


def tiered_attention(
    query: torch.Tensor,
    segments: Sequence[Segment],
    *,
    length: int,
    scale: float,
    codec: Codec,
    frame: torch.Tensor | None,
    rotary: Rotary,
    mask: torch.Tensor | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    ragged: bool = False,
) -> torch.Tensor:
    """Softmax attention over the tokens of all segments, without dequantising or reordering them.

    Scales fold into scores and probabilities, zero points into rank-1 corrections, the Hadamard matrix and the scales
    of the frame into the query and the output, its means into scores and output: README.md beside this file derives it.
    Computed in float32.

    Args:
        query: `[batch, heads, queries, head_dim]`; query `i` sits at position `length - queries + i`.
        segments: Tokens of the cache, the queries' own included.
        length: Tokens seen so far, the queries included.
        scale: Factor on the scores.
        codec: How the segments were encoded.
        frame: As for `encode`: float32 `[batch, kv_heads, codec.frame_size]`, or None where the codec has none.
        rotary: The rotation that it was taken with.
        mask: `[batch or 1, heads or 1, queries, columns]` for the last `columns` positions: bool (True attends) or
            added to the scores. None: causal.
        window: Only positions above `query position - window` are seen; a mask has this in it already.
        softcap: Scores become `softcap * tanh(score / softcap)`.
        sinks: `[heads]`, logits that take part in the softmax and carry no value (GPT-OSS).
        ragged: Some positions are -1.

    Returns:
        `[batch, heads, queries, value_dim]` in the dtype of `query`; 0 for a query that sees no token.
    """
    batch, heads, queries, head_dim = query.shape
    segments = list(segments)
    kv_heads = segments[0].positions.shape[1]
    group, rows = heads // kv_heads, heads // kv_heads * queries
    q = (query.float() * scale).reshape(batch, kv_heads, rows, head_dim)  # a group's heads and queries as rows
    segments = [s.unpacked() for s in segments if s.tokens]
    coded = [s for s in segments if isinstance(s.keys, Quantized)]
    exact = _joined([s for s in segments if not isinstance(s.keys, Quantized)])
    sizes = [s.positions.shape[-1] for s in exact]

    parts = []
    mean, fitted = codec.parts(frame, head_dim)
    if coded:
        key_scale, key_zero, value_scale, value_zero = _scales(coded)
        q_coded = q if fitted is None else q * fitted.key_scale.unsqueeze(-2)
        q_coded = linear(q_coded, hadamard_matrix(head_dim, q.device)) if codec.hadamard else q_coded
        offset = q_coded.sum(-1, keepdim=True) * key_zero.unsqueeze(-2)
        if mean is not None:
            columns = _positions(coded)
            columns = columns.masked_fill(columns < 0, length - 1) if ragged else columns  # hidden later
            start = int(columns.min()) if length > LARGEST_TABLE else 0  # the sequence may be far ahead of a window
            columns = (columns - start).unsqueeze(-2).expand(-1, -1, rows, -1)
            offset = offset + rotary.scores(q, mean, length, start).gather(-1, columns)
        products = torch.cat([_query_codes(q_coded, s.keys.codes, s.bits) for s in coded], dim=-1)
        parts.append(torch.addcmul(offset, products, key_scale.unsqueeze(-2)))
        sizes.insert(0, products.shape[-1])
    parts += [q @ s.keys.float().transpose(-1, -2) for s in exact]
    scores = torch.cat(parts, dim=-1)  # [batch, kv_heads, rows, tokens], coded tokens first
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    hides = mask is not None or window is not None or queries > 1 or ragged
    if hides:
        scores = scores.view(batch, kv_heads, group, queries, -1)
        scores = _masked(scores, _positions([*coded, *exact]), length, mask, window, ragged)
        scores = scores.view(batch, kv_heads, rows, -1)
    if sinks is not None:
        sink_scores = sinks.float().view(1, kv_heads, group, 1, 1).expand(batch, -1, -1, queries, -1)
        scores = torch.cat((scores, sink_scores.reshape(batch, kv_heads, rows, 1)), dim=-1)
    p = torch.softmax(scores, dim=-1)
    if hides:  # a query that sees nothing gets 0; NaN, which a token may bring, stays
        p = p.masked_fill(scores.amax(-1, keepdim=True) == -torch.inf, 0.0)
    shares = list(p[..., : sum(sizes)].split(sizes, dim=-1))

    out: torch.Tensor | None = None
    if coded:
        share = shares.pop(0)
        scaled = (share * value_scale.unsqueeze(-2)).split([s.positions.shape[-1] for s in coded], dim=-1)
        out = torch.linalg.vecdot(share, value_zero.unsqueeze(-2)).unsqueeze(-1)
        for segment, weights in zip(coded, scaled, strict=True):
            out = out + _weighted_codes(weights, segment.values.codes, segment.bits)
        if codec.hadamard:
            out = linear(out, hadamard_matrix(out.shape[-1], out.device))
        if fitted is not None:
            out = out * fitted.value_scale.unsqueeze(-2) + share.sum(-1, keepdim=True) * fitted.value_mean.unsqueeze(-2)
    for segment, share in zip(exact, shares, strict=True):
        part = share @ segment.values.float()
        out = part if out is None else out + part
    assert out is not None, "the queries' own tokens are among the segments"
    return out.view(batch, heads, queries, -1).to(query.dtype)


def _joined(exact: list[Segment]) -> list[Segment]:
    """Segments of few exact tokens as one, which takes fewer operations than it copies tokens."""
    if len(exact) < 2 or sum(s.positions.shape[-1] for s in exact) > FEW:
        return exact
    keys, values, positions = (torch.cat(parts, dim=2) for parts in zip(*(s[1:] for s in exact), strict=True))
    return [Segment(exact[0].bits, keys, values, positions)]


def _positions(segments: Sequence[Segment]) -> torch.Tensor:
    return torch.cat([s.positions for s in segments], dim=-1).long()


def _scales(coded: Sequence[Segment]) -> Sequence[torch.Tensor]:
    """Scales and zeros of keys, then of values, over the tokens of all tiers: float32 `[batch, kv_heads, tokens]`."""
    sides = [(side.step(s.bits), side.zero_point(s.bits)) for s in coded for side in (s.keys, s.values)]
    found = [torch.cat(parts, dim=2) for side in (sides[::2], sides[1::2]) for parts in zip(*side, strict=True)]
    return found


# One product for each part of the bytes: converting a part is a contiguous pass, joining them would not be.


def _query_codes(query: torch.Tensor, codes: torch.Tensor, bits: int) -> torch.Tensor:
    """`query . codes`, `[batch, kv_heads, rows, tokens]`."""
    parts = unpack(codes, bits)
    pairs = zip(query.chunk(len(parts), dim=-1), parts, strict=True)
    products = [q @ part.float().transpose(-1, -2) for q, part in pairs]
    return functools.reduce(torch.add, products)


def _weighted_codes(weights: torch.Tensor, codes: torch.Tensor, bits: int) -> torch.Tensor:
    """`weights @ codes`, `[batch, kv_heads, rows, value_dim]`."""
    return torch.cat([weights @ part.float() for part in unpack(codes, bits)], dim=-1)


def _masked(
    scores: torch.Tensor,
    positions: torch.Tensor,
    length: int,
    mask: torch.Tensor | None,
    window: int | None,
    ragged: bool,
) -> torch.Tensor:
    """`scores`, `[batch, kv_heads, group, queries, tokens]`, with what a query may not see at -inf."""
    batch, kv_heads, group, queries, tokens = scores.shape
    at = positions[:, :, None, None]
    if mask is None:
        first = 0
        ahead = torch.arange(length - queries, length, device=positions.device)[:, None] - at
        hidden = ahead < 0
        if window is not None:
            hidden = hidden | (ahead >= window)
    else:
        first = length - mask.shape[-1]  # position of the mask's first column
        table = mask.expand(batch, -1, -1, -1).unflatten(1, (kv_heads, group) if mask.shape[1] > 1 else (1, 1))
        table = table.expand(-1, kv_heads, -1, -1, -1)
        chosen = table.gather(-1, (at - first).clamp(min=0).expand(*table.shape[:-1], tokens))
        if mask.dtype == torch.bool:
            hidden = ~chosen
        else:
            scores, hidden = scores + chosen, chosen <= torch.finfo(mask.dtype).min / 2
    if ragged or first:
        hidden = hidden | (at < first)
    return scores.masked_fill(hidden, -torch.inf)
