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


def mean_kl(exact: torch.Tensor, other: torch.Tensor) -> float:
    """Mean over the rows of KL(exact || other), nats, of logits `[tokens, vocabulary]`."""
    total = 0.0
    for p, q in zip(exact.split(POSITIONS_AT_ONCE), other.split(POSITIONS_AT_ONCE), strict=True):
        log_p, log_q = log_softmax(p.float(), -1), log_softmax(q.float(), -1)
        total += float((log_p.exp() * (log_p - log_q)).sum(dtype=torch.float64))
    return total / len(exact)


def mean_loss(logits: torch.Tensor, ids: torch.Tensor) -> float:
    """Mean negative log-likelihood, nats, of `ids[1:]` by the logits of the tokens before them."""
    total = 0.0
    for rows, targets in zip(logits[:-1].split(POSITIONS_AT_ONCE), ids[1:].split(POSITIONS_AT_ONCE), strict=True):
        picked = log_softmax(rows.float(), -1).gather(-1, targets[:, None])
        total -= float(picked.sum(dtype=torch.float64))
    return total / (len(ids) - 1)
