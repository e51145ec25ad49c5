"""Pruning by NVIDIA's kvpress: SnapKV (arXiv 2404.14469) and Expected Attention (arXiv 2510.00636), with its defaults.

kvpress pins an older Transformers; scoring and pruning work on this one as they are, once attention layers pass on what
they no longer do: `cache_position`, and the cache by its former name. It prunes after the prefill only, by layer and KV
head.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from spectrumkv_hf.evaluation.subjects.baselines.accounting import Counted, counted_memory
from spectrumkv_hf.evaluation.subjects.methods import Method
from spectrumkv_hf.support.extras import required
from spectrumkv_hf.tiered.memory import MemoryReport

PRESSES = {"snapkv": "SnapKVPress", "expected_attention": "ExpectedAttentionPress"}


def _kvpress() -> Any:
    """The package, without what its import does to Transformers.

    Raises:
        ImportError: it is missing.
    """
    attention = dict(ALL_ATTENTION_FUNCTIONS.items())
    module = required("kvpress", f"pruning ({', '.join(PRESSES)})")
    # It wraps every attention function, for presses that mask by head. Those here don't, and other methods of the same
    # run should find Transformers as it was.
    for name, function in attention.items():
        ALL_ATTENTION_FUNCTIONS[name] = function
    return module


class PrunedCache(Counted, DynamicCache):
    """A `DynamicCache` that knows how many tokens it was given before a press pruned it."""


class Pressed(Method):
    """A cache pruned by a press.

    Args:
        press: A key of `PRESSES`.
        budget: Fraction of the tokens that is kept.
    """

    def __init__(self, spec: str, press: str, budget: float) -> None:
        super().__init__(spec)
        self.press, self.budget = press, budget

    def cache(self, model: PreTrainedModel) -> Cache:
        """An empty cache.

        Raises:
            ValueError: kvpress doesn't support the model, or it has sliding windows or other layers.
            ImportError: kvpress is missing.
        """
        supported = _kvpress().SUPPORTED_MODELS
        if not isinstance(model, supported):
            raise ValueError(
                f"kvpress supports {', '.join(cls.__name__ for cls in supported)}, not {type(model).__name__}"
            )
        cache = PrunedCache(config=model.config)
        if kinds := {type(layer).__name__ for layer in cache.layers if type(layer) is not DynamicLayer}:
            raise ValueError(f"kvpress prunes layers with full attention, this model has {', '.join(sorted(kinds))}")
        return cache

    def prefilling(self, model: PreTrainedModel) -> AbstractContextManager[Any]:
        return self._pressing(model)

    @contextmanager
    def _pressing(self, model: PreTrainedModel) -> Iterator[None]:
        class Press(getattr(_kvpress(), PRESSES[self.press])):  # type: ignore[misc]
            def forward_hook(self, module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
                states = kwargs["hidden_states"]
                older = {"cache_position": torch.arange(states.shape[1], device=states.device)}
                if "cache" in kwargs:  # the name from Transformers 5.24 on
                    older["past_key_values"] = kwargs["cache"]
                kwargs = kwargs | older
                return super().forward_hook(module, args, kwargs, output)

        try:
            with Press(compression_ratio=1 - self.budget)(model):
                yield
        except AssertionError as problem:  # of its checks of the prompt's length
            raise ValueError(f"{self.spec}: {problem}") from problem

    def memory(self, cache: Cache) -> MemoryReport:
        kept = sum(layer.get_seq_length() for layer in cache.layers)
        return counted_memory(cache, kept / cache.tokens_given())


def parse(spec: str, rest: str) -> Pressed:
    """`snapkv:BUDGET` or `expected_attention:BUDGET`; kvpress' compression ratio is 1 - BUDGET.

    Raises:
        ValueError: the budget is no number above 0 and up to 1.
    """
    press = spec.partition(":")[0]
    try:
        budget = float(rest)
    except ValueError:
        budget = 0.0
    if not 0 < budget <= 1:
        raise ValueError(f"method {spec!r}: write {press}:BUDGET, a fraction of the tokens above 0 and up to 1")
    return Pressed(spec, press, budget)
