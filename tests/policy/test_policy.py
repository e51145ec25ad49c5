"""Counts per tier are the documented ones for any n and b, and bad values are refused."""

from fractions import Fraction

import pytest

from spectrumkv_hf.policy import DROPPED, FP16, INT4, INT8, POLICIES, TIERS, Adaptive, get_policy, increments

OPTIONS = {"adaptive": {"probe_passed": False}}
BUDGETS = (0.25, 0.3, 0.33, 0.45, 0.5, 0.55, 0.6, 2 / 3, 0.7, 0.75, 0.9, 1.0)


def build(name, budget=None):
    return get_policy(name, budget, **OPTIONS.get(name, {}))


def serves(name, budget):
    try:
        return build(name, budget)
    except ValueError:
        return None


@pytest.mark.parametrize(
    ("name", "budget", "tokens", "expected"),
    [
        ("greedy", 0.3, 1000, {INT8: 200, INT4: 800}),
        ("greedy", 0.3, 1001, {INT8: 200, INT4: 801}),  # 200.2 rounds down
        ("greedy", 0.3, 999, {INT8: 199, INT4: 800}),
        ("greedy", 0.25, 7, {INT4: 7}),
        ("greedy", 0.5, 7, {INT8: 7}),
        ("greedy", 0.7, 1000, {FP16: 400, INT8: 600}),
        ("greedy", 1.0, 5, {FP16: 5}),
        ("random", 0.3, 1000, {INT8: 200, INT4: 800}),
        ("sink_protect", 0.3, 1004, {FP16: 4, INT8: 200, INT4: 800}),
        ("sink_protect", 0.7, 1004, {FP16: 404, INT8: 600}),
        ("sink_protect", 0.5, 3, {FP16: 3}),
        ("balanced", 0.5, 1000, {FP16: 200, INT8: 400, INT4: 400}),
        ("balanced", 0.25, 1000, {INT4: 1000}),
        ("balanced", 0.7, 1000, {FP16: 400, INT8: 600}),
        ("two_tier", 0.3, 1000, {INT8: 600, DROPPED: 400}),
        ("two_tier", 0.5, 1000, {INT8: 1000}),
        ("two_tier", 0.75, 1000, {FP16: 500, INT8: 500}),
        ("adaptive", 0.3, 1000, {INT8: 600, DROPPED: 400}),
        ("uniform_int8", 0.5, 9, {INT8: 9}),
        ("uniform_int4", 0.25, 9, {INT4: 9}),
        ("drop_window", 0.3, 1001, {FP16: 300, DROPPED: 701}),
        ("drop_scored", 0.3, 1001, {FP16: 300, DROPPED: 701}),
        ("fp16", 1.0, 11, {FP16: 11}),
    ],
)
def test_documented_counts(name, budget, tokens, expected):
    counts = build(name, budget).counts(tokens)
    assert {tier: n for tier, n in counts.items() if n} == expected


def test_adaptive_follows_the_probe():
    assert Adaptive(budget=0.3, probe_passed=True).counts(1000) == {INT8: 200, INT4: 800}
    with pytest.raises(ValueError, match="probe_passed"):
        get_policy("adaptive", 0.3)


@pytest.mark.parametrize("name", POLICIES)
def test_counts_add_up_and_keep_the_budget(name):
    for budget in BUDGETS:
        policy = serves(name, budget)
        if policy is None:
            continue
        for tokens in (*range(0, 40), 63, 64, 65, 1000, 4097):
            counts = policy.counts(tokens)
            assert sum(counts.values()) == tokens
            assert min(counts.values(), default=0) >= 0
            cost = sum(tier.cost * n for tier, n in counts.items())
            extra = policy.sinks if name == "sink_protect" else 0
            assert cost <= Fraction(str(budget)) * tokens + extra
            # Rounding loses less than one step of the tiers' costs for each tier but the last.
            assert cost > Fraction(str(budget)) * tokens - 2


@pytest.mark.parametrize("name", POLICIES)
def test_tiering_in_steps_gives_the_counts_of_the_whole(name):
    for budget in BUDGETS:
        policy = serves(name, budget)
        if policy is None:
            continue
        for steps in ((100,), (64, 64, 64), (5, 200, 64, 1, 64), (1,) * 20):
            total, seen = dict.fromkeys(TIERS, 0), 0
            for step in steps:
                counts = increments(policy, seen, step)
                assert sum(counts.values()) == step
                assert min(counts.values()) >= 0
                total = {tier: total[tier] + counts[tier] for tier in TIERS}
                seen += step
            expected = policy.counts(seen)
            if name == "balanced":  # INT4 can't give a token back when the other two round up at once
                slack = 1 if min(steps) >= 64 else len(steps)
                assert all(abs(total[tier] - expected.get(tier, 0)) <= slack for tier in TIERS)
            else:
                assert {tier: n for tier, n in total.items() if n} == {t: n for t, n in expected.items() if n}


@pytest.mark.parametrize(
    ("name", "budget", "options", "message"),
    [
        ("greedy", 0.2, {}, "from 0.25 to 1.*got 0.2"),
        ("greedy", 1.1, {}, "got 1.1"),
        ("sink_protect", "half", {}, "got 'half'"),
        ("sink_protect", float("nan"), {}, "got nan"),
        ("uniform_int8", 0.3, {}, "has the budget 0.5, got 0.3"),
        ("fp16", 0.5, {}, "got 0.5"),
        ("best", 0.5, {}, "unknown policy 'best'.*greedy.*sink_protect"),
        ("greedy", 0.5, {"sinks": -1}, "sinks.*got -1"),
        ("greedy", 0.5, {"recent_window": 1.5}, "recent_window.*got 1.5"),
        ("greedy", 0.5, {"scope": "row"}, "scope is one of head, layer, token, got 'row'"),
        ("greedy", 0.5, {"importance": "luck"}, "importance is one of .*got 'luck'"),
        ("greedy", 0.5, {"decay": -0.1}, "decay.*got -0.1"),
        ("greedy", 0.5, {"decay": float("inf")}, "decay is a finite number.*got inf"),
    ],
)
def test_bad_values(name, budget, options, message):
    with pytest.raises(ValueError, match=message):
        get_policy(name, budget, **options)


def test_unknown_option_and_a_built_policy():
    with pytest.raises(TypeError, match="no option colour.*recent_window"):
        get_policy("greedy", 0.5, colour="red")
    with pytest.raises(TypeError, match="already built"):
        get_policy(get_policy("greedy", 0.5), 0.3)
    policy = get_policy("greedy", 0.3)
    assert get_policy(policy) is policy
