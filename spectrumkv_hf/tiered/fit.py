"""Whether the config that a cache was made for is that of the model which uses it, as far as a cache can see."""

import importlib
import re
from collections.abc import Container, Sequence
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from typing import Any

import torch
from transformers import GenerationMixin, PreTrainedConfig

# fmt: off
ENCODERS_UNLESS_TOLD = frozenset((
    "bert", "bert-generation", "big_bird", "camembert", "data2vec-text", "electra", "ernie", "megatron-bert", "rembert",
    "roberta", "roberta-prelayernorm", "roc_bert", "roformer", "xlm-roberta", "xlm-roberta-xl", "xmod",
))  # fmt: on
"""Model types that attend in both directions unless `is_decoder` is set in the config."""

RECOMPUTED = frozenset(("phi3", "phi4_multimodal", "phimoe"))
"""Model types whose `prepare_inputs_for_generation` drops the cache where RoPE changes from short to long factors."""

COMPUTE_BETWEEN = frozenset(("diffllama", "doge", "jetmoe"))
"""Model types that compute with keys or values between the cache and their attention: a step can't read tiers then."""


def no_decoder(*configs: PreTrainedConfig) -> str | None:
    """Why models of this config keep no cache of tokens, or None where they may.

    Args:
        configs: A model's config and its decoder's.
    """
    text = configs[-1]
    if text.model_type in ENCODERS_UNLESS_TOLD and not getattr(text, "is_decoder", False):
        return f"{type(text).__name__} is an encoder's unless is_decoder=True is set in it"
    if not any(_knows_caches(type(config).__module__) for config in configs):
        return f"{type(configs[0]).__name__} is that of a model which keeps no cache"
    return None


@cache
def _knows_caches(config_module: str) -> bool:
    """Whether the modeling file beside a config's names a cache, or holds a class that generates."""
    if not config_module.startswith("transformers.models."):
        return True  # one's own model: who can tell
    try:
        found = vars(importlib.import_module(config_module.replace("configuration_", "modeling_")))
    except ImportError:
        return True
    classes = (value for value in found.values() if isinstance(value, type))
    return not found.keys().isdisjoint(("Cache", "DynamicCache", "EncoderDecoderCache")) or any(
        issubclass(value, GenerationMixin) and value.__module__ == found["__name__"] for value in classes
    )


def rope_switch(config: PreTrainedConfig) -> int | None:
    """Tokens behind which `generate()` drops the cache it was given; None for a model that never does."""
    tokens = getattr(config, "original_max_position_embeddings", None)
    return tokens if config.model_type in RECOMPUTED and isinstance(tokens, int) else None


@dataclass(frozen=True)
class Expected:
    """The keys that a layer's config can lead to.

    Models count their heads in fields of several names, and some have two counts for two kinds of layer; any of a
    config's own counts is accepted. Nothing is expected of configs that are not Transformers' own.

    Attributes:
        config: Name of the config's class.
        heads: Possible numbers of KV heads; empty for any.
        dims: Possible channels of keys; empty for any.
    """

    config: str
    heads: frozenset[int] = frozenset()
    dims: frozenset[int] = frozenset()

    @classmethod
    def of(cls, config: PreTrainedConfig) -> "Expected":
        """Read a layer's config."""
        name = type(config).__name__
        if not type(config).__module__.startswith("transformers.models."):
            return cls(name)
        declared = {field.name for field in fields(config)} if is_dataclass(config) else set()
        heads = _counts(config, r"(kv|key_value)_heads$", declared) or _counts(config, r"(heads|n_head)$", declared)
        if getattr(config, "multi_query", False):
            heads.add(1)
        if config.model_type == "falcon":  # in its new architecture keys are repeated before they are cached
            heads |= _counts(config, r"attention_heads$", declared)
        if config.model_type == "mimo_v2_flash":  # of layers with a window
            heads |= {2 * number for number in heads}
        widths = _counts(config, r"^(.*hidden_size|d_model|n_embd|embed_dim)$")
        parts = _counts(config, r"(attention_heads|num_heads|n_heads?)$") - {0}
        dims = _counts(config, r"(head_dim|dim_head|head_size|kv_channels|d_kv)$")
        return cls(name, frozenset(heads), frozenset(dims | {width // n for width in widths for n in parts}))

    def check(self, layer: int, rotated: int, keys: torch.Tensor) -> None:
        """Refuse the first keys of a layer where the config can't have led to them.

        Args:
            layer: Its index.
            rotated: Channels that the config's RoPE rotates.
            keys: `[batch, kv_heads, tokens, head_dim]`; of a tensor-parallel worker, its part of the heads.

        Raises:
            ValueError: other KV heads or channels.
        """
        _, heads, _, dim = keys.shape
        if self.heads and heads not in self.heads and not (_shared() and any(n % heads == 0 for n in self.heads)):
            raise ValueError(self._wrong(layer, f"{_listed(self.heads)} KV heads", str(heads)))
        if self.dims and dim not in self.dims:
            raise ValueError(self._wrong(layer, f"a head_dim of {_listed(self.dims)}", str(dim)))
        if rotated > dim:
            raise ValueError(self._wrong(layer, f"a RoPE over {rotated} channels", f"keys of {dim}"))

    def _wrong(self, layer: int, expected: str, given: str) -> str:
        return (
            f"the cache was made for another model: layer {layer} of its {self.config} has {expected}, got {given}. "
            "Make it from model.config"
        )


def _shared() -> bool:
    """Whether workers may share a layer's heads."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _counts(config: PreTrainedConfig, pattern: str, among: Container[str] | None = None) -> set[int]:
    """The integers in a config whose name matches, and is `among` those of the fields that count."""
    named = {name: value for name, value in vars(config).items() if re.search(pattern, name)}
    return {value for name, value in named.items() if type(value) is int and (among is None or name in among)}


def _listed(numbers: frozenset[int]) -> str:
    return " or ".join(map(str, sorted(numbers)))


def check_identity(ours: dict[str, Any], model: dict[str, Any], names: Sequence[str]) -> None:
    """Refuse a model whose identity (`identity.model_identity`) differs from the config's.

    Raises:
        ValueError: it does; the message names the first of `names` in which it does.
    """
    for name in names:
        if ours.get(name) != model.get(name):
            raise ValueError(
                f"config is not this model's: {name} is {ours.get(name)}, in the model {model.get(name)}. Take "
                "model.config"
            )
