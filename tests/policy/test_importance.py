"""What tokens are ranked by."""

import pytest
import torch

from spectrumkv_hf.policy import get_policy
from spectrumkv_hf.policy.importance import importance, positional

KEYS, VALUES, ATTENTION = torch.randn(2, 3, 50, 8), torch.randn(2, 3, 50, 8), torch.rand(2, 3, 50)


def score(attention=ATTENTION, start=0, seen=60, pads=None, layer=0, **options):
    policy = get_policy("greedy", 0.3, **options)
    return importance(policy, attention, KEYS, VALUES, start=start, seen=seen, pads=pads, layer=layer)


def test_attention():
    assert torch.equal(score(), ATTENTION)
    assert torch.equal(score(importance="attention_value"), ATTENTION * VALUES.norm(dim=-1))


def test_recency_decay():
    """I_j = A_j exp(-lambda (n - j)), n being the tokens seen."""
    expected = ATTENTION * torch.exp(-0.05 * (60 - torch.arange(10, 60)))
    assert torch.allclose(score(start=10, decay=0.05), expected)


@pytest.mark.parametrize("kind", ["attention", "attention_value", "kv_norm"])
def test_without_queries_norms_stand_in(kind):
    expected = VALUES.norm(dim=-1) / KEYS.norm(dim=-1)
    assert torch.allclose(score(attention=None, importance=kind), expected)


def test_scopes():
    assert torch.allclose(score(scope="layer"), ATTENTION.mean(1, keepdim=True).expand(-1, 3, -1))


def test_random_rankings():
    one = score(importance="random", seed=1)
    assert torch.equal(one, score(importance="random", seed=1))
    assert not torch.equal(one, score(importance="random", seed=2))
    assert not torch.equal(one, score(importance="random", seed=1, layer=1))
    assert not torch.equal(one[:, 0], one[:, 1])
    token = [score(importance="random", scope="token", layer=layer) for layer in range(2)]
    assert torch.equal(*token)


def test_recency():
    assert torch.equal(score(importance="recency", start=7)[1, 2], torch.arange(7.0, 57.0))


def test_the_papers_positional_score():
    """First 4 tokens 1, then exp(-i / 100), the last fifth raised to a ramp from .3 to .8."""
    got = positional(torch.arange(1000), 1000)[0]
    assert got[:4].tolist() == [1.0] * 4
    assert torch.allclose(got[4:800], torch.exp(-torch.arange(4, 800) / 100))
    assert torch.allclose(got[800:], torch.linspace(0.3, 0.8, 200))


def test_the_papers_positional_score_of_padded_rows():
    got = positional(torch.arange(120), 120, torch.tensor([0, 20]))
    assert torch.allclose(got[1, 20:], positional(torch.arange(100), 100)[0])
