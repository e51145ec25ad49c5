"""How far the predictions of a run lie from those of an exact one: KL divergence, top-1 agreement, perplexity change.

Loaded by `evaluate.load`, which copies this file alone: it imports nothing of the package, and one module a line,
because `evaluate` finds imports with a pattern that reads single lines.
"""

import math
import statistics
from collections.abc import Sequence
from typing import Any

import datasets
import evaluate
import numpy as np

DESCRIPTION = """
Compares the next-token distributions of two runs of a model on the same tokens, such as one over a compressed KV cache
with one over the exact cache: KL(exact || run) in nats, the share of positions where both rank the same token first,
and the change of perplexity in percent. Means over windows of text, with standard errors over the windows.
"""

INPUTS = """
Every example is one window of text.

The configuration "default" takes numbers of its tokens, which stay small whatever the vocabulary.
`spectrumkv_hf.evaluation.metrics.token_divergence` makes them of two tensors of logits. One number a window, the mean
of its tokens, will do as well. An empty list in every window: not known, and the results of it are None.

Args:
    kl: KL(exact || run) of the next token's distribution, nats.
    agreement: 1 where both runs rank the same token first, else 0.
    loss: negative log-likelihood of the window's tokens by the run, nats.
    exact_loss: the same by the exact run, of the same tokens.

The configuration "logits" takes the logits themselves, or log-probabilities. They are kept as numbers of Python: a
vocabulary of 50 thousand is too large for more than some hundred tokens.

Args:
    predictions: of the run, [windows, tokens, vocabulary].
    references: of the exact run, [windows, tokens, vocabulary].
    input_ids: the tokens that the logits were computed at, [windows, tokens]; each is predicted by the logits before
        it. An empty list in every window: no perplexity is wanted.

Returns:
    kl: mean over the windows of each window's mean.
    kl_error: its standard error over the windows, None for a single one, as are all errors.
    agreement, agreement_error: the same of the top-1 agreement, 0 to 1.
    loss, exact_loss: mean negative log-likelihoods.
    perplexity, exact_perplexity: their exponentials.
    perplexity_change: 100 * (perplexity / exact_perplexity - 1), percent.
    perplexity_change_error: its standard error over the windows, percentage points, to first order.
    windows: how many there are.

Raises:
    ValueError: no windows, windows that lack a quantity which others have, or shapes that do not fit.

Examples:
    >>> metric = evaluate.load(path, module_type="metric")
    >>> metric.compute(kl=[[0.2, 0.4]], agreement=[[1, 0]], loss=[[2.0]], exact_loss=[[2.0]])["agreement"]
    0.5
"""

QUANTITIES = ("kl", "agreement", "loss", "exact_loss")


class KvDivergence(evaluate.Metric):
    """KL divergence, top-1 agreement and perplexity change between two runs."""

    def _info(self) -> evaluate.MetricInfo:
        number = datasets.Value("float64")
        logits = datasets.Sequence(datasets.Sequence(datasets.Value("float32")))
        features = {
            "default": dict.fromkeys(QUANTITIES, datasets.Sequence(number)),
            "logits": {
                "predictions": logits,
                "references": logits,
                "input_ids": datasets.Sequence(datasets.Value("int64")),
            },
        }
        if self.config_name not in features:
            raise ValueError(f"kv_divergence has configurations {' and '.join(features)}, got {self.config_name!r}")
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation="",
            inputs_description=INPUTS,
            features=datasets.Features(features[self.config_name]),
        )

    def _compute(self, **inputs: list[Any]) -> dict[str, float | int | None]:
        if self.config_name == "default":
            return summary(**inputs)
        windows = [of_logits(*window) for window in zip(*inputs.values(), strict=True)]
        return summary(**{name: [window[name] for window in windows] for name in QUANTITIES})


def of_logits(predictions: Any, references: Any, input_ids: Sequence[int]) -> dict[str, list[float]]:
    """What the default configuration takes, of one window of the other."""
    other, exact = log_probabilities(predictions), log_probabilities(references)
    if other.ndim != 2 or other.shape != exact.shape or len(input_ids) not in (0, len(other)):
        raise ValueError(
            "a window has predictions and references of one shape, [tokens, vocabulary], and as many input_ids or "
            f"none, got {list(other.shape)}, {list(exact.shape)} and {len(input_ids)} input_ids"
        )
    if len(input_ids) and not 0 <= min(input_ids) <= max(input_ids) < other.shape[1]:
        raise ValueError(f"input_ids are 0 to {other.shape[1] - 1}, got {min(input_ids)} to {max(input_ids)}")
    with np.errstate(invalid="ignore"):
        terms = np.where(np.isneginf(exact), 0, np.exp(exact) * (exact - other))  # 0 log 0 is 0
    before, targets = np.arange(max(len(input_ids) - 1, 0)), np.asarray(input_ids[1:], int)
    return {
        "kl": terms.sum(-1).tolist(),
        "agreement": (exact.argmax(-1) == other.argmax(-1)).astype(float).tolist(),
        "loss": (-other[before, targets]).tolist(),
        "exact_loss": (-exact[before, targets]).tolist(),
    }


def log_probabilities(logits: Any) -> Any:
    """Of logits `[tokens, vocabulary]`, float64 of the same shape."""
    values = np.asarray(logits, dtype=np.float64)
    shifted = values - values.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def summary(**numbers: list[list[float]]) -> dict[str, float | int | None]:
    """The results, of each quantity's numbers by window."""
    windows = len(numbers["kl"])
    if not windows:
        raise ValueError("kv_divergence needs one window or more, got none")
    known = {name: checked(name, values) for name, values in numbers.items()}
    if [len(each) for each in numbers["loss"]] != [len(each) for each in numbers["exact_loss"]]:
        raise ValueError("loss and exact_loss are of the same tokens, got windows with different numbers of them")
    means = {name: [statistics.fmean(each) for each in values] for name, values in known.items()}
    differences = [run - exact for run, exact in zip(means["loss"], means["exact_loss"], strict=True)]
    loss, exact_loss = mean(means["loss"]), mean(means["exact_loss"])
    change, change_error = None, standard_error(differences)
    if loss is not None and exact_loss is not None:
        change = 100 * math.expm1(loss - exact_loss)
        change_error = None if change_error is None else (100 + change) * change_error  # by the derivative
    return {
        "kl": mean(means["kl"]),
        "kl_error": standard_error(means["kl"]),
        "agreement": mean(means["agreement"]),
        "agreement_error": standard_error(means["agreement"]),
        "loss": loss,
        "exact_loss": exact_loss,
        "perplexity": None if loss is None else math.exp(loss),
        "exact_perplexity": None if exact_loss is None else math.exp(exact_loss),
        "perplexity_change": change,
        "perplexity_change_error": change_error,
        "windows": windows,
    }


def checked(name: str, values: list[list[float]]) -> list[list[float]]:
    """The windows' numbers, or nothing where all are empty."""
    lacking = [index for index, each in enumerate(values) if not each]
    if lacking and len(lacking) < len(values):
        raise ValueError(f"{name} is known of all windows or of none, and is empty in window {lacking[0]}")
    return [] if lacking else values


def mean(values: list[float]) -> float | None:
    """Of nothing None."""
    return statistics.fmean(values) if values else None


def standard_error(values: list[float]) -> float | None:
    """Of the mean; None where there are fewer than two values, and NaN where one is not finite."""
    if not all(map(math.isfinite, values)):
        return math.nan if len(values) > 1 else None
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
