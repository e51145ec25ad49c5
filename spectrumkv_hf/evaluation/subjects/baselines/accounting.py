"""What caches that are not ours occupy: every byte they keep alive, over the bytes of the tokens they were given."""

from collections.abc import Iterator
from types import FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers.cache_utils import Cache

from spectrumkv_hf.tiered.memory import FP16_BYTES, MemoryReport, storage_bytes


def reachable_tensors(root: Any) -> Iterator[torch.Tensor]:
    """Tensors with a storage of their own, found from `root` through attributes, mappings and sequences.

    Tensor subclasses that wrap others have none; what they wrap is found in their attributes.
    """
    met: dict[int, Any] = {}  # holds the objects, so that no id is used twice
    stack = [root]
    while stack:
        item = stack.pop()
        if id(item) in met or isinstance(item, (type, ModuleType, FunctionType, MethodType)):
            continue
        met[id(item)] = item
        if isinstance(item, dict):
            stack.extend(item.values())
        elif isinstance(item, (list, tuple, set)):
            stack.extend(item)
        else:
            if isinstance(item, torch.Tensor) and not is_traceable_wrapper_subclass(item):
                yield item
            stack.extend(getattr(item, "__dict__", {}).values())


class Counted(Cache):
    """Mixin, in front of a cache class: remembers how many tokens each layer was given.

    A pruned or quantised cache can't tell afterwards what it would have held in FP16.

    Attributes:
        given: Of each layer, the tokens so far and the elements of keys and values of one token in all rows and heads.
        itemsize: Bytes of an element, as the model gave them.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.given: dict[int, tuple[int, int]] = {}
        self.itemsize = FP16_BYTES
        super().__init__(*args, **kwargs)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As of the cache class; keys and values are `[batch, kv_heads, tokens, head_dim]`."""
        tokens, self.itemsize = key_states.shape[2], key_states.element_size()
        before, _ = self.given.get(layer_idx, (0, 0))
        self.given[layer_idx] = before + tokens, (key_states.numel() + value_states.numel()) // max(tokens, 1)
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def tokens_given(self) -> int:
        """Over all layers."""
        return sum(tokens for tokens, _ in self.given.values())

    def fp16_bytes(self) -> int:
        """Two bytes for each element of the tokens given; of a sliding layer, of those that a new token can see."""
        total = 0
        for index, (tokens, elements) in self.given.items():
            layer = self.layers[index]
            if getattr(layer, "is_sliding", False):
                tokens = min(tokens, layer.sliding_window - 1)
            total += FP16_BYTES * tokens * elements
        return total


def counted_memory(cache: Counted, nominal_ratio: float) -> MemoryReport:
    """All bytes that `cache` keeps alive, over FP16's.

    Args:
        cache: After its prefill.
        nominal_ratio: Of its tokens, without scales.
    """
    fp16 = cache.fp16_bytes()
    exact = fp16 * cache.itemsize // FP16_BYTES
    return MemoryReport(storage_bytes(reachable_tensors(cache)), exact, fp16, nominal_ratio)
