"""Attention of a few queries over tiers of compressed tokens, read where they lie."""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from spectrumkv_kernels.codec import Codec
from spectrumkv_kernels.hadamard import hadamard
from spectrumkv_kernels.quantize import Quantized, unpack
from spectrumkv_kernels.rotary import Rotary


class Segment(NamedTuple):
    """Tokens of one tier: what one pass of the attention reads.

    Attributes:
        bits: 16 for exact tokens, else the width of a code.
        keys: `[batch, kv_heads, tokens, head_dim]` in the model's dtype, or `Quantized`.
        values: Likewise.
        positions: int32 `[batch, kv_heads, tokens]`, the slots of the tokens, ascending, -1 where a row has no token.
    """

    bits: int
    keys: torch.Tensor | Quantized
    values: torch.Tensor | Quantized
    positions: torch.Tensor


def tiered_attention(
    query: torch.Tensor,
    segments: Sequence[Segment],
    *,
    length: int,
    scale: float,
    codec: Codec,
    mean: torch.Tensor | None,
    rotary: Rotary,
    mask: torch.Tensor | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    ragged: bool = False,
) -> torch.Tensor:
    """Softmax attention over the tokens of all segments, without dequantising or reordering them.

    Scales fold into scores and probabilities, zero points into rank-1 corrections, the Hadamard matrix into the query
    and the output, the mean into the scores. Computed in float32.

    Args:
        query: `[batch, heads, queries, head_dim]`; query `i` sits at position `length - queries + i`.
        segments: Tokens of the cache, the queries' own included.
        length: Tokens seen so far, the queries included.
        scale: Factor on the scores.
        codec: How the segments were encoded.
        mean: float32 `[batch, kv_heads, head_dim]`, or None where the codec does not centre.
        rotary: The rotation that `mean` was taken with.
        mask: `[batch or 1, heads or 1, queries, columns]` for the last `columns` positions: bool (True attends) or
            added to the scores. None: causal.
        window: Only positions above `query position - window` are seen.
        softcap: Scores become `softcap * tanh(score / softcap)`.
        sinks: `[heads]`, logits that take part in the softmax and carry no value (GPT-OSS).
        ragged: Some positions are -1.

    Returns:
        `[batch, heads, queries, value_dim]` in the dtype of `query`; 0 for a query that sees no token.
    """
    batch, heads, queries, _ = query.shape
    kv_heads = segments[0].positions.shape[1]
    rows = heads // kv_heads * queries
    first = 0 if mask is None else length - mask.shape[-1]  # the position of the mask's first column
    q = query.float().reshape(batch, kv_heads, rows, -1) * scale
    q_codes = hadamard(q) if codec.hadamard else q
    mean_scores = None if mean is None else rotary.scores(q, mean, length)

    def visible(positions: torch.Tensor) -> torch.Tensor | None:
        """bool, broadcast to `[batch, kv_heads, group, queries, tokens]`; None where all tokens are."""
        tests = []
        if ragged or first > 0:
            tests.append((positions >= first)[:, :, None, None])
        if mask is None and (queries > 1 or window is not None):
            at = torch.arange(length - queries, length, device=positions.device)[:, None]
            ahead = at - positions[:, :, None, None]
            if queries > 1:
                tests.append(ahead >= 0)
            if window is not None:
                tests.append(ahead < window)
        return None if not tests else torch.stack(torch.broadcast_tensors(*tests)).all(0)

    def masked(scores: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        scores = scores.view(batch, kv_heads, -1, queries, positions.shape[-1])
        if mask is not None:
            column = (positions.long() - first).clamp(min=0)[:, :, None, None]
            table = mask.expand(batch, -1, -1, -1).unflatten(1, (-1, heads // kv_heads) if mask.shape[1] > 1 else (1, 1))
            table = table.expand(-1, kv_heads, -1, -1, -1)
            chosen = table.gather(-1, column.expand(*table.shape[:-1], -1))
            scores = scores.masked_fill(~chosen, -torch.inf) if mask.dtype == torch.bool else scores + chosen
        seen = visible(positions)
        return scores if seen is None else scores.masked_fill(~seen, -torch.inf)

    all_scores = []
    for segment in segments:
        if isinstance(segment.keys, torch.Tensor):
            scores = q @ segment.keys.float().transpose(-1, -2)
        else:
            scores = _code_scores(q_codes, segment.keys, segment.bits)
            if mean_scores is not None:
                index = segment.positions.long().clamp(min=0).unsqueeze(-2)
                scores = scores + mean_scores.gather(-1, index.expand(-1, -1, rows, -1))
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        all_scores.append(masked(scores, segment.positions).reshape(batch, kv_heads, rows, -1))

    top = torch.stack([scores.amax(-1) for scores in all_scores if scores.shape[-1]]).amax(0)
    if sinks is not None:
        sinks = sinks.float().view(1, kv_heads, -1, 1).expand(batch, -1, -1, queries).reshape(batch, kv_heads, rows)
        top = torch.maximum(top, sinks)
    top = top.clamp(min=torch.finfo(torch.float32).min)  # a query that sees nothing: exp(-inf - top) is 0, not NaN
    total = torch.zeros_like(top) if sinks is None else torch.exp(sinks - top)
    exact: torch.Tensor | float = 0.0
    coded: torch.Tensor | None = None
    for segment, scores in zip(segments, all_scores, strict=True):
        p = torch.exp(scores - top.unsqueeze(-1))
        total = total + p.sum(-1)
        if isinstance(segment.values, torch.Tensor):
            exact = exact + p @ segment.values.float()
        else:
            out = _code_values(p, segment.values, segment.bits)
            coded = out if coded is None else coded + out
    if coded is not None:
        exact = exact + (hadamard(coded) if codec.hadamard else coded)
    out = exact / total.clamp(min=torch.finfo(torch.float32).tiny).unsqueeze(-1)
    return out.view(batch, heads, queries, -1).to(query.dtype)


def _code_scores(query: torch.Tensor, keys: Quantized, bits: int) -> torch.Tensor:
    """`query . (codes * scale + zero)`, `[batch, kv_heads, rows, tokens]`."""
    width = keys.codes.shape[-1]
    scores: torch.Tensor | float = 0.0
    for i, part in enumerate(unpack(keys.codes, bits)):
        scores = scores + query[..., i * width : (i + 1) * width] @ part.float().transpose(-1, -2)
    zero = query.sum(-1, keepdim=True) * keys.zero_point(bits).unsqueeze(-2)
    return scores * keys.scale.float().unsqueeze(-2) + zero


def _code_values(p: torch.Tensor, values: Quantized, bits: int) -> torch.Tensor:
    """`p @ (codes * scale + zero)`, `[batch, kv_heads, rows, value_dim]`."""
    scaled = p * values.scale.float().unsqueeze(-2)
    out = torch.cat([scaled @ part.float() for part in unpack(values.codes, bits)], dim=-1)
    return out + (p @ values.zero_point(bits).unsqueeze(-1))
