"""`generate` compiles the decode step by itself; here on a CPU, where it does so when told to."""

import pytest
import torch
from families import left_padded, model
from torch._dynamo.utils import counters
from transformers import CompileConfig, DynamicCache

from spectrumkv_hf import SpectrumCache, cache_argument

SMALL = {"budget": 0.3, "recent_window": 16}


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def everywhere(backend):
    settings = CompileConfig(backend=backend, mode="reduce-overhead" if backend == "inductor" else None)
    settings._compile_all_devices = True
    return settings


def generate(m, lengths, cache, tokens, device="cpu", **kwargs):
    ids, mask = (t.to(device) for t in left_padded(lengths))
    settings = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False, **kwargs}
    return m.generate(ids, attention_mask=mask, **cache_argument(cache, m), **settings)


def compilations():
    """Graphs that were compiled, breaks in them, and compilations of the same code once more."""
    return (
        counters["stats"]["unique_graphs"],
        sum(counters["graph_break"].values()),
        sum(counters["recompiles"].values()),
    )


@pytest.mark.parametrize("options", [SMALL, {"policy": "fp16"}], ids=["b=.3", "fp16"])
@pytest.mark.parametrize(
    ("family", "attention"),
    [("llama", "sdpa"), ("gemma3", "sdpa"), ("gemma2", "spectrumkv"), ("gpt_oss", "spectrumkv")],
)
def test_one_graph_for_all_steps_and_caches(family, attention, options):
    m = model(family, attention)

    def cache():
        return SpectrumCache(m.config, **options, max_cache_len=260)

    expected = generate(m, [110, 70], cache(), 140)
    assert torch.equal(generate(m, [110, 70], cache(), 140, compile_config=everywhere("aot_eager")), expected)
    assert compilations() == (1, 0, 0)
    assert torch.equal(generate(m, [110, 70], cache(), 140, compile_config=everywhere("aot_eager")), expected)
    assert compilations() == (1, 0, 0)


@pytest.mark.parametrize("options", [SMALL, {"policy": "fp16"}], ids=["b=.3", "fp16"])
def test_500_steps_by_inductor(options):
    m = model("llama", "sdpa")
    compiled = SpectrumCache(m.config, **options, max_cache_len=660)
    grown = DynamicCache(config=m.config) if "policy" in options else SpectrumCache(m.config, **options)
    out = generate(m, [150, 101], compiled, 500, compile_config=everywhere("inductor"))
    assert torch.equal(out, generate(m, [150, 101], grown, 500))
    assert compilations() == (1, 0, 0)
    if not options.get("policy"):
        compiled.layers[0].settle()
        assert torch.equal(compiled.tier_map()[0], grown.tier_map()[0])


def test_host_operations_between_compiled_steps():
    m = model("llama", "sdpa")
    cache, other = (SpectrumCache(m.config, **SMALL, max_cache_len=400) for _ in range(2))
    outs = []
    for each, settings in ((cache, {"compile_config": everywhere("aot_eager")}), (other, {"disable_compile": True})):
        out = generate(m, [150], each, 40, **settings)
        each.crop(-20)
        out = m.generate(out[:, :175], max_new_tokens=80, do_sample=False, **cache_argument(each, m), **settings)
        outs.append((out, each.serialize()))
    (tokens, data), (others, more) = outs
    assert torch.equal(tokens, others) and len(data) == len(more)


@pytest.mark.parametrize("settings", [{"num_beams": 2}, {"prompt_lookup_num_tokens": 3}], ids=["beams", "lookup"])
def test_other_ways_to_decode_give_the_same_tokens(settings):
    m = model("llama", "sdpa")
    out = generate(
        m, [150], SpectrumCache(m.config, **SMALL, max_cache_len=300), 70,
        compile_config=everywhere("eager"), **settings,
    )  # fmt: skip
    assert torch.equal(out, generate(m, [150], SpectrumCache(m.config, **SMALL), 70, **settings))


def test_a_full_cache_refuses():
    m = model("llama", "sdpa")
    cache = SpectrumCache(m.config, **SMALL, max_cache_len=200)
    with pytest.raises(ValueError, match="takes 200 tokens"):
        generate(m, [150], cache, 70, compile_config=everywhere("eager"))
    assert int(cache.get_seq_length()) == 200


@pytest.mark.gpu
@pytest.mark.parametrize("options", [SMALL, {"policy": "fp16"}], ids=["b=.3", "fp16"])
@pytest.mark.parametrize(("family", "attention"), [("llama", "sdpa"), ("gemma3", "sdpa"), ("gpt_oss", "spectrumkv")])
def test_on_a_gpu_with_nothing_set(family, attention, options):
    m = model(family, attention).cuda()

    def cache():
        return SpectrumCache(m.config, **options, max_cache_len=660)

    expected = generate(m, [150, 101], cache(), 500, "cuda", disable_compile=True)
    assert torch.equal(generate(m, [150, 101], cache(), 500, "cuda"), expected)
    assert compilations() == (1, 0, 0) and not counters["inductor"]["cudagraph_skips"]
    assert torch.equal(generate(m, [150, 101], cache(), 500, "cuda"), expected)
    assert compilations() == (1, 0, 0) and not counters["inductor"]["cudagraph_skips"]
    grown = DynamicCache(config=m.config) if "policy" in options else SpectrumCache(m.config, **options)
    same = generate(m, [150, 101], grown, 500, "cuda") == expected
    assert bool(same[:, :200].all())
