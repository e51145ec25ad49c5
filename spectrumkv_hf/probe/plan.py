"""The probe of a plan: what rounding each layer costs a model, for as many bytes as there are."""

import time
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from spectrumkv_hf.policy import INT2
from spectrumkv_hf.policy.calibrated import ERRORS, Calibrated
from spectrumkv_hf.probe.measurement import Coding, Measurement, ProbeError, check_least, check_length, token_ids
from spectrumkv_hf.probe.passage import TEXTS
from spectrumkv_hf.probe.verdict import LayerPlan, PlanVerdict
from spectrumkv_kernels import CODECS, DEFAULT_CODEC

QUANTILES = 64
"""Equal shares of the tokens whose weight a plan knows."""


@dataclass(frozen=True, kw_only=True)
class PlanProbe:
    """How the loss grows with the error of each layer, by which `calibrated` shares out a budget.

    Each layer by itself is coded in 2 bits, the others stay exact, and the next-token KL over that cache is measured.
    Over the layers of a model it spans three orders of magnitude, and nothing that is known without measuring orders
    them. What a token adds to the error of its layer goes by the square of the attention that it gets from the text
    that follows, at the rank that the text before has given it: later attention does not fall where the prompt's did.

    Attributes:
        codec: Of the cache; it balances.
        context: Tokens whose cache is coded.
        continuation: Tokens predicted over it.
        texts: Over which this is measured: some of `TEXTS`.

    Raises:
        ValueError: a value out of range.
    """

    codec: str = DEFAULT_CODEC
    context: int = 896
    continuation: int = 128
    texts: tuple[str, ...] = TEXTS

    kind = "plan"
    parse = staticmethod(PlanVerdict.from_json)

    def __post_init__(self) -> None:
        if self.codec not in CODECS or not CODECS[self.codec].balanced:
            known = ", ".join(name for name, codec in CODECS.items() if codec.balanced)
            raise ValueError(f"budgets are planned for codecs that balance ({known}), got {self.codec!r}")
        if not self.texts or len({*self.texts}) < len(self.texts) or not {*self.texts} <= {*TEXTS}:
            raise ValueError(f"texts are some of {', '.join(TEXTS)}, each once, got {self.texts!r}")
        check_least(self, "a whole number", context=64, continuation=1)

    def forwards(self, model: PreTrainedModel) -> int:
        """Of the model: a text takes four over the exact cache, and one for each layer that has a cache."""
        return len(self.texts) * (4 + model.config.get_text_config(decoder=True).num_hidden_layers)

    def inputs(self, model: PreTrainedModel, tokenizer: Any) -> torch.Tensor:
        """Ids of the beginnings of all texts, `[texts, tokens]`.

        Raises:
            ProbeError: the model or a text is too short for them.
        """
        tokens = self.context + self.continuation
        check_length(model, tokens, f"a text of the probe has {tokens}")
        return torch.cat([token_ids(model, tokenizer, tokens, name)[0] for name in self.texts])

    def measure(self, model: PreTrainedModel, tokenizer: Any, ids: torch.Tensor) -> PlanVerdict:
        """Probe a model, in eval mode and without gradients, on the ids of `inputs`.

        Raises:
            ProbeError: no layer of the model is tiered, or it gives no numbers to compare.
        """
        began = time.perf_counter()
        losses: dict[int, list[float]] = {}
        weights: dict[int, list[torch.Tensor]] = {}
        for text in ids:
            measured = Measurement(model, text[None], self.context, self.codec, weigh=True)
            power = measured.ranked_power(Calibrated.sinks)
            for index in measured.tiered:
                losses.setdefault(index, []).append(measured.kl({index: Coding(INT2, INT2)}))
                weights.setdefault(index, []).append(_at_equal_shares(power.get(index)))
        layers = []
        for index in measured.tiered:
            layer = measured.layer(index)
            loss = sum(losses[index]) / len(ids)
            if not loss < float("inf"):
                raise ProbeError(f"the model gives no numbers to compare: layer {index} in 2 bits costs {loss:g} nats")
            keys, values = layer.store.tail
            layers.append(
                LayerPlan(
                    layer=index,
                    window=layer.window or 0,
                    key_dim=keys.shape[-1],
                    value_dim=values.shape[-1],
                    sensitivity=max(loss, 0.0) / ERRORS[INT2],
                    weights=tuple(_decreasing(torch.stack(weights[index]).mean(0).tolist())),
                    exact=keys.element_size() / 2,
                )
            )
        return PlanVerdict(
            codec=self.codec,
            context=self.context,
            continuation=self.continuation,
            texts=self.texts if tokenizer is not None else ("random tokens",),
            layers=tuple(layers),
            seconds=time.perf_counter() - began,
        )


def _at_equal_shares(power: torch.Tensor | None) -> torch.Tensor:
    """Means of `[tokens]` at `QUANTILES` equal shares of them, float64, over the mean of all; None: all weigh alike."""
    if power is None or not power.sum() > 0:
        return torch.ones(QUANTILES, dtype=torch.float64)
    found = torch.nn.functional.adaptive_avg_pool1d(power[None], QUANTILES)[0]
    return found / found.mean()


def _decreasing(weights: list[float]) -> list[float]:
    """The nearest weights that do not grow, by least squares: neighbours that do are averaged (isotonic regression).

    A cache gives tokens their tiers by rank, so a weight that is greater at a lower rank would buy bits for others.
    """
    blocks: list[tuple[float, int]] = []
    for weight in weights:
        blocks.append((weight, 1))
        while len(blocks) > 1 and blocks[-2][0] < blocks[-1][0]:
            (last, more), (before, some) = blocks.pop(), blocks.pop()
            blocks.append(((before * some + last * more) / (some + more), some + more))
    return [weight for weight, count in blocks for _ in range(count)]
