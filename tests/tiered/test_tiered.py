"""Tiered caches in real generate() calls: fused equals materialised, batches equal their rows, memory is real."""

import copy
import functools
import pickle
import re

import pytest
import torch
import transformers
from families import FAMILIES, config, left_padded, model, prompt
from packaging.version import Version
from torch.nn.functional import scaled_dot_product_attention
from transformers import DynamicCache

from spectrumkv_hf import SpectrumCache
from spectrumkv_hf.attention import route as attention
from spectrumkv_hf.attention.handle import SpectrumHandle
from spectrumkv_hf.policy import FP16, TIERS
from spectrumkv_hf.tiered import layer as layer_module
from spectrumkv_hf.tiered.cache import _tensors_of
from spectrumkv_hf.tiered.layer import SpectrumLayer
from spectrumkv_hf.tiered.memory import MemoryReport, storage_bytes
from spectrumkv_hf.tiered.sliding_layer import SlidingSpectrumLayer
from spectrumkv_kernels.attention.reference import tiered_attention

OLD = Version(transformers.__version__) < Version("5.23")
WINDOW = 160
"""Of the sliding families here: long enough for tokens to be tiered before they leave it."""

IMPLEMENTATIONS = ("sdpa", "eager", "spectrumkv")
NO_SDPA = {"gemma2", "gpt_oss"}
MODELS = [
    pytest.param(family, implementation, id=f"{family}-{implementation}")
    for family in FAMILIES
    for implementation in IMPLEMENTATIONS
    if not (implementation == "sdpa" and family in NO_SDPA)
    and not (implementation == "spectrumkv" and family == "falcon")  # looks its attention up in a dict of its own
]
SLIDING = {"mistral", "gemma2", "gemma3", "gpt_oss"}


def sizes(family):
    return {"sliding_window": WINDOW} if family in SLIDING else {}


def generate(m, ids, cache, **kwargs):
    kwargs = {"max_new_tokens": 12, "do_sample": False, **kwargs}
    return m.generate(ids, past_key_values=cache, output_logits=True, return_dict_in_generate=True, **kwargs)


def relative(x, y):
    return ((x - y).double().norm() / y.double().norm()).item()


def logits_of(m, cache, ids, steps=8, mask=None):
    """Logits of a prefill and of `steps` single tokens after it, `[batch, 1 + steps, vocabulary]`."""
    out = []
    with torch.no_grad():
        for i in range(steps + 1):
            new = ids[:, : ids.shape[1] - steps] if i == 0 else ids[:, ids.shape[1] - steps + i - 1, None]
            seen = None if mask is None else mask[:, : ids.shape[1] - steps + i]
            kwargs = {} if mask is None else {"position_ids": (seen.cumsum(-1) - 1).clamp(min=0)[:, -new.shape[1] :]}
            result = m(new, past_key_values=cache, attention_mask=seen, **kwargs)
            out.append(result.logits[:, -1:])
    return torch.cat(out, dim=1)


SCENARIOS = {
    "greedy": ([300], {}),
    "padded": ([300, 210], {}),
    "chunked": ([300], {"prefill_chunk_size": 90}),
    "beam": ([300], {"num_beams": 3}),
    "padded_beam": ([300, 210], {"num_beams": 2}),
}


def in_scenario(scenario, m, cache):
    """What a model generates in it: enough for tokens to be tiered after the prefill too, 64 at a time."""
    lengths, options = SCENARIOS[scenario]
    ids, mask = left_padded(lengths)
    return generate(m, ids, cache, attention_mask=mask, max_new_tokens=74, **options)


@functools.cache
def over_the_stock_cache(family, scenario):
    """The same for all implementations of attention."""
    m = model(family, "eager", **sizes(family))
    return in_scenario(scenario, m, DynamicCache(config=m.config))


@pytest.mark.parametrize(("family", "implementation"), MODELS)
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_exact_tiers_equal_the_stock_cache(family, implementation, scenario):
    """All arenas FP16: everything between model and store is in use, and no error hides a wrong token."""
    m = model(family, implementation, **sizes(family))
    cache = SpectrumCache(m.config, policy="greedy", budget=1.0, recent_window=4)
    got, expected = in_scenario(scenario, m, cache), over_the_stock_cache(family, scenario)
    assert torch.equal(got.sequences, expected.sequences)
    for a, b in zip(got.logits, expected.logits, strict=True):
        assert relative(a, b) < 1e-5
    tiered = [layer for layer in cache.layers if isinstance(layer, SpectrumLayer)]
    assert bool(tiered) == (family != "deepseek_v3")
    assert all(len(layer.store.arenas[FP16]) > 100 for layer in tiered)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("kwargs", [{"prompt_lookup_num_tokens": 4}, {"assistant_model": True}], ids=str)
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3"])
def test_exact_tiers_under_speculation(family, implementation, kwargs):
    """Rejected tokens are cropped, across tail and arenas."""
    if OLD and family == "gemma3":
        pytest.skip("Transformers 5.17 returns too many states from a stock sliding layer that records its past")
    m = model(family, implementation, **sizes(family))
    ids = torch.cat((prompt(150), prompt(150)), dim=1)
    if "assistant_model" in kwargs:
        assistant = copy.deepcopy(m)
        with torch.no_grad():
            for parameter in assistant.parameters():
                parameter.add_(0.01 * torch.randn_like(parameter))
        kwargs = {"assistant_model": assistant}
    cache = SpectrumCache(m.config, policy="greedy", budget=1.0, recent_window=0)
    got = generate(m, ids, cache, max_new_tokens=74, **kwargs)
    expected = generate(m, ids, DynamicCache(config=m.config), max_new_tokens=74)
    assert torch.equal(got.sequences, expected.sequences)


@pytest.mark.parametrize(("family", "implementation"), [p for p in MODELS if "eager" not in p.id])
@pytest.mark.parametrize(("policy", "budget"), [("sink_protect", 0.3), ("balanced", 0.6), ("drop_scored", 0.5)])
@pytest.mark.parametrize("lengths", [[300], [300, 210]], ids=str)
def test_fused_equals_materialised(family, implementation, policy, budget, lengths, monkeypatch):
    ids, mask = left_padded(lengths)
    mask = mask if len(lengths) > 1 else None
    m = model(family, implementation, **sizes(family))
    caches = [SpectrumCache(m.config, policy=policy, budget=budget, recent_window=8) for _ in range(2)]
    fused = logits_of(m, caches[0], ids, mask=mask)
    monkeypatch.setattr(attention, "FUSED", ())
    materialised = logits_of(m, caches[1], ids, mask=mask)
    assert relative(fused, materialised) < 1e-5


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
def test_fused_equals_materialised_after_a_crop_into_the_arenas(family, monkeypatch):
    """Rows and heads then hold different numbers of tokens of each tier, and the empty places must not be read."""
    m = model(family, "sdpa", **sizes(family))
    cache = SpectrumCache(m.config, policy="sink_protect", budget=0.3, recent_window=8)
    with torch.no_grad():
        m(prompt(220, batch=2), past_key_values=cache)
        cache.activate_past_recording()
        m(prompt(80, batch=2, seed=1), past_key_values=cache)
    cache.crop(-75)
    assert any(layer.store.ragged for layer in cache.layers)
    other = copy.deepcopy(cache)
    fused = logits_after(m, cache, 2)
    monkeypatch.setattr(attention, "FUSED", ())
    assert relative(fused, logits_after(m, other, 2)) < 1e-5


@pytest.mark.parametrize("implementation", ["sdpa", "spectrumkv"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3", "gpt2"])
def test_padded_rows_equal_unpadded_ones(family, implementation):
    """Uniform tiers, so that a code flipped by rounding is the only difference left."""
    m = model(family, implementation, **sizes(family))
    lengths = [300, 230]
    ids, mask = left_padded(lengths)
    for policy in ("uniform_int8", "sink_protect"):
        together = logits_of(m, SpectrumCache(m.config, policy=policy, budget=0.5, recent_window=8), ids, mask=mask)
        for row, length in enumerate(lengths):
            cache = SpectrumCache(m.config, policy=policy, budget=0.5, recent_window=8)
            alone = logits_of(m, cache, ids[row : row + 1, 300 - length :])
            assert relative(together[row : row + 1], alone) < 2e-4


@pytest.mark.parametrize("policy", ["sink_protect", "drop_scored"])
@pytest.mark.parametrize("operation", ["reorder", "select", "repeat", "crop", "deepcopy", "pickle", "reset"])
def test_operations_on_a_whole_cache(operation, policy):
    """Generation after the operation equals generation from a cache on which rows were chosen before."""
    m = model("gemma3", "sdpa", **sizes("gemma3"))
    ids = prompt(300, batch=3)

    def prefilled(rows):
        cache = SpectrumCache(m.config, policy=policy, budget=0.4, recent_window=8)
        with torch.no_grad():
            m(ids[rows], past_key_values=cache)
        return cache

    cache, rows = prefilled([0, 1, 2]), [0, 1, 2]
    if operation == "reorder":
        rows = [2, 0, 0]
        cache.reorder_cache(torch.tensor(rows))
    elif operation == "select":
        rows = [1]
        cache.batch_select_indices(torch.tensor(rows))
    elif operation == "repeat":
        rows = [0, 0, 1, 1, 2, 2]
        cache.batch_repeat_interleave(2)
    elif operation == "crop":
        cache.activate_past_recording()
        with torch.no_grad():
            m(prompt(3, batch=3, seed=8), past_key_values=cache)
        cache.crop(-3)
    elif operation == "deepcopy":
        cache = copy.deepcopy(cache)
    elif operation == "pickle":
        cache = pickle.loads(pickle.dumps(cache))
    elif operation == "reset":
        cache.reset()
        with torch.no_grad():
            m(ids, past_key_values=cache)
    expected = logits_after(m, prefilled(rows), len(rows))
    assert relative(logits_after(m, cache, len(rows)), expected) < 1e-5


def logits_after(m, cache, batch):
    with torch.no_grad():
        return m(prompt(2, seed=4).expand(batch, -1), past_key_values=cache).logits


@pytest.mark.parametrize("scope", ["head", "layer", "token"])
def test_scopes_share_what_they_say(scope):
    m = model("llama", "sdpa")
    cache = SpectrumCache(m.config, budget=0.3, recent_window=8, scope=scope)
    with torch.no_grad():
        m(prompt(300), past_key_values=cache)
    maps = torch.stack(list(cache.tier_map().values()))  # [layer, batch, head, token]
    assert (maps < 16).any(-1).all(), "every layer was tiered in the same forward"
    assert torch.equal(maps, maps[:, :, :1].expand_as(maps)) == (scope != "head")
    assert torch.equal(maps, maps[:1].expand_as(maps)) == (scope == "token")


def test_the_heard_tokens_keep_their_precision():
    """The attention scorer is in use: the tokens that the model attends to most are those with more bits."""
    m = model("llama", "eager")
    cache = SpectrumCache(m.config, policy="greedy", budget=0.3, recent_window=8, sinks=0)
    ids = prompt(120)  # all queries are probes
    with torch.no_grad():
        weights = m(ids, past_key_values=cache, output_attentions=True).attentions
    for index, layer in cache.tier_map().items():
        mass = weights[index].unflatten(1, (2, 2)).mean(2).sum(-2) / torch.arange(120, 0, -1)
        bits = layer[..., :112]
        for head in range(2):
            heard = mass[0, head, :112]
            assert heard[bits[0, head] == 8].min() >= heard[bits[0, head] == 4].max() - 1e-6


class TestMemory:
    """Bytes are counted from storages, as an outsider would."""

    @pytest.mark.parametrize(
        ("policy", "budget"), [("sink_protect", 0.3), ("sink_protect", 0.5), ("balanced", 0.5), ("two_tier", 0.3)]
    )
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize(
        ("codec", "scales"),
        [("spectrum", 2 * 2 * 2), ("spectrum2", 2)],  # scale and zero point in float16, a scale of a byte
    )
    def test_stored_bytes_are_those_predicted(self, policy, budget, dtype, codec, scales):
        m = copy.deepcopy(model("llama", "sdpa")).to(dtype)
        cache = SpectrumCache(m.config, policy=policy, budget=budget, codec=codec)
        generate(m, prompt(500, batch=2), cache, max_new_tokens=200)
        heads, dim, rows = 2, 16, 2
        predicted = 0
        for index, layer in enumerate(cache.layers):
            counts = cache.policy.counts(layer.store.tail_start)
            for tier in TIERS:
                if counts.get(tier) and tier.bits:
                    assert len(layer.store.arenas[tier]) == counts[tier]
                    element = dtype.itemsize if tier.bits == 16 else tier.bits / 8
                    coded = 2 * dim * element + (scales if tier.bits < 16 else 0)
                    positions = 4 * counts[tier]
                    where = (cache.tier_map()[index] == tier.bits).nonzero()[:, -1].view(rows, heads, -1)
                    if codec == "spectrum2" and where.diff(dim=-1).max() < 256:  # 64 steps of a byte, from a first one
                        positions = min(positions, -(-counts[tier] // 64) * (64 + 4))
                    predicted += rows * heads * (counts[tier] * coded + positions)
            predicted += rows * heads * 4 * (dim if codec == "spectrum" else 3 * dim + 1)  # the frame
            assert layer.store.tail_length <= 64 + 64
            predicted += 128 * rows * heads * 2 * dim * dtype.itemsize  # the tail's buffers
        assert reachable(cache) == cache.memory().stored
        assert reachable(cache) == predicted

    def test_report_adds_up(self):
        m = model("gemma3", "sdpa", **sizes("gemma3"))
        cache = SpectrumCache(m.config, budget=0.3, recent_window=8)
        generate(m, prompt(400), cache)
        report = cache.memory()
        assert sum(report.parts.values()) == report.stored
        assert report.fp16 == 2 * (411 + 159) * 2 * 32 * 2  # the full layer's tokens and the window's, K and V
        assert report.actual_ratio == report.stored / report.fp16
        assert 0.3 <= report.nominal_ratio < 0.7
        assert str(report).startswith(f"{report.times_smaller:.2f} times smaller than the exact cache (")

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("family", ["llama", "gemma3", "qwen3_next"])
    def test_exact_is_what_a_dynamic_cache_holds(self, family, dtype):
        """In the model's dtype, of a sliding layer what its window keeps, of stock layers everything."""
        m = model(family, "sdpa", **sizes(family)).to(dtype)
        ours, stock = SpectrumCache(m.config, budget=0.3, recent_window=8), DynamicCache(config=m.config)
        for cache in (ours, stock):
            generate(m, prompt(400), cache)
        held = [t for layer in stock.layers for t in _tensors_of(layer) if t.is_floating_point()]
        report = ours.memory()
        assert report.exact == sum(t.nbytes for t in held)
        assert report.times_smaller == report.exact / report.stored
        assert report.times_smaller > (1 if family == "qwen3_next" else 1.5)

    def test_report_says_when_more_is_stored(self):
        report = MemoryReport(stored=3 << 20, exact=2 << 20, fp16=1 << 20, nominal_ratio=1.0)
        assert str(report).startswith(
            "1.50 times the exact cache (2.00 MiB -> 3.00 MiB)\n  nominal ratio 1.000, actual 3"
        )
        assert MemoryReport(0, 0, 0, 0.0).times_smaller == 1 and str(MemoryReport(0, 0, 0, 0.0)).startswith("empty")

    @pytest.mark.parametrize("family", ["llama", "gemma3", "qwen3_next"])
    def test_repr_is_one_line(self, family):
        """Whatever the number of layers, before use and after."""
        m = model(family, "sdpa", **sizes(family))
        cache = SpectrumCache(m.config, budget=0.3)
        assert repr(cache).startswith("SpectrumCache(sink_protect b=0.3, ") and repr(cache).endswith(", 0 tokens)")
        generate(m, prompt(300), cache)
        said = repr(cache)
        assert len(said) < 250 and "\n" not in said
        assert " 311 tokens, " in said and cache.memory().headline() in said
        assert sum(map(int, re.findall(r"(\d+) x ", said))) == len(cache.layers)

    def test_nothing_grows_but_the_tail(self):
        m = model("llama", "sdpa")
        cache = SpectrumCache(m.config, budget=0.3, recent_window=8)
        with torch.no_grad():
            m(prompt(300), past_key_values=cache)
            before = {name: t.shape for name, t in cache.layers[0].store.tensors()}
            for step in range(40):
                m(prompt(1, seed=step), past_key_values=cache)
            after = {name: t.shape for name, t in cache.layers[0].store.tensors()}
        assert {n: s for n, s in before.items() if "tail" not in n} == {
            n: s for n, s in after.items() if "tail" not in n
        }

    def test_peak_of_a_decode_step_is_one_layers_temporary(self):
        """What a step allocates, after the profiler, never adds up to a layer in float32."""
        m = model("llama", "sdpa", num_hidden_layers=6)
        cache = SpectrumCache(m.config, budget=0.3, recent_window=8)
        with torch.no_grad():
            m(prompt(900), past_key_values=cache)
            m(prompt(1), past_key_values=cache)
            with torch.profiler.profile(
                activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True, acc_events=True
            ) as log:
                m(prompt(1, seed=1), past_key_values=cache)
        held = peak = 0
        for event in sorted(memory_events(log), key=lambda e: e[0]):
            held += event[1]
            peak = max(peak, held)
        layer = 900 * 2 * 2 * 16 * 4  # keys and values of one layer in float32
        assert 0 < peak < layer

    @pytest.mark.parametrize(("codec", "affine", "positions"), [("spectrum", 4, 300 * 4), ("spectrum2", 1, 5 * 68)])
    def test_positions_and_scales_are_counted(self, codec, affine, positions):
        m = model("llama", "sdpa")
        cache = SpectrumCache(m.config, policy="uniform_int4", codec=codec, recent_window=0)
        with torch.no_grad():
            m(prompt(300), past_key_values=cache)
        parts = cache.memory().parts
        assert parts["int4.keys.codes"] == 2 * 300 * 2 * 8
        assert parts["int4.values.affine"] == 2 * 300 * 2 * affine
        assert parts["int4.positions"] == 2 * 2 * positions


def reachable(thing, seen=None):
    """Bytes of all storages reachable from an object through attributes, dicts, lists and tuples."""
    seen = {} if seen is None else seen
    visited, pending = set(), [thing]
    while pending:
        item = pending.pop()
        if id(item) in visited:
            continue
        visited.add(id(item))
        if isinstance(item, torch.Tensor):
            seen[item.untyped_storage().data_ptr()] = item.untyped_storage().nbytes()
        elif isinstance(item, dict):
            pending += list(item.values())
        elif isinstance(item, list | tuple | set):
            pending += list(item)
        elif hasattr(item, "__dict__") and not isinstance(item, type):
            pending += list(vars(item).values())
    return sum(seen.values())


def memory_events(log):
    for event in log.profiler.kineto_results.events():
        if event.name() == "[memory]":
            yield event.start_ns(), event.nbytes()


class TestHandle:
    @pytest.fixture
    def layer(self):
        layer = SpectrumCache(config("llama"), budget=0.3, recent_window=8).layers[0]
        keys, values = torch.randn(1, 2, 300, 16), torch.randn(1, 2, 300, 16)
        layer.update(keys, values)
        layer.attended(torch.randn(1, 4, 300, 16), keys, None, scale=0.25)
        return layer

    def handles(self, layer, count=1):
        return layer.update(torch.randn(1, 2, count, 16), torch.randn(1, 2, count, 16))

    def test_looks_like_the_tensor_it_stands_for(self, layer):
        key, value = self.handles(layer)
        assert isinstance(key, SpectrumHandle) and isinstance(key, torch.Tensor)
        assert key.shape == (1, 2, 301, 16) and key.size(2) == 301 and key.dim() == 4
        assert (key.dtype, key.device) == (torch.float32, torch.device("cpu"))
        assert key.to(torch.float32) is key
        assert "keys of layer 0" in repr(key)
        assert torch.equal(key + 0, layer.keys)
        assert torch.equal(torch.cat([value, value]), torch.cat([layer.values] * 2))
        assert torch.equal(key.transpose(2, 3), layer.keys.transpose(2, 3))
        assert torch.equal(key[:, :, -3:], layer.keys[:, :, -3:])

    @pytest.mark.parametrize("repeated", [False, True])
    @pytest.mark.parametrize("queries", [1, 3])
    def test_sdpa_reads_the_store(self, layer, repeated, queries, monkeypatch):
        key, value = self.handles(layer, queries)
        query = torch.randn(1, 4, queries, 16)
        mask = torch.ones(queries, 300 + queries, dtype=torch.bool).tril(300)[None, None]
        dense = [t.repeat_interleave(2, dim=1) for t in (layer.keys, layer.values)]
        expected = scaled_dot_product_attention(query, *dense, attn_mask=mask)
        if repeated:  # as transformers' repeat_kv does
            key, value = (
                t[:, :, None, :, :].expand(1, 2, 2, 300 + queries, 16).reshape(1, 4, 300 + queries, 16)
                for t in (key, value)
            )
        monkeypatch.setattr(type(layer.store), "dense", None)  # materialising would fail
        got = scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=not repeated)
        assert relative(got, expected) < 1e-5

    def test_sdpa_of_a_packed_group(self, layer, monkeypatch):
        """Transformers packs a group's queries for one token into [batch, kv_heads, group, dim]."""
        key, value = self.handles(layer)
        query = torch.randn(1, 2, 2, 16)
        expected = scaled_dot_product_attention(query, layer.keys, layer.values)
        monkeypatch.setattr(type(layer.store), "dense", None)
        assert relative(scaled_dot_product_attention(query, key, value), expected) < 1e-5

    def test_stale_handles_are_refused(self, layer):
        key, _ = self.handles(layer)
        for change in (
            lambda: self.handles(layer),
            lambda: layer.crop(-1),
            lambda: layer.reorder_cache(torch.tensor([0])),
        ):
            change()
            with pytest.raises(RuntimeError, match="stale"):
                key + 0
            key, _ = self.handles(layer)

    def test_models_that_compute_on_dropped_tokens_are_refused(self):
        layer = SpectrumCache(config("llama"), policy="drop_scored", budget=0.5, recent_window=8).layers[0]
        keys = torch.randn(1, 2, 300, 16)
        layer.update(keys, keys)
        layer.attended(torch.randn(1, 4, 300, 16), keys, None, scale=0.25)
        key, _ = self.handles(layer)
        with pytest.raises(RuntimeError, match="dropped tokens"):
            key + 0


def test_families_outside_the_interface_are_right():
    """BLOOM computes attention itself: handles give it the dequantised tensors."""
    settings = {"vocab_size": 97, "hidden_size": 64, "n_layer": 2, "n_head": 4, "pad_token_id": 0, "eos_token_id": None}
    torch.manual_seed(0)
    m = transformers.BloomForCausalLM(transformers.BloomConfig(**settings)).eval()
    ids, mask = left_padded([300, 250])
    expected = generate(m, ids, DynamicCache(config=m.config), attention_mask=mask, max_new_tokens=80)
    cache = SpectrumCache(m.config, policy="greedy", budget=1.0, recent_window=4)
    got = generate(m, ids, cache, attention_mask=mask, max_new_tokens=80)
    assert torch.equal(got.sequences, expected.sequences)
    assert all(len(layer.store.arenas[FP16]) > 200 for layer in cache.layers)


@pytest.mark.parametrize(("codec", "most"), [("spectrum", 0.02), ("spectrum2", 0.03)])
def test_shared_kv_layers_read_exact_values_in_the_same_forward(codec, most):
    """Gemma-3n: later layers attend to an earlier layer's keys; the first token must still be exact."""
    settings = {
        "vocab_size": 97, "vocab_size_per_layer_input": 97, "hidden_size": 64, "intermediate_size": 96,
        "num_hidden_layers": 5, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
        "hidden_size_per_layer_input": 16, "num_kv_shared_layers": 2, "laurel_rank": 8, "altup_num_inputs": 2,
        "layer_types": ["full_attention"] * 5, "activation_sparsity_pattern": [0.0] * 5,
        "pad_token_id": 0, "eos_token_id": None, "max_position_embeddings": 512,
    }  # fmt: skip
    torch.manual_seed(0)
    m = transformers.Gemma3nForCausalLM(transformers.Gemma3nTextConfig(**settings)).eval()
    ours = SpectrumCache(m.config, policy="uniform_int8", codec=codec, recent_window=4)
    caches = [DynamicCache(config=m.config), ours]
    with torch.no_grad():
        first = [m(prompt(200), past_key_values=cache).logits for cache in caches]
        assert torch.equal(*first)
        later = [m(prompt(1, seed=2), past_key_values=cache).logits for cache in caches]
    assert 1e-7 < relative(later[1], later[0]) < most
    tiered = [layer for layer in caches[1].layers if isinstance(layer, SpectrumLayer)]
    assert all(layer.store.arenas for layer in tiered)


def test_encoder_decoder():
    settings = {
        "vocab_size": 97, "d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
        "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "max_position_embeddings": 512,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1,
        "forced_eos_token_id": None,
    }  # fmt: skip
    torch.manual_seed(0)
    m = transformers.BartForConditionalGeneration(transformers.BartConfig(**settings)).eval()
    kwargs = {"max_new_tokens": 150, "min_new_tokens": 150, "do_sample": False}
    expected = m.generate(prompt(40), **kwargs)
    for policy, budget in (("fp16", None), ("greedy", 1.0)):
        options = {"recent_window": 4} if policy == "greedy" else {}
        cache = SpectrumCache.for_encoder_decoder(m.config, policy=policy, budget=budget, **options)
        assert torch.equal(m.generate(prompt(40), past_key_values=cache, **kwargs), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(dtype):
    m = copy.deepcopy(model("llama", "sdpa")).to(dtype)
    reference = logits_of(m, DynamicCache(config=m.config), prompt(300))
    got = logits_of(m, SpectrumCache(m.config, policy="uniform_int8", recent_window=4), prompt(300))
    assert got.dtype == dtype
    assert torch.equal(got[:, 0], reference[:, 0])  # the prefill is exact
    assert relative(got, reference) < 0.02


@pytest.mark.parametrize(("policy", "budget"), [("fp16", None), ("sink_protect", 0.5)])
def test_prefill_in_inference_mode_decode_outside(policy, budget):
    m = model("llama", "sdpa")
    reference = SpectrumCache(m.config, policy=policy, budget=budget, recent_window=8)
    expected = logits_of(m, reference, prompt(300), steps=20)
    cache = SpectrumCache(m.config, policy=policy, budget=budget, recent_window=8)
    with torch.inference_mode():
        m(prompt(300)[:, :280], past_key_values=cache)
    with torch.no_grad():
        later = [m(prompt(300)[:, i, None], past_key_values=cache).logits for i in range(280, 300)]
        cache.crop(-3)
        cache.reorder_cache(torch.tensor([0]))
    assert torch.equal(torch.cat(later, dim=1), expected[:, 1:])


def test_autocast():
    m = model("llama", "sdpa")
    with torch.autocast("cpu", torch.bfloat16):
        got = logits_of(m, SpectrumCache(m.config, policy="uniform_int8", recent_window=4), prompt(300))
        reference = logits_of(m, DynamicCache(config=m.config), prompt(300))
    assert relative(got, reference) < 0.02


def test_the_dispatcher_is_asked(monkeypatch):
    """The fused read really runs in a plain generate() on sdpa."""
    calls = []

    def counting(*args, **kwargs):
        calls.append(args[0].shape)
        return tiered_attention(*args, **kwargs)

    monkeypatch.setattr(layer_module, "tiered_attention", counting)
    m = model("llama", "sdpa")
    generate(m, prompt(300), SpectrumCache(m.config, budget=0.5), max_new_tokens=5)
    assert calls == [(1, 4, 1, 16)] * (2 * 4)


def test_route_can_be_taken_out():
    attention.uninstall()
    m = model("llama", "sdpa")
    expected = generate(m, prompt(30), DynamicCache(config=m.config))
    SpectrumCache(m.config)
    attention.install()
    assert torch.equal(generate(m, prompt(30), DynamicCache(config=m.config)).sequences, expected.sequences)


def test_stock_layers_are_counted():
    m = model("qwen3_next", "sdpa")
    cache = SpectrumCache(m.config, budget=0.5, recent_window=8)
    generate(m, prompt(300), cache)
    stock = [t for layer in cache.layers if not isinstance(layer, SpectrumLayer) for t in _tensors_of(layer)]
    assert cache.memory().parts["uncompressed"] == storage_bytes(stock) > 0
    assert "1 x LinearAttentionLayer: linear_attention: not tiered" in cache.summary()


def test_sliding_layers_are_ours_where_it_saves_bytes():
    kinds = [type(layer) for layer in SpectrumCache(config("gemma3", sliding_window=WINDOW), recent_window=8).layers]
    assert kinds == [SlidingSpectrumLayer, SpectrumLayer]
    assert "DynamicSlidingWindowLayer" in SpectrumCache(config("gemma3")).summary()
