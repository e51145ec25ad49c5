"""What a model predicts over a cache, and how far predictions over two caches lie apart."""

import inspect

import torch
from torch.nn.functional import log_softmax
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from spectrumkv_hf.support.calls import cache_argument

POSITIONS_AT_ONCE = 32
"""Distributions compared at a time: with 260k tokens in the vocabulary, 32 MiB for each float32 copy."""


def logits_over(
    model: PreTrainedModel, ids: torch.Tensor, cache: Cache, start: int | None = None, last: int | None = None
) -> torch.Tensor:
    """Logits after tokens that are added to a cache, `[batch, last, vocabulary]`.

    Args:
        model: In eval mode.
        ids: `[batch, tokens]`, on the model's device.
        cache: Of the tokens before them.
        start: How many tokens those are, for a cache that was pruned and no longer knows; None: the cache knows.
        last: How many of the logits at the end are wanted; None: those of all tokens.
    """
    more: dict[str, object] = {}
    if start is not None:
        more["position_ids"] = torch.arange(start, start + ids.shape[1], device=ids.device).expand(len(ids), -1)
    if last is not None and "logits_to_keep" in inspect.signature(model.forward).parameters:
        more["logits_to_keep"] = last
    logits = model(input_ids=ids, use_cache=True, **cache_argument(cache, model), **more).logits
    return logits if last is None else logits[:, -last:]


def token_kl(exact: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """KL(exact || other) of every row, nats, float64 `[tokens]`, of logits `[tokens, vocabulary]`."""
    rows = []
    for p, q in zip(exact.split(POSITIONS_AT_ONCE), other.split(POSITIONS_AT_ONCE), strict=True):
        log_p, log_q = log_softmax(p.float(), -1), log_softmax(q.float(), -1)
        terms = log_p.exp() * (log_p - log_q)
        rows.append(terms.masked_fill(log_p == -torch.inf, 0.0).sum(-1, dtype=torch.float64))  # 0 log 0 is 0
    return torch.cat(rows)


def token_losses(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihood, nats, float64 `[tokens - 1]`, of `ids[1:]` by the logits of the tokens before them."""
    rows = []
    for scores, targets in zip(logits[:-1].split(POSITIONS_AT_ONCE), ids[1:].split(POSITIONS_AT_ONCE), strict=True):
        rows.append(-log_softmax(scores.float(), -1).gather(-1, targets[:, None])[:, 0].double())
    return torch.cat(rows)


def mean_kl(exact: torch.Tensor, other: torch.Tensor) -> float:
    """Mean of `token_kl` over the rows."""
    return float(token_kl(exact, other).mean())


def mean_loss(logits: torch.Tensor, ids: torch.Tensor) -> float:
    """Mean of `token_losses` over the tokens."""
    return float(token_losses(logits, ids).mean())
