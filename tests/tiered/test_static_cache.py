"""Caches of fixed capacity: the same tokens as caches that grow, from decode steps that the host takes no part in."""

import copy
import pickle

import pytest
import torch
from families import FAMILIES, config, left_padded, model, prompt
from transformers import DynamicCache

from spectrumkv_hf import SpectrumCache, cache_argument
from spectrumkv_hf.policy import Calibrated
from spectrumkv_hf.tiered.layer import SpectrumLayer

CAPACITY = 320
SMALL = {"budget": 0.3, "recent_window": 16}
SHARES = (0.02, 0.18, 0.3, 0.3, 0.2)


def generate(m, lengths, cache, tokens=70, **kwargs):
    ids, mask = left_padded(lengths)
    settings = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False, **kwargs}
    return m.generate(ids, attention_mask=mask, **cache_argument(cache, m), **settings)


def growing(m, **options):
    return DynamicCache(config=m.config) if options.get("policy") == "fp16" else SpectrumCache(m.config, **options)


def check(cache):
    for layer in cache.layers:
        if isinstance(layer, SpectrumLayer) and layer.is_initialized:
            layer.settle()
            layer.store.check_integrity()


def stepped(cache):
    """Whether the device alone has taken the last step."""
    return any(isinstance(layer, SpectrumLayer) and layer.steps_alone for layer in cache.layers)


def assert_alike(cache, other):
    """The same tokens in the same tiers, but for a few that rank alike up to the rounding of another order of sums."""
    assert len(cache.serialize()) == len(other.serialize())
    maps, others = cache.tier_map(), other.tier_map()
    for index in maps.keys() & others.keys():
        assert maps[index].sum() == others[index].sum()
        assert (maps[index] != others[index]).float().mean() < 0.1  # a model that repeats itself has many alike
    for a, b in zip(cache.layers, other.layers, strict=True):
        keys = a.as_growing().keys if hasattr(a, "as_growing") else a.keys
        assert (keys - b.keys).norm() <= 3e-2 * b.keys.norm()  # 4 bits in the place of 8, for those few


@pytest.mark.parametrize("options", [{"policy": "fp16"}, SMALL], ids=["fp16", "b=.3"])
@pytest.mark.parametrize("family", FAMILIES)
def test_families(family, options):
    attention = "spectrumkv" if family in ("gemma2", "gpt_oss", "qwen3") else "sdpa"
    m = model(family, attention)
    cache = SpectrumCache(m.config, **options, max_cache_len=CAPACITY)
    assert torch.equal(generate(m, [150, 90], cache), generate(m, [150, 90], growing(m, **options)))
    tiered = any(isinstance(layer, SpectrumLayer) for layer in cache.layers)
    assert stepped(cache) == (tiered and cache.is_compileable)
    check(cache)


SCENARIOS = {
    "short": ([3], {"max_new_tokens": 100, "min_new_tokens": 100}),
    "one token": ([1], {"max_new_tokens": 100, "min_new_tokens": 100}),
    "late row": ([150, 2], {"max_new_tokens": 150, "min_new_tokens": 150}),
    "beam": ([150], {"num_beams": 3}),
    "chunked": ([200, 180], {"prefill_chunk_size": 70}),
    "lookup": ([160], {"prompt_lookup_num_tokens": 3}),
    "eager": ([150, 120], {}),
}


POLICIES = {
    "fp16": {"policy": "fp16"},
    "b=.3": SMALL,
    "two_tier": {"policy": "two_tier", "budget": 0.4, "recent_window": 16},
    "balanced": {"policy": "balanced", "budget": 0.4, "recent_window": 7, "importance": "recency", "decay": 0.01},
    "absmax": {"policy": "uniform_int8", "codec": "absmax"},
    "spectrum2": {**SMALL, "codec": "spectrum2"},
    "plan": {
        "policy": Calibrated(budget=0.3, layers=dict.fromkeys(range(8), SHARES), recent_window=16),
        "codec": "spectrum2",
    },
    "floor": {"budget": 0.7, "floors": {0: "fp16"}, "recent_window": 0},
}


@pytest.mark.parametrize(
    ("scenario", "policy"),
    [
        *((scenario, "b=.3") for scenario in SCENARIOS),
        *(("late row", policy) for policy in POLICIES),
        ("beam", "fp16"),
        ("short", "spectrum2"),
        ("chunked", "plan"),
        ("lookup", "plan"),
    ],
)
def test_scenarios(scenario, policy):
    options = POLICIES[policy]
    lengths, settings = SCENARIOS[scenario]
    m = model("llama", "eager" if scenario == "eager" else "sdpa")
    cache, other = SpectrumCache(m.config, **options, max_cache_len=CAPACITY), SpectrumCache(m.config, **options)
    assert torch.equal(generate(m, lengths, cache, **settings), generate(m, lengths, other, **settings))
    assert stepped(cache) == (scenario != "eager")
    check(cache)
    maps, others = cache.tier_map(), other.tier_map()
    assert all(torch.equal(maps[index], others[index]) for index in maps)


@pytest.mark.parametrize("scenario", ["beam", "chunked", "lookup", "late row"])
def test_windows(scenario):
    lengths, settings = SCENARIOS[scenario]
    m = model("gemma3", "sdpa")
    cache = SpectrumCache(m.config, policy="fp16", max_cache_len=CAPACITY)
    expected = generate(m, lengths, DynamicCache(config=m.config), **settings)
    assert torch.equal(generate(m, lengths, cache, **settings), expected)
    check(cache)


@pytest.mark.parametrize(
    ("options", "because"),
    [
        ({"scope": "token"}, "scope 'token'"),
        ({"scope": "layer"}, "scope 'layer'"),
        ({"importance": "random"}, "importance 'random'"),
        ({"importance": "positional"}, "importance 'positional'"),
    ],
)
def test_policies_that_need_the_host_decode_there(options, because, caplog):
    m = model("llama", "sdpa")
    options = {**SMALL, **options}
    with caplog.at_level("WARNING"):
        cache = SpectrumCache(m.config, **options, max_cache_len=CAPACITY + len(because))
    assert because in caplog.text and "without compiling" in caplog.text
    assert not cache.is_compileable
    assert torch.equal(generate(m, [150], cache), generate(m, [150], SpectrumCache(m.config, **options)))
    assert not stepped(cache)


@pytest.mark.parametrize(
    ("family", "options"),
    [("llama", SMALL), ("gemma3", SMALL), ("mistral", SMALL), ("llama", POLICIES["plan"])],
    ids=["llama", "gemma3", "mistral", "llama, plan"],
)
def test_between_steps_it_is_a_cache_like_others(family, options):
    """Saved, cropped, copied, selected from, and gone on with."""
    m = model(family, "sdpa")
    cache, other = SpectrumCache(m.config, **options, max_cache_len=500), SpectrumCache(m.config, **options)
    first = generate(m, [150, 150], cache)
    assert torch.equal(first, generate(m, [150, 150], other))
    assert_alike(cache, other)

    read = SpectrumCache.deserialize(cache.serialize(), m.config)
    read.reserve(500)
    copies = [cache, other, read, copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))]
    for each in copies:
        each.reorder_cache(torch.tensor([1, 0]))
        each.batch_repeat_interleave(2)
        each.batch_select_indices(torch.tensor([3, 0, 1]))
        if family == "llama":
            each.crop(-30)
    ids = torch.cat((first, prompt(9, 2, seed=5)), dim=1)[torch.tensor([0, 1, 1])]
    if family == "llama":
        ids = torch.cat((ids[:, :189], prompt(9, 3, seed=5)), dim=1)
    outs = [
        m.generate(ids, max_new_tokens=80, min_new_tokens=80, do_sample=False, **cache_argument(each, m))
        for each in copies
    ]
    assert all(torch.equal(out, outs[1]) for out in outs)
    for each in copies:
        assert_alike(each, other)
    assert stepped(cache) and stepped(read) and not stepped(other)
    for each in copies:
        check(each)


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))], ids=["deep", "pickle"]
)
def test_copies_right_after_a_step(copied):
    m = model("gemma3", "sdpa")
    cache = SpectrumCache(m.config, **SMALL, max_cache_len=CAPACITY)
    first = generate(m, [150], cache)
    other = copied(cache)
    outs = [
        m.generate(torch.cat((first, prompt(3)), 1), max_new_tokens=70, do_sample=False, **cache_argument(each, m))
        for each in (other, cache)
    ]
    assert torch.equal(*outs) and torch.equal(other.serialize(), cache.serialize())


def test_reset_keeps_the_buffers():
    m = model("llama", "sdpa")
    cache = SpectrumCache(m.config, **SMALL, max_cache_len=CAPACITY)
    first = generate(m, [150], cache)
    held = [(layer.store.step.buffer.data_ptr(), layer.store.step.number) for layer in cache.layers]
    cache.reset()
    assert cache.get_seq_length() == 0
    assert torch.equal(generate(m, [150], cache), first)
    assert [(layer.store.step.buffer.data_ptr(), layer.store.step.number) for layer in cache.layers] == held


def test_memory_is_what_is_allocated():
    m = model("llama", "sdpa")
    cache = SpectrumCache(m.config, **SMALL, max_cache_len=CAPACITY)
    generate(m, [150], cache)
    report = cache.memory()
    assert report.stored == sum(
        layer.store.step.buffer.nbytes + layer.store.step.state.nbytes for layer in cache.layers
    )
    assert sum(report.parts.values()) == report.stored
    assert report.parts["free"] > 0


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_full_cache_refuses_before_anything_is_lost(attention):
    m = model("gemma3", attention)
    cache = SpectrumCache(m.config, **SMALL, max_cache_len=200)
    with pytest.raises(ValueError, match="takes 200 tokens"):
        generate(m, [201], cache)
    with pytest.raises(ValueError, match="takes 200 tokens"):
        generate(m, [150], cache, tokens=70)
    assert int(cache.get_seq_length()) == 200
    check(cache)
    other = SpectrumCache(m.config, **SMALL, max_cache_len=300)
    generate(m, [150], other, tokens=51)
    assert_alike(cache, other)


def test_steps_that_nobody_counted_are_refused_on_the_device():
    m = model("llama", "sdpa")
    cache = SpectrumCache(m.config, **SMALL, max_cache_len=160)
    generate(m, [150], cache, tokens=11)
    layer = cache.layers[0]
    step = torch.randn(1, 2, 1, 16)
    assert layer.steps_alone
    keys, _ = layer.step(step, step)
    out = keys.layer.attend_step(torch.randn(1, 4, 1, 16), None, 0.25, None, None)
    assert bool(out.isnan().all())
    with pytest.raises(RuntimeError, match="full at 160 tokens: 1 more"):
        layer.settle()


def test_an_interrupted_step_is_noticed():
    m = model("llama", "sdpa")
    cache = SpectrumCache(m.config, **SMALL, max_cache_len=CAPACITY)
    generate(m, [150], cache)
    layer, token = cache.layers[0], torch.randn(1, 2, 1, 16)
    layer.step(token, token)
    cache.update(token, token, 0)
    with pytest.raises(RuntimeError, match="interrupted"):
        cache.update(token, token, 1)


def test_other_shapes_are_refused():
    m = model("llama", "sdpa")
    cache = SpectrumCache(m.config, **SMALL, max_cache_len=CAPACITY)
    generate(m, [150], cache)
    with pytest.raises(ValueError, match="holds tokens of batch 1"):
        cache.update(torch.randn(2, 2, 1, 16), torch.randn(2, 2, 1, 16), 0)
    with pytest.raises(TypeError, match="float32"):
        cache.update(torch.randn(1, 2, 1, 16).half(), torch.randn(1, 2, 1, 16).half(), 0)
    check(cache)


def test_listeners_hear_every_token():
    m = model("llama", "sdpa")
    cache, heard = SpectrumCache(m.config, **SMALL, max_cache_len=CAPACITY), []
    generate(m, [150], cache)
    remove = cache.layers[0].on_update.add(lambda layer, keys, values: heard.append(keys.shape[2]))
    assert not cache.is_compileable
    out = m(prompt(1), **cache_argument(cache, m))
    assert out.logits.isfinite().all() and heard == [1]
    remove()
    assert cache.is_compileable


@pytest.mark.parametrize("given", [0, -1, 1.5, "8", True])
def test_bad_capacity(given):
    with pytest.raises(ValueError, match="max_cache_len is a number of tokens"):
        SpectrumCache(config("llama"), max_cache_len=given)


def test_reserve_refuses_what_does_not_fit():
    m = model("llama", "sdpa")
    cache = SpectrumCache(m.config, **SMALL)
    generate(m, [150], cache)
    with pytest.raises(ValueError, match="219 tokens"):
        cache.reserve(218)
    cache.reserve(219)
    with pytest.raises(ValueError, match="once"):
        cache.reserve(400)


@pytest.mark.parametrize("padding", [0, 20])
@pytest.mark.parametrize("tokens", [130, 191, 192, 193, 300])
def test_reserve_keeps_a_window_whose_tokens_have_tiers(tokens, padding):
    """They are exact from then on, and what their codes stood for: the same logits as in a cache that grows."""
    m = model("gemma3", "sdpa", sliding_window=192)
    ids = prompt(tokens + 80, 2, seed=4)
    mask = torch.ones_like(ids)
    mask[0, :padding] = 0
    grows = SpectrumCache(m.config, budget=0.3)

    def forward(cache, start, stop):
        with torch.no_grad():
            return m(ids[:, start:stop], attention_mask=mask[:, :stop], **cache_argument(cache, m)).logits

    forward(grows, 0, tokens)
    window = grows.layers[0].store
    assert window.arenas and window.length - 191 < window.tail_start
    fixed = copy.deepcopy(grows)
    fixed.reserve(tokens + 100)
    assert not fixed.layers[0].store.arenas and fixed.layers[1].store.arenas
    for step in range(60):  # the cache that grows tiers its window anew behind that
        a, b = (forward(cache, tokens + step, tokens + step + 1) for cache in (fixed, grows))
        assert ((a - b).norm() / b.norm()) < 1e-5
    read = SpectrumCache.deserialize(fixed.serialize(), m.config)
    a, b = (forward(cache, tokens + 60, tokens + 61) for cache in (fixed, read))
    assert ((a - b).norm() / b.norm()) < 1e-5


def test_reserve_refuses_a_window_that_lacks_tokens():
    m = model("gemma3", "sdpa", sliding_window=192)
    cache = SpectrumCache(m.config, policy="drop_scored", budget=0.4)
    with torch.no_grad():
        m(prompt(180), **cache_argument(cache, m))
        before = cache.serialize().clone()
        with pytest.raises(ValueError, match="were dropped"):
            cache.reserve(300)
        assert torch.equal(cache.serialize(), before)
        assert m(prompt(1), **cache_argument(cache, m)).logits.isfinite().all()


def test_an_attention_that_asks_for_weights_gets_keys_and_values():
    m = model("llama", "sdpa")
    cache = SpectrumCache(m.config, policy="fp16", max_cache_len=CAPACITY)
    generate(m, [150], cache)
    keys, values = cache.update(torch.randn(1, 2, 1, 16), torch.randn(1, 2, 1, 16), 0)
    shown, _ = keys.layer.handles()
    assert shown.shape == (1, 2, 220, 16) and shown.dense().isfinite().all()
    assert keys.to(torch.float32) is keys
    with pytest.raises(TypeError, match="cast"):
        values.to(torch.float16)
