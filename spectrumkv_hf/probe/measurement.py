"""Measuring what tiers cost a model: the caches of a text, whose layers are recoded and continued."""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, cast

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache

from spectrumkv_hf.attention.masks import causal_mask
from spectrumkv_hf.policy import FP16, Greedy, Policy, SinkProtect, Tier
from spectrumkv_hf.probe.divergence import logits_over, mean_kl
from spectrumkv_hf.probe.passage import TEXTS, text
from spectrumkv_hf.probe.verdict import LayerError
from spectrumkv_hf.tiered.cache import TieredCache
from spectrumkv_hf.tiered.layer import FUSED_QUERIES, Attention, SpectrumLayer
from spectrumkv_hf.tiered.store import Arena
from spectrumkv_kernels import attention_scores, decode, encode


class ProbeError(ValueError):
    """A model that can't be probed."""


def check_least(probe: Any, what: str, **least: int) -> None:
    """Refuse fields of a probe that are no integers, or less than these, with a ValueError; `what` they are."""
    for name, number in least.items():
        if type(getattr(probe, name)) is not int or getattr(probe, name) < number:
            raise ValueError(f"{name} is {what}, {number} or more, got {getattr(probe, name)!r}")


def check_length(model: PreTrainedModel, tokens: int, needed: str) -> None:
    """Refuse a model that takes fewer tokens, with a `ProbeError` that says what needs them."""
    longest = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None) or tokens
    if tokens > longest:
        raise ProbeError(f"the model takes {longest} tokens, {needed}")


class Coding(NamedTuple):
    """The tiers of a layer's keys and values."""

    keys: Tier
    values: Tier


def token_ids(model: PreTrainedModel, tokenizer: Any, tokens: int, name: str = TEXTS[0]) -> tuple[torch.Tensor, str]:
    """`[1, tokens]` of one of `TEXTS`, on the model's device, and what they are.

    Without a tokenizer they are random, the same for every vocabulary of this size, and stay away from its ends, where
    special tokens are.
    """
    if tokenizer is None:
        size = model.config.get_text_config(decoder=True).vocab_size
        generator = torch.Generator().manual_seed(TEXTS.index(name))
        ids = torch.randint(size // 10, max(size * 9 // 10, size // 10 + 1), (1, tokens), generator=generator)
        return ids.to(model.device), "random tokens"
    ids = tokenizer(text(name), return_tensors="pt", verbose=False).input_ids[:, :tokens]
    if ids.shape[1] < tokens:
        raise ProbeError(f"the calibration text has {ids.shape[1]} tokens, {tokens} were asked for")
    return ids.to(model.device), name


class Measurement:
    """A context in the FP16 tier of a cache, of which copies are recoded and continued.

    The prefill of a tiered cache is exact, so recoding gives what another prefill would.
    """

    def __init__(
        self, model: PreTrainedModel, ids: torch.Tensor, context: int, codec: str, weigh: bool = False
    ) -> None:
        """Fill the caches with the first `context` of `ids`, `[1, tokens]`; with `weigh`, for `ranked_power`.

        Raises:
            ProbeError: no layer of the model is tiered.
        """
        self._model, self._codec = model, codec
        self._scores: dict[int, torch.Tensor] = {}  # by which a layer ranks its last tokens, [kv_heads, tokens]
        self._context, self._rest = ids[:, :context], ids[:, context:]
        # The control: every token goes through an arena, none is coded.
        self._cache = self._prefilled(Greedy(budget=1.0, recent_window=0), self._rank if weigh else None)
        layers = [layer for layer in self._cache.layers if isinstance(layer, SpectrumLayer)]
        for layer in layers:
            layer.settle()
            # What continues copies stays as it comes: to rank and tier it would take half of their time.
            layer.policy = replace(layer.policy, recent_window=ids.shape[1])
        self.tiered = [layer.layer_idx for layer in layers if layer.is_initialized and FP16 in layer.store.arenas]
        if not self.tiered:
            raise ProbeError(f"no layer of the model is tiered:\n{self._cache.summary()}")
        exact = DynamicCache(config=model.config)
        logits_over(model, self._context, exact, last=1)
        self._exact = self._continued(exact)

    def _prefilled(self, policy: Policy, watch: Callable[[Attention], None] | None = None) -> TieredCache:
        cache = TieredCache(self._model.config, policy=policy, codec=self._codec)
        layers = [layer for layer in cache.layers if isinstance(layer, SpectrumLayer)]
        removers = [] if watch is None else [layer.on_attention.add(watch) for layer in layers]
        logits_over(self._model, self._context, cache, last=1)
        for remove in removers:
            remove()
        return cache

    def _rank(self, seen: Attention) -> None:
        layer = seen.layer
        found = attention_scores(
            seen.query, layer.store.tail[0], scale=seen.scale, mask=seen.mask, window=layer.window,
            softcap=seen.softcap, sinks=seen.sinks,
        )  # fmt: skip
        self._scores.setdefault(layer.layer_idx, found[0])

    def ranked_power(self, sinks: int) -> dict[int, torch.Tensor]:
        """How heavily errors of tokens weigh, by layer, from the one that ranks first to the last, float64 `[tokens]`.

        A token's error reaches the output by the attention it gets, so its square weighs by the square of that: here
        the mean over the continuation's queries, summed over heads. Each KV head ranks its tokens by the attention of
        the context, as a cache does. Layers whose attention could not be watched are missing.

        Args:
            sinks: First tokens, which stay exact and are left out.
        """
        power: dict[int, torch.Tensor] = {}
        tokens = self._context.shape[1]

        def watch(seen: Attention) -> None:
            store, index = seen.layer.store, seen.layer.layer_idx
            start = store.first_kept if seen.mask is None else store.length - seen.mask.shape[-1]
            found = _attention_power(seen, store.dense(start)[0])[:, : tokens - start]
            # Layers that share these keys and values add their queries.
            power[index] = power[index] + found if index in power else found

        cache = copy.deepcopy(self._cache)
        for index in self._scores:
            cache.layers[index].on_attention.add(watch)
        self._continued(cache)
        ranked = {}
        for index, found in power.items():
            first = max(sinks, tokens - found.shape[1], tokens - self._scores[index].shape[1])
            held = first - tokens  # negative: of the last tokens, those that a window holds and that are no sinks
            if held < 0:
                order = self._scores[index][:, held:].argsort(-1, descending=True)
                ranked[index] = found[:, held:].gather(-1, order).double().sum(0).cpu()
        return ranked

    def layer(self, index: int) -> SpectrumLayer:
        """A tiered layer of the cache, which is not to be changed."""
        return cast(SpectrumLayer, self._cache.layers[index])

    def _continued(self, cache: Cache) -> torch.Tensor:
        return logits_over(self._model, self._rest, cache)[0]

    def kl(self, codings: Mapping[int, Coding]) -> float:
        """KL with layers recoded."""
        cache = copy.deepcopy(self._cache)
        for index, coding in codings.items():
            layer = cache.layers[index]
            arenas = {**layer.store.arenas, FP16: _recoded(layer, layer.store.arenas[FP16], coding)}
            layer.adopt(layer.store.with_arenas(list(arenas.values())))
        return mean_kl(self._exact, self._continued(cache))

    def policy_kl(self, budget: float) -> float:
        """KL of the default policy at a budget."""
        return mean_kl(self._exact, self._continued(self._prefilled(SinkProtect(budget=budget, recent_window=0))))

    def attention_errors(self, tiers: Sequence[Tier]) -> dict[Tier, list[LayerError]]:
        """Errors of the attention outputs of the continuation's last queries, the queries being exact."""
        power: dict[int, float] = {}
        error: dict[tuple[int, Coding], float] = {}
        codings = [Coding(*sides) for tier in tiers for sides in ((tier, FP16), (FP16, tier))]

        def compare(seen: Attention) -> None:
            layer, store = seen.layer, seen.layer.store
            if FP16 not in store.arenas:
                return
            n = min(FUSED_QUERIES, seen.query.shape[2])
            mask = seen.mask
            if mask is not None and mask.shape[2] > 1:
                mask = mask[:, :, -n:]

            def output(arena: Arena) -> torch.Tensor:
                held = store.with_arenas([arena])
                return layer.read(seen.query[:, :, -n:], mask, seen.scale, seen.softcap, seen.sinks, held).float()

            exact = store.arenas[FP16]
            expected = output(exact)
            # Layers that share these keys and values add their queries.
            power[layer.layer_idx] = power.get(layer.layer_idx, 0.0) + float(expected.square().sum())
            for coding in codings:
                difference = output(_recoded(layer, exact, coding)) - expected
                key = layer.layer_idx, coding
                error[key] = error.get(key, 0.0) + float(difference.square().sum())

        cache = copy.deepcopy(self._cache)
        for index in self.tiered:
            cache.layers[index].on_attention.add(compare)
        self._continued(cache)

        def relative(index: int, coding: Coding) -> float:
            return (error[index, coding] / power[index]) ** 0.5 if power[index] else 0.0

        return {
            tier: [
                LayerError(layer=i, keys=relative(i, Coding(tier, FP16)), values=relative(i, Coding(FP16, tier)))
                for i in sorted(power)
            ]
            for tier in tiers
        }


def _attention_power(seen: Attention, keys: torch.Tensor) -> torch.Tensor:
    """Mean over the queries of the squared attention that keys get, summed over a group's heads, `[kv_heads, tokens]`.

    Args:
        keys: All that the queries saw, `[1, kv_heads, tokens, head_dim]`.
    """
    queries, (kv_heads, tokens) = seen.query.shape[2], keys.shape[1:3]
    scores = (seen.query.float() * seen.scale).unflatten(1, (kv_heads, -1)) @ keys.float().unsqueeze(2).mT
    scores = scores.flatten(1, 2)  # [1, heads, queries, tokens]
    if seen.softcap is not None:
        scores = (scores / seen.softcap).tanh() * seen.softcap
    mask = seen.mask
    if mask is None:
        mask = causal_mask(seen.query, tokens)
        if seen.layer.window:
            mask = mask.triu(tokens - queries - seen.layer.window + 1)
    scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    if seen.sinks is not None:
        scores = torch.cat((scores, seen.sinks.float().view(1, -1, 1, 1).expand(*scores.shape[:-1], 1)), dim=-1)
    found = scores.softmax(-1)[..., :tokens].square().mean(2)
    return found[0].unflatten(0, (kv_heads, -1)).sum(1)


def _recoded(layer: SpectrumLayer, arena: Arena, coding: Coding) -> Arena:
    """An FP16 arena whose keys and values are what `coding` would give back; the sinks stay exact."""
    store, sink = layer.store, (arena.positions < SinkProtect.sinks).unsqueeze(-1)
    exact = cast(torch.Tensor, arena.keys), cast(torch.Tensor, arena.values)

    def decoded(tier: Tier) -> tuple[torch.Tensor, torch.Tensor]:
        if tier == FP16:
            return exact
        at, codec, frame, rotary = arena.positions, store.codec, store.frame, store.rotary
        k, v = encode(*exact, at, tier.bits, codec, frame, rotary)
        return decode(k, v, at, tier.bits, codec, frame, rotary)

    both = decoded(coding.keys)
    sides = both[0], (both if coding.values == coding.keys else decoded(coding.values))[1]
    keys, values = (torch.where(sink, old, new.to(old.dtype)) for old, new in zip(exact, sides, strict=True))
    return Arena(FP16, keys, values, arena.positions)
