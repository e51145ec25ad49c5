"""Cache layers that keep their tokens in tiers."""

import functools
import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from transformers.cache_utils import CacheLayerMixin

from spectrumkv_hf.attention.handle import SpectrumHandle
from spectrumkv_hf.attention.masks import causal_mask
from spectrumkv_hf.policy import Policy
from spectrumkv_hf.policy.importance import READS_QUERIES, importance
from spectrumkv_hf.tiered.listeners import Listeners
from spectrumkv_hf.tiered.schedule import OpenUpdate, SharedRanking, Stage
from spectrumkv_hf.tiered.store import TAIL_STEP, Arena, TieredStore
from spectrumkv_kernels import Codec, Rotary, attention_scores, real_tokens, tiered_attention

logger = logging.getLogger(__name__)

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

Indices = torch.Tensor | Sequence[int]
"""Rows of a batch."""

FUSED_QUERIES = 32
"""With more queries than this, one dequantisation of the layer costs less than reading its codes query by query."""


def _own_precision(device: torch.device) -> AbstractContextManager[Any]:
    """Keeps autocast out of what is computed in float32 on purpose."""
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


@functools.cache
def _warn_of_lost_gradients() -> None:
    logger.warning(
        "SpectrumCache keeps keys and values without their gradients, as every cache of rounded values does: what is "
        "learnt through cached tokens is lost. To generate or to score, run the model under torch.no_grad(); to train "
        "it, pass use_cache=False."
    )


class Attention(NamedTuple):
    """An attention over a layer's last update, as `spectrumkv_kernels.tiered_attention` takes it."""

    layer: "SpectrumLayer"
    query: torch.Tensor
    mask: torch.Tensor | None
    scale: float
    softcap: float | None
    sinks: torch.Tensor | None


class SpectrumLayer(CacheLayerMixin):
    """A layer with full attention.

    New tokens are exact. After attention has run on them, all but the last `recent_window` get their tiers; decoding
    tiers `TAIL_STEP` tokens at a time.

    Args:
        policy: How tokens are tiered.
        codec: How tiers are coded.
        rotary: The model's rotation, for the codec's centring.
        layer_idx: Index in the model.
        defer: Tier at the next update only, because other layers read this one's keys and values in the same forward.
        shared: The ranking that all layers share, for scope `token`.
    """

    is_compileable = False
    is_croppable = True
    is_sliding = False
    supports_early_init = True

    def __init__(
        self,
        policy: Policy,
        codec: Codec,
        rotary: Rotary,
        layer_idx: int = 0,
        defer: bool = False,
        shared: SharedRanking | None = None,
    ) -> None:
        # Not super().__init__(), which would assign `keys` and `values`, properties here.
        self.policy, self.codec, self.rotary = policy, codec, rotary
        self.layer_idx, self.defer, self.shared = layer_idx, defer, shared
        self.window: int | None = None
        self.on_update: Listeners[[int, torch.Tensor, torch.Tensor]] = Listeners()
        self.on_attention: Listeners[[Attention]] = Listeners()
        self.on_final: Listeners[[int]] = Listeners()
        self.reset()

    def reset(self) -> None:
        """Forget all tokens."""
        self.is_initialized = False
        self._store: TieredStore | None = None
        self.generation = getattr(self, "generation", 0) + 1
        self._open = OpenUpdate()
        if self.shared is not None:
            self.shared.clear()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.policy.name}, tokens={self.get_seq_length()})"

    # -- what the model calls -------------------------------------------------------------------------------------

    @property
    def store(self) -> TieredStore:
        """The layer's tensors; there are some from the first update on."""
        assert self._store is not None
        return self._store

    @property
    def tail_start(self) -> int:
        """Position of the first exact token behind the tiers."""
        return self.store.tail_start

    @property
    def new_tokens(self) -> int:
        """Tokens of the last update."""
        return self._open.tokens

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Set up for tensors like these, `[batch, kv_heads, any, dim]`."""
        if key_states.dtype not in DTYPES or value_states.dtype not in DTYPES:
            raise TypeError(
                f"keys and values of {' or '.join(str(t) for t in DTYPES)} can be cached, got {key_states.dtype} and "
                f"{value_states.dtype}"
            )
        if not self.policy.lossless and (key_states.shape[-1] % 2 or value_states.shape[-1] % 2):
            raise ValueError(
                f"INT4 packs two channels a byte: head_dim must be even, got {key_states.shape[-1]} for keys and "
                f"{value_states.shape[-1]} for values"
            )
        self.dtype, self.device = key_states.dtype, key_states.device
        self.kv_heads = key_states.shape[1]
        self._store = TieredStore(key_states, value_states, self.codec, self.rotary)
        self.is_initialized = True

    def adopt(self, store: TieredStore) -> None:
        """Hold a store that was assembled elsewhere, in the place of what the layer held."""
        keys, values = store.tail
        self.reset()
        self.lazy_initialization(keys[:, :, :0], values[:, :, :0])
        self._store = store

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add keys and values, `[batch, kv_heads, tokens, dim]`, and return what attention reads.

        Gradients are not kept: keys and values are detached, with a warning.

        Returns:
            `SpectrumHandle`s of the layer, or plain tensors where the policy is lossless.

        Raises:
            ValueError: the shape does not fit the tokens held.
            TypeError: an unsupported dtype.
        """
        if key_states.requires_grad or value_states.requires_grad:
            if torch.is_grad_enabled():
                _warn_of_lost_gradients()
            key_states, value_states = key_states.detach(), value_states.detach()
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        store, given = self.store, key_states.shape
        (held_keys, held_values), held = self.store.buffers, self.store.buffers[0].shape
        if held[:2] != given[:2] or held[3] != given[3]:
            raise ValueError(
                f"layer {self.layer_idx} holds {store.length} tokens of batch {held[0]}, {held[1]} KV heads, head_dim "
                f"{held[3]}; got batch {given[0]}, {given[1]} KV heads, head_dim {given[3]}. Call reset(), or take a "
                "new cache for another batch."
            )
        if held_keys.dtype != key_states.dtype or held_values.dtype != value_states.dtype:
            raise TypeError(
                f"layer {self.layer_idx} holds keys and values of {held_keys.dtype} and {held_values.dtype}, got "
                f"{key_states.dtype} and {value_states.dtype}"
            )
        if held_keys.device != key_states.device:
            raise ValueError(
                f"layer {self.layer_idx} lies on {held_keys.device}, got keys on {key_states.device}: "
                "SpectrumCache.deserialize and load take a device"
            )
        self.settle()
        kv_length, _ = self.get_mask_sizes(given[2])
        self.generation += 1
        store.append(key_states, value_states)
        self._open = OpenUpdate(given[2], store.length - kv_length, Stage.UNSEEN)
        self.on_update(self.layer_idx, key_states, value_states)
        if self.policy.lossless:
            self._open.stage = Stage.SETTLED
            self.announce()
            return store.dense(self._open.read_from)
        shape = (*given[:2], kv_length)
        return (
            SpectrumHandle(self, "keys", (*shape, key_states.shape[3]), key_states.dtype),
            SpectrumHandle(self, "values", (*shape, value_states.shape[3]), value_states.dtype),
        )

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of what `update` will return for `query_length` new tokens."""
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        """Tokens seen, those included that a policy has dropped."""
        return self._store.length if self._store is not None else 0

    def get_max_length(self) -> int:
        """-1: no bound."""
        return -1

    def get_max_cache_shape(self) -> int:
        """Name of `get_max_length` up to Transformers 5.17."""
        return self.get_max_length()

    # -- what attention calls -------------------------------------------------------------------------------------

    @torch.compiler.disable
    def dense_for(self, generation: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Dequantised keys and values for handles of `generation`, `[batch, kv_heads, length, dim]`."""
        self.check(generation)
        return self.store.dense(self._open.read_from)

    def check(self, generation: int) -> None:
        """Refuse a handle that is older than the layer's last change."""
        if generation != self.generation:
            raise RuntimeError(
                f"these keys or values of layer {self.layer_idx} are stale: the cache has changed since update() "
                "returned them"
            )

    def check_complete(self) -> None:
        """Refuse to be read by an attention that would take dropped tokens for keys and values of 0.

        Raises:
            RuntimeError: the policy has dropped tokens.
        """
        if self.store.drops:
            raise RuntimeError(
                f"policy {self.policy.name!r} dropped tokens, and this model's attention computes on keys and "
                "values in a way that can't leave them out. Use attn_implementation='sdpa', 'eager' or 'spectrumkv', "
                "or a policy that drops none."
            )

    @torch.compiler.disable
    def attend(
        self,
        generation: int,
        on_dense: Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor],
        query: torch.Tensor,
        mask: torch.Tensor | None,
        *,
        scale: float,
        softcap: float | None = None,
        sinks: torch.Tensor | None = None,
        fused: bool = True,
    ) -> torch.Tensor:
        """Attention of the new tokens' queries over the layer, after which it may tier them.

        Args:
            generation: Of the handles that lead here.
            on_dense: The stock attention on keys and values, `[batch, kv_heads, length, dim]`, and a mask; returns
                `[batch, heads, queries, value_dim]`.
            query: `[batch, heads, queries, head_dim]`.
            mask: `[batch or 1, heads or 1, queries, length]`, bool or additive, or None for causal.
            scale, softcap, sinks: What `on_dense` does with the scores, for reading the store directly.
            fused: Whether it may be read directly.

        Returns:
            `[batch, heads, queries, value_dim]`.

        Raises:
            RuntimeError: the handles are stale.
            ValueError: the mask has another number of columns than there are tokens.
        """
        self.check(generation)
        length = self.store.length - self._open.read_from
        if mask is not None and mask.shape[-1] != length:
            raise ValueError(
                f"layer {self.layer_idx} has {length} tokens to attend to, the attention mask is for {mask.shape[-1]}"
            )
        fused = fused and not (query.requires_grad and torch.is_grad_enabled())  # only the stock attention has those
        if fused and self.store.arenas and query.shape[2] <= FUSED_QUERIES:
            with _own_precision(query.device):
                out = self.read(query, mask, scale, softcap, sinks)
                self.attended(query, None, mask, scale, softcap, sinks)
            return out
        keys, values = self.dense_for(generation)
        out = on_dense(keys, values, self._without_dropped(mask, query, keys.shape[2]))
        with _own_precision(query.device):
            self.attended(query, keys, mask, scale, softcap, sinks)
        return out

    def _without_dropped(self, mask: torch.Tensor | None, query: torch.Tensor, length: int) -> torch.Tensor | None:
        """The mask, with the tokens hidden that the policy has dropped."""
        if not self.store.drops:
            return mask
        held = self.store.tier_map(self.store.length - length) > 0
        held = held.repeat_interleave(query.shape[1] // held.shape[1], dim=1).unsqueeze(2)
        if mask is None:
            mask = causal_mask(query, length)
        if mask.dtype == torch.bool:
            return mask & held
        return mask.masked_fill(~held, torch.finfo(mask.dtype).min)

    def read(
        self,
        query: torch.Tensor,
        mask: torch.Tensor | None,
        scale: float,
        softcap: float | None = None,
        sinks: torch.Tensor | None = None,
        store: TieredStore | None = None,
    ) -> torch.Tensor:
        """Attention over the store, or another, where it lies; see `spectrumkv_kernels.tiered_attention`."""
        store = self.store if store is None else store
        return tiered_attention(
            query,
            store.segments(),
            length=store.length,
            scale=scale,
            codec=self.codec,
            mean=store.mean,
            rotary=self.rotary,
            mask=mask,
            window=self.window,
            softcap=softcap,
            sinks=sinks,
            ragged=store.ragged,
        )

    def attended(
        self,
        query: torch.Tensor,
        keys: torch.Tensor | None,
        mask: torch.Tensor | None,
        scale: float,
        softcap: float | None = None,
        sinks: torch.Tensor | None = None,
    ) -> None:
        """Take note of an attention over the last update, which may then be tiered.

        Args:
            query: `[batch, heads, queries, head_dim]`.
            keys: All keys it saw, in order of position, or None where they were not at hand; then tokens are ranked
                without attention.
            mask, scale, softcap, sinks: As in `spectrumkv_kernels.attention_scores`.
        """
        if self.on_attention:
            self.on_attention(Attention(self, query, mask, scale, softcap, sinks))
        if self._open.stage is not Stage.UNSEEN:  # another layer that shares these keys and values came before
            return
        tokens = self._open.tokens
        fits = mask is None or (mask.dim() == 4 and mask.shape[-2] == tokens)
        with torch.no_grad():
            if tokens > 1 and fits and (real := real_tokens(mask, tokens)) is not None:
                self.store.note_padding(real.expand(self.store.batch_size, -1))
            reads = self.policy.importance in READS_QUERIES and keys is not None and fits and tokens > TAIL_STEP
            if reads and keys is not None and self._due():
                score = attention_scores
                scores = score(query, keys, scale=scale, mask=mask, window=self.window, softcap=softcap, sinks=sinks)
                self._open.scores = scores[..., keys.shape[2] - self.store.tail_length :]
        if self.defer and self._due():
            self._open.stage = Stage.DEFERRED
        else:
            self._finish()

    def _due(self) -> int:
        """How many of the oldest tail tokens are to be tiered now."""
        excess = self.store.tail_length - self.policy.recent_window
        if self.policy.lossless or excess <= TAIL_STEP:
            return 0
        return excess if self._open.tokens > TAIL_STEP else excess // TAIL_STEP * TAIL_STEP

    def settle(self) -> None:
        """Finish what the last update left open: its tiering was deferred, or no attention took note of it."""
        if self._open.stage is not Stage.SETTLED:
            self._finish()
        if self.shared is not None and self.shared.waits(self):
            self.shared.settle()

    def _finish(self) -> None:
        """Tier what is due. After an error it is still due."""
        with torch.no_grad():
            self._tier(self._open.scores)
        self._open.stage, self._open.scores = Stage.SETTLED, None

    def _tier(self, scores: torch.Tensor | None) -> None:
        """Tier what is due, by attention scores of the tail or without."""
        tokens, store = self._due(), self.store
        if not tokens:
            self.announce()
            return
        keys, values = (t[:, :, :tokens] for t in store.tail)
        score = importance(
            self.policy,
            None if scores is None else scores[..., :tokens],
            keys,
            values,
            start=store.tail_start,
            seen=store.length,
            pads=store.pads,
            layer=self.layer_idx,
        )
        if self.shared is not None:
            self.shared.offer(self, score)
        else:
            self.compress(tokens, score)
            self.announce()

    def compress(self, tokens: int, score: torch.Tensor) -> None:
        """Tier the oldest `tokens` of the tail by rank of `score`, `[batch, kv_heads, tokens]`."""
        self.store.compress(tokens, self.policy, score, self.policy.floor(self.layer_idx))

    def lift(self, tokens: torch.Tensor, arena: Arena) -> None:
        """Move tokens to the tier in which an arena holds them; see `TieredStore.lift`."""
        self.store.lift(tokens, arena)
        self.generation += 1

    def announce(self) -> None:
        """Say that the layer holds what it will hold until the next update; once an update."""
        self.on_final(self.layer_idx)

    # -- what users and generate() call ---------------------------------------------------------------------------

    @property
    def keys(self) -> torch.Tensor | None:
        """Dequantised keys, `[batch, kv_heads, length, head_dim]`; None before the first update.

        Where tokens were dropped, which a reader would take for keys of 0, a handle that has this shape and raises a
        RuntimeError when it is read.
        """
        return self._visible()[0]

    @keys.setter
    def keys(self, keys: torch.Tensor) -> None:
        self._replace(keys=keys)

    @property
    def values(self) -> torch.Tensor | None:
        """Dequantised values, `[batch, kv_heads, length, value_dim]`; None before the first update. As in `keys`."""
        return self._visible()[1]

    @values.setter
    def values(self, values: torch.Tensor) -> None:
        self._replace(values=values)

    def _replace(self, **side: torch.Tensor) -> None:
        """Other exact keys or values, as in `TieredStore.replace_tail`.

        Raises:
            AttributeError: the layer keeps tiers, or nothing yet.
        """
        if not self.policy.lossless or self._store is None:
            raise AttributeError(
                f"layer {self.layer_idx}: keys and values can be assigned to where policy 'fp16' holds some, not "
                f"{'before the first update' if self.policy.lossless else f'in tiers of policy {self.policy.name!r}'}"
            )
        self.store.replace_tail(**side)
        self.generation += 1

    def _visible(self, start: int = 0) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        if self._store is None:
            return None, None
        if self._store.drops and bool((self._store.tier_map(start) == 0).any()):
            # Handles tell their shape, which Mllama asks for, and refuse to be read.
            sides = zip(("keys", "values"), self._store.tail, strict=True)
            shapes = [
                (side, (*like.shape[:2], self._store.length - start, like.shape[3]), like) for side, like in sides
            ]
            keys, values = (SpectrumHandle(self, side, shape, like.dtype) for side, shape, like in shapes)
            return keys, values
        return self._store.sides if self.policy.lossless else self._store.dense(start)

    def tier_map(self) -> torch.Tensor:
        """Bits of every token, int64 `[batch, kv_heads, length]`; 0 for one that was dropped or left the window."""
        return self.store.tier_map()

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last `-tokens_to_remove` tokens; 0 removes none.

        Raises:
            ValueError: a positive number.
        """
        tokens_to_remove = int(tokens_to_remove)  # Transformers 5.17 passes a tensor
        if tokens_to_remove > 0:
            raise ValueError(
                f"crop takes the number of tokens to remove as a negative number (or 0), got {tokens_to_remove}"
            )
        if self._store is None or not tokens_to_remove:
            return
        self.settle()
        self.store.crop(max(self.store.length + tokens_to_remove, 0))
        self.generation += 1

    def _map(self, function: Any) -> None:
        if self._store is not None:
            self.settle()
            self._store.map(function)
            self.generation += 1

    def reorder_cache(self, beam_idx: Indices) -> None:
        """Row `i` becomes what row `beam_idx[i]` was."""
        rows = torch.as_tensor(beam_idx)
        self._map(lambda t: t.index_select(0, rows.to(t.device)))

    def batch_select_indices(self, indices: Indices) -> None:
        """Keep the rows `indices`."""
        rows = torch.as_tensor(indices)
        self._map(lambda t: t[rows.to(t.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row `repeats` times."""
        self._map(lambda t: t.repeat_interleave(repeats, dim=0))

    def offload(self) -> None:
        """Move the tensors to the CPU."""
        if self._store is not None:
            self._store.map(lambda t: t.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        """Move the tensors back to the layer's device."""
        if self._store is not None and self._store.device != self.device:
            self._store.map(lambda t: t.to(self.device, non_blocking=True))
