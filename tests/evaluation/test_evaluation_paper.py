"""The paper's protocol: keys and values are fake-quantised before RoPE."""

from dataclasses import replace

import pytest
import torch
from families import model, prompt

from spectrumkv_hf.evaluation.protocols.fake_quantisation import (
    fake_quantise,
    fake_quantised_loss,
    perplexity_change,
    projections,
    quantised_projections,
    tier_bits,
)
from spectrumkv_hf.evaluation.subjects.methods import parse_method


def policy(name, budget=None):
    return parse_method(f"paper_{name}:{budget}" if budget else f"paper_{name}").policy


def loss_of(logits, ids):
    return float(torch.nn.functional.cross_entropy(logits[0, :-1].double(), ids[0, 1:]))


@pytest.mark.parametrize("bits", [4, 8])
def test_quantiser(bits):
    x = torch.randn(2, 9, 24, generator=torch.Generator().manual_seed(0))
    x[0, 3] = 0
    want = torch.zeros_like(x)
    for b in range(2):
        for t in range(9):
            top = 2 ** (bits - 1) - 1
            scale = max(float(x[b, t].abs().max()) / top, 1e-30)
            want[b, t] = torch.tensor([round(v / scale) * scale for v in x[b, t].tolist()])
    got = fake_quantise(x, torch.full((9,), bits))
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    assert len(got[1, 0].unique()) <= 2**bits - 1


def test_exact_tokens_pass():
    x = torch.randn(1, 3, 8).bfloat16()
    got = fake_quantise(x, torch.tensor([16, 4, 0]))
    assert torch.equal(got[:, [0, 2]], x[:, [0, 2]]) and not torch.equal(got[:, 1], x[:, 1])
    assert got.dtype == x.dtype


def test_tiers_follow_the_position():
    """Greedy at b=.3: a fifth INT8, the first tokens and the last of the text by the paper's score."""
    bits = tier_bits(policy("greedy", 0.3), 100)
    assert sorted(bits.tolist()) == [4] * 80 + [8] * 20
    eights = (bits == 8).nonzero()[:, 0].tolist()
    assert eights[:4] == [0, 1, 2, 3] and eights[-1] < 100
    score = torch.tensor([1.0] * 4 + [torch.e ** (-i / 100) for i in range(4, 100)])
    score[80:] = torch.maximum(score[80:], torch.linspace(0.3, 0.8, 20))
    assert set(eights) == set(score.topk(20).indices.tolist())


def test_tiers_of_dropping_and_random():
    window = tier_bits(policy("drop_window", 0.3), 100)
    assert (window > 0).nonzero()[:, 0].tolist() == [0, 1, 2, 3, *range(74, 100)]
    assert tier_bits(policy("sink_protect", 0.3), 100)[:4].tolist() == [16] * 4
    first, second = (tier_bits(replace(policy("random", 0.3), seed=seed), 100) for seed in (1, 2))
    assert first.tolist() != second.tolist() and first.sum() == second.sum()
    assert (first[:4] == 4).any() or (second[:4] == 4).any()  # no sinks are pinned


def test_unquantised_is_the_plain_model():
    llama, ids = model("llama"), prompt(90)
    loss, nominal = fake_quantised_loss(llama, ids, policy("fp16"))
    assert loss == pytest.approx(loss_of(llama(ids).logits.detach(), ids), rel=1e-6) and nominal == 1


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "gemma3"])
def test_hooks_quantise_projections_before_rope(family):
    """As weights and inputs say: the same projections computed by hand."""
    built, ids = model(family), prompt(40)
    bits = tier_bits(policy("greedy", 0.3), 40)
    seen = {}
    first = built.get_decoder().layers[0].self_attn
    keep = [
        first.k_proj.register_forward_hook(lambda m, i, o: seen.update(plain=o)),
        first.q_proj.register_forward_hook(lambda m, i, o: seen.update(query=o)),
    ]
    with torch.no_grad(), quantised_projections(built, bits):
        last = first.k_proj.register_forward_hook(lambda m, i, o: seen.update(coded=o))
        logits = built(ids, use_cache=False).logits
    for handle in (*keep, last):
        handle.remove()
    torch.testing.assert_close(seen["coded"], fake_quantise(seen["plain"], bits))
    assert not torch.equal(seen["coded"], seen["plain"])
    assert fake_quantised_loss(built, ids, policy("greedy", 0.3))[0] == pytest.approx(loss_of(logits, ids), rel=1e-5)
    with torch.no_grad():
        assert loss_of(built(ids, use_cache=False).logits, ids) != loss_of(logits, ids)  # the hooks are gone


def test_dropped_texts_are_scored_on_what_is_left():
    """The kept tokens attend to each other across the gap, at their own positions."""
    llama, ids = model("llama", attention="eager"), prompt(80)
    kept = (tier_bits(policy("drop_window", 0.4), 80) > 0).nonzero()[:, 0]
    causal = torch.full((len(kept), len(kept)), torch.finfo(torch.float32).min).triu(1)
    with torch.no_grad():
        logits = llama(ids[:, kept], position_ids=kept[None], attention_mask=causal[None, None], use_cache=False).logits
    got, nominal = fake_quantised_loss(llama, ids, policy("drop_window", 0.4))
    assert got == pytest.approx(loss_of(logits, ids[:, kept]), rel=1e-5)
    assert nominal == 0.4 and len(kept) == 32


def test_two_tiers_hide_what_they_drop():
    llama, ids = model("llama"), prompt(80)
    bits = tier_bits(policy("two_tier", 0.3), 80)
    assert sorted(set(bits.tolist())) == [0, 8]
    got, _ = fake_quantised_loss(llama, ids, policy("two_tier", 0.3))
    changed = ids.clone()
    gap = int((bits == 0).nonzero()[-1])
    changed[0, gap] = ids[0, gap] % 90 + 4
    with torch.no_grad(), quantised_projections(llama, bits):
        one, two = (llama(x, attention_mask=(bits > 0).long()[None]).logits[0] for x in (ids, changed))
    torch.testing.assert_close(one[gap + 1 :], two[gap + 1 :])
    assert got == pytest.approx(loss_of(one[None], ids), rel=1e-5)


def test_fused_projections_are_refused():
    for family in ("phi3", "gpt2"):
        with pytest.raises(ValueError, match="k_proj and v_proj"):
            projections(model(family))


def test_change_is_of_the_mean_perplexity():
    assert perplexity_change([1.0, 3.0], [1.0, 2.0]) == pytest.approx(
        100 * ((torch.e**1 + torch.e**3) / (torch.e**1 + torch.e**2) - 1)
    )
