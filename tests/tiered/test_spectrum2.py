"""Caches of the codec `spectrum2`, with tiers of 2 and 3 bits: what holds for every cache holds for them."""

import copy
import pickle
from dataclasses import replace

import pytest
import torch
from families import left_padded, model, prompt
from transformers import DynamicCache

from spectrumkv_hf import SpectrumCache, cache_argument
from spectrumkv_hf.policy import FP16, INT4, INT8, Calibrated, SinkProtect, UniformInt4
from spectrumkv_hf.tiered.store import TieredStore
from spectrumkv_kernels import CODECS, Rotary, fit_frame, query_power

SHARES = (0.02, 0.18, 0.3, 0.3, 0.2)
EVEN = dict.fromkeys(range(8), SHARES)
POLICIES = {
    "plan": Calibrated(budget=0.3, layers=EVEN, recent_window=10),
    "sink_protect": SinkProtect(budget=0.3, recent_window=10),
}
FAMILIES = ["llama", "qwen2", "gpt2", "falcon"]


def cache_for(m, policy="plan", **options):
    return SpectrumCache(m.config, policy=POLICIES[policy], codec="spectrum2", **options)


def forward(m, cache, ids, mask=None):
    at = None if mask is None else (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
    with torch.no_grad():
        return m(ids, attention_mask=mask, position_ids=at, **cache_argument(cache)).logits


def close(a, b, tolerance=2e-4):
    return float((a - b).norm() / b.norm()) < tolerance


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("family", FAMILIES)
def test_steps_read_what_the_tiers_stand_for(family, policy):
    """Attention over codes gives what attention over the dequantised keys and values gives, step by step."""
    m, ids = model(family, "sdpa"), prompt(300)
    cache = cache_for(m, policy)
    forward(m, cache, ids)
    for step in range(3):
        plain = DynamicCache(config=m.config)
        for index, layer in enumerate(cache.layers):
            plain.update(layer.keys.clone(), layer.values.clone(), index)
        new, at = prompt(1, seed=step + 1), torch.tensor([[300 + step]])
        with torch.no_grad():
            expected = m(new, position_ids=at, **cache_argument(plain)).logits
        got = forward(m, cache, new)
        assert close(got, expected)
    widths = {tier.bits for layer in cache.layers for tier in layer.store.arenas}
    assert widths == ({16, 8, 4, 3, 2} if policy == "plan" else {16, 8, 4})
    for layer in cache.layers:
        layer.store.check_integrity()


@pytest.mark.parametrize("policy", POLICIES)
def test_rows_of_a_padded_batch_are_as_alone(policy):
    """Ranked by norms: the queries by which attention is measured are others where there is padding."""
    m, ranked = model("llama", "sdpa"), replace(POLICIES[policy], importance="kv_norm")
    ids, mask = left_padded([260, 141])
    cache, alone = (SpectrumCache(m.config, policy=ranked, codec="spectrum2") for _ in range(2))
    both, one = forward(m, cache, ids, mask), forward(m, alone, ids[1:, 119:])
    assert close(both[1, -1], one[0, -1])
    new, more = prompt(1, batch=2, seed=4), torch.cat((mask, mask.new_ones(2, 1)), 1)
    assert close(forward(m, cache, new, more)[1], forward(m, alone, new[1:])[0], 2e-3)  # a code may fall otherwise


@pytest.mark.parametrize("policy", POLICIES)
def test_operations(policy):
    m, ids = model("llama", "sdpa"), prompt(300, batch=2)
    cache = cache_for(m, policy)
    forward(m, cache, ids)
    new = prompt(1, batch=2, seed=3)
    expected = forward(m, copy.deepcopy(cache), new)
    assert torch.equal(forward(m, pickle.loads(pickle.dumps(cache)), new), expected)
    assert torch.equal(forward(m, SpectrumCache.deserialize(cache.serialize(), m.config), new), expected)

    swapped = copy.deepcopy(cache)
    swapped.reorder_cache(torch.tensor([1, 0]))
    assert close(forward(m, swapped, new.flip(0)).flip(0), expected, 1e-6)
    selected = copy.deepcopy(cache)
    selected.batch_select_indices(torch.tensor([1]))
    repeated = copy.deepcopy(selected)
    assert close(forward(m, selected, new[1:]), expected[1:], 1e-6)
    repeated.batch_repeat_interleave(2)
    assert close(forward(m, repeated, new[1:].expand(2, -1)), expected[1:].expand(2, -1, -1), 1e-6)

    cropped = copy.deepcopy(cache)
    forward(m, cropped, prompt(5, batch=2, seed=9))
    cropped.crop(-5)
    assert close(forward(m, cropped, new), expected, 1e-6)
    cropped.crop(-200)
    assert cropped.get_seq_length() == 101
    forward(m, cropped, prompt(90, batch=2, seed=10))
    for layer in cropped.layers:
        layer.store.check_integrity()
    cropped.reset()
    assert close(forward(m, cropped, ids), forward(m, cache_for(m, policy), ids), 1e-6)


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"prompt_lookup_num_tokens": 4}, {"do_sample": False}], ids=str)
def test_generate(options):
    m, ids = model("llama", "sdpa"), prompt(200)
    more = {"max_new_tokens": 100, "pad_token_id": 0, "do_sample": False} | options
    out = m.generate(ids, **cache_argument(cache := cache_for(m)), **more)
    assert out.shape == (1, 300) and len(cache.layers[0].store.arenas) == 5
    if "num_beams" not in options:
        assert torch.equal(out, m.generate(ids, **cache_argument(cache_for(m)), **(more | {"do_sample": False})))


@pytest.mark.parametrize("policy", POLICIES)
def test_a_fixed_capacity_decodes_the_same_tokens(policy):
    m, ids = model("llama", "sdpa"), prompt(150)
    more = {"max_new_tokens": 90, "pad_token_id": 0, "do_sample": False}
    expected = m.generate(ids, **cache_argument(cache_for(m, policy)), **more)
    cache = cache_for(m, policy, max_cache_len=260)
    assert cache.is_compileable
    assert torch.equal(m.generate(ids, **cache_argument(cache), **more), expected)
    again = SpectrumCache.deserialize(cache.serialize(), m.config)
    again.reserve(260)
    assert torch.equal(forward(m, again, ids[:, :1]), forward(m, cache, ids[:, :1]))


def test_a_token_that_no_code_stands_for_stays_exact():
    """Its vector is a thousand times as large as others'; they keep their tiers, and it is the only exact one."""
    m = model("llama", "sdpa")
    cache = SpectrumCache(m.config, policy=SinkProtect(budget=0.25, sinks=0, recent_window=0), codec="spectrum2")
    keys, values = (torch.randn(1, 2, 300, 16, generator=torch.Generator().manual_seed(s)) for s in (1, 2))
    values[:, 1, 123] *= 1000
    with torch.no_grad():
        for layer in cache.layers:
            layer.update(keys, values)
            layer.settle()
    for layer in cache.layers:
        bits = layer.tier_map()
        assert int(bits[0, 1, 123]) == 16 and int((bits == 16).sum()) == 2  # as many in each head
        assert torch.equal(layer.values[0, 1, 123], values[0, 1, 123])
        assert close(layer.values[:, :, :123], values[:, :, :123], 0.2)


@pytest.mark.parametrize("length", [150, 400])
def test_windows_balance_keys_by_the_queries_too(length):
    """Also where most of the prompt has left the window when it is tiered: scales are those of `fit_frame`."""
    m, ids, seen = model("gemma3", "sdpa", sliding_window=200), prompt(length), {}
    cache = cache_for(m, "sink_protect")

    def take(attention):
        layer = attention.layer
        seen[layer.layer_idx] = query_power(attention.query, layer.kv_heads), *(t.clone() for t in layer.store.tail)

    for layer in cache.layers:
        layer.on_attention.add(take)
    forward(m, cache, ids)
    for layer in cache.layers:
        power, keys, values = seen[layer.layer_idx]
        arguments = keys, values, 0, layer.rotary, True, 4
        assert close(layer.store.frame, fit_frame(*arguments, query_power=power), 1e-5)
        assert not close(layer.store.frame, fit_frame(*arguments), 1e-2)


@pytest.mark.parametrize(("head_dim", "most"), [(64, 0.262), (128, 0.256)])
def test_bytes_of_int4(head_dim, most):
    """Codes, scales and positions of all tokens in 4 bits, over their FP16 bytes."""
    keys, values = (torch.randn(1, 2, 1024, head_dim, generator=torch.Generator().manual_seed(i)) for i in (1, 2))
    store = TieredStore(keys, values, CODECS["spectrum2"], Rotary())
    store.append(keys, values)
    store.confirm(store.tier(1024, UniformInt4(), torch.rand(1, 2, 1024)))
    arena = store.arenas[INT4]
    assert sum(t.nbytes for _, t in arena.tensors()) <= most * 2 * (keys.numel() + values.numel())
    assert torch.equal(arena.positions, torch.arange(1024, dtype=torch.int32).expand(1, 2, -1))
    store.check_integrity()


@pytest.mark.parametrize("lost", [False, True])
def test_positions_too_far_apart_to_be_packed(lost):
    """Tokens of 8 bits are 300 positions apart, also where tokens are tiered once more because one has no code."""
    keys, values = (torch.randn(1, 2, 8000, 8, generator=torch.Generator().manual_seed(i)) for i in (1, 2))
    if lost:
        values[0, :, 150] *= 1000
    score = torch.zeros(1, 2, 8000)
    score[..., ::300] = 1
    store = TieredStore(keys, values, CODECS["spectrum2"], Rotary())
    store.append(keys, values)
    store.confirm(store.tier(8000, SinkProtect(budget=0.2508, sinks=0), score))
    store.check_integrity()
    found = store.arenas[INT8].positions
    assert found.shape[-1] == 25 and torch.equal(found, 300 * torch.arange(25, dtype=torch.int32).expand(1, 2, -1))
    assert [arena.segment.packed for arena in store.arenas.values()] == [False] * lost + [False, True]
    if lost:
        assert store.arenas[FP16].positions.flatten().tolist() == [150, 150]


def test_one_ranking_for_all_layers_balances_keys_alike():
    """Layers are tiered when the last of them has been ranked, each by the queries that it has seen."""
    m, ids = model("llama", "sdpa"), prompt(300)
    caches = [SpectrumCache(m.config, policy=replace(POLICIES["sink_protect"], scope=scope), codec="spectrum2")
              for scope in ("head", "token")]  # fmt: skip
    for cache in caches:
        forward(m, cache, ids)
    for one, other in zip(*(cache.layers for cache in caches), strict=True):
        assert torch.equal(one.store.frame, other.store.frame)
