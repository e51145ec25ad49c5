"""The paper's probe: three needles over three-tier greedy at b=.3, passed with two of them found.

The paper (section on the adaptive policy) states neither needles nor depths, and its script is not released: those here
are ours. As in its retrieval code, the first token of an answer comes from the prefill, which is exact.
"""

import time
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache

from spectrumkv_hf.policy import get_policy
from spectrumkv_hf.probe.measurement import ProbeError, check_least, check_length
from spectrumkv_hf.probe.needles import NEEDLES, NeedlePrompts, ask, found, needle_prompts
from spectrumkv_hf.probe.verdict import PaperVerdict, Trial
from spectrumkv_hf.tiered.cache import TieredCache
from spectrumkv_kernels import CODECS

BUDGET = 0.3
RELEASED: dict[str, Any] = {"importance": "positional", "scope": "token", "recent_window": 0, "sinks": 4}
"""Options of a policy as the paper's released code has it: one map for all layers and heads, ranked by position, and
nothing exact on top but the sinks."""
TRIALS = tuple(zip(NEEDLES[:3], (0.25, 0.5, 0.75), strict=True))
"""Needles and their relative depths."""


@dataclass(frozen=True, kw_only=True)
class PaperProbe:
    """Whether a model retrieves over three tiers.

    Attributes:
        codec: Of the cache; `absmax` is the paper's.
        tokens: Of each prompt; 4096 in the paper's retrieval.

    Raises:
        ValueError: an unknown codec.
    """

    codec: str = "absmax"
    tokens: int = 4096

    kind = "paper"
    parse = staticmethod(PaperVerdict.from_json)

    def __post_init__(self) -> None:
        if self.codec not in CODECS:
            raise ValueError(f"unknown codec {self.codec!r}: choose from {', '.join(CODECS)}")
        check_least(self, "a number of tokens", tokens=1)

    def forwards(self, model: PreTrainedModel) -> int:
        """Of the model: 32 tokens for each of three needles, over the exact cache and over tiers."""
        return 192

    def inputs(self, model: PreTrainedModel, tokenizer: Any) -> torch.Tensor:
        """Ids of the prompts, `[trials, tokens]`.

        Raises:
            ProbeError: the model or the prompts are too short.
            TypeError: there is no tokenizer.
        """
        return torch.cat([prompts.ids for prompts in self._prompts(model, tokenizer)])

    def _prompts(self, model: PreTrainedModel, tokenizer: Any) -> list[NeedlePrompts]:
        if tokenizer is None:
            raise TypeError("the paper's probe asks questions: give a tokenizer")
        check_length(model, self.tokens, f"the prompts of the probe have {self.tokens}")
        try:
            return [needle_prompts(tokenizer, needle, [depth], self.tokens) for needle, depth in TRIALS]
        except ValueError as problem:
            raise ProbeError(str(problem)) from None

    def measure(self, model: PreTrainedModel, tokenizer: Any, ids: torch.Tensor) -> PaperVerdict:
        """Probe a model in eval mode; `ids` are those of `inputs`."""
        began = time.perf_counter()
        config = model.config
        greedy = get_policy("greedy", BUDGET, **RELEASED)

        def finds(cache: Cache, prompts: NeedlePrompts) -> bool:
            return found(ask(model, tokenizer, cache, prompts, first_exact=True), prompts.answer)[0]

        trials = [
            Trial(
                answer=needle.answer,
                depth=depth,
                exact=finds(DynamicCache(config=config), prompts),
                tiered=finds(TieredCache(config, policy=greedy, codec=self.codec), prompts),
            )
            for (needle, depth), prompts in zip(TRIALS, self._prompts(model, tokenizer), strict=True)
        ]
        return PaperVerdict(
            codec=self.codec, tokens=self.tokens, trials=tuple(trials), seconds=time.perf_counter() - began
        )
