"""`SpectrumCache`, a `transformers.Cache` whose tokens lie in precision tiers."""

import copy
import functools
import importlib
import logging
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers import DynamicCache, EncoderDecoderCache, PreTrainedConfig
from transformers.cache_utils import (
    DYNAMIC_LAYER_TYPE_MAPPING,
    STATIC_LAYER_TYPE_MAPPING,
    Cache,
    StaticLayer,
    get_layer_types_and_kwargs,
)

from spectrumkv_hf.attention.route import FUSED, install
from spectrumkv_hf.policy import Lossless, Policy, get_policy
from spectrumkv_hf.tiered import fit
from spectrumkv_hf.tiered.identity import FIELDS, layer_configs, model_identity, weights_fingerprint
from spectrumkv_hf.tiered.layer import Indices, SpectrumLayer
from spectrumkv_hf.tiered.memory import FP16_BYTES, MemoryReport, storage_bytes
from spectrumkv_hf.tiered.mixed_layers import (
    CrossAttentionLayer,
    HybridSlidingSpectrumLayer,
    HybridSpectrumLayer,
    LinearStates,
)
from spectrumkv_hf.tiered.rope import rotary_of
from spectrumkv_hf.tiered.schedule import Confirmations, SharedRanking
from spectrumkv_hf.tiered.sliding_layer import SlidingSpectrumLayer
from spectrumkv_hf.tiered.store import TAIL_STEP
from spectrumkv_kernels import CODECS, DEFAULT_CODEC

logger = logging.getLogger(__name__)

TIERED: dict[str, type[SpectrumLayer]] = {
    "full_attention": SpectrumLayer,
    "sliding_attention": SlidingSpectrumLayer,
    "hybrid": HybridSpectrumLayer,
    "hybrid_sliding": HybridSlidingSpectrumLayer,
}
"""The layer that tiers what a type of Transformers' layers holds."""

_TAKES = {
    "sliding_window": ("sliding_attention", "chunked_attention", "hybrid_sliding", "reference_sliding_attention"),
    "number_of_states": ("conv", "linear_attention", "hybrid", "hybrid_sliding"),
}
"""Types of layers that take an option; Transformers 5.17 gives all options to all layers."""
_INDEXED = ("indexed_attention", "deepseek_sparse_attention", "qwen_sparse_attention")  # one name in 5.24, two in 5.17
_ALWAYS_GROWING = (*_INDEXED, "hybrid", "hybrid_sliding")
"""Types of layers of which Transformers' static class gives other logits than its dynamic one: with an index, and where
a window is longer than the capacity. Hybrid ones are not compiled anyway."""


@functools.cache
def _warn_once(message: str) -> None:
    logger.warning(message)


class TieredCache(Cache):
    """The layers of a `SpectrumCache`, and what Transformers calls; arguments and errors as there."""

    def __init__(
        self,
        config: PreTrainedConfig,
        policy: str | Policy = "sink_protect",
        budget: float | None = None,
        codec: str = DEFAULT_CODEC,
        model: torch.nn.Module | None = None,
        max_cache_len: int | None = None,
        **policy_options: Any,
    ) -> None:
        if not isinstance(config, PreTrainedConfig):
            raise TypeError(f"config is a model's config (model.config), got {type(config).__name__}")
        if config.is_encoder_decoder:
            raise ValueError(
                f"{type(config).__name__} is an encoder-decoder: its decoder needs a second cache for cross-attention. "
                "Use SpectrumCache.for_encoder_decoder(config, ...)"
            )
        if codec not in CODECS:
            raise ValueError(f"unknown codec {codec!r}: choose from {', '.join(CODECS)}")
        if max_cache_len is not None and (type(max_cache_len) is not int or max_cache_len < 1):
            raise ValueError(f"max_cache_len is a number of tokens, 1 or more, or None, got {max_cache_len!r}")
        self.policy = get_policy(policy, budget, **policy_options)
        self.codec = CODECS[codec]
        if short := [tier.name for tier in self.policy.tiers if 0 < tier.bits < self.codec.least_bits]:
            raise ValueError(
                f"codes of codec {codec!r} have {self.codec.least_bits} bits or more, and the policy has a tier "
                f"{short[0]}: choose {DEFAULT_CODEC!r}"
            )
        self._capacity = max_cache_len
        self._unread = 0  # steps at most since the length was last known
        self._known = 0
        self._notes: dict[int, str] = {}
        self._broken = ""  # why the cache can't be used until it is reset
        text_config = config.get_text_config(decoder=True)
        self.identity = model_identity(text_config)
        self.weights: str | None = None
        """Fingerprint of the model's weights, where they are known."""
        if model is not None:
            self._take_weights(model)
        self._unfit = fit.no_decoder(config, text_config)
        if self._unfit:
            _warn_once(f"{self._unfit}: a SpectrumCache made for it can't be used")
        if tokens := fit.rope_switch(text_config):
            _warn_once(
                f"behind {tokens} tokens, where the factors of {text_config.model_type}'s RoPE change, generate() "
                "drops the cache it was given and goes on with a DynamicCache, uncompressed"
            )
        self._config = text_config
        super().__init__(layers=self._build_layers(text_config))
        self._eager_because = self._uncompileable()
        if self._capacity is not None and self._eager_because:
            _warn_once(f"SpectrumCache(max_cache_len={max_cache_len}) decodes without compiling: {self._eager_because}")
        install()

    def _take_weights(self, model: Any) -> None:
        theirs = model_identity(model.config.get_text_config(decoder=True))
        fit.check_identity(self.identity, theirs, FIELDS)
        self.weights = weights_fingerprint(model)

    @classmethod
    def for_encoder_decoder(cls, config: PreTrainedConfig, **options: Any) -> EncoderDecoderCache:
        """Self-attention in a `SpectrumCache`, cross-attention exact and whole in a `DynamicCache`.

        Args:
            config: Of an encoder-decoder model; it is not changed.
            options: As in the class.
        """
        if not config.is_encoder_decoder:
            raise ValueError(f"{type(config).__name__} is no encoder-decoder: use SpectrumCache(config, ...)")
        decoder = config.get_text_config(decoder=True)  # which may be a whole encoder-decoder's in turn (Florence-2)
        decoder = copy.copy(decoder.get_text_config(decoder=True))
        decoder.is_encoder_decoder = False
        # Without the decoder's config, whose sliding windows don't apply: cross-attention sees the whole input.
        return EncoderDecoderCache(cls(decoder, **options), DynamicCache())

    def _build_layers(self, config: PreTrainedConfig) -> list[Any]:
        types, kwargs = get_layer_types_and_kwargs(config)
        if beyond := [layer for layer, _ in self.policy.floors if layer >= len(types)]:
            raise ValueError(f"floors name layer {beyond[0]}, the model's layers are 0 to {len(types) - 1}")
        per_layer = [kwargs] * len(types) if isinstance(kwargs, dict) else kwargs  # one dict up to Transformers 5.17
        shares = getattr(config, "num_kv_shared_layers", None) or "reuse" in (
            getattr(config, "kv_sharing_modes", None) or ()
        )
        crossing = getattr(config, "cross_attention_layers", None) or ()
        ranking, confirmations = SharedRanking() if self.policy.scope == "token" else None, Confirmations()
        configs = layer_configs(config)
        rotary = functools.cache(lambda layer, kind: rotary_of(configs[layer], kind))
        expected = functools.cache(lambda layer: fit.Expected.of(configs[layer]))
        first = {id(own): index for index, own in reversed(list(enumerate(configs)))}  # layers alike share a rotation
        layers: list[Any] = []
        self._stock: dict[int, functools.partial[Any]] = {}
        self._hybrid: dict[int, functools.partial[Any]] = {}
        self._unchecked: dict[int, fit.Expected] = {}
        for index, (kind, options) in enumerate(zip(types, per_layer, strict=True)):
            if kind not in DYNAMIC_LAYER_TYPE_MAPPING:
                raise ValueError(f"layer {index} is of type {kind!r}, for which Transformers has no dynamic layer")
            options = {name: value for name, value in options.items() if kind in _TAKES.get(name, (kind,))}
            dynamic: functools.partial[Any] = functools.partial(DYNAMIC_LAYER_TYPE_MAPPING[kind], **options)
            stock = dynamic
            if self._capacity is not None and kind in STATIC_LAYER_TYPE_MAPPING and kind not in _ALWAYS_GROWING:
                static = {"max_cache_len": self._capacity, **options}
                stock = functools.partial(STATIC_LAYER_TYPE_MAPPING[kind], **static)
            own = configs[index]
            window = options.get("sliding_window")
            note = self._stock_because(own, kind, window)
            static_window = self._capacity is not None and kind == "sliding_attention"
            if static_window:  # a ring of exact tokens, whatever the window
                if note or not self.policy.lossless:
                    self._notes[index] = "sliding window: exact in a cache of fixed capacity"
                options["growing"] = dynamic if note else None
                note = None
            if index in crossing:
                stock, note = functools.partial(CrossAttentionLayer), "cross-attention: exact, not tiered"
            if note:
                self._notes[index] = note
                self._stock[index] = stock
                layers.append(stock())
                continue
            if kind in ("hybrid", "hybrid_sliding"):
                self._hybrid[index] = stock
            self._unchecked[index] = expected(first[id(own)])
            layers.append(
                TIERED[kind](
                    policy=Lossless() if static_window else self.policy,
                    codec=self.codec,
                    rotary=rotary(first[id(own)], kind),
                    layer_idx=index,
                    defer=bool(shares),
                    shared=None if static_window else ranking,
                    capacity=self._capacity,
                    confirmations=confirmations,
                    **options,
                )
            )
            confirmations.last = index
            if ranking is not None and not static_window:
                ranking.join()
        if self._notes and not self.policy.lossless:
            what = f"of {type(config).__name__} uncompressed:\n{self.summary(layers)}"
            if len(self._notes) < len(layers):
                logger.info("SpectrumCache leaves some layers %s", what)
            else:
                _warn_once(f"SpectrumCache compresses nothing of this model: it leaves all layers {what}")
        return layers

    def _stock_because(self, config: PreTrainedConfig, kind: str, window: int | None) -> str | None:
        """Why a layer keeps its stock class, or None where it is tiered."""
        if kind not in TIERED:
            return f"{kind}: not tiered"
        if getattr(config, "kv_lora_rank", None):
            return "MLA latents: not tiered"
        if window is not None and self.policy.lossless:
            return "sliding window: exact anyway"
        least = self.policy.recent_window + 2 * TAIL_STEP
        if window is not None and window < least:
            return f"sliding window of {window}: below {least} tokens nothing would leave the exact tail"
        return None

    def reserve(self, max_cache_len: int) -> None:
        """Give the cache a fixed capacity, so that decoding can be compiled; what it holds is copied there.

        Args:
            max_cache_len: Tokens that it takes in all.

        Raises:
            ValueError: it holds more already, or has a fixed capacity.
        """
        self.check_whole()
        length = max(self._lengths(), default=0)
        if self._capacity is not None or type(max_cache_len) is not int or max_cache_len < max(length, 1):
            raise ValueError(
                f"a cache of {length} tokens can be given a capacity of as many or more once, got {max_cache_len!r}"
                + (f" for one of {self._capacity}" if self._capacity is not None else "")
            )
        other = copy.copy(self)
        other._capacity = max_cache_len
        other.layers = other._build_layers(self._config)
        for index, (old, new) in enumerate(zip(self.layers, other.layers, strict=True)):
            if getattr(old, "record_past", False) and hasattr(new, "activate_past_recording"):
                new.activate_past_recording()
            if isinstance(old, SpectrumLayer):
                old.settle()
                if isinstance(old, LinearStates):
                    raise ValueError("a cache with linear attention can't be given a capacity once it is made")
                if old.is_initialized:
                    new.adopt(old.store)
            elif isinstance(new, SlidingSpectrumLayer):
                new.take_growing(old)
            elif type(old) is type(new):  # of a fixed size in any case, as the states of linear attention
                other.layers[index] = old
            elif old.is_initialized and type(new) is StaticLayer:
                new.update(old.keys, old.values)
            elif old.is_initialized:  # a window of Transformers that has let go of tokens: it goes on growing
                other.layers[index] = old
        other._eager_because = other._uncompileable()
        other._known, other._unread = length, 0
        self.__dict__.update(other.__dict__)

    def _lengths(self) -> set[int]:
        """Tokens seen by each layer; linear attention does not count them."""
        return {int(layer.get_seq_length()) for layer in self.layers if hasattr(layer, "get_seq_length")}

    def summary(self, layers: list[Any] | None = None) -> str:
        """Which layers are tiered, and why the others are not; a line for each kind."""
        layers = self.layers if layers is None else layers
        kinds = Counter(
            (type(layer).__name__, self._notes.get(i) or self._tiering(i)) for i, layer in enumerate(layers)
        )
        return "\n".join(f"{count} x {name}: {note}" for (name, note), count in kinds.items())

    def __repr__(self) -> str:
        """One line: policy, layers by class, tokens and bytes."""
        kinds = Counter(type(layer).__name__ for layer in self.layers)
        lengths = sorted(self._lengths())
        tokens = " or ".join(map(str, lengths or [0]))  # more than one after an interrupted forward
        about = [
            f"{self.policy.name} b={self.policy.budget:g}",
            *(f"{count} x {name}" for name, count in kinds.items()),
        ]
        about += [f"{tokens} tokens", *([self.memory().headline()] if any(lengths) else [])]
        return f"{type(self).__name__}({', '.join(about)})"

    def _tiering(self, index: int) -> str:
        floor = self.policy.floor(index)
        least = f", {floor.name} or better" if floor else ""
        beside = ", beside exact states" if index in self._hybrid else ""
        return f"tiered, {self.policy.name} b={self.policy.budget:g}{least}{beside}"

    def use_stock(self, index: int) -> None:
        """Give a hybrid layer Transformers' own class, as in caches that were written before it could be tiered."""
        self._stock[index] = self._hybrid.pop(index)
        self._notes[index] = "hybrid: not tiered where the cache was written"
        self.layers[index] = self._stock[index]()

    # -- compiled decoding --------------------------------------------------------------------------------------------

    def _uncompileable(self) -> str:
        """Why decoding can't be compiled, as far as the config and the policy say, or an empty string."""
        if self._capacity is None:
            return "it has no max_cache_len"
        name = type(self._config).__module__.replace("configuration_", "modeling_")
        try:
            known = hasattr(importlib.import_module(name), "ALL_ATTENTION_FUNCTIONS")
        except ImportError:
            known = False
        if not known:
            return f"the attention of {type(self._config).__name__}'s model is its own"
        if self._config.model_type in fit.COMPUTE_BETWEEN:
            return f"{type(self._config).__name__}'s model computes with keys or values before its attention"
        for index, layer in enumerate(self.layers):
            if isinstance(layer, LinearStates):
                return f"layer {index} has linear attention beside its own"
            if isinstance(layer, SpectrumLayer) and layer.undecodable:
                return layer.undecodable
            if not isinstance(layer, SpectrumLayer) and not layer.is_compileable:
                return f"layer {index} is a {type(layer).__name__}"
        return ""

    @property
    def is_compileable(self) -> bool:
        """Whether `generate` may compile the decode step: the cache has a fixed capacity, and attention reads tiers."""
        if self._eager_because or getattr(self._config, "_attn_implementation", None) not in (*FUSED, None):
            return False
        return all(layer.is_compileable for layer in self.layers)

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Length and offset of what attention will see with `query_length` new tokens.

        Raises:
            ValueError: a step that may be compiled is asked for, and the cache is full.
        """
        if self._capacity is None or query_length != 1 or not self.is_compileable:
            return super().get_mask_sizes(query_length, layer_idx)
        self._check_room()
        layer = self.layers[layer_idx] if layer_idx < len(self.layers) else None
        ring = getattr(layer, "is_sliding", False) and not isinstance(layer, SpectrumLayer)  # of Transformers: chunks
        if ring or any(isinstance(other, SpectrumLayer) and other.unshown for other in self.layers):
            return super().get_mask_sizes(query_length, layer_idx)
        return self._capacity, 0

    def _check_room(self) -> None:
        """Refuse a step behind the capacity, before any layer takes part in it.

        The length is on the device. Each step asks here at least once, so it is read only where it may be the last.
        """
        assert self._capacity is not None
        self._unread += 1
        if self._known + self._unread >= self._capacity:
            self._known, self._unread = int(self.get_seq_length()), 1
            if self._known >= self._capacity:
                raise ValueError(
                    f"the cache is full: it takes {self._capacity} tokens (max_cache_len). Nothing was added"
                )

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> Any:
        """Add keys and values, `[batch, kv_heads, tokens, dim]`, of a layer; see `SpectrumLayer.update` and `step`.

        Raises:
            ValueError: the cache was made for another model: one with fewer layers, with other heads, or without a
                decoder. The cache is as it was.
            RuntimeError: an earlier forward or operation ended before it had reached all layers.
        """
        if self._capacity is not None and key_states.shape[-2] == 1 and layer_idx < len(self.layers):
            layer = self.layers[layer_idx]
            if isinstance(layer, SpectrumLayer):
                if layer.steps_alone:
                    if not torch.compiler.is_compiling():
                        self._check_step(layer)
                    return layer.step(key_states, value_states)
            elif layer.is_compileable and layer.is_initialized:
                return layer.update(key_states, value_states, *args, **kwargs)
        return self._update(key_states, value_states, layer_idx, *args, **kwargs)

    def _check_step(self, layer: SpectrumLayer) -> None:
        """What `_update` checks, for a step that asks the device nothing."""
        self.check_whole()
        before = self._before(layer.layer_idx)
        if before is None or before.count is None or layer.count is None:
            return
        if before.count != layer.count + 1:
            raise RuntimeError(
                f"layer {before.layer_idx} holds {before.count} tokens, layer {layer.layer_idx} would hold "
                f"{layer.count + 1}: a forward was interrupted. Call reset(), and give the whole prompt again"
            )

    @torch.compiler.disable  # of what is behind it nothing can be traced: C++, kernels, decisions on the host
    def _update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self.check_whole()
        self._check_model(layer_idx, key_states)
        layer = self.layers[layer_idx]
        if isinstance(layer, SpectrumLayer):
            before, length = self._before(layer_idx), layer.length + key_states.shape[-2]
            if before is not None and before.length != length:
                raise RuntimeError(
                    f"layer {before.layer_idx} holds {before.length} tokens, layer {layer_idx} would hold {length}: a "
                    "forward was interrupted. Call reset(), and give the whole prompt again"
                )
        shown = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        if self._capacity is not None and isinstance(layer, SpectrumLayer):
            self._known, self._unread = layer.length, 0
        return shown

    def _before(self, layer_idx: int) -> SpectrumLayer | None:
        """The last tiered layer before one that holds tokens."""
        for index in range(layer_idx - 1, -1, -1):
            layer = self.layers[index]
            if isinstance(layer, SpectrumLayer) and layer.is_initialized:
                return layer
        return None

    def _check_model(self, layer_idx: int, key_states: torch.Tensor) -> None:
        """Refuse keys of a model that the cache was not made for; each layer's first ones are compared with it."""
        if layer_idx >= len(self.layers):
            raise ValueError(
                f"the cache was made for another model: its config has {len(self.layers)} layers, got keys and values "
                f"of layer {layer_idx}. Make it from model.config"
            )
        if self._unfit:
            raise ValueError(f"the cache was made for another model: {self._unfit}. Make it from model.config")
        if layer_idx in self._unchecked:
            layer = self.layers[layer_idx]
            rotated = 2 * len(layer.rotary.inv_freq) if isinstance(layer, SpectrumLayer) else 0
            self._unchecked[layer_idx].check(layer_idx, rotated, key_states)
            del self._unchecked[layer_idx]

    def check_whole(self) -> None:
        """Refuse to go on with a cache in which an operation ended halfway.

        Raises:
            RuntimeError: until `reset`.
        """
        if self._broken:
            raise RuntimeError(f"{self._broken}. Call reset(), and give the whole prompt again")

    def _change(self, what: str, change: Callable[[Any], None]) -> None:
        """Change every layer. An error that comes after the first of them leaves a cache that refuses use."""
        self.check_whole()
        # Layers that may refuse a change come first: where they do, nothing has happened yet.
        order = sorted(self.layers, key=lambda layer: _is_atomic(layer) and not layer.is_sliding)
        self._broken = f"{what} ended before it had reached all layers"
        for done, layer in enumerate(order):
            try:
                change(layer)
            except Exception as problem:
                memory = isinstance(problem, torch.OutOfMemoryError | MemoryError)
                if not done and (_is_atomic(layer) or not memory):  # it refused
                    self._broken = ""
                raise
        self._broken = ""

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last `-tokens_to_remove` tokens; 0 removes none.

        Raises:
            ValueError: a positive number.
            RuntimeError: tokens would be seen again that a sliding window has left; see `activate_past_recording`.
        """
        self._change("crop", lambda layer: layer.crop(tokens_to_remove))

    def reorder_cache(self, beam_idx: Indices) -> None:
        """Row `i` becomes what row `beam_idx[i]` was."""
        rows = torch.as_tensor(beam_idx)
        self._change("reorder_cache", lambda layer: layer.reorder_cache(rows))

    def batch_select_indices(self, indices: Indices) -> None:
        """Keep the rows `indices`."""
        rows = torch.as_tensor(indices)
        self._change("batch_select_indices", lambda layer: layer.batch_select_indices(rows))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row `repeats` times."""
        self._change("batch_repeat_interleave", lambda layer: layer.batch_repeat_interleave(repeats))

    @property
    def max_cache_len(self) -> int:
        """-1: no bound; PEFT asks for it by this name."""
        return self.get_max_length()

    def __iter__(self) -> Iterator[tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]]:
        """Keys and values of each layer, dequantised, and its sliding window, as `DynamicCache` gives them."""
        for layer in self.layers:
            window = layer.sliding_window if getattr(layer, "is_sliding", False) else None
            yield layer.keys, layer.values, None if window is None else torch.tensor(window)

    def reset(self) -> None:
        """Forget all tokens, so that the cache serves another prompt. The layers stay the same objects."""
        for index, layer in enumerate(self.layers):
            if (made := self._stock.get(index)) is not None:
                # Their own reset keeps the length up to Transformers 5.17.
                type(layer).__init__(layer, *made.args, **made.keywords)
            else:
                layer.reset()
        self._broken = ""

    def on_layer(self, callback: Callable[[int], None]) -> Callable[[], None]:
        """Call `callback` with a tiered layer's index whenever what the layer holds is final until its next update.

        That is right after its attention where tokens were tiered or nothing was due; at the end of the last layer for
        `scope="token"`; and at the next update, or when the layer is serialised, where other layers still read its
        exact tokens (Gemma-3n). Layers of Transformers' own classes don't call: they are final once a later layer is.
        What the callback raises comes out of the model's forward. Several callbacks are called in the order in which
        they were added.

        Returns:
            A function that removes the callback.
        """
        removers = [layer.on_final.add(callback) for layer in self.layers if isinstance(layer, SpectrumLayer)]

        def remove() -> None:
            for each in removers:
                each()

        return remove

    def _tiered(self) -> Iterator[SpectrumLayer]:
        return (layer for layer in self.layers if isinstance(layer, SpectrumLayer) and layer.is_initialized)

    def memory(self) -> MemoryReport:
        """Bytes stored by tier and part, and those of the exact cache that they replace."""
        parts: Counter[str] = Counter()
        tensors: list[torch.Tensor] = []
        elements = cost = exact = tiered = replaced = 0.0
        for layer in self._tiered():
            store = layer.store
            for name, size in store.parts():
                parts[name] += size
            tensors.extend(store.storages())
            keys, values = store.tail
            per_token = store.batch_size * layer.kv_heads * (keys.shape[3] + values.shape[3])
            visible, _ = layer.get_mask_sizes(0)
            elements += visible * per_token
            exact += visible * per_token * keys.element_size()
            cost += store.tail_length * per_token
            cost += sum(float(arena.tier.cost) * len(arena) * per_token for arena in store.arenas.values())
            tiered += store.tiered_bytes()
            replaced += (store.tail_start - store.first_kept) * per_token * FP16_BYTES
        stock = [t for layer in self.layers for t in _exact_tensors_of(layer)]
        uncompressed = storage_bytes(stock)
        if uncompressed:
            parts["uncompressed"] = uncompressed
        order = sorted(parts, key=lambda name: -parts[name])
        return MemoryReport(
            stored=storage_bytes([*tensors, *stock]),
            exact=int(exact) + uncompressed,
            fp16=int(elements * FP16_BYTES) + uncompressed,
            nominal_ratio=cost / elements if elements else 0.0,
            parts={name: parts[name] for name in order},
            tiered_ratio=tiered / replaced if replaced else 0.0,
        )

    def tier_map(self) -> dict[int, torch.Tensor]:
        """Bits of every token by tiered layer, int64 `[batch, kv_heads, length]`; 0 where it was dropped or left."""
        return {layer.layer_idx: layer.tier_map() for layer in self._tiered()}


def _is_atomic(layer: Any) -> bool:
    """Whether a layer changes as a whole or not at all; others may be left between keys and values, or states."""
    return isinstance(layer, SpectrumLayer) and not isinstance(layer, LinearStates)


def _exact_tensors_of(layer: Any) -> Iterator[torch.Tensor]:
    """Tensors in Transformers' own keeping: of a stock layer all, of a hybrid one the linear attention's states."""
    if isinstance(layer, SpectrumLayer):
        yield from layer.states() if isinstance(layer, LinearStates) else ()
    else:
        yield from _tensors_of(layer)


def _tensors_of(layer: Any) -> Iterator[torch.Tensor]:
    """The tensors that a stock layer holds, in attributes or in dicts and lists of them."""
    for value in vars(layer).values():
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, dict):
            yield from (v for v in value.values() if isinstance(v, torch.Tensor))
        elif isinstance(value, list | tuple):
            yield from (v for v in value if isinstance(v, torch.Tensor))
