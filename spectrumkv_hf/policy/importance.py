"""Importance of tokens: what policies rank by."""

import torch

from spectrumkv_hf.policy import Policy

READS_QUERIES = ("attention", "attention_value")
"""Kinds of importance that need attention scores."""


def importance(
    policy: Policy,
    attention: torch.Tensor | None,
    keys: torch.Tensor,
    values: torch.Tensor,
    *,
    start: int,
    seen: int,
    pads: torch.Tensor | None = None,
    layer: int = 0,
) -> torch.Tensor:
    """Score of each token of a stretch; higher keeps more precision. Sinks and padding are the caller's business.

    `I_j = A_j exp(-lambda (n - j))` (paper, section on token importance), where `A_j` is the policy's score.

    Args:
        policy: Says which score, its decay and its scope.
        attention: `attention_scores` of the tokens, float32 `[batch, kv_heads, tokens]`, or None where no query was
            seen; then `kv_norm` stands in.
        keys: `[batch, kv_heads, tokens, head_dim]`.
        values: `[batch, kv_heads, tokens, value_dim]`.
        start: Position of the first token.
        seen: Tokens seen so far, `n`.
        pads: Padding tokens at the start of each row, `[batch]`, or None.
        layer: Index of the layer, so that random rankings of layers differ.

    Returns:
        float32 `[batch, kv_heads, tokens]`; the same for all heads where the scope is not `head`.
    """
    batch, heads, tokens, _ = keys.shape

    def positions() -> torch.Tensor:
        return torch.arange(start, start + tokens, device=keys.device)

    if policy.importance in READS_QUERIES and attention is not None:
        score = attention
        if policy.importance == "attention_value":  # VATP, arXiv 2406.12335, with the 2-norm
            score = score * values.float().norm(dim=-1)
    elif policy.importance in (*READS_QUERIES, "kv_norm"):
        score = kv_norm(keys, values)
    elif policy.importance == "positional":
        score = positional(positions(), seen, pads).unsqueeze(1).expand(batch, heads, -1)
    elif policy.importance == "recency":
        score = positions().float().expand(batch, heads, -1)
    else:
        shared = policy.scope == "token"
        generator = torch.Generator().manual_seed(policy.seed * 7919 + start + (0 if shared else 104729 * (layer + 1)))
        score = torch.rand(1 if shared else heads, tokens, generator=generator).to(keys.device).expand(batch, heads, -1)
    if policy.decay:
        score = score * torch.exp(-policy.decay * (seen - positions()))
    if policy.scope != "head":
        score = score.mean(1, keepdim=True).expand(-1, heads, -1)
    return score


def kv_norm(keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Importance without queries: the norm of the value over the norm of the key, float32 `[batch, kv_heads, tokens]`.

    Keys of a small norm attract attention (kvpress' Knorm), large values weigh more in the output.
    """
    return values.float().norm(dim=-1) / keys.float().norm(dim=-1).clamp(min=1e-6)


def positional(positions: torch.Tensor, seen: int, pads: torch.Tensor | None = None) -> torch.Tensor:
    """The score that the paper's released experiments rank by, float32 `[batch or 1, tokens]`.

    The first 4 tokens 1, then `exp(-i / 100)`, the last fifth raised to a ramp from .3 to .8
    (`compute_importance_heuristic` of the authors' code). It reads no attention.
    """
    index = positions.float() - (0 if pads is None else pads.unsqueeze(-1))
    length = torch.as_tensor(float(seen)) if pads is None else (seen - pads).unsqueeze(-1).float()
    tail = (0.8 * length).floor()
    ramp = 0.3 + 0.5 * (index - tail) / (length - tail - 1).clamp(min=1)
    score = torch.where(index < 4, torch.ones_like(index), torch.exp(-index / 100))
    score = torch.where(index >= tail, torch.maximum(score, ramp), score)
    return score if score.dim() == 2 else score.unsqueeze(0)
