import itertools

import pytest

from spectrumkv_hf.policy import FP16, INT1, INT2, INT3, INT4, INT8, Calibrated, get_policy, increments
from spectrumkv_hf.policy.calibrated import ERRORS, FRAME, PLANNED, SCARCE, LayerCost, allocate

FALLING = tuple(2.0**-i for i in range(16))
WEIGHTS = tuple(16 * w / sum(FALLING) for w in FALLING)
EVEN = (1.0,) * 16


def cost(shares, overhead):
    return sum(share * float(tier.cost) for tier, share in zip(PLANNED, shares, strict=True)) + overhead


def loss(layer, shares):
    """Of whole quantiles, by rank."""
    ranked = [t for t, share in zip(PLANNED, shares, strict=True) for _ in range(round(share * len(layer.weights)))]
    return layer.sensitivity * sum(w * ERRORS[t] for w, t in zip(layer.weights, ranked, strict=True))


@pytest.mark.parametrize("budget", [0.15, 0.2, 0.25, 0.3, 0.5, 0.8])
@pytest.mark.parametrize("overhead", [0.0, 6 / 256])
def test_a_plan_takes_the_bytes_of_its_budget(budget, overhead):
    layers = [LayerCost(s, w, overhead) for s, w in ((1.0, WEIGHTS), (1e-3, WEIGHTS), (30.0, EVEN), (1e-6, EVEN))]
    plan = allocate(layers, budget)
    assert all(abs(sum(shares) - 1) < 1e-9 for shares in plan)
    assert sum(cost(shares, overhead) for shares in plan) / len(plan) == pytest.approx(budget, abs=1e-9)


@pytest.mark.parametrize("budget", [0.3, 0.5, 0.8])
def test_exact_tokens_of_a_float32_model_take_twice_the_bytes(budget):
    (plan,) = allocate([LayerCost(1.0, WEIGHTS, 0.0, exact=2.0)], budget)
    assert cost(plan, 0) + plan[PLANNED.index(FP16)] == pytest.approx(budget, abs=1e-9)


def test_sensitive_layers_and_heavy_tokens_get_the_bits():
    calm, touchy = LayerCost(0.01, WEIGHTS, 0.0), LayerCost(1.0, WEIGHTS, 0.0)
    low, high = allocate([calm, touchy], 0.25)
    assert cost(low, 0) < 0.2 < 0.3 < cost(high, 0)
    even, heavy = (allocate([LayerCost(1.0, w, 0.0)], 0.25)[0] for w in (EVEN, WEIGHTS))
    assert even[PLANNED.index(INT4)] == pytest.approx(1)
    assert sum(heavy[PLANNED.index(t)] for t in (INT2, INT1)) > 0.3 and heavy[PLANNED.index(INT8)] > 0


@pytest.mark.parametrize(("tiers", "scarce"), [(PLANNED, True), (PLANNED[:-1], False)], ids=["1 bit", "2 bits"])
def test_no_other_shares_at_the_bytes_of_a_plan_cost_less(tiers, scarce):
    """Every way to give the quantiles of two small layers their tiers, against the plan at the same bytes."""
    layers = [LayerCost(1.0, (2.5, 0.4, 0.1), 0.0), LayerCost(0.2, (1.5, 1.0, 0.5), 0.0)]
    ways = [
        tuple(counts.count(t) / 3 for t in PLANNED)
        for counts in itertools.combinations_with_replacement(tiers, 3)
    ]  # fmt: skip
    every = [((cost(a, 0) + cost(b, 0)) / 2, loss(layers[0], a) + loss(layers[1], b)) for a in ways for b in ways]
    checked = 0
    for budget in sorted({size for size, _ in every if (size < 1 / 8 + SCARCE) == scarce}):
        plan = allocate(layers, budget)
        if any(abs(3 * share - round(3 * share)) > 1e-6 for shares in plan for share in shares):
            continue  # between two prices, of which each is checked by itself
        checked += 1
        planned = sum(map(loss, layers, plan))
        assert all(other >= planned - 1e-12 for size, other in every if size <= budget + 1e-12), budget
    assert checked > 3


def test_one_bit_is_for_scarce_budgets():
    layers = [LayerCost(1.0, WEIGHTS, 0.02), LayerCost(1e-3, WEIGHTS, 0.02)]
    few, more = (allocate(layers, 0.145 + SCARCE + change) for change in (-1e-6, 1e-6))
    assert sum(shares[-1] for shares in few) > 0.1 and not any(shares[-1] for shares in more)
    assert any(shares[-1] for shares in allocate(layers, 0.3, (FP16, INT1)))


def test_budgets_below_the_least_tier():
    with pytest.raises(ValueError, match=r"all tokens in int1 take 0.086 of the FP16 bytes, got budget=0.08"):
        allocate([LayerCost(1.0, EVEN, 0.0234)], 0.08)
    with pytest.raises(ValueError, match=r"all tokens in int4 take 0.250"):
        allocate([LayerCost(1.0, EVEN, 0.0)], 0.24, (FP16, INT8, INT4))


SHARES = (
    (0, (0.0, 0.2, 0.3, 0.4, 0.0, 0.1)),
    (2, (0.0, 0.0, 0.5, 0.0, 0.5, 0.0)),
    (3, (0.0, 0.0, 1.0, 0.0, 0.0, 0.0)),
)


def policy(**options):
    return Calibrated(budget=0.25, layers=SHARES, **options)


@pytest.mark.parametrize("tokens", [0, 1, 3, 4, 5, 17, 63, 64, 100, 1000, 12345])
def test_counts_keep_to_the_bytes_of_the_shares(tokens):
    """Of all layers together, sinks and frames included: never above once there are some tokens, and hardly below."""
    taken = 0.0
    for layer, shares in SHARES:
        counts = policy().for_layer(layer).counts(tokens)
        assert sum(counts.values()) == tokens and all(n > 0 for n in counts.values())
        assert counts.get(FP16, 0) == min(4, tokens)
        assert {*counts} <= {FP16} | {t for t, share in zip(PLANNED, shares, strict=True) if share}
        taken += FRAME + sum(n * float(t.cost) for t, n in counts.items())
    allowed = tokens * sum(cost(shares, 0) for _, shares in SHARES)
    if tokens >= 100:
        assert allowed - len(SHARES) * len(PLANNED) / 2 <= taken <= allowed


def test_layers_in_one_tier_leave_the_saving_to_others():
    plan = policy()
    assert plan.for_layer(3).debt == 0 and plan.for_layer(3).counts(1000) == {FP16: 4, INT4: 996}
    assert plan.for_layer(0).debt + plan.for_layer(2).debt == pytest.approx(
        sum(FRAME + 4 * (1 - cost(shares, 0)) for _, shares in SHARES)
    )
    assert Calibrated(budget=0.25, layers=SHARES[2:]).for_layer(3).debt == 0


def test_tokens_of_decoding_take_what_the_longer_row_has_more():
    one = policy().for_layer(0)
    for before, tokens in ((0, 700), (700, 64), (764, 64), (828, 1)):
        grown = increments(one, before, tokens)
        assert sum(grown.values()) == tokens
    total = {
        t: n + sum(increments(one, i, 64).get(t, 0) for i in range(640, 6400, 64)) for t, n in one.counts(640).items()
    }
    assert total == one.counts(6400)


def test_layers():
    whole = policy(sinks=2, recent_window=7)
    assert Calibrated(budget=0.25, layers=dict(reversed(SHARES))) == policy()
    assert whole.for_layer(2).sinks == 2 and whole.for_layer(2).recent_window == 7
    assert {INT8, INT4, INT3, INT2, INT1} >= {*whole.counts(1000)} - {FP16}
    with pytest.raises(ValueError, match="planned for layers 0, 2, 3, not for layer 1"):
        whole.for_layer(1)
    assert get_policy("greedy").for_layer(5) == get_policy("greedy")


@pytest.mark.parametrize(
    "layers",
    [
        (),
        3,
        ((0, (1.0,)),),
        ((0, (0.5, 0.5, 0.0, 0.0)),),
        ((0, (0.5, 0.5, 0.5, 0.0, 0.0, 0.0)),),
        ((0, (0.5, 0.5, 0.0, 0.0, 0.0, 0.0, 0.0)),),
        ((0, (-0.5, 1.5, 0.0, 0.0, 0.0, 0.0)),),
        ((-1, (0.0, 0.0, 1.0, 0.0, 0.0, 0.0)),),
        ((0, (float("nan"), 1.0, 0.0, 0.0, 0.0, 0.0)),),
        (("a", (0.0, 0.0, 1.0, 0.0, 0.0, 0.0)),),
        ((0, "shares"),),
    ],
    ids=str,
)
def test_what_is_no_plan(layers):
    with pytest.raises(ValueError, match="layers are pairs of a layer"):
        Calibrated(budget=0.25, layers=layers)


def test_plans_of_before_there_was_a_tier_of_1_bit():
    whole = policy()
    before = [(layer, shares[:5]) for layer, shares in SHARES[1:]]
    assert Calibrated(budget=0.25, layers=before).layers == whole.layers[1:]
    with pytest.raises(ValueError, match="layers are pairs of a layer"):
        Calibrated(budget=0.25, layers=[(0, SHARES[0][1][:5])])


def test_by_name_it_needs_a_plan():
    with pytest.raises(ValueError, match="a plan of `SpectrumCache.from_model`"):
        get_policy("calibrated", 0.25)
