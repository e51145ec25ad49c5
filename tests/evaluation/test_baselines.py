"""Other people's caches: they run where the methods run, count all their bytes, and refuse what they can't do."""

import gc
import itertools
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec

import families
import pytest
import torch
from quanto import import_quanto
from transformers import DynamicCache, cache_utils
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from spectrumkv_hf.evaluation.protocols.needles import ask_over
from spectrumkv_hf.evaluation.protocols.quality import continuation_quality, exact_logits, prefill
from spectrumkv_hf.evaluation.subjects.baselines.coded import STEP, CodedCache, TensorFormat
from spectrumkv_hf.evaluation.subjects.baselines.float8 import Float8
from spectrumkv_hf.evaluation.subjects.baselines.kivi import KiviKeys, KiviValues
from spectrumkv_hf.evaluation.subjects.baselines.turboquant import TurboQuant, lloyd_max, rotation
from spectrumkv_hf.evaluation.subjects.methods import BASELINES, Method, parse_method
from spectrumkv_hf.probe.divergence import logits_over, mean_kl
from spectrumkv_hf.probe.needles import NeedlePrompts, found
from spectrumkv_hf.support.extras import INSTALL
from spectrumkv_hf.tiered.memory import storage_bytes

PACKAGES = {
    "quanto": "optimum.quanto",
    "hqq": "hqq.core.quantize",
    "nf4": "bitsandbytes.functional",
    "fp4": "bitsandbytes.functional",
    "snapkv": "kvpress",
    "expected_attention": "kvpress",
}
SPECS = [
    "quanto:4",
    "quanto:2",
    "hqq:8",
    "hqq:4",
    "hqq:4:0",
    "hqq:2",
    "hqq:1",
    "fp8",
    "nf4",
    "nf4:0",
    "nf4:4:32",
    "fp4",
    "fp8_e4m3",
    "fp8_e4m3:unscaled",
    "fp8_e5m2",
    "fp8_e5m2:unscaled",
    "kivi:4:32:32",
    "kivi:2:64:0",
    "turboquant",
    "turboquant:3",
    "turboquant:2",
    "snapkv:0.5",
    "expected_attention:0.5",
]
EVERY_SPEC = pytest.mark.parametrize("spec", SPECS)
CONTEXT = 168


def need(module: str) -> None:
    """Skip without it. It is not imported: that is for the method to do, in its own way."""
    try:
        found = find_spec(module)
    except ModuleNotFoundError:
        found = None
    if found is None:
        pytest.skip(f"{module} is not installed")


def method_of(spec: str) -> Method:
    name = spec.partition(":")[0]
    if name in PACKAGES:
        need(PACKAGES[name])
    if name == "quanto":
        import_quanto()
    if name == "fp8" and not hasattr(cache_utils, "Fp8QuantizedLayer"):
        pytest.skip("this Transformers has no FP8 cache")
    return parse_method(spec)


def llama():
    """Heads of 64 channels, as groups and blocks of 64 are made for."""
    return families.model("llama", head_dim=64)


@contextmanager
def births() -> Iterator[Callable[[], int]]:
    """Bytes of all storages behind tensors that Python objects made since hold: found without knowing where."""

    def count() -> int:
        gc.collect()
        tensors = [item for item in gc.get_objects() if type(item) is torch.Tensor]
        return storage_bytes(tensors)

    gc.collect()
    gc.freeze()  # hides what is there already
    yield count
    gc.unfreeze()


def prefilled(method: Method, model, ids: torch.Tensor):
    cache = method.cache(model)
    with method.prefilling(model):
        prefill(model, ids, cache)
    return cache


@EVERY_SPEC
def test_memory_is_all_that_came_to_life(spec):
    method, model, ids = method_of(spec), llama(), families.prompt(CONTEXT, 2)
    warm = prefilled(method, model, ids)  # what packages keep for themselves is there now
    with births() as count:
        cache = prefilled(method, model, ids)
        alive = count()
    memory = method.memory(cache)
    assert memory.stored == alive == method.memory(warm).stored
    full = sum(keys.numel() + values.numel() for keys, values, *_ in prefilled(parse_method("exact"), model, ids))
    assert memory.fp16 == 2 * full


@EVERY_SPEC
def test_continuation_quality(spec):
    ids = families.prompt(CONTEXT + 40)
    quality = continuation_quality(llama(), ids, CONTEXT, method_of(spec))
    assert 0 < quality.kl < 2 and math.isfinite(quality.perplexity)
    assert 0 < quality.nominal_ratio <= 0.5
    assert quality.nominal_ratio <= quality.actual_ratio <= 2 * quality.nominal_ratio + 0.0626 + 8 / CONTEXT


class Words:
    """A tokenizer whose words are token numbers; it remembers what it decoded last."""

    def batch_decode(self, ids: torch.Tensor, skip_special_tokens: bool) -> list[str]:
        self.last = [" ".join(map(str, row)) for row in ids.tolist()]
        return self.last


@pytest.mark.parametrize(
    "spec",
    [
        "quanto",
        "hqq",
        "fp8",
        "nf4",
        "fp8_e4m3",
        "kivi",
        "kivi:4:32:0",
        "turboquant",
        "snapkv:0.5",
        "expected_attention:0.5",
    ],
)
def test_rows_are_retrieved_from_as_if_alone(spec):
    """Past a flush of new tokens. One scale for all rows, as in FP8, lets them differ a little."""
    method, model, ids, words = method_of(spec), llama(), families.prompt(CONTEXT + 1, 2), Words()
    alone = ask_over(model, words, method, NeedlePrompts(ids[1:], 8, "-"), STEP + 8).texts[0]
    answer = " ".join(alone.split()[:6])
    hits = found(ask_over(model, words, method, NeedlePrompts(ids, 8, answer), STEP + 8).texts, answer)
    assert len(hits) == 2 and (hits[1] or spec in ("fp8", "fp8_e4m3"))


def test_eight_bits_are_nearly_exact():
    need("hqq.core.quantize")
    model, ids = llama(), families.prompt(CONTEXT)
    logits = {}
    for spec in ("exact", "hqq:8", "hqq:1"):
        cache = prefilled(parse_method(spec), model, ids[:, :-8])
        logits[spec] = logits_over(model, ids[:, CONTEXT - 8 :], cache, CONTEXT - 8)[0].detach()
    assert mean_kl(logits["exact"], logits["hqq:8"]) < 1e-4 < 0.01 < mean_kl(logits["exact"], logits["hqq:1"])


@pytest.mark.parametrize("name, widths", [("hqq", (8, 4, 2, 1)), ("quanto", (4, 2))])
def test_fewer_bits_are_fewer_bytes_and_more_loss(name, widths):
    model, ids = llama(), families.prompt(CONTEXT + 40)
    exact = exact_logits(model, ids, CONTEXT)
    rows = [continuation_quality(model, ids, CONTEXT, method_of(f"{name}:{bits}"), exact) for bits in widths]
    for more, fewer in zip(rows[:-1], rows[1:], strict=True):
        assert fewer.actual_ratio < more.actual_ratio and fewer.nominal_ratio < more.nominal_ratio
        assert fewer.kl > more.kl


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_bytes_of_blocks(kind, dtype):
    """Codes of half a byte, a float32 for 64 of them, and four sinks as they are."""
    method, heads, layers = method_of(f"{kind}:4:16"), 2, 2
    model = families.model("llama", head_dim=64)
    model = type(model)(model.config).to(dtype).eval()
    memory = method.memory(prefilled(method, model, families.prompt(100)))
    coded, exact = 100 - 4 - 16, 4 + 16
    assert memory.stored == 2 * layers * heads * (coded * (32 + 4) + exact * 64 * dtype.itemsize)
    assert memory.nominal_ratio == pytest.approx((coded / 4 + exact) / 100)


def test_float8_keeps_what_it_can_represent():
    values = torch.tensor([448.0, -3.5, 0.0, 0.015625, 240.0, -96.0]).expand(1, 2, 5, 6)
    for codec in (Float8(torch.float8_e4m3fn, True), Float8(torch.float8_e4m3fn, False)):
        assert torch.equal(codec.decode(codec.encode(values), values.shape, torch.float32), values)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_float8_saturates_or_scales(dtype):
    values = torch.tensor([1e6, -1e6, 1.0])
    largest = torch.finfo(dtype).max
    unscaled, scaled = (
        codec.decode(codec.encode(values), values.shape, torch.float32)
        for codec in (Float8(dtype, False), Float8(dtype, True))
    )
    assert unscaled.tolist() == [largest, -largest, 1.0]
    assert torch.allclose(scaled[:2], values[:2])
    assert Float8(dtype, True).encode(torch.zeros(3))[0].float().tolist() == [0, 0, 0]


class Same(TensorFormat):
    """Stores a tensor as it is."""

    bits = 16

    def encode(self, x):
        return (x.clone(),)

    def decode(self, stored, shape, dtype):
        return stored[0].reshape(shape).to(dtype)


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3", "gpt2"])
@pytest.mark.parametrize("context", [2, 60])
def test_a_lossless_codec_is_exact(family, context):
    """Through single tokens, and chunks past several flushes and the sliding window of 24."""
    model, ids = families.model(family), families.prompt(context + 30 + 8 + 140, 2)
    caches = DynamicCache(config=model.config), CodedCache(model, Same(), sinks=4, recent=8)
    at = 0
    with torch.inference_mode():
        for count in [context, 30] + [1] * 8 + [7] * 20:
            logits = [model(input_ids=ids[:, at : at + count], past_key_values=cache).logits for cache in caches]
            torch.testing.assert_close(logits[1], logits[0], rtol=1e-4, atol=1e-4)
            at += count
    assert caches[1].get_seq_length() == at == ids.shape[1]
    assert all(all(layer.coded) and layer.keys.shape[-2] <= 8 + STEP for layer in caches[1].layers)


def test_sliding_layers_count_their_window():
    """Window 24: 23 tokens are stored, none of them a sink once the prompt is longer."""
    method, model = parse_method("fp8_e4m3:unscaled"), families.model("gemma3")
    memory = method.memory(prefilled(method, model, families.prompt(100)))
    elements = 2 * 2 * 32 * (100 + 23)  # keys and values, two heads
    assert memory.fp16 == 2 * elements
    assert elements <= memory.stored <= elements + 16
    sinks = CodedCache(model, Same(), sinks=4, recent=0)
    prefill(model, families.prompt(100), sinks)
    assert [layer.exact_start[0].shape[-2] for layer in sinks.layers] == [0, 4]


def kivi_of(groups: torch.Tensor, bits: int) -> torch.Tensor:
    """Groups of the last dimension, coded and decoded by the paper's formulas in float64; and each one's step."""
    low, high = groups.double().aminmax(dim=-1, keepdim=True)
    zero, scale = low.half().double(), ((high - low) / (2**bits - 1)).half().double()
    codes = ((groups.double() - zero) / scale).round().clamp(0, 2**bits - 1)
    return torch.stack((codes * scale + zero, scale.expand_as(codes)))


@pytest.mark.parametrize("bits, group", [(4, 32), (2, 32), (4, 64), (2, 128)])
@pytest.mark.parametrize("channels", [128, 256])
def test_kivi_groups_keys_by_channel_and_values_by_token(bits, group, channels):
    """Numbers may differ by a scale that is rounded to the next float16, which is far less than a step of the codes."""
    torch.manual_seed(0)
    x = torch.randn(2, 2, 2 * group, channels) * torch.logspace(-1, 2, channels)
    keys = KiviKeys(bits, group)
    got = [codec.decode(codec.encode(x), x.shape, torch.float32) for codec in (keys, keys.for_values)]
    by_channel = kivi_of(x.transpose(2, 3).unflatten(-1, (2, group)), bits).flatten(-2).transpose(-1, -2)
    by_token = kivi_of(x.unflatten(-1, (-1, group)), bits).flatten(-2)
    for mine, (theirs, step) in zip(got, (by_channel, by_token), strict=True):
        assert ((mine - theirs).abs() <= 0.02 * step).all()


def test_kivi_keeps_groups_of_equal_elements():
    x = torch.full((1, 1, 32, 64), 3.5)
    for codec in (KiviKeys(2, 32), KiviValues(2, 32)):
        assert torch.equal(codec.decode(codec.encode(x), x.shape, torch.float32), x)


@pytest.mark.parametrize(
    "residual, tokens, keys, values",
    [
        (128, 0, 0, 0),
        (128, 127, 0, 0),
        (128, 128, 128, 0),
        (128, 129, 128, 1),
        (128, 255, 128, 127),
        (128, 256, 256, 128),
        (32, 31, 0, 0),
        (32, 32, 32, 0),
        (32, 33, 32, 1),
        (0, 1, 0, 1),
        (0, 31, 0, 31),
        (0, 32, 32, 32),
        (0, 33, 32, 33),
    ],
)
def test_kivi_codes_what_it_would_have_coded_token_by_token(residual, tokens, keys, values):
    """Of a prompt as many keys and values as of tokens one after another, and with the same result."""
    torch.manual_seed(0)
    states = torch.randn(2, 2, 2, tokens + 1, 64)  # keys and values, two rows, two heads
    seen = []
    for steps in ([tokens, 1], [1] * (tokens + 1), [tokens // 2, tokens - tokens // 2, 1]):
        cache = CodedCache(families.model("llama", num_hidden_layers=1), KiviKeys(4, 32), sinks=0, recent=residual)
        for end, count in zip(itertools.accumulate(steps), steps, strict=True):
            if tokens and end == tokens + 1:  # before the last
                (layer,) = cache.layers
                coded = [sum(part.shape[2] for part in side) for side in layer.coded]
                assert coded == [keys, values]
                assert [layer.keys.shape[2], layer.values.shape[2]] == [tokens - n for n in coded]
            got = cache.update(*states[:, :, :, end - count : end], 0)
        seen.append(torch.stack(got))
    assert torch.equal(seen[0], seen[1]) and torch.equal(seen[0], seen[2])
    for side, coded in zip((0, 1), (keys, values), strict=True):
        same = (seen[0][side] == states[side]).all(-1).all(0).all(0)
        assert same.tolist() == [False] * coded + [True] * (tokens + 1 - coded)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits, group, residual", [(4, 32, 128), (2, 64, 64), (2, 32, 0)])
def test_bytes_of_kivi(bits, group, residual, dtype):
    """Codes, two float16 for each group, and the last tokens as they are."""
    method, heads, layers, tokens = parse_method(f"kivi:{bits}:{group}:{residual}"), 2, 2, 300
    model = type(llama())(llama().config).to(dtype).eval()
    memory = method.memory(prefilled(method, model, families.prompt(tokens)))
    exact = tokens % (residual or group) + residual  # keys, then values
    elements = (2 * tokens - exact) * 64
    assert memory.stored == layers * heads * (elements * bits / 8 + elements // group * 4 + exact * 64 * dtype.itemsize)
    assert memory.nominal_ratio == pytest.approx((exact + (2 * tokens - exact) * bits / 16) / (2 * tokens))


@pytest.mark.parametrize("spec", ["kivi:4:128:128", "kivi:4:64", "turboquant:4", "turboquant:3"])
@pytest.mark.parametrize("channels", [128, 256])
def test_heads_of_more_channels(spec, channels):
    model = families.model("llama", head_dim=channels)
    assert 0 < continuation_quality(model, families.prompt(CONTEXT + 40), CONTEXT, parse_method(spec)).kl < 0.2


def test_kivi_needs_whole_groups_of_channels():
    with pytest.raises(ValueError, match="a head_dim of 64 is no multiple of the group of 128"):
        prefilled(parse_method("kivi:4:128"), llama(), families.prompt(130))


@pytest.mark.parametrize("spec", ["kivi:4:32:0", "turboquant:4"])
def test_sliding_layers_code_what_their_window_holds(spec):
    """Window 24, of whose 23 tokens KIVI can't group the keys; then over the window's end, token by token."""
    method, model, ids = parse_method(spec), families.model("gemma3"), families.prompt(130, 2)
    cache = prefilled(method, model, ids[:, :100])
    keys = (0, 96) if spec.startswith("kivi") else (23, 100)
    assert [[sum(part.shape[2] for part in side) for side in layer.coded] for layer in cache.layers] == [
        [keys[0], 23],
        [keys[1], 100],
    ]
    exact = prefilled(parse_method("exact"), model, ids[:, :100])
    for at in range(100, 130):
        with torch.inference_mode():
            logits = [model(input_ids=ids[:, at : at + 1], past_key_values=x).logits[:, -1] for x in (exact, cache)]
        assert mean_kl(*logits) < 0.2


@pytest.mark.parametrize(
    "bits, positive",
    [(1, [0.7979]), (2, [0.4528, 1.5104]), (3, [0.2451, 0.7560, 1.3439, 2.1519])],
)
def test_levels_of_lloyd_and_max(bits, positive):
    """As J. Max's tables of 1960 have them."""
    levels = lloyd_max(bits)
    assert levels == pytest.approx([-x for x in reversed(positive)] + positive, abs=1e-4)


@pytest.mark.parametrize("bits, error", [(4, 0.0095), (3, 0.0345), (2, 0.1175)])
@pytest.mark.parametrize("channels", [64, 96, 128, 256])
def test_turboquant_loses_what_theory_says(bits, error, channels):
    """In whatever direction a vector is; of few dimensions, whose tails are shorter, a little less is lost."""
    torch.manual_seed(0)
    codec = TurboQuant(bits)
    for x in (torch.randn(1, 2, 500, channels), torch.randn(1, 2, 500, channels) * torch.logspace(-2, 2, channels)):
        lost = (codec.decode(codec.encode(x), x.shape, torch.float32) - x).square().sum(-1) / x.square().sum(-1)
        assert lost.mean().item() == pytest.approx(error, rel=0.05)


@pytest.mark.parametrize("bits", [4, 3, 2])
def test_turboquant_takes_the_nearest_levels(bits):
    torch.manual_seed(0)
    x, turn = torch.randn(2, 2, 50, 128) * 9, rotation(128, torch.device("cpu")).double()
    torch.testing.assert_close(turn @ turn.T, torch.eye(128, dtype=torch.float64), rtol=0, atol=1e-6)
    codec, levels = TurboQuant(bits), torch.tensor(lloyd_max(bits), dtype=torch.float64) / 128**0.5
    norms = x.double().norm(dim=-1, keepdim=True)
    nearest = ((x.double() / norms @ turn).unsqueeze(-1) - levels).abs().argmin(-1)
    expected = levels[nearest] @ turn.T * norms.half().double()
    got = codec.decode(codec.encode(x), x.shape, torch.float32)
    torch.testing.assert_close(got, expected.float(), rtol=1e-4, atol=1e-4)


def test_turboquant_of_no_and_of_too_long_vectors():
    x = torch.stack((torch.zeros(64), torch.full((64,), 1e5))).expand(1, 1, 2, 64)
    got = TurboQuant(4).decode(TurboQuant(4).encode(x), x.shape, torch.float32)
    assert not got[0, 0, 0].any()
    assert got[0, 0, 1].norm().item() == pytest.approx(65504, rel=0.05)


@pytest.mark.parametrize("bits", [4, 3, 2])
def test_bytes_of_turboquant(bits):
    """Codes, and a float16 for each vector."""
    method, heads, layers = parse_method(f"turboquant:{bits}"), 2, 2
    memory = method.memory(prefilled(method, llama(), families.prompt(100)))
    assert memory.stored == 2 * layers * heads * 100 * (64 * bits // 8 + 2)
    assert memory.nominal_ratio == bits / 16


def test_turboquant_codes_later_tokens_alike():
    """A step more than 64 stay exact; those before are as if they had all been coded at once."""
    torch.manual_seed(0)
    states, codec = torch.randn(2, 2, 2, 10 + 2 * STEP + 2, 64), TurboQuant(4)
    cache = CodedCache(families.model("llama", num_hidden_layers=1), codec, sinks=0, recent=0)
    for at in (slice(0, 10), *(slice(i, i + 1) for i in range(10, states.shape[3]))):
        keys, values = cache.update(*states[:, :, :, at], 0)
    for got, given in zip((keys, values), states, strict=True):
        old = given[:, :, : 10 + 2 * STEP]
        expected = torch.cat(
            (codec.decode(codec.encode(old), old.shape, torch.float32), given[:, :, old.shape[2] :]), 2
        )
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert [len(side) for side in cache.layers[0].coded] == [1, 1]


@pytest.mark.parametrize("name", ["snapkv", "expected_attention"])
def test_presses_keep_the_budget_and_leave_no_trace(name):
    need("kvpress")
    model, ids = llama(), families.prompt(CONTEXT + 40)
    method = parse_method(f"{name}:0.625")
    cache = prefilled(method, model, ids[:, :CONTEXT])
    assert [layer.keys.shape for layer in cache.layers] == [(1, 2, CONTEXT * 5 // 8, 64)] * 2
    assert method.memory(cache).nominal_ratio == 0.625
    assert method.memory(cache).actual_ratio == 2 * 0.625  # float32
    assert continuation_quality(model, ids, CONTEXT, parse_method(f"{name}:1")).kl == 0
    assert not any(f.__module__.startswith("kvpress") for f in ALL_ATTENTION_FUNCTIONS.values())
    assert not any(module._forward_hooks for module in model.modules())
    with pytest.raises(ValueError, match="(greater|more) .*than"):
        prefilled(method, model, ids[:, :4])


@pytest.mark.parametrize("name", PACKAGES)
def test_missing_package(name, monkeypatch):
    monkeypatch.setitem(sys.modules, PACKAGES[name], None)
    method = parse_method(f"{name}:0.5" if PACKAGES[name] == "kvpress" else name)
    top = PACKAGES[name].split(".")[0]
    with pytest.raises(ImportError, match=f"{name}.* needs the package {top} ") as problem:
        method.cache(llama())
    assert INSTALL[top] in str(problem.value)


@pytest.mark.parametrize(
    "spec, message",
    [
        ("quanto:8", "quanto takes 4, 2 bits, got '8'"),
        ("hqq:x", "hqq takes 4, 8, 2, 1 bits"),
        ("fp8:4", "fp8 takes nothing"),
        ("hqq:4:2", "an axis of 0 or 1"),
        ("quanto:4:0", "quanto.:BITS. or hqq"),
        ("nf4:4:5:6", "nf4:SINKS:RECENT|nf4.:SINKS"),
        ("fp4:-1", "whole numbers"),
        ("fp8_e4m3:raw", "fp8_e4m3:unscaled"),
        ("kivi:3", "bits is one of 4, 2, got 3"),
        ("kivi:4:16", "group is one of 32, 64, 128, got 16"),
        ("kivi:4:64:32", "32 tokens, is no multiple of the group of 64"),
        ("kivi:4:32:128:1", "write kivi.:BITS.:GROUP.:RESIDUAL"),
        ("kivi:-4", "whole numbers"),
        ("turboquant:8", "turboquant takes 4, 3, 2 bits, got '8'"),
        ("turboquant:4:1", "got '4:1'"),
        ("snapkv", "snapkv:BUDGET"),
        ("snapkv:0", "above 0"),
        ("expected_attention:1.5", "up to 1"),
        ("expected_attention:much", "expected_attention:BUDGET"),
        ("nf5", "unknown method 'nf5': choose from exact, quanto"),
    ],
)
def test_parse_errors(spec, message):
    with pytest.raises(ValueError, match=message):
        parse_method(spec)


def test_every_baseline_is_tested():
    assert {spec.partition(":")[0] for spec in SPECS} == set(BASELINES) - {"exact"}


@pytest.mark.parametrize(
    "spec, family, message",
    [
        ("quanto", "gemma3", "full attention"),
        ("hqq", "mistral", "full attention"),
        ("nf4", "qwen3_next", "layer 0 of Qwen3NextForCausalLM is a LinearAttentionLayer"),
        ("kivi", "qwen3_next", "layer 0 of Qwen3NextForCausalLM is a LinearAttentionLayer"),
        ("snapkv:0.5", "gpt2", "kvpress supports LlamaForCausalLM, .* not GPT2LMHeadModel"),
        ("snapkv:0.5", "mistral", "DynamicSlidingWindowLayer"),
    ],
)
def test_models_that_a_method_can_not_do(spec, family, message):
    with pytest.raises(ValueError, match=message):
        method_of(spec).cache(families.model(family))


@pytest.mark.parametrize("bits, length", [(4, 101), (2, 102), (1, 100)])
def test_hqq_refuses_what_it_could_not_read_back(bits, length):
    """Groups along axis 1 are packed by 2, 4 or 8, and what is left over would be lost."""
    need("hqq.core.quantize")
    model = families.model("llama", head_dim=64, num_key_value_heads=1)
    with pytest.raises(ValueError, match=f"hqq packs {8 // bits} groups .* the {length} of .*hqq:BITS:0"):
        prefilled(parse_method(f"hqq:{bits}"), model, families.prompt(length))
    kl = continuation_quality(model, families.prompt(length + 10), length, parse_method(f"hqq:{bits}:0")).kl
    assert math.isfinite(kl)


def test_no_fp8_cache_in_old_transformers(monkeypatch):
    monkeypatch.delattr(cache_utils, "Fp8QuantizedLayer", raising=False)
    with pytest.raises(ValueError, match="has no FP8 cache"):
        parse_method("fp8").cache(llama())


def test_coded_caches_only_grow():
    cache = CodedCache(llama(), Same(), sinks=4, recent=0)
    for call in (lambda: cache.crop(-1), lambda: cache.reorder_cache(torch.tensor([0])), cache.reset):
        with pytest.raises(NotImplementedError, match="only grows"):
            call()
