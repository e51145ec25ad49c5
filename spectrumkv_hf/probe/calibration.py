"""Our probe: what each tier costs a model, keys and values apart, measured over its own cache on a short text."""

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache

from spectrumkv_hf.policy import FP16, INT4, INT8, Greedy, SinkProtect, Tier
from spectrumkv_hf.probe.divergence import logits_over, mean_kl
from spectrumkv_hf.probe.passage import passage
from spectrumkv_hf.probe.verdict import CalibrationVerdict, LayerError, TierReport
from spectrumkv_hf.tiered.cache import TieredCache
from spectrumkv_hf.tiered.layer import FUSED_QUERIES, Attention, SpectrumLayer
from spectrumkv_hf.tiered.store import Arena
from spectrumkv_kernels import CODECS, decode, encode

DEFAULT_LOSS = 0.01
"""Nats. Between what INT4 costs three models of 135M to 500M parameters with this codec, .0025 to .0085, and with the
paper's, .027 to .103, by this probe; in WikiText-2 below it perplexity rose by 1.4 % at most, above it by 2 to 34 %."""
LADDER = (0.25, 0.3, 0.35, 0.4, 0.45, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
"""Budgets at which `sink_protect` is tried where INT4 alone is not safe."""


class ProbeError(ValueError):
    """A model that can't be probed."""


class Coding(NamedTuple):
    """The tiers of a layer's keys and values."""

    keys: Tier
    values: Tier


def token_ids(model: PreTrainedModel, tokenizer: Any, tokens: int) -> tuple[torch.Tensor, str]:
    """`[1, tokens]` on the model's device, and what they are.

    Without a tokenizer they are random, the same for every vocabulary of this size, and stay away from its ends, where
    special tokens are.
    """
    if tokenizer is None:
        size = model.config.get_text_config(decoder=True).vocab_size
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(size // 10, max(size * 9 // 10, size // 10 + 1), (1, tokens), generator=generator)
        return ids.to(model.device), "random tokens"
    ids = tokenizer(passage(), return_tensors="pt", verbose=False).input_ids[:, :tokens]
    if ids.shape[1] < tokens:
        raise ProbeError(f"the calibration text has {ids.shape[1]} tokens, {tokens} were asked for")
    return ids.to(model.device), "passage"


@dataclass(frozen=True, kw_only=True)
class CalibrationProbe:
    """Next-token KL and errors of attention outputs of each tier against the exact cache.

    Attributes:
        codec: Of the cache.
        loss: What a safe tier may cost: mean KL of the next token's distribution against the exact cache, nats.
        context: Tokens whose cache is coded.
        continuation: Tokens predicted over it.

    Raises:
        ValueError: a value out of range.
    """

    codec: str = "spectrum"
    loss: float = DEFAULT_LOSS
    context: int = 512
    continuation: int = 128

    kind = "calibration"
    forwards = 11
    """Of the model, where every tier is safe: three over the exact cache, the control, the errors, three a tier."""
    parse = staticmethod(CalibrationVerdict.from_json)

    def __post_init__(self) -> None:
        if self.codec not in CODECS:
            raise ValueError(f"unknown codec {self.codec!r}: choose from {', '.join(CODECS)}")
        if not 0 < self.loss < float("inf"):
            raise ValueError(f"loss is a positive number of nats, got {self.loss!r}")
        for name, least in (("context", 64), ("continuation", 1)):
            if type(getattr(self, name)) is not int or getattr(self, name) < least:
                raise ValueError(f"{name} is a number of tokens, {least} or more, got {getattr(self, name)!r}")

    def inputs(self, model: PreTrainedModel, tokenizer: Any) -> torch.Tensor:
        """Ids of context and continuation, `[1, tokens]`.

        Raises:
            ProbeError: the model or the text is too short for them.
        """
        tokens = self.context + self.continuation
        longest = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None) or tokens
        if tokens > longest:
            raise ProbeError(
                f"the model takes {longest} tokens, context and continuation of the probe are {self.context} and "
                f"{self.continuation}"
            )
        return token_ids(model, tokenizer, tokens)[0]

    def measure(self, model: PreTrainedModel, tokenizer: Any, ids: torch.Tensor) -> CalibrationVerdict:
        """Probe a model, in eval mode and without gradients, on the ids of `inputs`.

        Raises:
            ProbeError: no layer of the model is tiered, or it gives no numbers to compare.
        """
        began = time.perf_counter()
        measured = _Measurement(model, ids, self.context, self.codec)
        control = measured.kl({})
        if not control <= self.loss:
            raise ProbeError(
                f"over the same exact cache two runs of the model differ by {control:g} nats: tiers can't be compared"
            )
        errors = measured.attention_errors((INT8, INT4))
        int8 = self._report(measured, INT8, FP16, errors[INT8], {})
        int4 = self._report(measured, INT4, INT8, errors[INT4], dict.fromkeys(int8.unsafe, FP16))
        budget, kl = LADDER[0], int4.kl
        if int4.unsafe or int8.unsafe:
            ladder = [b for b in LADDER[1:] if (b > INT8.cost) == bool(int8.unsafe)]
            known = {float(INT8.cost): int8.kl, 1.0: control}
            budget, kl = _first(ladder, self.loss, lambda b: known[b] if b in known else measured.policy_kl(b))
        return CalibrationVerdict(
            codec=self.codec,
            loss=self.loss,
            context=self.context,
            continuation=self.continuation,
            text="random tokens" if tokenizer is None else "passage",
            control=control,
            tiered=tuple(measured.tiered),
            int8=int8,
            int4=int4,
            plain_budget=budget,
            plain_kl=kl,
            seconds=time.perf_counter() - began,
        )

    def _report(
        self,
        measured: "_Measurement",
        tier: Tier,
        better: Tier,
        errors: Sequence[LayerError],
        fixed: Mapping[int, Tier],
    ) -> TierReport:
        """The tier, and which layers need `better` where it does not meet the loss; `fixed` ones have theirs."""

        def kl(keys: Tier, values: Tier, floors: Mapping[int, Tier]) -> float:
            floored = {layer: Coding(floor, floor) for layer, floor in floors.items()}
            return measured.kl({layer: floored.get(layer, Coding(keys, values)) for layer in measured.tiered})

        size = {error.layer: error.keys**2 + error.values**2 for error in errors}
        worst = sorted((i for i in measured.tiered if i not in fixed), key=lambda i: -size.get(i, 0.0))
        whole = kl(tier, tier, {})
        unsafe: tuple[int, ...] = ()
        floored = whole
        if not whole <= self.loss:
            floors = [{**fixed, **dict.fromkeys(worst[:n], better)} for n in range(len(worst) + 1)]
            chosen, floored = _first(floors, self.loss, lambda each: kl(tier, tier, each))
            unsafe = tuple(sorted(chosen))
        return TierReport(
            tier=tier.name,
            kl=whole,
            kl_keys=kl(tier, FP16, {}),
            kl_values=kl(FP16, tier, {}),
            layers=tuple(errors),
            unsafe=unsafe,
            kl_floored=floored,
        )


def _first(candidates: Sequence[Any], loss: float, kl: Callable[[Any], float]) -> tuple[Any, float]:
    """The first candidate that meets the loss, and its KL, by bisection; the last one is known to."""
    low, high = 0, len(candidates) - 1
    met: float | None = None
    while low < high:
        middle = (low + high) // 2
        if (value := kl(candidates[middle])) <= loss:
            high, met = middle, value
        else:
            low = middle + 1
    return candidates[high], kl(candidates[high]) if met is None else met


class _Measurement:
    """A context in the FP16 tier of a cache, of which copies are recoded and continued.

    The prefill of a tiered cache is exact, so recoding gives what another prefill would.
    """

    def __init__(self, model: PreTrainedModel, ids: torch.Tensor, context: int, codec: str) -> None:
        self._model, self._codec = model, codec
        self._context, self._rest = ids[:, :context], ids[:, context:]
        # The control: every token goes through an arena, none is coded.
        self._cache = self._prefilled(Greedy(budget=1.0, recent_window=0))
        layers = [layer for layer in self._cache.layers if isinstance(layer, SpectrumLayer)]
        for layer in layers:
            layer.settle()
        self.tiered = [layer.layer_idx for layer in layers if layer.is_initialized and FP16 in layer.store.arenas]
        if not self.tiered:
            raise ProbeError(f"no layer of the model is tiered:\n{self._cache.summary()}")
        exact = DynamicCache(config=model.config)
        logits_over(model, self._context, exact, last=1)
        self._exact = self._continued(exact)

    def _prefilled(self, policy: Greedy | SinkProtect) -> TieredCache:
        cache = TieredCache(self._model.config, policy=policy, codec=self._codec)
        logits_over(self._model, self._context, cache, last=1)
        return cache

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
