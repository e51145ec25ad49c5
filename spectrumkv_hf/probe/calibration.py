"""Our probe: what each tier costs a model, keys and values apart, measured over its own cache on a short text."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from spectrumkv_hf.policy import FP16, INT4, INT8, Tier
from spectrumkv_hf.probe.measurement import Coding, Measurement, ProbeError, check_least, check_length, token_ids
from spectrumkv_hf.probe.verdict import CalibrationVerdict, LayerError, TierReport
from spectrumkv_kernels import CODECS, DEFAULT_CODEC

DEFAULT_LOSS = 0.01
"""Nats. Between what INT4 costs three models of 135M to 500M parameters with this codec, .0025 to .0085, and with the
paper's, .027 to .103, by this probe; in WikiText-2 below it perplexity rose by 1.4 % at most, above it by 2 to 34 %."""
LADDER = (0.25, 0.3, 0.35, 0.4, 0.45, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
"""Budgets at which `sink_protect` is tried where INT4 alone is not safe."""


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

    codec: str = DEFAULT_CODEC
    loss: float = DEFAULT_LOSS
    context: int = 512
    continuation: int = 128

    kind = "calibration"
    parse = staticmethod(CalibrationVerdict.from_json)

    def __post_init__(self) -> None:
        if self.codec not in CODECS:
            raise ValueError(f"unknown codec {self.codec!r}: choose from {', '.join(CODECS)}")
        if not 0 < self.loss < float("inf"):
            raise ValueError(f"loss is a positive number of nats, got {self.loss!r}")
        check_least(self, "a number of tokens", context=64, continuation=1)

    def forwards(self, model: PreTrainedModel) -> int:
        """Of the model, where every tier is safe: three over the exact cache, the control, the errors, three a tier."""
        return 11

    def inputs(self, model: PreTrainedModel, tokenizer: Any) -> torch.Tensor:
        """Ids of context and continuation, `[1, tokens]`.

        Raises:
            ProbeError: the model or the text is too short for them.
        """
        tokens = self.context + self.continuation
        needed = f"context and continuation of the probe are {self.context} and {self.continuation}"
        check_length(model, tokens, needed)
        return token_ids(model, tokenizer, tokens)[0]

    def measure(self, model: PreTrainedModel, tokenizer: Any, ids: torch.Tensor) -> CalibrationVerdict:
        """Probe a model, in eval mode and without gradients, on the ids of `inputs`.

        Raises:
            ProbeError: no layer of the model is tiered, or it gives no numbers to compare.
        """
        began = time.perf_counter()
        measured = Measurement(model, ids, self.context, self.codec)
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
        measured: Measurement,
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
