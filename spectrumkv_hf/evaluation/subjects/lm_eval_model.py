"""lm-eval's model class for Transformers over the cache of any method, registered there as `spectrumkv`.

Stock `hf` scores a text in one forward without a cache, and can't be given one for generation. lm-eval finds models in
its own package only, so its own command line knows this one if it is started here:

    python -m spectrumkv_hf.evaluation.subjects.lm_eval_model run --model spectrumkv \\
        --model_args pretrained=M,policy=SPEC ...
"""

import logging
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from tqdm import tqdm
from transformers import PreTrainedModel

from spectrumkv_hf.evaluation.subjects.methods import parse_method
from spectrumkv_hf.probe.divergence import logits_over
from spectrumkv_hf.support.calls import cache_argument
from spectrumkv_hf.tiered.memory import MemoryReport

logger = logging.getLogger(__name__)

CHUNK = 128
"""Tokens of a continuation in a forward; up to 64 new ones would be tiered without attention scores."""


@dataclass
class CacheUse:
    """What the caches of an evaluation held when they were last read.

    Attributes:
        caches: How many were made, one for each batch.
        unread: How many of them nothing was read from, because all tokens came in one forward.
        cut: How many prompts were longer than the model's `max_length` and lost their beginning.
        stored: Bytes of the others, and `exact`, `fp16`, `nominal`: what these were in the model's own exact cache, at
            two bytes an element, and at the nominal costs of their tiers.
    """

    caches: int = 0
    unread: int = 0
    cut: int = 0
    stored: int = 0
    exact: int = 0
    fp16: int = 0
    nominal: float = 0.0

    def add(self, memory: MemoryReport | None) -> None:
        """Count a cache, or one that was not read (None)."""
        self.caches += 1
        if memory is None:
            self.unread += 1
            return
        self.stored += memory.stored
        self.exact += memory.exact
        self.fp16 += memory.fp16
        self.nominal += memory.nominal_ratio * memory.fp16

    def summary(self) -> dict[str, float | int]:
        """Counts, and the mean ratios, weighted by the caches' size; 0 where none was read."""
        return {
            "caches": self.caches,
            "unread": self.unread,
            "cut": self.cut,
            "times_smaller": self.exact / self.stored if self.stored else 1.0,
            "actual_ratio": self.stored / self.fp16 if self.fp16 else 0.0,
            "nominal_ratio": self.nominal / self.fp16 if self.fp16 else 0.0,
        }


@register_model("spectrumkv")
class SpectrumLM(HFLM):
    """Decoder-only models whose tokens are scored and generated over a method's cache, a fresh one for each batch.

    Log-likelihoods: all tokens of the context but the last are prefilled in one forward, in exact precision, and
    compressed; then the last one and the continuation come in chunks. So every scored token reads the stored cache,
    and of the tokens before it only those of its own chunk (and the policy's recent window) are exact. A rolling
    log-likelihood has a context of one token, so that its first chunk sees nothing but itself.

    Generation: one `generate()` on the cache, which is compressed after the prefill.

    Args:
        pretrained: As of lm-eval's `HFLM`: a hub id, a path or a model.
        policy: A method as `parse_method` reads it; `exact` gives what stock `hf` does.
        recent_window: Tokens that a policy keeps exact at the end; None: its default.
        chunk: Tokens of a continuation in a forward.
        kwargs: As of `HFLM`.

    Raises:
        ValueError: a method, chunk or batch size that can't be, or an encoder-decoder.
    """

    def __init__(
        self,
        pretrained: str | PreTrainedModel,
        policy: str = "sink_protect:0.5",
        recent_window: int | None = None,
        chunk: int = CHUNK,
        **kwargs: Any,
    ) -> None:
        self.method = parse_method(policy, recent_window)
        if not isinstance(chunk, int) or chunk < 1:
            raise ValueError(f"chunk is a number of tokens, 1 or more, got {chunk!r}")
        if str(kwargs.get("batch_size", 1)).startswith("auto"):
            raise ValueError("batch_size is a number here: how much fits depends on the method, give one")
        super().__init__(pretrained, **kwargs)
        if self.backend != "causal":
            raise ValueError(f"{type(self.model).__name__} is an encoder-decoder: only decoder-only models run here")
        self.method.prepare(self.model, self.tokenizer)
        self.chunk = chunk
        self.use = CacheUse()
        self._context = 1

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[Any, list[int], list[int]]],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        """As of `HFLM`, for requests with the same length of context at a time.

        The rows of a batch then change from context to continuation at the same token, and there is no padding but
        after a row's end, where nothing is scored any more.
        """
        groups: dict[int, list[int]] = {}
        for index, (_, context, continuation) in enumerate(requests):
            left = min(len(context), self.max_length + 1 - len(continuation))  # HFLM truncates from the left
            self.use.cut += left < len(context)
            groups.setdefault(left, []).append(index)
        answers: dict[int, tuple[float, bool]] = {}
        with tqdm(total=len(requests), desc="log-likelihoods", disable=disable_tqdm or None) as bar:
            for length, indices in sorted(groups.items(), reverse=True):
                self._context = length
                group = [requests[index] for index in indices]
                got = super()._loglikelihood_tokens(group, disable_tqdm=True, override_bs=override_bs)
                answers |= zip(indices, got, strict=True)
                bar.update(len(group))
        return [answers[index] for index in range(len(requests))]

    def tok_batch_encode(
        self,
        strings: list[str],
        padding_side: str = "left",
        left_truncate_len: int | None = None,
        truncation: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As of `HFLM`; rows that are cut are counted."""
        ids, mask = super().tok_batch_encode(strings, padding_side, None, truncation)
        if left_truncate_len is None:
            return ids, mask
        self.use.cut += int((mask.sum(1) > left_truncate_len).sum())
        return ids[:, -left_truncate_len:], mask[:, -left_truncate_len:]

    @torch.inference_mode()
    def _model_call(
        self, inps: torch.Tensor, attn_mask: torch.Tensor | None = None, labels: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Logits `[batch, tokens, vocabulary]` from the last token of the context on, of `inps`, `[batch, all]`.

        `HFLM` takes it for a model that sees fewer tokens than it was given, and counts from the end.
        """
        method, model = self.method, self.model
        cache = method.cache(model)
        start, memory = self._context - 1, None
        with torch.autocast(
            self.device.type, dtype=self.mixed_precision_dtype, enabled=self.mixed_precision_dtype is not None
        ):
            if start:
                with method.prefilling(model):
                    logits_over(model, inps[:, :start], cache, 0, last=1)
            logits = []
            for ids in inps[:, start:].split(self.chunk, dim=1):
                end = start + ids.shape[1]
                if start and end == inps.shape[1]:
                    memory = method.memory(cache)
                with nullcontext() if start else method.prefilling(model):
                    logits.append(logits_over(model, ids, cache, start))
                start = end
        self.use.add(memory)
        return torch.cat(logits, dim=1)

    def _model_generate(
        self, context: torch.Tensor, max_length: int, stop: list[str], **generation_kwargs: Any
    ) -> torch.Tensor:
        """Ids `[batch, tokens]` that begin with `context`, `[batch, context]`, as of `HFLM`.

        Raises:
            ValueError: the method's cache has lost count of its tokens, on which `generate()` relies.
        """
        cache = self.method.cache(self.model)
        with self.method.prefilling(self.model):
            ids = super()._model_generate(context, max_length, stop, **cache_argument(cache), **generation_kwargs)
        fed = ids.shape[1] - 1
        if (held := cache.get_seq_length()) < fed:
            raise ValueError(
                f"method {self.method.spec!r} prunes: its cache counts {held} of {fed} tokens, and "
                "generate() would give new ones wrong positions. It can run tasks of log-likelihoods only"
            )
        self.use.add(self.method.memory(cache) if fed > context.shape[1] else None)
        return ids


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
