"""The policy of a probe's plan: each layer has its own shares of tokens in each tier, and the budget means bytes."""

import functools
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from fractions import Fraction
from typing import NamedTuple

import torch

from spectrumkv_hf.policy.policies import FP16, INT1, INT2, INT3, INT4, INT8, POLICIES, Counts, Policy, Tier

PLANNED = (FP16, INT8, INT4, INT3, INT2, INT1)
"""Tiers of a plan, the most precise first."""
ERRORS = {FP16: 0.0, INT8: 4e-5, INT4: 0.010, INT3: 0.036, INT2: 0.13, INT1: 3.0}
"""Squared error of the codes of `spectrum2` for normal variables, relative to the variance. Of 1 bit that is 0.57; but
errors of keys reach the output by an exponential, so large ones do more harm than their square says. What is taken for
them matters little: from 1 to 6 the plans for SmolLM2-135M at .15 cost .0093 to .0107 nats, with 0.57 .0123."""
SCARCE = 1 / 24
"""Of the FP16 bytes. Where a budget leaves as much beside what all tokens take in 2 bits, none gets 1 bit, which gains
nothing there: with it the same model costs .0031 to .0047 nats at .2, without it .0029."""
FRAME = 3
"""Exact tokens whose bytes a layer's frame takes: `2 key_dim + value_dim + 1` numbers of four bytes."""

Shares = tuple[float, ...]
"""Of tokens in each of `PLANNED`, the sinks not counted; they add up to 1."""


@dataclass(frozen=True, kw_only=True)
class LayerShares(Policy):
    """One layer of a plan: `Calibrated.for_layer`.

    Attributes:
        shares: As of `Shares`.
        debt: Exact tokens whose bytes the layer has to save.
    """

    name = "calibrated"
    minimum = Fraction(1, 16)
    shares: Shares = (0.0, 0.0, 1.0, 0.0, 0.0, 0.0)
    debt: float = 0.0

    @property
    def tiers(self) -> tuple[Tier, ...]:
        return tuple(tier for tier, _ in self._used)

    @property
    def _used(self) -> list[tuple[Tier, float]]:
        return [(tier, share) for tier, share in zip(PLANNED, self.shares, strict=True) if share]

    @property
    def cost(self) -> float:
        """Mean nominal cost of the tokens but the sinks."""
        return sum(share * float(tier.cost) for tier, share in self._used)

    @property
    def spare(self) -> float:
        """What of it can be saved: nothing where all tokens are in one tier."""
        return self.cost - float(self._used[-1][0].cost)

    def counts(self, tokens: int) -> Counts:
        """By the shares. To save the debt, tokens of the most precise tier go to the next one that is used; where that
        is not enough, tokens of that one to the next.
        """
        exact = min(self.sinks, tokens)
        used = self._used
        counts = dict.fromkeys(PLANNED, 0) | {tier: int(share * (tokens - exact)) for tier, share in used}
        least = used[-1][0]
        counts[least] += tokens - exact - sum(counts.values())
        debt = self.debt
        for (tier, _), (lower, _) in itertools.pairwise(used):
            gain = float(tier.cost - lower.cost)
            moved = min(counts[tier], max(math.ceil(debt / gain), 0))
            counts[tier] -= moved
            counts[lower] += moved
            debt -= moved * gain
        counts[FP16] += exact
        return {tier: n for tier, n in counts.items() if n}


@dataclass(frozen=True, kw_only=True)
class Calibrated(Policy):
    """A probe's plan for a budget of bytes: `budget` is what tiered tokens take of their FP16 bytes, with scales,
    positions and frames.

    What sinks and frames take beyond the shares is saved again, by each layer in proportion to what it can save. So the
    whole keeps to its bytes however short the context is, unless hardly any layer has more than one tier.

    Attributes:
        layers: `Shares` of each tiered layer, by its index: pairs, or a mapping, held as pairs in the order of layers.
    """

    name = "calibrated"
    minimum = LayerShares.minimum
    layers: tuple[tuple[int, Shares], ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "layers", _checked(self.layers))

    def counts(self, tokens: int) -> Counts:
        """Those of a layer with the mean shares of all."""
        columns = zip(*(shares for _, shares in self.layers), strict=True)
        mean = self._of(tuple(sum(column) / len(self.layers) for column in columns))
        return replace(mean, debt=self._debt(mean)).counts(tokens)

    @property
    def tiers(self) -> tuple[Tier, ...]:
        """Of all layers together."""
        return self._tiers

    @functools.cached_property
    def _tiers(self) -> tuple[Tier, ...]:
        used = {tier for each in self._each.values() for tier in each.tiers}
        return tuple(tier for tier in PLANNED if tier in used)

    def for_layer(self, layer: int) -> Policy:
        """The policy of one layer.

        Raises:
            ValueError: the plan has no such layer.
        """
        if layer not in self._each:
            planned = ", ".join(map(str, self._each))
            raise ValueError(f"policy {self.name!r} was planned for layers {planned}, not for layer {layer}")
        return self._each[layer]

    @functools.cached_property
    def _each(self) -> dict[int, LayerShares]:
        """Every layer, with its part of what all have to save."""
        every = {index: self._of(shares) for index, shares in self.layers}
        spare, debt = sum(each.spare for each in every.values()), sum(map(self._debt, every.values()))
        return {i: replace(each, debt=debt * each.spare / spare if spare else 0.0) for i, each in every.items()}

    def _debt(self, layer: LayerShares) -> float:
        """What a layer's sinks and frame take beyond its shares."""
        return FRAME + self.sinks * (1 - layer.cost)

    def _of(self, shares: Shares) -> LayerShares:
        common = {field.name: getattr(self, field.name) for field in fields(Policy)}
        return LayerShares(**common, shares=shares)


POLICIES[Calibrated.name] = Calibrated


def _checked(given: Mapping[int, Shares] | Iterable[tuple[int, Shares]]) -> tuple[tuple[int, Shares], ...]:
    names = ", ".join(tier.name for tier in PLANNED)
    refused = ValueError(
        f"layers are pairs of a layer, 0 or more and each once, and its shares of tokens in {names}, numbers from 0 to "
        f"1 that add up to 1: a plan of `SpectrumCache.from_model`, got {str(given)[:200]}"
    )
    try:
        pairs = [(layer, _whole(tuple(map(float, shares)))) for layer, shares in dict(given).items()]
        sound = bool(pairs) and all(
            type(layer) is int and layer >= 0 and len(shares) == len(PLANNED) and _are_shares(shares)
            for layer, shares in pairs
        )
    except (TypeError, ValueError):
        raise refused from None
    if not sound:
        raise refused
    return tuple(sorted(pairs))


def _whole(shares: Shares) -> Shares:
    """Shares as of `Shares`, from those of a plan of the time before there was a tier of 1 bit."""
    return (*shares, 0.0) if len(shares) == len(PLANNED) - 1 else shares


def _are_shares(shares: Sequence[float]) -> bool:
    return all(0 <= share <= 1 for share in shares) and abs(sum(shares) - 1) < 1e-6


class LayerCost(NamedTuple):
    """What rounding the tokens of a layer costs.

    Attributes:
        sensitivity: Loss per unit of relative squared error of all its tokens.
        weights: Of the tokens' errors, from the most to the least important, at equal shares of the tokens; their mean
            is 1.
        overhead: Bytes of a token beside its codes, as a fraction of its FP16 bytes.
        exact: Bytes of a token that stays exact, likewise: 2 in a float32 model.
    """

    sensitivity: float
    weights: Sequence[float]
    overhead: float
    exact: float = 1.0


def allocate(layers: Sequence[LayerCost], budget: float, tiers: tuple[Tier, ...] = PLANNED) -> list[Shares]:
    """Shares of the tiers in each layer by which the loss is least at a budget.

    The loss is taken as the sum over layers and tokens of sensitivity, weight and the squared error of the tier
    (`ERRORS`). At a price `p` of a byte, each token takes the tier by which its loss plus `p` times its bytes is least
    (Everett's Lagrange multipliers); the price is found by bisection, and shares between those at the two prices next
    to the budget meet it exactly. Codes of 1 bit are for budgets below `SCARCE`.

    Args:
        layers: With as many weights each.
        budget: Mean fraction of the FP16 bytes.
        tiers: Those that may be used, the most precise first.

    Raises:
        ValueError: the budget is below the bytes of the least tier.
    """
    weights = torch.tensor([layer.weights for layer in layers], dtype=torch.float64)
    sensitivity = torch.tensor([max(layer.sensitivity, 0.0) for layer in layers], dtype=torch.float64)
    cost = torch.tensor(
        [[(each.exact if tier == FP16 else float(tier.cost)) + each.overhead for tier in tiers] for each in layers],
        dtype=torch.float64,
    )
    if tiers[-2:] == (INT2, INT1) and budget >= float(cost[:, -2].mean()) + SCARCE:
        tiers, cost = tiers[:-1], cost[:, :-1]
    least = float(cost[:, -1].mean())
    if budget < least:
        raise ValueError(f"all tokens in {tiers[-1].name} take {least:.3f} of the FP16 bytes, got budget={budget:g}")
    errors = torch.tensor([ERRORS[tier] for tier in tiers], dtype=torch.float64)
    loss = sensitivity[:, None, None] * weights[..., None] * errors  # [layers, quantiles, tiers]

    def shares(price: float) -> torch.Tensor:
        chosen = (loss + price * cost[:, None]).argmin(-1)
        return torch.nn.functional.one_hot(chosen, len(tiers)).double().mean(1)

    def bytes_of(found: torch.Tensor) -> float:
        return float((found * cost).sum(-1).mean())

    low, high = -60.0, 60.0  # logarithms to base 2 of the price: at the lower one more bytes are spent
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if bytes_of(shares(2.0**middle)) <= budget else (middle, high)
    rich, poor = shares(2.0**low), shares(2.0**high)
    spread = bytes_of(rich) - bytes_of(poor)
    part = min(max((budget - bytes_of(poor)) / spread, 0.0), 1.0) if spread > 0 else 0.0
    found = poor + part * (rich - poor)
    by_tier = {tier: found[:, i].tolist() for i, tier in enumerate(tiers)}
    return [tuple(by_tier[tier][i] if tier in by_tier else 0.0 for tier in PLANNED) for i in range(len(layers))]
