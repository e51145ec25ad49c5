"""Cache layers that keep their tokens in tiers."""

import functools
import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from transformers.cache_utils import CacheLayerMixin

from spectrumkv_hf.attention.handle import SpectrumHandle, StaticHandle
from spectrumkv_hf.attention.masks import causal_mask
from spectrumkv_hf.policy import FP16, Policy, Tier
from spectrumkv_hf.policy.importance import READS_QUERIES, importance
from spectrumkv_hf.tiered.listeners import Listeners
from spectrumkv_hf.tiered.schedule import Confirmations, OpenUpdate, SharedRanking, Stage
from spectrumkv_hf.tiered.static_store import Plan, StaticStore, Step, undecodable
from spectrumkv_hf.tiered.store import TAIL_STEP, Arena, TieredStore, Tiering
from spectrumkv_kernels import (
    Codec,
    Rotary,
    attention_scores,
    divisor,
    query_power,
    real_tokens,
    tiered_attention,
)
from spectrumkv_kernels.static import library
from spectrumkv_kernels.static.layout import LENGTH
from spectrumkv_kernels.static.operations import append as append_step
from spectrumkv_kernels.static.operations import attend as attend_step

logger = logging.getLogger(__name__)

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

Indices = torch.Tensor | Sequence[int]
"""Rows of a batch."""

FUSED_QUERIES = 32
"""With more queries than this, one dequantisation of the layer costs less than reading its codes query by query."""


_AS_IT_IS = nullcontext()


def _own_precision(device: torch.device) -> AbstractContextManager[Any]:
    """Keeps autocast out of what is computed in float32 on purpose."""
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return _AS_IT_IS


@functools.cache
def _unfit(tiers: tuple[Tier, ...], key_dim: int, value_dim: int) -> int:
    """Bits of the first tier whose codes do not fill bytes; 0: there is none."""
    coded = (tier.bits for tier in tiers if tier != FP16)
    return next((bits for bits in coded if key_dim % divisor(bits) or value_dim % divisor(bits)), 0)


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
        capacity: Tokens that the layer takes in all, for which it then keeps room from the first on, so that decoding
            can be compiled; None: it grows.
        confirmations: Of all layers of the cache; None: the layer is alone.
    """

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
        capacity: int | None = None,
        confirmations: Confirmations | None = None,
    ) -> None:
        # Not super().__init__(), which would assign `keys` and `values`, properties here.
        self.policy, self.codec, self.rotary = policy.for_layer(layer_idx), codec, rotary
        self._tiers_beside = () if self.policy is policy else policy.tiers
        self.layer_idx, self.defer, self.shared = layer_idx, defer, shared
        self.confirmations = Confirmations() if confirmations is None else confirmations
        self.window: int | None = None
        self.capacity = capacity
        self.undecodable = undecodable(policy)
        self._direct: bool | None = None
        """The last attention of an update took its handles as they are, and could read the store; None before any."""
        self.on_update: Listeners[[int, torch.Tensor, torch.Tensor]] = Listeners()
        self.on_attention: Listeners[[Attention]] = Listeners()
        self.on_final: Listeners[[int]] = Listeners()
        self.reset()

    def reset(self) -> None:
        """Forget all tokens."""
        self.is_initialized = False
        before = getattr(self, "_held", None)
        self._buffer_of = before if isinstance(before, StaticStore) else getattr(self, "_buffer_of", None)
        self._held: TieredStore | None = None
        self._tiering: Tiering | None = None  # is to be confirmed
        self._moved = False  # decoding has changed the store on the device
        self.count: int | None = 0
        """Tokens seen, for comparing layers; None once a compiled step has added to them."""
        self.generation = getattr(self, "generation", 0) + 1
        self._open = OpenUpdate()
        if self.shared is not None:
            self.shared.clear()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.policy.name}, tokens={self.length})"

    # -- what the model calls -------------------------------------------------------------------------------------

    @property
    def _store(self) -> TieredStore | None:
        if self._moved:
            self._catch_up()
        if self._tiering is not None:
            self.confirm()
        return self._held

    def __getstate__(self) -> dict[str, Any]:
        """For copies, which have no buffer from which they could still learn what steps have done."""
        return self.__dict__ | {"_held": self._store, "_buffer_of": None, "_moved": False, "_tiering": None}

    def confirm(self) -> None:
        """Wait until it is known whether codes stand for all tokens that were tiered; those for which none does stay
        exact."""
        if self._tiering is not None and self._held is not None:
            with torch.no_grad(), _own_precision(self._held.device):
                self._held.confirm(self._tiering)
            self._tiering = None
            self._publish()

    def _catch_up(self) -> None:
        """Learn what decode steps on the device have done.

        Raises:
            RuntimeError: there were more of them than the layer had room for.
        """
        store = self._held
        assert isinstance(store, StaticStore)
        self._moved = False
        refused = store.pull()
        self.count = store.length
        store.publish()
        self._open = OpenUpdate(1, 0, Stage.DEFERRED)
        self.generation += 1
        if refused:
            raise RuntimeError(
                f"layer {self.layer_idx} was full at {self.capacity} tokens: {refused} more came in compiled steps, "
                "and were not taken. Give SpectrumCache a larger max_cache_len"
            )

    @property
    def store(self) -> TieredStore:
        """The layer's tensors; there are some from the first update on."""
        store = self._store
        assert store is not None
        return store

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
        dims = key_states.shape[-1], value_states.shape[-1]
        if bits := _unfit(self.policy.tiers, *dims):
            raise ValueError(
                f"codes of {bits} bits fill bytes where head_dim is a multiple of {divisor(bits)}, got {dims[0]} for "
                f"keys and {dims[1]} for values"
            )
        self.dtype, self.device = key_states.dtype, key_states.device
        self.kv_heads = key_states.shape[1]
        if self.capacity is None:
            self._held = TieredStore(key_states, value_states, self.codec, self.rotary)
        else:
            floor = self.policy.floor(self.layer_idx)
            plan = Plan(self.capacity, self.policy, floor, self.window, self._tiers_beside)
            self._held = StaticStore(key_states, value_states, self.codec, self.rotary, plan)
            self._held.succeed(self._buffer_of)
        self._buffer_of = None
        self.is_initialized = True

    def adopt(self, store: TieredStore) -> None:
        """Hold a store that was assembled elsewhere, in the place of what the layer held."""
        keys, values = store.tail
        self.reset()
        self.count = store.length
        self.lazy_initialization(keys[:, :, :0], values[:, :, :0])
        if isinstance(self._held, StaticStore):
            self._check_room(store.length)
            self._held.take(store)
            self._publish()
        else:
            self._held = store

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add keys and values, `[batch, kv_heads, tokens, dim]`, and return what attention reads.

        Gradients are not kept: keys and values are detached, with a warning.

        Returns:
            `SpectrumHandle`s of the layer, or plain tensors where the policy is lossless and the layer grows.

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
        held_keys, held_values = store.buffers
        held = held_keys.shape
        if held[0] != given[0] or held[1] != given[1] or held[3] != given[3]:
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
        self._check_room(store.length + given[2])
        kv_length, _ = self.get_mask_sizes(given[2])
        self.generation += 1
        store.append(key_states, value_states)
        self.count = store.length
        self._open = OpenUpdate(given[2], store.length - kv_length, Stage.UNSEEN)
        self.on_update(self.layer_idx, key_states, value_states)
        if self.policy.lossless and self.capacity is None:
            self._open.stage = Stage.SETTLED
            self.announce()
            return store.dense(self._open.read_from)
        return self._shown(kv_length)

    def _shown(self, length: int) -> tuple[SpectrumHandle, SpectrumHandle]:
        """Handles of keys and values of the last `length` tokens."""
        keys, values = self.store.buffers
        batch, heads, _, dim = keys.shape
        return (
            SpectrumHandle(self, "keys", (batch, heads, length, dim), keys.dtype),
            SpectrumHandle(self, "values", (batch, heads, length, values.shape[3]), values.dtype),
        )

    def _check_room(self, length: int) -> None:
        """Refuse more tokens than a layer of fixed capacity takes.

        Raises:
            ValueError: `length` are more.
        """
        if self.capacity is not None and length > self.capacity:
            raise ValueError(
                f"the cache takes {self.capacity} tokens (max_cache_len), layer {self.layer_idx} would hold {length}: "
                "nothing was added"
            )

    # -- a decode step, on the device alone ---------------------------------------------------------------------------

    @property
    def is_compileable(self) -> bool:
        """Whether a decode step needs no host: capacity, policy and the model's attention allow it, nobody listens."""
        return (
            self.capacity is not None
            and self._direct is not False
            and not self.undecodable
            and not getattr(self, "record_past", False)
            and not (self.on_update.some or self.on_attention.some or self.on_final.some)
        )

    @property
    def _static(self) -> Step:
        """Where a decode step finds the layer, which is published."""
        return self._held.step  # type: ignore[union-attr]

    @property
    def steps_alone(self) -> bool:
        """Whether the next token can be added by `step`."""
        held = self._held
        return self._direct is True and isinstance(held, StaticStore) and held.published and self.is_compileable

    @property
    def unshown(self) -> bool:
        """It holds tokens, and no attention has shown yet whether it can read them where they are."""
        return self.is_initialized and self._direct is None

    def note_route(self, direct: bool) -> None:
        """Learn whether an attention took the handles as they are, and may read the store."""
        self._direct = direct

    def step(self, key_states: torch.Tensor, value_states: torch.Tensor) -> tuple[StaticHandle, StaticHandle]:
        """Add one token, `[batch, kv_heads, 1, dim]`, where `steps_alone` says so; traceable, and without the host.

        What is due to be tiered from earlier steps is tiered before.

        Raises:
            ValueError: the shape does not fit the tokens held.
            TypeError: another dtype than theirs.
        """
        buffer, state, layout, number, by_host = self._static
        shape = (layout.batch, layout.kv_heads, 1)
        if key_states.shape != (*shape, layout.key_dim) or value_states.shape != (*shape, layout.value_dim):
            raise ValueError(
                f"layer {self.layer_idx} holds tokens of batch {layout.batch}, {layout.kv_heads} KV heads, head_dim "
                f"{layout.key_dim}; got keys {tuple(key_states.shape)}. Call reset(), or take a new cache for another "
                "batch."
            )
        if key_states.dtype != layout.dtype or value_states.dtype != layout.dtype:
            raise TypeError(
                f"layer {self.layer_idx} holds keys and values of {layout.dtype}, got {key_states.dtype} and "
                f"{value_states.dtype}"
            )
        if torch.compiler.is_compiling():
            (library.append_by_host if by_host else library.append)(buffer, state, key_states, value_states, number)
            self.count = None
        else:
            with torch.no_grad():
                append_step(buffer, state, key_states, value_states, layout)
            self.count = None if self.count is None else self.count + 1
        self._moved = True
        return StaticHandle(self, 0), StaticHandle(self, 1)

    def attend_step(
        self,
        query: torch.Tensor,
        mask: torch.Tensor | None,
        scale: float,
        softcap: float | None,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        """Attention after `step`; arguments and result as in `spectrumkv_kernels.static.reference.attend`."""
        buffer, state, layout, number, by_host = self._static
        window = self.window if mask is None else None
        if torch.compiler.is_compiling():
            attend = library.attend_by_host if by_host else library.attend
            return attend(query, buffer, state, number, scale, mask, window, softcap, sinks)
        with _own_precision(query.device):
            return attend_step(
                query, buffer, state, layout, scale=scale, mask=mask, window=window, softcap=softcap, sinks=sinks
            )

    @torch.compiler.disable
    def handles(self) -> tuple[SpectrumHandle, SpectrumHandle]:
        """Handles of keys and values after `step`, for an attention that can't read the store directly."""
        length = self.store.length
        start = length - self.get_mask_sizes(0)[0]
        self._open = OpenUpdate(1, start, Stage.DEFERRED)
        return self._shown(length - start)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of what `update` will return for `query_length` new tokens."""
        return self.length + query_length, 0

    @property
    def length(self) -> int:
        """`get_seq_length` as a number, for which the host may have to wait."""
        store = self._store
        return 0 if store is None else store.length

    def get_seq_length(self) -> int:
        """Tokens seen, those included that a policy has dropped.

        After decode steps on the device, and in a compiled graph, an integer tensor there, as in Transformers' static
        layers.
        """
        held = self._held
        alone = isinstance(held, StaticStore) and held.published and held.step is not None
        if alone and (self._moved or torch.compiler.is_compiling()):
            return self._static.state[LENGTH].long()  # type: ignore[return-value]
        return 0 if held is None else held.length

    def get_max_length(self) -> int:
        """Tokens that the layer takes; -1: no bound."""
        return -1 if self.capacity is None else self.capacity

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
        store, start = self.store, self._open.read_from
        length = store.length - start
        if mask is not None and length < mask.shape[-1] == self.capacity:  # of a step that could have been compiled
            mask = mask[..., start : start + length]
        if mask is not None and mask.shape[-1] != length:
            raise ValueError(
                f"layer {self.layer_idx} has {length} tokens to attend to, the attention mask is for {mask.shape[-1]}"
            )
        fused = fused and not (query.requires_grad and torch.is_grad_enabled())  # only the stock attention has those
        if fused and store.arenas and query.shape[2] <= FUSED_QUERIES:
            with _own_precision(query.device):
                out = self.read(query, mask, scale, softcap, sinks, store)
                self.attended(query, None, mask, scale, softcap, sinks)
            return out
        keys, values = store.dense(start)
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
        now = store.contents
        return tiered_attention(
            query,
            store.growing() if self.capacity is None else store.segments(),  # decode steps change it behind its back
            length=now.length,
            scale=scale,
            codec=self.codec,
            frame=now.frame,
            rotary=self.rotary,
            mask=mask,
            window=self.window,
            softcap=softcap,
            sinks=sinks,
            ragged=now.ragged,
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
        if self.on_attention.some:
            self.on_attention(Attention(self, query, mask, scale, softcap, sinks))
        if self._open.stage is not Stage.UNSEEN:  # another layer that shares these keys and values came before
            return
        if self._open.tokens > 1:  # one query tells next to nothing
            self._learn(query, keys, mask, scale, softcap, sinks)
        if self.defer and self._due():
            self._open.stage = Stage.DEFERRED
        else:
            self._finish()

    @torch.no_grad()
    def _learn(
        self,
        query: torch.Tensor,
        keys: torch.Tensor | None,
        mask: torch.Tensor | None,
        scale: float,
        softcap: float | None,
        sinks: torch.Tensor | None,
    ) -> None:
        """What `attended` is told of padding, of the queries' power and of the attention that tokens got."""
        tokens = self._open.tokens
        fits = mask is None or (mask.dim() == 4 and mask.shape[-2] == tokens)
        if fits and (real := real_tokens(mask, tokens)) is not None:
            self.store.note_padding(real.expand(self.store.batch_size, -1))
        pads = self.store.pads
        begins = self.store.frame is None or pads is not None
        if self.codec.balanced and begins and self._due():
            first = self.store.length - query.shape[2]
            self._open.query_power = query_power(query, self.kv_heads, None if pads is None else pads - first)
        reads = self.policy.importance in READS_QUERIES and keys is not None and fits and tokens > TAIL_STEP
        if reads and keys is not None and self._due():
            score = attention_scores
            scores = score(query, keys, scale=scale, mask=mask, window=self.window, softcap=softcap, sinks=sinks)
            self._open.scores = scores[..., keys.shape[2] - self.store.tail_length :]

    def _due(self) -> int:
        """How many of the oldest tail tokens are to be tiered now."""
        excess = self.store.tail_length - self.policy.recent_window
        if self.policy.lossless or excess <= TAIL_STEP:
            return 0
        return excess if self._open.tokens > TAIL_STEP else excess // TAIL_STEP * TAIL_STEP

    def settle(self) -> None:
        """Finish what the last update left open: its tiering was deferred, or no attention took note of it."""
        if self._store is not None and self._open.stage is not Stage.SETTLED:
            self._finish()
        if self.shared is not None and self.shared.waits(self):
            self.shared.settle()

    def _finish(self) -> None:
        """Tier what is due. After an error it is still due."""
        if self._due():
            with torch.no_grad():
                self._tier(self._open.scores)
        else:
            self.announce()
        # The power of the queries stays: where all layers share a ranking, tokens may not have their tiers yet.
        self._open.stage, self._open.scores = Stage.SETTLED, None
        if self._tiering is None:
            self._publish()
        else:
            self.confirmations.tiered(self)

    def _publish(self) -> None:
        """Let decode steps on the device find what is held."""
        self.store.publish()

    def _tier(self, scores: torch.Tensor | None) -> None:
        """Tier what is due, by attention scores of the tail or without."""
        tokens, store = self._due(), self.store
        if not tokens:  # of what was due a window has let go
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
        """Tier the oldest `tokens` of the tail by rank of `score`, `[batch, kv_heads, tokens]`; to be confirmed."""
        floor, power = self.policy.floor(self.layer_idx), self._open.query_power
        self._tiering = self.store.tier(tokens, self.policy, score, floor, power, self._tiers_beside)

    def lift(self, tokens: torch.Tensor, arena: Arena) -> None:
        """Move tokens to the tier in which an arena holds them; see `TieredStore.lift`."""
        self.store.lift(tokens, arena)
        self._publish()
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
        self._publish()
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
        return self._store.sides if self.policy.lossless and not start else self._store.dense(start)

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
        self.count = self.store.length
        self._publish()
        self.generation += 1

    def _map(self, function: Any) -> None:
        if self._store is not None:
            self.settle()
            self._store.map(function)
            self._publish()
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
            self._publish()
