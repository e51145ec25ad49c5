"""Quality of a continuation: exact prefill, a compressed cache, further tokens with teacher forcing over that cache.

Every method predicts the same continuation tokens, and only what its cache holds of the context reaches them.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import NamedTuple

import torch
from tqdm import tqdm
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from spectrumkv_hf.evaluation.subjects.methods import Exact, Method
from spectrumkv_hf.probe.divergence import logits_over, mean_kl, mean_loss


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


def with_error(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean, and its standard error where there are two values or more."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return statistics.fmean(values), error


class Summary(NamedTuple):
    """A method at one length of context, over the windows.

    Attributes:
        spec: The method.
        context: Tokens prefilled.
        mean: Of the windows.
        kl_error: Standard error of the mean KL over the windows, nats; None: there is one window.
        change: Perplexity change, percent, of the mean log-likelihoods.
        change_error: Its standard error over the windows, percentage points.
    """

    spec: str
    context: int
    mean: Quality
    kl_error: float | None
    change: float
    change_error: float | None


def summarise(spec: str, context: int, windows: list[Quality]) -> Summary:
    """Means over the windows, and how far they may be off."""
    mean = Quality.mean(windows)
    _, kl_error = with_error([window.kl for window in windows])
    _, loss_error = with_error([window.loss - window.exact_loss for window in windows])
    scale = 100 + mean.perplexity_change  # the derivative of 100 (exp(x) - 1)
    return Summary(
        spec, context, mean, kl_error, mean.perplexity_change, None if loss_error is None else scale * loss_error
    )


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
