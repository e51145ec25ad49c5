"""Attention mass that each key receives from a sample of the queries."""

import torch

from ..backend.tensor_cache import keep

QUERY_CHUNK = 16
"""Probe queries scored at a time, which bounds the temporary."""


def real_tokens(mask: torch.Tensor | None, queries: int) -> torch.Tensor | None:
    """Which of the last `queries` tokens are no padding: those that may attend to themselves.

    Args:
        mask: `[batch, heads or 1, queries, columns]`, bool or additive, or None.

    Returns:
        bool `[batch, queries]`, or None where there is no mask.
    """
    if mask is None:
        return None
    diagonal = mask[:, 0].diagonal(offset=mask.shape[-1] - queries, dim1=-2, dim2=-1)
    return _allowed(diagonal)


def probe_rows(
    real: torch.Tensor | None, queries: int, recent: int, strided: int, device: torch.device
) -> torch.Tensor:
    """The sample of queries: the last `recent` and `strided` more, spread evenly over those before, padding skipped.

    Args:
        real: `real_tokens` of the queries, `[batch, queries]`, or None.
        queries: How many there are.

    Returns:
        int64 `[batch or 1, probes]`; -1 where a row has fewer real queries than probes.
    """
    if real is None:
        return _probes_of_all(queries, recent, strided, device)
    order = torch.argsort(real.logical_not().to(torch.uint8), dim=-1, stable=True)  # real ones first, in order
    count = real.sum(-1, keepdim=True)
    early = (count - recent).clamp(min=0)
    step = torch.arange(min(strided, max(queries - recent, 0)), device=device)
    spread = torch.where(early > strided, step * early // max(strided, 1), step.where(step < early, -1))
    last = count - torch.arange(min(recent, queries), 0, -1, device=device)
    picked = torch.cat((spread, last), dim=-1)
    return order.gather(-1, picked.clamp(min=0)).where(picked >= 0, -1)


@keep(8)
def _probes_of_all(queries: int, recent: int, strided: int, device: torch.device) -> torch.Tensor:
    """`probe_rows` where no query is padding: the same for all layers."""
    return probe_rows(torch.ones(1, queries, dtype=torch.bool, device=device), queries, recent, strided, device)


def attention_scores(
    query: torch.Tensor,
    keys: torch.Tensor,
    *,
    scale: float,
    mask: torch.Tensor | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    recent: int = 64,
    strided: int = 64,
) -> torch.Tensor:
    """Mean attention probability that each key receives from the probe queries which can see it.

    The normalisation by the count of such queries removes the bias of causal attention towards early keys (ZipCache,
    arXiv 2405.14256). Queries of padding take no part.

    Args:
        query: `[batch, heads, queries, head_dim]`, after RoPE; the last `queries` of the keys' positions.
        keys: `[batch, kv_heads, tokens, head_dim]`, exact, in order of position.
        scale: Factor on query times key.
        mask: Which keys a query sees, `[batch or 1, heads or 1, queries, tokens]`, bool or additive; None for causal.
        window: How many keys a query sees, its own included; None: all.
        softcap: Scores become `softcap * tanh(score / softcap)`; None: they stay.
        sinks: Logits of a further, invisible key, `[heads]`; None: there is none.
        recent: How many of the last queries probe.
        strided: How many more probe, spread over the prompt.

    Returns:
        float32 `[batch, kv_heads, tokens]`, the mean over the heads of a group; 0 for a key that no probe sees.
    """
    batch, heads, queries, _ = query.shape
    kv_heads, tokens = keys.shape[1:3]
    rows = probe_rows(real_tokens(mask, queries), queries, recent, strided, query.device).expand(batch, -1)
    k = keys.float().transpose(-1, -2)
    columns = torch.arange(tokens, device=query.device)
    mass = torch.zeros(batch, kv_heads, tokens, device=query.device)
    seen_by = torch.zeros(batch, 1, tokens, device=query.device)
    for chunk in rows.split(QUERY_CHUNK, dim=-1):
        index = chunk.clamp(min=0)[:, None, :, None]
        q = query.gather(2, index.expand(-1, heads, -1, query.shape[-1])).float() * scale
        scores = q.unflatten(1, (kv_heads, -1)).flatten(2, 3) @ k  # a group's heads as rows of one product
        scores = scores.view(batch, heads, -1, tokens)  # [batch, heads, probes, tokens]
        if softcap is not None:
            scores = scores.div_(softcap).tanh_().mul_(softcap)
        if mask is None:
            ahead = tokens - queries + index - columns
            allowed = ahead >= 0 if window is None else (ahead >= 0) & (ahead < window)
        else:
            part = mask.expand(batch, -1, -1, -1)
            part = part.gather(2, index.expand(-1, part.shape[1], -1, tokens))
            allowed = _allowed(part)
            if mask.dtype != torch.bool:
                scores += part
        allowed = allowed & (chunk >= 0)[:, None, :, None]
        scores.masked_fill_(~allowed, -torch.inf)
        if sinks is not None:
            scores = torch.cat((scores, sinks.float().view(1, -1, 1, 1).expand(*scores.shape[:-1], 1)), dim=-1)
        probabilities = torch.softmax(scores, dim=-1)[..., :tokens].nan_to_num_()  # a padding query sees nothing
        mass += probabilities.unflatten(1, (kv_heads, -1)).sum((2, 3))
        seen_by += allowed.any(1, keepdim=True).sum(2)
    return mass.div_(heads // kv_heads) / seen_by.clamp(min=1.0)


def _allowed(mask: torch.Tensor) -> torch.Tensor:
    return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
