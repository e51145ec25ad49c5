"""With policy "fp16" everything is bit-equal to `DynamicCache`, tokens and logits."""

import copy

import pytest
import torch
import transformers
from families import FAMILIES, config, left_padded, model, prompt
from packaging.version import Version
from transformers import DynamicCache

from spectrumkv_hf import SpectrumCache

OLD = Version(transformers.__version__) < Version("5.23")
NO_SDPA = {"gemma2", "gpt_oss"}
"""Families that Transformers refuses to run with sdpa (Gemma-2 only from 5.23 on)."""

COMBINATIONS = [
    pytest.param(family, attention, id=f"{family}-{attention}")
    for family in FAMILIES
    for attention in ("sdpa", "eager")
    if not (attention == "sdpa" and family in NO_SDPA)
]


def lossless(family, **changes):
    return SpectrumCache(config(family, **changes), policy="fp16")


def generate(m, ids, cache, **kwargs):
    kwargs = {"max_new_tokens": 8, "do_sample": False, **kwargs}
    torch.manual_seed(3)
    return m.generate(ids, past_key_values=cache, output_logits=True, return_dict_in_generate=True, **kwargs)


def assert_equal(left, right):
    assert torch.equal(left.sequences, right.sequences)
    assert len(left.logits) == len(right.logits)
    for step, (a, b) in enumerate(zip(left.logits, right.logits, strict=True)):
        assert torch.equal(a, b), f"logits of step {step} differ by {(a - b).abs().max()}"


SCENARIOS = {
    "greedy": ([40], {}),
    "sampling": ([40], {"do_sample": True, "temperature": 0.8}),
    "beam": ([40], {"num_beams": 4}),
    "return_sequences": ([40], {"do_sample": True, "num_return_sequences": 3}),
    "chunked_prefill": ([40], {"prefill_chunk_size": 9}),
    "prompt_lookup": ([40], {"prompt_lookup_num_tokens": 3}),
    "left_padded": ([40, 33, 7], {}),
    "left_padded_beam": ([40, 33], {"num_beams": 3}),
    "left_padded_chunked": ([40, 11], {"prefill_chunk_size": 16}),
}


@pytest.mark.parametrize("scenario", SCENARIOS)
@pytest.mark.parametrize(("family", "attention"), COMBINATIONS)
def test_generate(family, attention, scenario):
    lengths, kwargs = SCENARIOS[scenario]
    m = model(family, attention)
    if scenario == "prompt_lookup":
        skip_without_rollback(family, m)
    ids, mask = left_padded(lengths)
    if scenario == "prompt_lookup":
        ids = torch.cat((ids[:, :20], ids[:, :20]), dim=1)  # something to look up
    if len(lengths) > 1:
        kwargs = {**kwargs, "attention_mask": mask}
    expected = generate(m, ids, DynamicCache(config=m.config), **kwargs)
    assert_equal(generate(m, ids, lossless(family), **kwargs), expected)


def skip_without_rollback(family, m):
    if OLD and family in {"gemma3", "mistral", "gpt_oss", "gemma2"}:
        pytest.skip("Transformers 5.17 returns too many states from a sliding layer that records its past")
    if getattr(m, "_is_stateful", False):
        pytest.skip("Transformers rolls no stateful model back")


@pytest.mark.parametrize(("family", "attention"), COMBINATIONS)
def test_assisted_decoding(family, attention):
    m = model(family, attention)
    skip_without_rollback(family, m)
    assistant = copy.deepcopy(m)
    with torch.no_grad():
        for parameter in assistant.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    ids = prompt(40)
    expected = generate(m, ids, DynamicCache(config=m.config), assistant_model=assistant)
    assert_equal(generate(m, ids, lossless(family), assistant_model=assistant), expected)


@pytest.mark.parametrize(("family", "attention"), COMBINATIONS)
def test_continue_from_a_past(family, attention):
    m = model(family, attention)
    results = []
    for cache in (DynamicCache(config=m.config), lossless(family)):
        first = generate(m, prompt(40), cache)
        more = torch.cat((first.sequences, prompt(5, seed=1)), dim=1)
        results.append(generate(m, more, cache))
    assert_equal(results[1], results[0])


@pytest.mark.parametrize(("family", "attention"), COMBINATIONS)
def test_deepcopied_prefix(family, attention):
    m = model(family, attention)
    prefix = prompt(30)
    results = []
    for cache in (DynamicCache(config=m.config), lossless(family)):
        with torch.no_grad():
            m(prefix, past_key_values=cache)
        for seed in (1, 2):  # the second use shows whether the first one changed the prefix
            ids = torch.cat((prefix, prompt(6, seed=seed)), dim=1)
            results.append(generate(m, ids, copy.deepcopy(cache)))
    assert_equal(results[2], results[0])
    assert_equal(results[3], results[1])


@pytest.mark.parametrize("family", FAMILIES)
def test_reset_and_reuse(family):
    m = model(family, "eager")
    cache = lossless(family)
    generate(m, prompt(40), cache)
    cache.reset()
    assert cache.get_seq_length() == 0
    expected = generate(m, prompt(25, seed=5), DynamicCache(config=m.config))
    assert_equal(generate(m, prompt(25, seed=5), cache), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_two_caches_alive(family):
    m = model(family, "eager")
    expected = {seed: generate(m, prompt(30, seed=seed), DynamicCache(config=m.config)) for seed in (1, 2)}
    caches = {seed: lossless(family) for seed in (1, 2)}
    ids = {seed: prompt(30, seed=seed) for seed in (1, 2)}
    for _ in range(8):  # a token of each in turn
        for seed, cache in caches.items():
            ids[seed] = generate(m, ids[seed], cache, max_new_tokens=1).sequences
    for seed in caches:
        assert torch.equal(ids[seed], expected[seed].sequences)


def test_stock_cache_is_untouched_by_the_route():
    m = model("llama", "sdpa")
    before = generate(m, prompt(40), DynamicCache(config=m.config))
    SpectrumCache(m.config, budget=0.3)
    assert_equal(generate(m, prompt(40), DynamicCache(config=m.config)), before)
