"""The transfer protocol: exact prefill, a compressed cache, a continuation with teacher forcing on that cache.

Every method predicts the same continuation tokens, and only what its cache holds of the context reaches them.
"""

import inspect
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from torch.nn.functional import log_softmax
from tqdm import tqdm
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from spectrumkv_hf.evaluation.subjects.methods import Exact, Method
from spectrumkv_hf.support.calls import cache_argument

POSITIONS_AT_ONCE = 32
"""Distributions compared at a time: with 260k tokens in the vocabulary, 32 MiB for each float32 copy."""


@dataclass(frozen=True)
class Quality:
    """Predictions on a continuation, over a cache and over the exact one.

    Attributes:
        kl: Mean over the continuation of KL(exact || cache) of the next token's distribution, nats.
        loss: Mean negative log-likelihood of the continuation's tokens but the first, over the cache, nats.
        exact_loss: The same over the exact cache.
        actual_ratio: Bytes of the cache after the prefill, over two bytes an element.
        nominal_ratio: Mean nominal cost of its tokens.
    """

    kl: float
    loss: float
    exact_loss: float
    actual_ratio: float
    nominal_ratio: float

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss)

    @property
    def exact_perplexity(self) -> float:
        return math.exp(self.exact_loss)

    @property
    def perplexity_change(self) -> float:
        """In percent of the exact cache's."""
        return 100 * math.expm1(self.loss - self.exact_loss)

    @classmethod
    def mean(cls, windows: Sequence["Quality"]) -> "Quality":
        """Of windows of the same length; perplexities are then those of the mean log-likelihood."""
        fields = zip(*(asdict(window).values() for window in windows), strict=True)
        return cls(*(sum(values) / len(windows) for values in fields))


@torch.inference_mode()
def last_logits(model: PreTrainedModel, ids: torch.Tensor, cache: Cache, start: int) -> torch.Tensor:
    """Logits `[batch, vocabulary]` after the tokens `ids`, `[batch, tokens]`, which follow `start` others.

    Positions are given, because a cache that was pruned no longer knows them.
    """
    positions = torch.arange(start, start + ids.shape[1], device=ids.device).expand(ids.shape[0], -1)
    last_only = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    out = model(input_ids=ids, position_ids=positions, use_cache=True, **cache_argument(cache, model), **last_only)
    return out.logits[:, -1]


def prefill(model: PreTrainedModel, ids: torch.Tensor, cache: Cache) -> None:
    """Put the tokens `ids`, `[batch, tokens]`, into an empty cache in one forward."""
    last_logits(model, ids, cache, 0)


@torch.inference_mode()
def continuation_logits(model: PreTrainedModel, ids: torch.Tensor, context: int, cache: Cache) -> torch.Tensor:
    """Logits `[tokens, vocabulary]` of the tokens `ids[:, context:]` on a cache prefilled with those before."""
    positions = torch.arange(context, ids.shape[1], device=ids.device)[None]
    rest = ids[:, context:]
    out = model(input_ids=rest, position_ids=positions, use_cache=True, **cache_argument(cache, model))
    return out.logits[0]


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


def exact_logits(model: PreTrainedModel, ids: torch.Tensor, context: int) -> torch.Tensor:
    """`continuation_logits` on a `DynamicCache`."""
    cache = Exact("exact").cache(model)
    prefill(model, ids[:, :context], cache)
    return continuation_logits(model, ids, context, cache)


def transfer_quality(
    model: PreTrainedModel,
    ids: torch.Tensor,
    context: int,
    method: Method,
    exact: torch.Tensor | None = None,
) -> Quality:
    """Compare a method with the exact cache under the transfer protocol.

    Args:
        model: In eval mode.
        ids: Tokens of one text, `[1, context + continuation]`, on the model's device.
        context: How many of them are prefilled.
        method: How the cache is held.
        exact: `exact_logits` of the same arguments, where several methods are compared; None: computed here.

    Raises:
        ValueError: there are fewer than two tokens of continuation, or no context.
    """
    if not 1 <= context <= ids.shape[1] - 2:
        raise ValueError(f"{ids.shape[1]} tokens do not leave 2 or more after a context of {context}")
    if exact is None:
        exact = exact_logits(model, ids, context)
    cache = method.cache(model)
    with method.prefilling(model):
        prefill(model, ids[:, :context], cache)
    memory = method.memory(cache)
    logits = continuation_logits(model, ids, context, cache)
    rest = ids[0, context:]
    return Quality(
        kl=mean_kl(exact, logits),
        loss=mean_loss(logits, rest),
        exact_loss=mean_loss(exact, rest),
        actual_ratio=memory.actual_ratio,
        nominal_ratio=memory.nominal_ratio,
    )


def measure(
    model: PreTrainedModel, windows: Sequence[torch.Tensor], context: int, methods: Sequence[Method]
) -> dict[str, Quality]:
    """`transfer_quality` of every method by its spec, the mean over the windows."""
    results: dict[str, list[Quality]] = {method.spec: [] for method in methods}
    with tqdm(total=len(windows) * (1 + len(methods)), desc="quality", disable=None) as bar:
        for ids in windows:
            ids = ids.to(model.device)
            exact = exact_logits(model, ids, context)
            bar.update()
            for method in methods:
                results[method.spec].append(transfer_quality(model, ids, context, method, exact))
                bar.update()
    return {name: Quality.mean(qualities) for name, qualities in results.items()}
