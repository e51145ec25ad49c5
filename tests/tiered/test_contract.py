"""What users and libraries do with a cache beside `generate()`: gradients, compilation, lists, iteration."""

import copy
import logging

import pytest
import torch
from families import model, prompt
from transformers import DynamicCache

from spectrumkv_hf import SpectrumCache
from spectrumkv_hf.tiered import layer as layer_module


def prefilled(m, length=300, batch=1, **options):
    cache = SpectrumCache(m.config, **{"budget": 0.3, **options})
    with torch.no_grad():
        m(prompt(length, batch), past_key_values=cache)
    return cache


# -- gradients --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"policy": "fp16", "budget": None}], ids=["tiered", "fp16"])
def test_a_forward_outside_no_grad_gives_the_same(options, caplog):
    layer_module._warn_of_lost_gradients.cache_clear()
    m = model("llama", "sdpa")
    expected = prefilled(m, **options)
    cache = SpectrumCache(m.config, **{"budget": 0.3, **options})
    with caplog.at_level(logging.WARNING):
        m(prompt(300), past_key_values=cache)
        got = m(prompt(1, seed=1), past_key_values=cache).logits.detach()
    with torch.no_grad():
        without = m(prompt(1, seed=1), past_key_values=expected).logits
    assert float((got - without).norm() / without.norm()) < 1e-5  # the stock attention, which has gradients, reads here
    assert sum("without their gradients" in record.message for record in caplog.records) == 1
    assert not any(t.requires_grad for layer in cache.layers for _, t in layer.store.tensors())


@pytest.mark.parametrize("implementation", ["sdpa", "eager", "spectrumkv"])
@pytest.mark.parametrize("count", [1, 20])
def test_a_continuation_is_scored_under_grad(implementation, count):
    """The loss of a continuation over a compressed prefix has the gradients of one over its dequantised contents."""
    m = copy.deepcopy(model("llama", implementation))
    cache = prefilled(m)
    ids = prompt(count, seed=7)

    def gradients(used):
        m.zero_grad(set_to_none=True)
        m(ids, past_key_values=used, labels=ids if count > 1 else None).logits.square().mean().backward()
        return {name: p.grad for name, p in m.named_parameters()}

    dequantised = DynamicCache(config=m.config)
    for index, (keys, values, _) in enumerate(cache):
        dequantised.update(keys.clone(), values.clone(), index)
    got, expected = gradients(cache), gradients(dequantised)
    for name in expected:
        if "k_proj" in name or "v_proj" in name:
            assert got[name] is None  # the new tokens' own keys and values are detached, as the warning says
        elif name.endswith(("lm_head.weight", "model.norm.weight", "layers.1.mlp.down_proj.weight")):
            # What no later key or value depends on.
            assert float((got[name] - expected[name]).norm() / expected[name].norm()) < 1e-3


# -- compilation ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("policy", "family"),
    [
        ("sink_protect", "gemma3"),
        ("fp16", "llama"),
        *(pytest.param("sink_protect", family, marks=pytest.mark.slow) for family in ("llama", "falcon", "gpt2")),
    ],
)
def test_a_compiled_model_gives_the_same_logits(policy, family):
    """The compiler leaves what belongs to the cache to Python; before it traced into C++ and the process died."""
    m = copy.deepcopy(model(family, "sdpa"))
    torch._dynamo.reset()
    compiled = torch.compile(m, backend="aot_eager")
    caches = [SpectrumCache(m.config, policy=policy) for _ in range(2)]
    with torch.no_grad():
        for ids in (prompt(300), *(prompt(1, seed=seed) for seed in range(3))):
            expected = m(ids, past_key_values=caches[0]).logits
            got = compiled(ids, past_key_values=caches[1]).logits
            assert float((got - expected).norm() / expected.norm()) < 1e-5


def test_other_caches_still_compile_as_a_whole():
    m = copy.deepcopy(model("llama", "sdpa"))
    SpectrumCache(m.config)  # installs the route
    torch._dynamo.reset()
    compiled = torch.compile(m, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        got = compiled(prompt(30), past_key_values=DynamicCache(config=m.config)).logits
        assert torch.allclose(got, m(prompt(30)).logits, atol=1e-5)


# -- the container ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [[1, 0, 0], (1, 0, 0), torch.tensor([1, 0, 0])], ids=["list", "tuple", "tensor"])
@pytest.mark.parametrize("operation", ["reorder_cache", "batch_select_indices"])
@pytest.mark.parametrize("options", [{}, {"policy": "fp16", "budget": None}], ids=["tiered", "fp16"])
def test_rows_may_be_a_list(operation, rows, options):
    m = model("gemma3", "sdpa")  # one of its layers is Transformers' own
    cache = prefilled(m, batch=2, **options)
    before = [(k.clone(), v.clone()) for k, v, _ in cache]
    getattr(cache, operation)(rows)
    for (k, v, _), (old_k, old_v) in zip(cache, before, strict=True):
        assert torch.equal(k, old_k[[1, 0, 0]]) and torch.equal(v, old_v[[1, 0, 0]])


def test_exact_keys_and_values_can_be_assigned_to():
    """What libraries that edit caches do: other contents, of the same and of another length."""
    m = model("llama", "sdpa")
    cache, stock = SpectrumCache(m.config, policy="fp16"), DynamicCache(config=m.config)
    with torch.no_grad():
        for used in (cache, stock):
            m(prompt(20), past_key_values=used)
        for length in (20, 12, 15):  # as it is, shorter, longer than before
            for used in (cache, stock):
                for layer in used.layers:
                    more = torch.cat((layer.keys, layer.keys), dim=2)[:, :, :length]
                    layer.keys, layer.values = 0.5 * more, torch.cat((layer.values, layer.values), dim=2)[:, :, :length]
            assert cache.get_seq_length() == stock.get_seq_length() == length
            got, expected = (m(prompt(1, seed=length), past_key_values=c).logits for c in (cache, stock))
            assert torch.equal(got, expected)
    with pytest.raises(AttributeError, match="before the first update"):
        SpectrumCache(m.config, policy="fp16").layers[0].keys = torch.zeros(1, 2, 3, 16)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_iteration_gives_what_a_dynamic_cache_gives(family):
    m = model(family, "sdpa")
    cache, stock = prefilled(m, policy="fp16", budget=None), DynamicCache(config=m.config)
    with torch.no_grad():
        m(prompt(300), past_key_values=stock)
    for ours, theirs in zip(cache, stock, strict=True):
        assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[1], theirs[1])
        assert (ours[2] is None and theirs[2] is None) or torch.equal(ours[2], theirs[2])


@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen3_next"])
def test_reset_keeps_the_layers(family):
    m = model(family, "sdpa")
    cache = prefilled(m)
    layers = list(cache.layers)
    cache.reset()
    assert all(a is b for a, b in zip(cache.layers, layers, strict=True))
    assert cache.get_seq_length() == 0
    with torch.no_grad():
        got = m(prompt(200, seed=3), past_key_values=cache).logits
        assert torch.equal(got, m(prompt(200, seed=3), past_key_values=SpectrumCache(m.config, budget=0.3)).logits)


@pytest.mark.parametrize("policy", ["fp16", "sink_protect"])
def test_double_precision(policy, monkeypatch):
    m = copy.deepcopy(model("llama", "sdpa")).double()
    cache, stock = SpectrumCache(m.config, policy=policy), DynamicCache(config=m.config)
    with torch.no_grad():
        for ids in (prompt(300), prompt(1, seed=1), prompt(40, seed=2)):
            got, expected = (m(ids, past_key_values=used).logits for used in (cache, stock))
            assert got.dtype == torch.float64
            if policy == "fp16" or ids.shape[1] == 300:
                assert torch.equal(got, expected)
            else:
                assert float((got - expected).norm() / expected.norm()) < 0.02
    again = SpectrumCache.deserialize(cache.serialize(), m.config)
    for (k, v, _), (other_k, other_v, _) in zip(cache, again, strict=True):
        assert k.dtype == other_k.dtype == torch.float64
        assert torch.equal(k, other_k) and torch.equal(v, other_v)


def test_the_length_that_peft_asks_for():
    cache = SpectrumCache(model("llama", "sdpa").config)
    assert cache.max_cache_len == cache.get_max_length() == -1


# -- bytes of short chats ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"policy": "fp16", "budget": None}, {"recent_window": 0}], ids=str)
@pytest.mark.parametrize("first", [1, 5, 20, 60, 130])
def test_a_chat_of_any_length_takes_little_more_than_a_dynamic_cache(first, options, dtype):
    m = copy.deepcopy(model("llama", "sdpa")).to(dtype)
    cache = prefilled(m, first, **options)
    worst, elements = 0.0, sum(2 * layer.kv_heads * layer.store.buffers[0].shape[3] for layer in cache.layers)
    with torch.no_grad():
        for step in range(200):  # in which the tail is tiered twice at least
            worst = max(worst, cache.memory().stored / (cache.get_seq_length() * elements * dtype.itemsize))
            m(prompt(1, seed=step), past_key_values=cache)
    assert worst <= 1.25


def test_a_cropped_chat_frees_its_tail():
    m = model("llama", "sdpa")
    cache = prefilled(m, 120)
    cache.crop(-110)
    assert cache.memory().stored <= 2.5 * 10 * 2 * 2 * 2 * 16 * 4
