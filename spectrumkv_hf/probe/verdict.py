"""What a probe has found, and the policy that follows from it."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, is_dataclass
from typing import Any, Self, cast, get_args, get_origin

from spectrumkv_hf.policy import FP16, INT4, INT8, Adaptive, Calibrated, SinkProtect
from spectrumkv_hf.policy.calibrated import PLANNED, LayerCost, Shares, allocate
from spectrumkv_kernels.codec.quantize import divisor
from spectrumkv_kernels.segment import START, TILE

BESIDE = 2 + (START + TILE) / TILE
"""Bytes that a token of a head has beside its codes: a scale for the key and one for the value, and its position."""


class Stored:
    """A dataclass that is kept as JSON."""

    def to_json(self) -> dict[str, Any]:
        """As JSON has it; `from_json` takes it back."""
        return json.loads(json.dumps(asdict(cast(Any, self))))

    @classmethod
    def from_json(cls, data: Any) -> Self:
        """What `to_json` gave.

        Raises:
            ValueError: it is none.
        """
        return _built(cls, data)


@dataclass(frozen=True, kw_only=True)
class LayerError:
    """What coding one side of a layer does to its attention output, for exact queries.

    Attributes:
        layer: Index in the model.
        keys: Relative L2 error of the output over heads and queries where the keys alone are coded.
        values: The same for the values.
    """

    layer: int
    keys: float
    values: float


@dataclass(frozen=True, kw_only=True)
class TierReport:
    """A tier in use for all tokens of the context but the sinks.

    Attributes:
        tier: Its name.
        kl: Mean KL of the next token's distribution against the exact cache, nats.
        kl_keys: The same where the keys alone are coded, the values being exact.
        kl_values: Where the values alone are.
        layers: Errors of attention outputs by layer; layers whose attention can't be watched are missing.
        unsafe: Layers that need a more precise tier for the stated loss to be met; none where the tier is safe in all.
        kl_floored: `kl` when those layers have it.
    """

    tier: str
    kl: float
    kl_keys: float
    kl_values: float
    layers: tuple[LayerError, ...]
    unsafe: tuple[int, ...]
    kl_floored: float


@dataclass(frozen=True, kw_only=True)
class CalibrationVerdict(Stored):
    """What each tier costs a model on a calibration text, and what follows for a stated loss.

    Attributes:
        codec: Of the cache that was measured.
        loss: The stated loss: mean KL of the next token's distribution against the exact cache, nats.
        context: Tokens whose cache was coded.
        continuation: Tokens predicted over it.
        text: `passage`, or `random tokens` where no tokenizer was given.
        control: KL where all tokens went through the FP16 tier, on the same path: 0, or what rounding leaves where the
            device does not repeat its results or few tokens are predicted, which read the tier by other kernels.
        tiered: Layers that were tiered.
        int8: The INT8 tier.
        int4: The INT4 tier.
        plain_budget: The least budget of those tried at which `sink_protect` meets the loss without floors.
        plain_kl: Its KL.
        seconds: That the probe took.
    """

    codec: str
    loss: float
    context: int
    continuation: int
    text: str
    control: float
    tiered: tuple[int, ...]
    int8: TierReport
    int4: TierReport
    plain_budget: float
    plain_kl: float
    seconds: float

    def __post_init__(self) -> None:
        for report, name in ((self.int8, INT8.name), (self.int4, INT4.name)):
            if report.tier != name or not {*report.unsafe} <= {*self.tiered}:
                raise ValueError(f"no report of {name}: {report}")
        if not self.tiered:
            raise ValueError("a verdict on no layer")

    @property
    def safe(self) -> tuple[str, ...]:
        """Tiers that meet the loss in use for all tokens of all layers."""
        return (FP16.name, *(report.tier for report in (self.int8, self.int4) if not report.unsafe))

    @property
    def cheapest(self) -> SinkProtect:
        """The cheapest policy that meets the loss."""
        return self.policy(float(SinkProtect.minimum))

    def policy(self, budget: float, **options: Any) -> SinkProtect:
        """The policy that meets the loss at `budget`, or the cheapest above it: with floors, or at a higher budget.

        It rests on what was measured for all tokens in the least tier, or at a lower budget: more precise tokens are
        taken not to raise the loss.

        Args:
            budget: As of `SinkProtect`.
            options: Further fields of the policy, which the probe has not varied.

        Raises:
            ValueError: as of `SinkProtect`.
        """
        plain = SinkProtect(budget=budget, **options)
        if budget >= self.plain_budget:
            return plain
        floored = SinkProtect(budget=budget, floors=self._floors(budget), **options)
        if self.cost(floored) < self.plain_budget:
            return floored
        return SinkProtect(budget=self.plain_budget, **options)

    def _floors(self, budget: float) -> tuple[tuple[int, str], ...]:
        floors = dict.fromkeys(self.int8.unsafe, FP16.name)
        if budget < INT8.cost:
            floors = dict.fromkeys(self.int4.unsafe, INT8.name) | floors
        return tuple(sorted(floors.items()))

    def cost(self, policy: SinkProtect) -> float:
        """Mean nominal cost of a policy over the tiered layers, in a long context."""
        floors = [policy.floor(layer) for layer in self.tiered]
        return sum(max(policy.budget, float(floor.cost)) if floor else policy.budget for floor in floors) / len(floors)


@dataclass(frozen=True, kw_only=True)
class LayerPlan:
    """What rounding the tokens of a layer costs a model.

    Attributes:
        layer: Index in the model.
        window: Tokens of its sliding window; 0: it has none.
        key_dim, value_dim: Channels of its heads.
        sensitivity: Next-token KL against the exact cache, nats, per unit of relative squared error of all its tokens.
        weights: What tokens at equal shares of the ranking add to it, the most important first; their mean is 1.
        exact: Bytes of a number that stays exact, over those of FP16.
    """

    layer: int
    window: int
    key_dim: int
    value_dim: int
    sensitivity: float
    weights: tuple[float, ...]
    exact: float


@dataclass(frozen=True, kw_only=True)
class PlanVerdict(Stored):
    """What rounding each layer costs a model on a calibration text, from which plans for any budget follow.

    Attributes:
        codec: Of the cache that was measured.
        context: Tokens whose cache was coded.
        continuation: Tokens predicted over it.
        texts: Over which it was measured, or `random tokens` where no tokenizer was given.
        layers: The tiered layers.
        seconds: That the probe took.
    """

    codec: str
    context: int
    continuation: int
    texts: tuple[str, ...]
    layers: tuple[LayerPlan, ...]
    seconds: float

    def __post_init__(self) -> None:
        if not self.layers or len({len(layer.weights) for layer in self.layers}) > 1:
            raise ValueError(f"a plan of {len(self.layers)} layers, or their weights are not of one kind")

    def policy(self, budget: float, **options: Any) -> Calibrated:
        """The plan for a budget of bytes.

        Layers with a window share it among themselves, as do those without: how many tokens a layer holds beside
        another depends on the context, and in each group they are as many.

        Args:
            budget: What tiered tokens take of their FP16 bytes, with scales, positions and frames.
            options: Further fields of the policy.

        Raises:
            ValueError: the budget is out of range, or an option is.
        """
        shares: dict[int, Shares] = {}
        for window in {layer.window for layer in self.layers}:
            group = [layer for layer in self.layers if layer.window == window]
            dims = {dim for each in group for dim in (each.key_dim, each.value_dim)}
            fit = tuple(tier for tier in PLANNED if not any(dim % divisor(tier.bits) for dim in dims))
            costs = [
                LayerCost(g.sensitivity, g.weights, BESIDE / (2 * (g.key_dim + g.value_dim)), g.exact) for g in group
            ]
            planned = allocate(costs, budget, fit)
            shares |= {layer.layer: found for layer, found in zip(group, planned, strict=True)}
        return Calibrated(budget=budget, layers=tuple(sorted(shares.items())), **options)


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One needle: what to find, at which relative depth, and whether the model did, over the exact cache and tiers."""

    answer: str
    depth: float
    exact: bool
    tiered: bool


@dataclass(frozen=True, kw_only=True)
class PaperVerdict(Stored):
    """The paper's probe: three needles over three-tier greedy at b=.3.

    Attributes:
        codec: Of the cache that was measured.
        tokens: Of each prompt.
        trials: Needles tried.
        seconds: That the probe took.
    """

    codec: str
    tokens: int
    trials: tuple[Trial, ...]
    seconds: float

    @property
    def passed(self) -> bool:
        """Two of three needles found, the paper's rule."""
        return sum(trial.tiered for trial in self.trials) >= 2

    @property
    def conclusive(self) -> bool:
        """The exact cache passes, so that a failure says something of the tiers. The paper does not ask."""
        return sum(trial.exact for trial in self.trials) >= 2

    def policy(self, budget: float, **options: Any) -> Adaptive:
        """Three tiers for a model that passed, else two.

        Raises:
            ValueError: as of `Adaptive`.
        """
        return Adaptive(budget=budget, probe_passed=self.passed, **options)


Verdict = CalibrationVerdict | PaperVerdict | PlanVerdict


def _built(cls: Any, data: Any) -> Any:
    """An instance of a dataclass of this module from JSON, every field checked by its annotation."""
    names: Mapping[str, type] = cls.__annotations__
    if not isinstance(data, dict) or data.keys() != names.keys():
        raise ValueError(f"no {cls.__name__}: {str(data)[:80]}")
    return cls(**{name: _value(name, kind, data[name]) for name, kind in names.items()})


def _value(name: str, kind: Any, data: Any) -> Any:
    if is_dataclass(kind):
        return _built(kind, data)
    if get_origin(kind) is tuple and isinstance(data, list):
        return tuple(_value(name, get_args(kind)[0], item) for item in data)
    if kind is float and type(data) is int:
        return float(data)
    if type(data) is not kind:
        raise ValueError(f"{name} is {str(data)[:80]}, no {kind}")
    return data
