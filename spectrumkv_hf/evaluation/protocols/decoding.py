"""Long greedy decoding over a compressed prompt, against the same over the exact cache.

All tokens of the prompt but the last are prefilled and compressed. So every new token, the first included, is predicted
over the stored cache, which holds the new ones too as it holds them in use. They come one by one; no text ends before
its length, as under `min_new_tokens`.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel

from spectrumkv_hf.evaluation.metrics import load, token_divergence
from spectrumkv_hf.evaluation.protocols.quality import prefill, ratios
from spectrumkv_hf.evaluation.subjects.methods import Exact, Method
from spectrumkv_hf.probe.divergence import logits_over
from spectrumkv_hf.tiered.memory import MemoryReport

GRAM = 8
"""Tokens in a row that count as repeated where they were there before."""


class Decoded(NamedTuple):
    """What was decoded: the likeliest ids `[batch, tokens]`, and the logits, `[batch, tokens, vocabulary]`.

    With few bits of a logit several are the largest, and which of them is taken depends on how they are looked through.
    """

    ids: torch.Tensor
    logits: torch.Tensor


@dataclass(frozen=True)
class Departure:
    """How far a method's run lies from the exact one, of one prompt.

    Attributes:
        first: Index of the first token that the method's own run has otherwise; None: there is none.
        same: Share of its tokens that are equal to the exact run's at the same place.
        repeated: Share of its tokens that end `GRAM` in a row which it had before. A run in a loop says little.
        kl: Mean of each bucket of KL(exact || method) of the next token's distribution, nats, where both are given the
            exact run's tokens.
        agreement: Share of each bucket where both then rank the same token first.
    """

    first: int | None
    same: float
    repeated: float
    kl: list[float]
    agreement: list[float]


class Decoder:
    """A method's cache of prompts, and what the model says over it.

    Args:
        model: In eval mode.
        method: How the cache is held.
        prompts: `[batch, tokens]`, two tokens or more, on the model's device.

    Attributes:
        cache: The cache, and `tokens`, how many it was given.
        prefilled: What it held after the prefill.
    """

    def __init__(self, model: PreTrainedModel, method: Method, prompts: torch.Tensor) -> None:
        self.model, self.cache = model, method.cache(model)
        self.tokens = prompts.shape[1] - 1
        self.last = prompts[:, self.tokens :]
        with method.prefilling(model):
            prefill(model, prompts[:, : self.tokens], self.cache)
        self.prefilled = method.memory(self.cache)
        ends = model.generation_config.eos_token_id if model.generation_config else None
        ends = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
        self.ends = torch.tensor(ends, dtype=torch.long, device=prompts.device)

    @torch.inference_mode()
    def run(self, tokens: int, given: torch.Tensor | None = None) -> Decoded:
        """Go on for so many tokens.

        Args:
            tokens: How many.
            given: What is put behind each token, `[batch, tokens]`; None: what is likeliest.
        """
        ids, logits = [], []
        for step in range(tokens):
            scores = logits_over(self.model, self.last, self.cache, self.tokens)[:, -1]
            logits.append(scores.index_fill(-1, self.ends, -torch.inf))
            ids.append(logits[-1].argmax(-1, keepdim=True))
            self.last = ids[-1] if given is None else given[:, step : step + 1]
            self.tokens += 1
        return Decoded(torch.cat(ids, 1), torch.stack(logits, 1))


def exact_run(model: PreTrainedModel, prompts: torch.Tensor, tokens: int) -> Decoded:
    """The likeliest `tokens` tokens after prompts, `[batch, tokens]`, over the exact cache."""
    return Decoder(model, Exact("exact"), prompts).run(tokens)


def departures(
    model: PreTrainedModel, prompts: torch.Tensor, method: Method, exact: Decoded, bucket: int
) -> tuple[list[Departure], MemoryReport, MemoryReport]:
    """Compare a method with the exact run, once by the exact run's tokens and once by its own.

    Args:
        model: In eval mode.
        prompts: `[batch, tokens]`, on the model's device.
        method: How the cache is held.
        exact: `exact_run` of the same prompts.
        bucket: Tokens of which a mean is taken.

    Returns:
        One for each prompt, and what the cache held after the prefill and at the end.

    Raises:
        ValueError: the run is no whole number of buckets.
    """
    if exact.ids.shape[1] % bucket:
        raise ValueError(f"{exact.ids.shape[1]} tokens are no whole number of buckets of {bucket}")
    parts = [*zip(exact.ids.split(bucket, dim=1), exact.logits.split(bucket, dim=1), strict=True)]
    found: list[dict[str, list[float]]] = [{"kl": [], "agreement": []} for _ in prompts]
    forced, same = Decoder(model, method, prompts), True
    for ids, logits in parts:
        run = forced.run(bucket, ids)
        same = same and torch.equal(run.ids, ids)
        for own, p, q in zip(found, logits, run.logits, strict=True):
            divergence = token_divergence(p, q)
            for name, values in own.items():
                values.append(statistics.fmean(divergence[name]))
    said = exact.ids
    if not same:  # else its own run is that one
        free = Decoder(model, method, prompts)
        said = torch.cat([free.run(bucket).ids for _ in parts], 1)
    rows = [
        Departure(*_difference(own, meant), repeated(own), means["kl"], means["agreement"])
        for own, meant, means in zip(said.tolist(), exact.ids.tolist(), found, strict=True)
    ]
    return rows, forced.prefilled, method.memory(forced.cache)


def _difference(said: Sequence[int], meant: Sequence[int]) -> tuple[int | None, float]:
    """Index of the first token that differs, and the share of those that don't."""
    same = [a == b for a, b in zip(said, meant, strict=True)]
    return None if all(same) else same.index(False), statistics.fmean(same)


def repeated(ids: Sequence[int], length: int = GRAM) -> float:
    """Share of the tokens that end `length` in a row which were there before."""
    grams = [tuple(ids[end - length : end]) for end in range(length, len(ids) + 1)]
    return (len(grams) - len({*grams})) / len(ids)


def summarised(rows: Sequence[Departure], prefilled: Sequence[float], final: Sequence[float]) -> dict[str, Any]:
    """Divergence and bytes by the modules that compute them, over the whole runs and bucket by bucket.

    Args:
        rows: Of one method, a prompt each.
        prefilled: Bytes of its caches after the prefill, over those of two bytes an element.
        final: The same at the end.

    Returns:
        `kv_divergence` and its `buckets`, `kv_memory` and `kv_memory_at_end`, and what `Departure` has, by prompt.
    """
    metric = load("kv_divergence", keep_in_memory=True)
    unknown: list[list[float]] = [[] for _ in rows]

    def divergence(buckets: slice) -> dict[str, Any]:
        known = {name: [getattr(row, name)[buckets] for row in rows] for name in ("kl", "agreement")}
        return dict(metric.compute(**known, loss=unknown, exact_loss=unknown))

    return {
        "kv_divergence": divergence(slice(None)),
        "buckets": [divergence(slice(at, at + 1)) for at in range(len(rows[0].kl))],
        "kv_memory": ratios(prefilled),
        "kv_memory_at_end": ratios(final),
        **{name: [getattr(row, name) for row in rows] for name in ("first", "same", "repeated")},
    }
