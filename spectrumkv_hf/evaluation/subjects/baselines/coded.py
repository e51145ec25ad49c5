"""A cache of one codec for all tokens but the sinks and the last ones, for formats that Transformers has no cache for.

The rules are `SpectrumCache`'s, so that only the format differs: the prefill attends over exact keys and values and is
encoded after it; new tokens are exact and encoded in batches of 64, unless the format says when (`TensorFormat.due`);
nothing is encoded twice.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

from spectrumkv_hf.evaluation.subjects.baselines.accounting import Counted, counted_memory
from spectrumkv_hf.evaluation.subjects.methods import Method
from spectrumkv_hf.tiered.memory import MemoryReport

STEP = 64
"""Tokens encoded at a time while decoding."""


class TensorFormat(ABC):
    """A format for a tensor `[batch, kv_heads, tokens, head_dim]`.

    Attributes:
        bits: Of an element, without scales.
        joins: What is stored has the tokens in dimension 2 throughout, so that later tokens can be appended to it.
    """

    bits: int
    joins = False

    @abstractmethod
    def encode(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Its codes, scales and what else has to be stored."""

    @abstractmethod
    def decode(self, stored: tuple[torch.Tensor, ...], shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
        """The tensor again."""

    @property
    def for_values(self) -> "TensorFormat":
        """The format of the values, where this one is that of the keys."""
        return self

    def due(self, tokens: int, recent: int, prefill: bool) -> int:
        """How many of the last `tokens` tokens, exact so far, are encoded now: the oldest of them.

        Args:
            recent: Last tokens that stay exact.
            prefill: They are those of the prefill, else some have come since.
        """
        excess = tokens - recent
        return max(excess, 0) if prefill else max(excess - 1, 0) // STEP * STEP


class _Coded(NamedTuple):
    stored: tuple[torch.Tensor, ...]
    shape: torch.Size

    def joined(self, later: "_Coded") -> "_Coded":
        """With later tokens behind these."""
        stored = tuple(torch.cat(pair, dim=2) for pair in zip(self.stored, later.stored, strict=True))
        batch, heads, tokens, channels = self.shape
        return _Coded(stored, torch.Size((batch, heads, tokens + later.shape[2], channels)))


class CodedLayer(DynamicLayer):
    """A layer with full attention.

    Args:
        codec: Of the keys; that of the values is its `for_values`.
        sinks: First tokens that stay exact.
        recent: Last tokens that stay exact.
    """

    is_croppable = False

    def __init__(self, codec: TensorFormat, sinks: int, recent: int) -> None:
        super().__init__()
        self.codecs, self.sinks, self.recent = (codec, codec.for_values), sinks, recent
        self.length = 0
        self.coded: tuple[list[_Coded], list[_Coded]] = [], []
        self.exact_start: tuple[torch.Tensor, torch.Tensor] | None = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add tokens, `[batch, kv_heads, tokens, head_dim]`.

        Returns:
            Keys and values of all tokens; those given now are exact.
        """
        new = key_states, value_states
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.length = key_states.shape[-2]
            self._start(*new)
            return new
        reach = self._in_reach() + key_states.shape[-2]
        self.length += key_states.shape[-2]
        keys, values = (torch.cat((*self._held(side), x), dim=-2)[:, :, -reach:] for side, x in enumerate(new))
        self.keys, self.values = (torch.cat((tail, x), dim=-2) for tail, x in zip(self._tail, new, strict=True))
        self._encode_due(prefill=False)
        return keys, values

    def get_seq_length(self) -> int:
        """Tokens given so far."""
        return self.length

    def nominal(self) -> tuple[float, int]:
        """Sum of the costs of the stored tokens' keys and values (exact 1), and the number of both."""
        coded = sum(part.shape[-2] for side in self.coded for part in side)
        exact = sum(x.shape[-2] for part in (self.exact_start, self._tail) if part is not None for x in part)
        return exact + coded * self.codecs[0].bits / 16, exact + coded

    @property
    def _tail(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.keys, self.values

    def _in_reach(self) -> int:
        """How many of the tokens so far the next one sees."""
        return self.length

    def _start(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        left = self.length - self._in_reach()
        sinks = max(self.sinks, left)
        # Clones, since a view would keep everything that the model computed alive.
        self.exact_start = keys[:, :, left:sinks].clone(), values[:, :, left:sinks].clone()
        self.keys, self.values = keys[:, :, sinks:], values[:, :, sinks:]
        self._encode_due(prefill=True)

    def _encode_due(self, prefill: bool) -> None:
        left = []
        for codec, coded, tail in zip(self.codecs, self.coded, self._tail, strict=True):
            if count := codec.due(tail.shape[-2], self.recent, prefill):
                old = tail[:, :, :count].contiguous()
                new = _Coded(codec.encode(old), old.shape)
                coded.append(coded.pop().joined(new) if codec.joins and coded else new)
            left.append(tail[:, :, count:].clone())
        self.keys, self.values = left

    def _held(self, side: int) -> list[torch.Tensor]:
        """Keys (side 0) or values (1) in order."""
        assert self.exact_start is not None
        codec, dtype = self.codecs[side], self.exact_start[side].dtype
        decoded = [codec.decode(part.stored, part.shape, dtype) for part in self.coded[side]]
        return [self.exact_start[side], *decoded, self._tail[side]]

    def _refuse(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError("a baseline's cache only grows: it has no beams, and nothing can be removed")

    crop = reorder_cache = batch_repeat_interleave = batch_select_indices = reset = _refuse


class CodedSlidingLayer(CodedLayer):
    """A layer with sliding-window attention. What leaves the window while decoding is not freed.

    Args:
        sliding_window: Tokens that a query sees, itself included.
    """

    is_sliding = True

    def __init__(self, sliding_window: int, codec: TensorFormat, sinks: int, recent: int) -> None:
        super().__init__(codec, sinks, recent)
        self.sliding_window = sliding_window

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the keys that attention gets."""
        offset = max(self.length - self.sliding_window + 1, 0)
        return self.length - offset + query_length, offset

    def get_max_length(self) -> int:
        """The sliding window."""
        return self.sliding_window

    def _in_reach(self) -> int:
        return min(self.length, self.sliding_window - 1)


class CodedCache(Counted, Cache):
    """Coded layers for a model.

    Args:
        model: With layers of full and sliding-window attention only.
        codec: Of keys and values.
        sinks: First tokens that stay exact, where the window still holds them.
        recent: Last tokens that stay exact.

    Raises:
        ValueError: the model has other layers.
    """

    def __init__(self, model: PreTrainedModel, codec: TensorFormat, sinks: int, recent: int) -> None:
        layers: list[CodedLayer] = []
        for index, stock in enumerate(DynamicCache(config=model.config).layers):
            if type(stock) is DynamicLayer:
                layers.append(CodedLayer(codec, sinks, recent))
            elif type(stock) is DynamicSlidingWindowLayer:
                layers.append(CodedSlidingLayer(stock.sliding_window, codec, sinks, recent))
            else:
                raise ValueError(
                    f"layer {index} of {type(model).__name__} is a {type(stock).__name__}: "
                    "this method knows layers with full or sliding-window attention only"
                )
        super().__init__(layers=layers)


class Coded(Method):
    """A `CodedCache`.

    Args:
        codec: Makes the codec, and raises ImportError without its package.
        sinks: First tokens that stay exact.
        recent: Last tokens that stay exact.
    """

    def __init__(self, spec: str, codec: Callable[[], TensorFormat], sinks: int = 0, recent: int = 0) -> None:
        super().__init__(spec)
        self.codec, self.sinks, self.recent = codec, sinks, recent

    def cache(self, model: PreTrainedModel) -> Cache:
        return CodedCache(model, self.codec(), self.sinks, self.recent)

    def memory(self, cache: Cache) -> MemoryReport:
        costs, tokens = zip(*(layer.nominal() for layer in cache.layers), strict=True)
        return counted_memory(cache, sum(costs) / sum(tokens))
