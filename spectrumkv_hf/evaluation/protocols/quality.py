"""Quality of a continuation: exact prefill, a compressed cache, further tokens with teacher forcing over that cache.

Every method predicts the same continuation tokens, and only what its cache holds of the context reaches them.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from tqdm import tqdm
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from spectrumkv_hf.evaluation.metrics import load, token_divergence
from spectrumkv_hf.evaluation.subjects.methods import Exact, Method
from spectrumkv_hf.probe.divergence import logits_over


@dataclass(frozen=True)
class Quality:
    """Predictions on a continuation, over a cache and over the exact one.

    Attributes:
        kl: Mean over the continuation of KL(exact || cache) of the next token's distribution, nats.
        loss: Mean negative log-likelihood of the continuation's tokens but the first, over the cache, nats.
        exact_loss: The same over the exact cache.
        actual_ratio: Bytes of the cache after the prefill, over two bytes an element.
        nominal_ratio: Mean nominal cost of its tokens.
        agreement: Share of the continuation where both caches rank the same next token first; None: it was measured
            before this was kept.
    """

    kl: float
    loss: float
    exact_loss: float
    actual_ratio: float
    nominal_ratio: float
    agreement: float | None = None

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
        means: list[Any] = [None if None in values else statistics.fmean(values) for values in fields]
        return cls(*means)


def with_error(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean, and its standard error where there are two values or more; NaN where one is not finite."""
    if len(values) < 2:
        return statistics.fmean(values), None
    finite = all(map(math.isfinite, values))  # statistics.stdev takes no others
    return statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values)) if finite else math.nan


class Summary(NamedTuple):
    """A method at one length of context, over the windows.

    Attributes:
        spec: The method.
        context: Tokens prefilled.
        mean: Of the windows.
        kl_error: Standard error of the mean KL over the windows, nats; None: there is one window.
        change: Perplexity change, percent, of the mean log-likelihoods.
        change_error: Its standard error over the windows, percentage points.
        metrics: What the modules of `spectrumkv_hf.evaluation.metrics` say, by name: all of the above comes from them.
    """

    spec: str
    context: int
    mean: Quality
    kl_error: float | None
    change: float
    change_error: float | None
    metrics: Mapping[str, dict[str, Any]]


def summarise(spec: str, context: int, windows: list[Quality]) -> Summary:
    """Means over the windows, and how far they may be off.

    Raises:
        ImportError: the package `evaluate` is missing.
    """
    agreement = [[window.agreement] for window in windows if window.agreement is not None]
    divergence = load("kv_divergence", keep_in_memory=True).compute(
        kl=[[window.kl] for window in windows],
        agreement=agreement if len(agreement) == len(windows) else [[] for _ in windows],
        loss=[[window.loss] for window in windows],
        exact_loss=[[window.exact_loss] for window in windows],
    )
    memory = ratios([window.actual_ratio for window in windows])
    mean = Quality(
        kl=divergence["kl"],
        loss=divergence["loss"],
        exact_loss=divergence["exact_loss"],
        actual_ratio=memory["ratio"],
        nominal_ratio=statistics.fmean(window.nominal_ratio for window in windows),
        agreement=divergence["agreement"],
    )
    return Summary(
        spec,
        context,
        mean,
        divergence["kl_error"],
        divergence["perplexity_change"],
        divergence["perplexity_change_error"],
        {"kv_divergence": divergence, "kv_memory": memory},
    )


def ratios(actual: Sequence[float]) -> dict[str, Any]:
    """`kv_memory` of caches whose bytes are known over those of two bytes an element, which are its unit then."""
    memory: dict[str, Any] = load("kv_memory", keep_in_memory=True).compute(stored=actual, exact=[1.0] * len(actual))
    return memory


@torch.inference_mode()
def prefill(model: PreTrainedModel, ids: torch.Tensor, cache: Cache) -> None:
    """Put the tokens `ids`, `[batch, tokens]`, into an empty cache in one forward."""
    logits_over(model, ids, cache, 0, last=1)


@torch.inference_mode()
def exact_logits(model: PreTrainedModel, ids: torch.Tensor, context: int) -> torch.Tensor:
    """Logits `[tokens, vocabulary]` of the tokens `ids[:, context:]` on a `DynamicCache` of those before."""
    cache = Exact("exact").cache(model)
    prefill(model, ids[:, :context], cache)
    return logits_over(model, ids[:, context:], cache, context)[0]


@torch.inference_mode()
def continuation_quality(
    model: PreTrainedModel,
    ids: torch.Tensor,
    context: int,
    method: Method,
    exact: torch.Tensor | None = None,
) -> Quality:
    """Compare a method with the exact cache on a continuation.

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
    logits = logits_over(model, ids[:, context:], cache, context)[0]
    means = {name: statistics.fmean(each) for name, each in token_divergence(exact, logits, ids[0, context:]).items()}
    return Quality(**means, actual_ratio=memory.actual_ratio, nominal_ratio=memory.nominal_ratio)


def measure(
    model: PreTrainedModel, windows: Sequence[torch.Tensor], context: int, methods: Sequence[Method]
) -> dict[str, Quality]:
    """`continuation_quality` of every method by its spec, the mean over the windows."""
    results: dict[str, list[Quality]] = {method.spec: [] for method in methods}
    with tqdm(total=len(windows) * (1 + len(methods)), desc="quality", disable=None) as bar:
        for ids in windows:
            ids = ids.to(model.device)
            exact = exact_logits(model, ids, context)
            bar.update()
            for method in methods:
                results[method.spec].append(continuation_quality(model, ids, context, method, exact))
                bar.update()
    return {name: Quality.mean(qualities) for name, qualities in results.items()}
