"""`generate` compiles the decode step by itself; here on a CPU, where it does so when told to."""

import pytest
import torch
from families import left_padded, model
from torch._dynamo.utils import counters
from transformers import CompileConfig, DynamicCache, LogitsProcessor

from spectrumkv_hf import SpectrumCache, cache_argument

SMALL = {"budget": 0.3, "recent_window": 16}
TOLERANCE = {"fp16": (1e-5, 1e-3), None: (1e-3, 2e-2)}
"""Median and largest error over all steps. Tokens whose ranks are nearly ties may change tiers by rounding."""


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


class Forced(LogitsProcessor):
    """Makes `generate` say given tokens, `[batch, steps]`, so that one near tie does not make all others differ."""

    def __init__(self, tokens, prompt):
        self.tokens, self.prompt = tokens, prompt

    def __call__(self, input_ids, scores):
        step = input_ids.shape[1] - self.prompt
        return torch.full_like(scores, -torch.inf).scatter(1, self.tokens[:, step : step + 1], 0.0)


def logits(m, lengths, cache, tokens, device="cpu", **settings):
    """Of each step of `generate` that says `tokens`: `[steps, batch, vocabulary]`."""
    forced = [Forced(tokens, max(lengths))]
    settings |= {"logits_processor": forced, "output_logits": True, "return_dict_in_generate": True}
    return torch.stack(generate(m, lengths, cache, tokens.shape[1], device, **settings).logits)


def assert_alike(given, expected, usual, most):
    """Logits of all steps agree, and so do their largest where they are not nearly ties."""
    errors = (given - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert errors.median() < usual and errors.max() < most, (errors.median(), errors.max())
    best = expected.topk(2, dim=-1).values
    clear = best[..., 0] - best[..., 1] > 2 * (given - expected).abs().amax(-1)
    assert clear.float().mean() > 0.9
    assert torch.equal(given.argmax(-1)[clear], expected.argmax(-1)[clear])


def compilations():
    """Graphs that were compiled, breaks in them, and compilations of the same code once more."""
    return (
        counters["stats"]["unique_graphs"],
        sum(counters["graph_break"].values()),
        sum(counters["recompiles"].values()),
    )


@pytest.mark.parametrize(
    ("family", "attention", "options"),
    [
        ("llama", "sdpa", {"policy": "fp16"}),
        ("gemma3", "sdpa", SMALL),
        ("gemma2", "spectrumkv", SMALL),
        ("gpt_oss", "spectrumkv", SMALL),
        ("llama", "sdpa", {**SMALL, "codec": "spectrum2"}),
    ],
    ids=str,
)
def test_one_graph_for_all_steps_and_caches(family, attention, options):
    m = model(family, attention)

    def cache():
        return SpectrumCache(m.config, **options, max_cache_len=260)

    expected = generate(m, [110, 70], cache(), 90)
    assert torch.equal(generate(m, [110, 70], cache(), 90, compile_config=everywhere("aot_eager")), expected)
    assert compilations() == (1, 0, 0)
    assert torch.equal(generate(m, [110, 70], cache(), 90, compile_config=everywhere("aot_eager")), expected)
    assert compilations() == (1, 0, 0)


@pytest.mark.parametrize(
    "options", [SMALL, pytest.param({"policy": "fp16"}, marks=pytest.mark.slow)], ids=["b=.3", "fp16"]
)
def test_500_steps_by_inductor(options):
    m = model("llama", "sdpa")
    cache = SpectrumCache(m.config, **options, max_cache_len=660)
    other = DynamicCache(config=m.config) if "policy" in options else SpectrumCache(m.config, **options)
    said = generate(m, [150, 101], other, 500)[:, 150:]
    other = DynamicCache(config=m.config) if "policy" in options else SpectrumCache(m.config, **options)
    given = logits(m, [150, 101], cache, said, compile_config=everywhere("inductor"))
    assert compilations() == (1, 0, 0)
    assert_alike(given, logits(m, [150, 101], other, said), *TOLERANCE[options.get("policy")])


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
@pytest.mark.parametrize(
    "options", [SMALL, {"policy": "fp16"}, {**SMALL, "codec": "spectrum2"}], ids=["b=.3", "fp16", "spectrum2"]
)
@pytest.mark.parametrize(("family", "attention"), [("llama", "sdpa"), ("gemma3", "sdpa"), ("gpt_oss", "spectrumkv")])
def test_on_a_gpu_with_nothing_set(family, attention, options):
    m = model(family, attention).cuda()

    def cache():
        return SpectrumCache(m.config, **options, max_cache_len=660)

    said = generate(m, [150, 101], cache(), 500, "cuda", disable_compile=True)[:, 150:]
    eager = logits(m, [150, 101], cache(), said, "cuda", disable_compile=True)
    for _ in range(2):
        assert_alike(logits(m, [150, 101], cache(), said, "cuda"), eager, *TOLERANCE[options.get("policy")])
        assert compilations() == (1, 0, 0) and not counters["inductor"]["cudagraph_skips"]
    grown = DynamicCache(config=m.config) if "policy" in options else SpectrumCache(m.config, **options)
    assert_alike(logits(m, [150, 101], grown, said, "cuda"), eager, 2e-3, 5e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("options", [SMALL, {"policy": "fp16"}], ids=["b=.3", "fp16"])
def test_heads_without_kernels_are_left_out_of_graphs(options):
    """Their steps read counts on the host, which a CUDA graph can't hold; what lies between them is captured."""
    m = model("llama", "sdpa", head_dim=320).cuda()

    def cache():
        return SpectrumCache(m.config, **options, max_cache_len=330)

    said = generate(m, [150, 101], cache(), 160, "cuda", disable_compile=True)[:, 150:]
    eager = logits(m, [150, 101], cache(), said, "cuda", disable_compile=True)
    assert_alike(logits(m, [150, 101], cache(), said, "cuda"), eager, *TOLERANCE[options.get("policy")])
    assert compilations() == (1, 0, 0)
