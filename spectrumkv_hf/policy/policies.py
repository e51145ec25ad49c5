"""Policies: how many tokens each precision tier takes at a byte budget, and by what they are ranked."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from fractions import Fraction
from functools import cache, lru_cache
from typing import ClassVar, NamedTuple


class Tier(NamedTuple):
    """A precision. `cost` is nominal: bytes per element over those of FP16, scales and zero points not counted."""

    name: str
    bits: int
    cost: Fraction

    def __hash__(self) -> int:
        """Quick, because tiers are keys wherever tokens are counted, and a fraction's hash takes a power."""
        return self.bits


FP16 = Tier("fp16", 16, Fraction(1))
INT8 = Tier("int8", 8, Fraction(1, 2))
INT4 = Tier("int4", 4, Fraction(1, 4))
INT3 = Tier("int3", 3, Fraction(3, 16))
INT2 = Tier("int2", 2, Fraction(1, 8))
INT1 = Tier("int1", 1, Fraction(1, 16))
DROPPED = Tier("dropped", 0, Fraction(0))
TIERS = (FP16, INT8, INT4, INT3, INT2, INT1, DROPPED)
"""From the most to the least precise: the most important tokens take the first."""

IMPORTANCE = ("attention", "attention_value", "kv_norm", "positional", "recency", "random")
SCOPES = ("head", "layer", "token")

Counts = dict[Tier, int]


@dataclass(frozen=True, kw_only=True)
class Policy:
    """Assigns a precision to every token of the cache. `b`, the budget, is the mean nominal cost over the tokens.

    Counts round the more precise tiers down and give the rest to the least precise, so that `b` is never exceeded but
    by the sinks where a policy says so.

    Attributes:
        budget: `b`, in the range that the policy serves.
        sinks: The first tokens of each row, ranked above all others.
        recent_window: The last tokens, kept exact and outside the budget until that many newer ones have come.
        importance: Score that ranks tokens: `attention` they receive, `attention_value` (that times the norm of
            their value), `kv_norm`, `positional` (as in the paper's released code), `recency` or `random`. What needs
            queries falls back to `kv_norm` where none are seen.
        decay: lambda of `I_j = A_j exp(-lambda (n - j))`, per token.
        scope: Rank per `head`, per `layer`, or once for all layers and heads (`token`, as in the paper).
        seed: Of the random ranking.
        floors: The least precise tier that tokens of a layer are stored in, `fp16` or `int8`, by index of the layer:
            pairs, or a mapping, held as pairs in the order of layers. Tokens to which `counts` gives less take that
            tier; those that are dropped stay dropped. What it costs comes on top of the budget.

    Raises:
        ValueError: a field is out of its range.
    """

    name: ClassVar[str]
    minimum: ClassVar[Fraction] = Fraction(1, 4)
    lossless: ClassVar[bool] = False

    budget: float = 0.5
    sinks: int = 4
    recent_window: int = 64
    importance: str = "attention"
    decay: float = 0.0
    scope: str = "head"
    seed: int = 0
    floors: tuple[tuple[int, str], ...] = ()

    def __post_init__(self) -> None:
        finite = isinstance(self.budget, int | float) and math.isfinite(self.budget)
        if not finite or not self.minimum <= self.exact_budget <= 1:
            raise ValueError(
                f"policy {self.name!r} serves budgets from {float(self.minimum):g} to 1 (fraction of the FP16 bytes), "
                f"got {self.budget!r}"
            )
        if self.importance not in IMPORTANCE:
            raise ValueError(f"importance is one of {', '.join(IMPORTANCE)}, got {self.importance!r}")
        if self.scope not in SCOPES:
            raise ValueError(f"scope is one of {', '.join(SCOPES)}, got {self.scope!r}")
        for field in ("sinks", "recent_window"):
            value = getattr(self, field)
            if not isinstance(value, int) or value < 0:
                raise ValueError(f"{field} is a number of tokens, 0 or more, got {value!r}")
        if not 0 <= self.decay < math.inf:
            raise ValueError(f"decay is a finite number, 0 or more, got {self.decay!r}")
        object.__setattr__(self, "floors", _checked_floors(self.floors))

    @property
    def exact_budget(self) -> Fraction:
        """`b` as the decimal that was written: .3 is 3/10, not the binary number next to it."""
        return _written(self.budget)

    def counts(self, tokens: int) -> Counts:
        """Tokens per tier for a row of `tokens` tokens; they add up to `tokens`. `floors` are not in them."""
        raise NotImplementedError

    @property
    def tiers(self) -> tuple[Tier, ...]:
        """Tiers that tokens may be stored in."""
        return () if self.lossless else (FP16, INT8, INT4)

    def for_layer(self, layer: int) -> "Policy":
        """By which the tokens of a layer are tiered: this policy, where layers are alike."""
        return self

    def floor(self, layer: int) -> Tier | None:
        """The least precise tier for tokens of a layer that are stored; None: any."""
        name = dict(self.floors).get(layer)
        return next((tier for tier in TIERS if tier.name == name), None)


def _checked_floors(given: Mapping[int, str] | Iterable[tuple[int, str]]) -> tuple[tuple[int, str], ...]:
    accepted = ValueError(
        f"floors are pairs of a layer, 0 or more and each once, and {FP16.name!r} or {INT8.name!r}, got {given!r}"
    )
    try:
        pairs = [(layer, tier) for layer, tier in (given.items() if isinstance(given, Mapping) else given)]
    except (TypeError, ValueError):
        raise accepted from None
    sound = all(type(layer) is int and layer >= 0 and tier in (FP16.name, INT8.name) for layer, tier in pairs)
    if not sound or len({layer for layer, _ in pairs}) < len(pairs):
        raise accepted
    return tuple(sorted(pairs))


def lifted(counts: Mapping[Tier, int], floor: Tier | None) -> Counts:
    """The counts with the tokens of stored tiers that are less precise than `floor` moved into it."""
    if floor is None:
        return dict(counts)
    low = [tier for tier in counts if tier != DROPPED and tier.bits < floor.bits]
    kept = {tier: n for tier, n in counts.items() if tier not in low}
    return kept | {floor: kept.get(floor, 0) + sum(counts[tier] for tier in low)}


def exempt(counts: Mapping[Tier, int], tokens: int) -> Counts:
    """The counts with up to `tokens` more in FP16, taken from the least precise tiers."""
    moved = dict(counts)
    for tier in reversed(TIERS[1:]):
        some = min(moved.get(tier, 0), tokens)
        if some:
            tokens -= some
            moved[tier] -= some
            moved[FP16] = moved.get(FP16, 0) + some
    return moved


@cache
def _written(number: float) -> Fraction:
    """The decimal that a number is written as. Kept, because every layer asks for it whenever it tiers."""
    return Fraction(str(number))


def _fill(tokens: int, shares: dict[Tier, Fraction], rest: Tier) -> Counts:
    counts = {tier: int(share * tokens) for tier, share in shares.items()}
    return {tier: n for tier, n in counts.items() if n} | {rest: tokens - sum(counts.values())}


def _greedy(budget: Fraction, tokens: int) -> Counts:
    if budget <= INT8.cost:
        return _fill(tokens, {INT8: 4 * budget - 1}, rest=INT4)
    return _fill(tokens, {FP16: 2 * budget - 1}, rest=INT8)


@dataclass(frozen=True, kw_only=True)
class Lossless(Policy):
    """Everything exact, bit-equal to `DynamicCache`."""

    name = "fp16"
    minimum = Fraction(1)
    lossless = True
    budget: float = 1.0

    def counts(self, tokens: int) -> Counts:
        return {FP16: tokens}


@dataclass(frozen=True, kw_only=True)
class Greedy(Policy):
    """b <= .5: INT8 = 4b - 1, INT4 = 2 - 4b; above: FP16 = 2b - 1, INT8 = 2 - 2b."""

    name = "greedy"

    def counts(self, tokens: int) -> Counts:
        return _greedy(self.exact_budget, tokens)


@dataclass(frozen=True, kw_only=True)
class SinkProtect(Policy):
    """The sinks FP16, then greedy at `b` on the rest: the sinks come on top of the budget."""

    name = "sink_protect"

    def counts(self, tokens: int) -> Counts:
        sinks = min(self.sinks, tokens)
        counts = _greedy(self.exact_budget, tokens - sinks)
        return {FP16: counts.pop(FP16, 0) + sinks} | counts


@dataclass(frozen=True, kw_only=True)
class Balanced(Policy):
    """R = 4b - 1: FP16 = R / 5, INT8 = 2R / 5, rest INT4; where that is below 0, FP16 = 2b - 1, INT8 = 1 - FP16."""

    name = "balanced"

    def counts(self, tokens: int) -> Counts:
        surplus = 4 * self.exact_budget - 1
        if surplus * 3 / 5 > 1:
            return _fill(tokens, {FP16: 2 * self.exact_budget - 1}, rest=INT8)
        return _fill(tokens, {FP16: surplus / 5, INT8: surplus * 2 / 5}, rest=INT4)


@dataclass(frozen=True, kw_only=True)
class TwoTier(Policy):
    """FP16 = 2b - 1 and INT8; below b = .5 INT8 = 2b and the least important tokens are dropped."""

    name = "two_tier"
    minimum = Fraction(1, 100)

    def counts(self, tokens: int) -> Counts:
        if self.exact_budget >= INT8.cost:
            return _fill(tokens, {FP16: 2 * self.exact_budget - 1}, rest=INT8)
        return _fill(tokens, {INT8: 2 * self.exact_budget}, rest=DROPPED)


@dataclass(frozen=True, kw_only=True)
class Adaptive(Policy):
    """Three-tier greedy for a model that passed the probe, else `two_tier`.

    Attributes:
        probe_passed: The verdict, required.
    """

    name = "adaptive"
    minimum = TwoTier.minimum
    probe_passed: bool | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.probe_passed is None:
            raise ValueError("policy 'adaptive' follows the verdict of a probe: give probe_passed=True or False")
        if self.probe_passed:
            Greedy(budget=self.budget)  # checks the range of its budget

    def counts(self, tokens: int) -> Counts:
        chosen = Greedy if self.probe_passed else TwoTier
        return chosen(budget=self.budget).counts(tokens)


@dataclass(frozen=True, kw_only=True)
class _Uniform(Policy):
    tier: ClassVar[Tier]

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.exact_budget != self.tier.cost:
            raise ValueError(f"policy {self.name!r} has the budget {float(self.tier.cost):g}, got {self.budget!r}")

    def counts(self, tokens: int) -> Counts:
        return {self.tier: tokens}


@dataclass(frozen=True, kw_only=True)
class UniformInt8(_Uniform):
    """All tokens INT8."""

    name = "uniform_int8"
    tier = INT8
    budget: float = 0.5


@dataclass(frozen=True, kw_only=True)
class UniformInt4(_Uniform):
    """All tokens INT4."""

    name = "uniform_int4"
    tier = INT4
    budget: float = 0.25


@dataclass(frozen=True, kw_only=True)
class RandomTier(Greedy):
    """Greedy counts, random ranking."""

    name = "random"
    importance: str = "random"


@dataclass(frozen=True, kw_only=True)
class DropScored(Policy):
    """FP16 = b, the least important tokens dropped ("SWS" in the paper)."""

    name = "drop_scored"
    minimum = Fraction(1, 100)

    def counts(self, tokens: int) -> Counts:
        return _fill(tokens, {FP16: self.exact_budget}, rest=DROPPED)


@dataclass(frozen=True, kw_only=True)
class DropWindow(DropScored):
    """The sinks and the last tokens FP16, the middle dropped ("PDTrim" in the paper; StreamingLLM's window)."""

    name = "drop_window"
    importance: str = "recency"


POLICIES: dict[str, type[Policy]] = {
    policy.name: policy
    for policy in (
        Lossless,
        Greedy,
        SinkProtect,
        Balanced,
        TwoTier,
        Adaptive,
        UniformInt8,
        UniformInt4,
        RandomTier,
        DropWindow,
        DropScored,
    )
}
"""Every policy by name."""


def get_policy(policy: str | Policy, budget: float | None = None, **options: object) -> Policy:
    """A policy by name, or the given one.

    Args:
        policy: A key of `POLICIES`, or a policy.
        budget: Its budget; None: the policy's own.
        options: Further fields of the policy class, for a policy by name.

    Raises:
        ValueError: an unknown name, or a value out of range.
        TypeError: an unknown option, or options beside a policy that is already built.
    """
    if isinstance(policy, Policy):
        if options or budget not in (None, policy.budget):
            raise TypeError(f"give budget and options inside the policy: {policy!r} is already built")
        return policy
    if policy not in POLICIES:
        raise ValueError(f"unknown policy {policy!r}: choose from {', '.join(POLICIES)}")
    cls = POLICIES[policy]
    accepted = {field.name for field in fields(cls)}
    if unknown := sorted(set(options) - accepted):
        raise TypeError(f"policy {policy!r} has no option {', '.join(unknown)}: it takes {', '.join(sorted(accepted))}")
    if budget is not None:
        options["budget"] = budget
    return cls(**options)  # type: ignore[arg-type]


@lru_cache(maxsize=1024)
def increments(policy: Policy, before: int, tokens: int) -> Mapping[Tier, int]:
    """Counts for `tokens` further tokens of a row in which `before` already have a tier.

    Taken as a difference of totals, so that the counts of a row are the documented ones for its length, in however
    many steps it was tiered. Kept, because most layers ask for the same.
    """
    if not tokens:
        return {}
    total, had = policy.counts(before + tokens), policy.counts(before)
    counts: Counts = {}
    left = tokens
    for tier in TIERS:
        grown = max(total.get(tier, 0) - had.get(tier, 0), 0)
        counts[tier] = min(grown, left)
        left -= counts[tier]
    last = next(tier for tier in reversed(TIERS) if total.get(tier))
    counts[last] += left
    return counts
