"""Every config type and every architecture that can be built small: a cache is made, exact where it should be."""

import copy
import functools
import importlib
import inspect
import logging
import pkgutil
import re

import pytest
import torch
import transformers
from families import config, model, prompt
from transformers import CONFIG_MAPPING, DynamicCache, EncoderDecoderCache, PreTrainedConfig
from transformers.modeling_outputs import BaseModelOutput
from zoo import CAUSAL, HYBRID, SEQ_TO_SEQ, zoo_model

from spectrumkv_hf import SpectrumCache
from spectrumkv_hf.attention import route as attention
from spectrumkv_hf.tiered import fit
from spectrumkv_hf.tiered.cache import _warn_once
from spectrumkv_hf.tiered.layer import SpectrumLayer
from spectrumkv_hf.tiered.mixed_layers import (
    CrossAttentionLayer,
    HybridSlidingSpectrumLayer,
    HybridSpectrumLayer,
    LinearStates,
)

HETEROGENEOUS = ("gemma4_text", "gemma4_unified_text")


@pytest.fixture(autouse=True)
def fresh_warnings():
    _warn_once.cache_clear()


def built(model_type, names="causal"):
    """A model of the zoo; a test of one that can't be built, or whose stock cache fails, is skipped with the reason."""
    if isinstance(m := zoo_model(model_type, names), str):
        pytest.skip(m)
    return m


# -- configs ----------------------------------------------------------------------------------------------------------


def state_of(config):
    """Everything that a config holds, its parts included."""
    parts = {k: state_of(v) if isinstance(v, PreTrainedConfig) else copy.deepcopy(v) for k, v in vars(config).items()}
    return type(config), parts


def default_config(model_type):
    """A default config that `DynamicCache` takes, or None."""
    try:
        made = CONFIG_MAPPING[model_type]()
        name = type(made.get_text_config(decoder=True)).__module__.replace("configuration_", "modeling_")
        importlib.import_module(name)  # some register layers of their own
        DynamicCache(config=made)
    except Exception:
        return None
    return made


def cache_of(config, **options):
    if config.is_encoder_decoder:
        return SpectrumCache.for_encoder_decoder(config, **options).self_attention_cache
    return SpectrumCache(config, **options)


def test_every_config_type():
    """No other failure than `DynamicCache`'s, the same layers but for the tiered ones, and nothing changed."""
    made = 0
    for model_type in CONFIG_MAPPING:
        if (given := default_config(model_type)) is None:
            continue
        before, described = state_of(given), copy.deepcopy(given.to_dict())
        for policy in ("sink_protect", "fp16"):
            cache = cache_of(given, policy=policy)
            stock = DynamicCache(config=given.get_text_config(decoder=True))
            assert len(cache.layers) == len(stock.layers), model_type
            for ours, theirs in zip(cache.layers, stock.layers, strict=True):
                assert type(ours) is type(theirs) or isinstance(ours, SpectrumLayer | CrossAttentionLayer), model_type
                assert getattr(ours, "sliding_window", None) in (None, getattr(theirs, "sliding_window", None))
            assert cache.is_linear == stock.is_linear and cache.is_sliding == stock.is_sliding, model_type
        assert state_of(given) == before and given.to_dict() == described, model_type
        made += 1
    assert made > 500


def test_the_sweep_sees_a_change():
    given = default_config("t5gemma2")
    before = state_of(given)
    given.decoder.is_encoder_decoder = not given.decoder.is_encoder_decoder
    assert state_of(given) != before


@pytest.mark.parametrize("model_type", ["gemma4", "gemma4_text", "gemma4_unified"])
def test_layers_that_differ(model_type):
    """The identity names what differs, layer by layer, and each layer has the rotation of its own head_dim."""
    if model_type not in CONFIG_MAPPING:
        pytest.skip("not in this version of Transformers")
    text = CONFIG_MAPPING[model_type]().get_text_config(decoder=True)
    cache = SpectrumCache(text)
    dims = cache.identity["head_dim"]
    assert dims == [layer.head_dim for layer in text.per_layer_config] and set(dims) == {256, 512}
    for layer, dim, kind in zip(cache.layers, dims, text.layer_types, strict=True):
        assert len(layer.rotary.inv_freq) == dim // 2
        turning = sum(frequency > 0 for frequency in layer.rotary.inv_freq)
        assert turning == (dim // 2 if kind == "sliding_attention" else dim // 8)


def test_engines_read_layers_that_differ():
    settings = pytest.importorskip("spectrumkv_hf.engines.settings")
    text = CONFIG_MAPPING["gemma4_text"]()
    shape = settings.model_shape(text)
    assert shape.head_dim is None and shape.kv_heads == text.per_layer_config[0].num_key_value_heads
    assert [len(rotary.inv_freq) for rotary in shape.rotaries] == [d // 2 for d in shape.identity["head_dim"]]
    plain = settings.model_shape(config("llama"))
    assert (plain.kv_heads, plain.head_dim, len(set(plain.rotaries))) == (2, 16, 1)


def test_the_list_of_what_is_not_tiered():
    """`examples/list_architectures.py`, of which the README has the answer."""
    from list_architectures import untiered

    count, reasons = untiered()
    found = {name: reason for reason, names in reasons.items() for name in names}
    assert count > 150 and 15 < len(found) < 30
    for name in ("deepseek_v3", "minicpm3", "youtu"):
        assert found[name] == "MLA latents: not tiered"
    assert found["mamba"] == "linear_attention: not tiered"
    for name in ("llama", "jamba", "qwen3_next", "gemma3_text", "zamba", "zamba2", "falcon_h1", "bart", "gpt_oss"):
        assert name not in found


# -- models -----------------------------------------------------------------------------------------------------------


def forwards(m, cache, ids, chunks):
    with torch.no_grad():
        return torch.cat([m(part, past_key_values=cache).logits for part in ids.split(chunks, dim=1)], dim=1)


@pytest.mark.parametrize("model_type", CAUSAL)
def test_lossless_equals_stock(model_type):
    """Bit for bit; no check of a config refuses a model's own."""
    m = built(model_type)
    ids, chunks = prompt(34, seed=3), [28, *[1] * 6]
    try:
        expected = forwards(m, DynamicCache(config=m.config), ids, chunks)
    except Exception as problem:
        pytest.skip(f"over DynamicCache: {problem}"[:200])
    cache = SpectrumCache(m.config, policy="fp16", model=m)
    assert torch.equal(forwards(m, cache, ids, chunks), expected)


@pytest.mark.parametrize("model_type", CAUSAL)
def test_a_fixed_capacity_equals_stock(model_type):
    """From the beginning, and given to a cache that holds tokens, where that is not refused."""
    m = built(model_type)
    ids, chunks = prompt(34, seed=3), [25, 1, 1, 1, 3, 1, 1, 1]
    try:
        expected = forwards(m, DynamicCache(config=m.config), ids, chunks)
    except Exception as problem:
        pytest.skip(f"over DynamicCache: {problem}"[:200])
    cache = SpectrumCache(m.config, policy="fp16", max_cache_len=60)
    fixed = forwards(m, cache, ids, chunks)
    if cache.is_compileable:  # else a compiled step would break into many graphs
        held = [layer for layer in cache.layers if isinstance(layer, SpectrumLayer) and layer.is_initialized]
        assert all(layer.steps_alone for layer in held)
    assert ((fixed - expected).norm() / expected.norm()) < 1e-4
    cache = SpectrumCache(m.config, policy="fp16")
    before = forwards(m, cache, ids[:, :25], 25)
    if any(isinstance(layer, LinearStates) for layer in cache.layers):
        with pytest.raises(ValueError, match="linear attention"):
            cache.reserve(60)
    else:
        cache.reserve(60)
    reserved = torch.cat((before, forwards(m, cache, ids[:, 25:], chunks[1:])), dim=1)
    assert ((reserved - expected).norm() / expected.norm()) < 1e-4


def generate(m, cache):
    """Enough for tokens to be tiered after the prefill too."""
    kwargs = {"max_new_tokens": 74, "min_new_tokens": 74, "do_sample": False, "output_logits": True}
    return m.generate(prompt(300, batch=2), past_key_values=cache, return_dict_in_generate=True, **kwargs)


@functools.cache
def over_the_stock_cache(model_type):
    m = built(model_type)
    return generate(m, DynamicCache(config=m.config))


@pytest.mark.parametrize("model_type", [*HETEROGENEOUS, *HYBRID])
class TestDecoders:
    """What is new: layers that differ, and attention beside a linear attention."""

    @pytest.mark.parametrize(("policy", "budget"), [("fp16", None), ("greedy", 1.0)])
    def test_greedy_tokens(self, model_type, policy, budget):
        m, expected = built(model_type), over_the_stock_cache(model_type)
        cache = SpectrumCache(m.config, policy=policy, budget=budget, recent_window=4)
        got = generate(m, cache)
        assert torch.equal(got.sequences, expected.sequences)
        for a, b in zip(got.logits, expected.logits, strict=True):
            assert torch.equal(a, b) if policy == "fp16" else ((a - b).norm() / b.norm()) < 1e-4
        tiered = [layer for layer in cache.layers if isinstance(layer, SpectrumLayer)]
        assert tiered and all(bool(layer.store.arenas) == (policy != "fp16") for layer in tiered)

    @pytest.mark.parametrize("budget", [0.3, 0.5])
    def test_tiers_equal_the_dequantised_ones(self, model_type, budget, monkeypatch):
        m = built(model_type)
        ids = prompt(300, batch=2)
        caches = [SpectrumCache(m.config, budget=budget, recent_window=8) for _ in range(2)]
        chunks = [292, *[1] * 8]
        fused = forwards(m, caches[0], ids, chunks)
        monkeypatch.setattr(attention, "FUSED", ())
        materialised = forwards(m, caches[1], ids, chunks)
        assert ((fused - materialised).norm() / materialised.norm()) < 1e-5
        assert caches[0].memory().parts["int8.keys.codes"] > 0
        stock = forwards(m, DynamicCache(config=m.config), ids, chunks)
        assert torch.equal(fused[:, :292], stock[:, :292]) and not torch.equal(fused, stock)

    def test_round_trip(self, model_type):
        """The states of a linear attention travel with the tiers."""
        m = built(model_type)
        ids = prompt(320, batch=2)
        cache = SpectrumCache(m.config, budget=0.4, recent_window=8)
        forwards(m, cache, ids[:, :300], 300)
        other = SpectrumCache.deserialize(cache.serialize(), m.config)
        assert torch.equal(other.serialize(), cache.serialize())
        expected = forwards(m, cache, ids[:, 300:], 1)
        assert torch.equal(forwards(m, other, ids[:, 300:], 1), expected)

    @pytest.mark.parametrize("operation", ["reorder", "select", "repeat", "reset", "deepcopy"])
    def test_operations(self, model_type, operation):
        m = built(model_type)
        ids, more = prompt(300, batch=3), prompt(4, batch=3, seed=5)

        def filled(rows):
            cache = SpectrumCache(m.config, budget=0.4, recent_window=8)
            forwards(m, cache, ids[rows], 300)
            return cache

        cache, rows = filled([0, 1, 2]), [0, 1, 2]
        if operation == "reorder":
            rows = [2, 0, 0]
            cache.reorder_cache(torch.tensor(rows))
        elif operation == "select" and "gemma4" in model_type:
            rows = [2]
            cache.batch_select_indices(torch.tensor(rows))
        elif operation == "repeat" and "gemma4" in model_type:
            rows = [0, 0, 1, 1, 2, 2]
            cache.batch_repeat_interleave(2)
        elif operation in ("select", "repeat"):  # Transformers' own linear layers lack these
            for layer in cache.layers:
                if isinstance(layer, SpectrumLayer):
                    before = [state.clone() for state in layer.states()]
                    layer.batch_select_indices(torch.tensor([2, 1]))
                    layer.batch_repeat_interleave(2)
                    for old, new in zip(before, layer.states(), strict=True):
                        assert torch.equal(old[[2, 2, 1, 1]], new)
            return
        elif operation == "reset":
            forwards(m, cache, more, 1)
            cache.reset()
            forwards(m, cache, ids, 300)
        else:
            cache = copy.deepcopy(cache)
        expected = forwards(m, filled(rows), more[rows], 1)
        assert ((forwards(m, cache, more[rows], 1) - expected).norm() / expected.norm()) < 1e-5


class TestHybrid:
    def test_layers(self):
        m = built("falcon_h1")
        cache = SpectrumCache(m.config, budget=0.3, recent_window=8)
        assert {type(layer) for layer in cache.layers} == {HybridSpectrumLayer}
        assert "tiered, sink_protect b=0.3, beside exact states" in cache.summary()
        forwards(m, cache, prompt(300), 300)
        states = sum(t.nbytes for layer in cache.layers for t in layer.states())
        assert cache.memory().parts["uncompressed"] == states > 0
        assert not cache.is_croppable
        with pytest.raises(RuntimeError, match="does not track past states"):
            cache.layers[0].crop(-1)
        assert cache.layers[0].get_seq_length() == 300

    def test_sliding(self):
        m = built("inkling_text")
        cache = SpectrumCache(m.config, budget=0.3, recent_window=8)
        assert [type(layer) for layer in cache.layers] == [HybridSlidingSpectrumLayer, HybridSpectrumLayer] * 2
        forwards(m, cache, prompt(400), 400)
        assert cache.layers[0].store.first_kept > 0

    def test_files_from_before(self):
        """Hybrid layers used to be Transformers' own; such a cache goes on as it was written."""
        m = built("falcon_h1")
        ids = prompt(120)
        cache = SpectrumCache(m.config, budget=0.3, recent_window=8)
        for index in range(len(cache.layers)):
            cache.use_stock(index)
        forwards(m, cache, ids[:, :100], 100)
        other = SpectrumCache.deserialize(cache.serialize(), m.config)
        assert "not tiered where the cache was written" in other.summary()
        assert torch.equal(forwards(m, other, ids[:, 100:], 1), forwards(m, cache, ids[:, 100:], 1))

    def test_a_stream_is_whole(self):
        """States may follow a layer's attention: no layer goes out before they are there."""
        from spectrumkv_hf.wire import Assembler, Emitter

        m = built("zamba")
        cache, frames = SpectrumCache(m.config, budget=0.4, recent_window=8), []
        with Emitter(cache, emit=frames.append):
            forwards(m, cache, prompt(300), 300)
        assembler = Assembler(SpectrumCache, m.config)
        received = [assembler.feed(frame) for frame in frames][-1]
        more = prompt(5, seed=9)
        assert torch.equal(forwards(m, received, more, 1), forwards(m, cache, more, 1))


# -- encoder-decoders -------------------------------------------------------------------------------------------------


class Encoded(BaseModelOutput):
    """An encoder's output with what some models look for in it."""

    attention_mask = router_logits = None


@pytest.mark.parametrize("model_type", SEQ_TO_SEQ)
def test_encoder_decoder_equals_stock(model_type):
    m = built(model_type, "seq_to_seq")
    if not m.config.is_encoder_decoder:
        pytest.skip("a decoder")
    text = m.config.get_text_config(decoder=True)
    width = getattr(text, "cross_hidden_size", None) or 64
    encoded = torch.randn(2, 60, width, generator=torch.Generator().manual_seed(1))
    ids = prompt(185, batch=2)
    ids = ids[..., None].expand(-1, -1, 3) if model_type == "dia" else ids

    def logits(cache):
        with torch.no_grad():
            return torch.cat(
                [
                    m(
                        encoder_outputs=Encoded(last_hidden_state=encoded),
                        decoder_input_ids=part,
                        past_key_values=cache,
                        use_cache=True,
                    ).logits
                    for part in ids.split([180, *[1] * 5], dim=1)
                ],
                dim=1,
            )

    before = state_of(m.config)
    try:
        expected = logits(EncoderDecoderCache(DynamicCache(config=text), DynamicCache()))
    except Exception as problem:
        pytest.skip(f"over DynamicCache: {problem}"[:200])
    cache = SpectrumCache.for_encoder_decoder(m.config, policy="fp16")
    assert torch.equal(logits(cache), expected)
    assert {layer.keys.shape[2] for layer in cache.cross_attention_cache.layers} == {60}
    tiered = SpectrumCache.for_encoder_decoder(m.config, policy="uniform_int8", recent_window=4)
    error = (logits(tiered) - expected).norm() / expected.norm()
    ours = [layer for layer in tiered.self_attention_cache.layers if isinstance(layer, SpectrumLayer)]
    held = [layer for layer in ours if layer.get_seq_length() > 180]  # FSMT of 5.17 takes the last token only
    assert ours and all(layer.store.arenas for layer in held) and error < 0.1
    assert state_of(m.config) == before


BUILT = "bart encoder-decoder florence2 pix2struct t5 t5gemma t5gemma2 whisper dia moonshine canary mbart marian led"


@pytest.mark.parametrize("model_type", BUILT.split())
def test_these_are_among_them(model_type):
    """So that the tests above can't become empty."""
    if model_type not in CONFIG_MAPPING:
        pytest.skip("not in this version of Transformers")
    assert not isinstance(zoo_model(model_type, "seq_to_seq"), str)


def test_most_decoders_are_among_them():
    assert sum(not isinstance(zoo_model(model_type, "causal"), str) for model_type in CAUSAL) > 130


# -- Mllama -----------------------------------------------------------------------------------------------------------


class TestMllama:
    """Layers 1 and 3 attend to an image, whose tokens are stored once."""

    @pytest.fixture
    def m(self):
        text = transformers.models.mllama.configuration_mllama.MllamaTextConfig(
            vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4,
            num_key_value_heads=2, cross_attention_layers=[1, 3], max_position_embeddings=1024, pad_token_id=0,
            bos_token_id=1, eos_token_id=None,
        )  # fmt: skip
        torch.manual_seed(7)
        made = transformers.MllamaForCausalLM._from_config(text).eval()
        with torch.no_grad():
            for name, parameter in made.named_parameters():
                if parameter.dim() > 1:
                    parameter.mul_(4.0)
                if "gate" in name:  # 0 at first, which would hide the image
                    parameter.fill_(1.0)
        return made

    def run(self, m, cache, ids, states=None):
        with torch.no_grad():
            return m(ids, past_key_values=cache, cross_attention_states=states).logits

    def filled(self, m, ids, states, **options):
        cache = DynamicCache(config=m.config) if not options else SpectrumCache(m.config, recent_window=8, **options)
        return cache, self.run(m, cache, ids, states)

    @pytest.fixture
    def states(self):
        return torch.randn(2, 33, 64, generator=torch.Generator().manual_seed(2))

    def test_summary_tells(self, m):
        cache = SpectrumCache(m.config, budget=0.3)
        assert "2 x CrossAttentionLayer: cross-attention: exact, not tiered" in cache.summary()
        assert "2 x SpectrumLayer: tiered" in cache.summary()

    @pytest.mark.parametrize("options", [{"policy": "fp16"}, {"budget": 0.4}], ids=str)
    def test_round_trip(self, m, states, options):
        ids, more = prompt(300, batch=2), prompt(1, batch=2, seed=5)
        cache, logits = self.filled(m, ids, states, **options)
        stock, expected = self.filled(m, ids, states)
        assert torch.equal(logits, expected)
        assert torch.equal(cache.layers[1].keys, stock.layers[1].keys) and cache.layers[1].keys.shape[2] == 33
        other = SpectrumCache.deserialize(cache.serialize(), m.config)
        continued = self.run(m, cache, more)
        assert torch.equal(self.run(m, other, more), continued)
        if options == {"policy": "fp16"}:
            assert torch.equal(continued, self.run(m, stock, more))

    def test_dropped_text_and_beams(self, m, states):
        cache, _ = self.filled(m, prompt(300, batch=2), states, policy="drop_scored", budget=0.5)
        image = cache.layers[1].keys.clone()
        cache.reorder_cache(torch.tensor([1, 1]))
        assert torch.equal(cache.layers[1].keys, image[[1, 1]]) and image.abs().sum(-1).min() > 0
        self.run(m, cache, prompt(1, batch=2, seed=5))

    def test_files_from_before(self, m):
        """Without an image the layers were tiered ones without tokens."""
        cache = SpectrumCache(m.config, budget=0.4, recent_window=8)
        ids = prompt(200)
        self.run(m, cache, ids)
        blank = SpectrumCache(config("llama"), budget=0.4, recent_window=8).layers[0]
        assert isinstance(cache.layers[1], CrossAttentionLayer) and not cache.layers[1].is_initialized
        cache.layers[1] = cache.layers[3] = blank
        other = SpectrumCache.deserialize(cache.serialize(), m.config)
        assert isinstance(other.layers[1], CrossAttentionLayer)
        assert torch.equal(self.run(m, other, prompt(1)), self.run(m, cache, prompt(1)))


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_keys_of_a_layer_that_dropped_tokens(family):
    m = model(family, "sdpa", **({"sliding_window": 160} if family == "gemma3" else {}))
    cache = SpectrumCache(m.config, policy="drop_scored", budget=0.5, recent_window=8)
    assert cache.layers[0].keys is None
    forwards(m, cache, prompt(60), 60)
    assert cache.layers[0].keys.shape[2] == 60  # nothing dropped yet
    forwards(m, cache, prompt(300), 300)
    for layer in cache.layers:
        for side in ("keys", "values"):
            handle = getattr(layer, side)
            assert handle.shape == (1, 2, layer.get_mask_sizes(0)[0], m.config.head_dim) and handle.numel() > 0
            with pytest.raises(RuntimeError, match="'drop_scored' dropped tokens"):
                handle.clone()
    kept = int((cache.layers[0].tier_map() == 0).any(1)[0].nonzero()[0])  # tokens before the first dropped one
    if family == "llama" and kept:
        cache.crop(kept - cache.get_seq_length())
        assert cache.layers[0].keys.clone().shape[2] == kept


# -- what is said -----------------------------------------------------------------------------------------------------


class TestWarnings:
    def test_a_budget_that_compresses_nothing(self, caplog):
        with caplog.at_level(logging.WARNING):
            for _ in range(2):
                SpectrumCache(config("deepseek_v3"), budget=0.3)
        (record,) = caplog.records
        assert "compresses nothing" in record.message and "2 x DynamicLayer: MLA latents" in record.message

    def test_not_where_something_is_compressed_or_nothing_should_be(self, caplog):
        with caplog.at_level(logging.WARNING):
            SpectrumCache(config("qwen3_next"), budget=0.3)
            SpectrumCache(config("deepseek_v3"), policy="fp16")
        assert not caplog.records

    def test_a_cache_that_generate_will_drop(self, caplog):
        switch = {"original_max_position_embeddings": 64, "max_position_embeddings": 256}
        long = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
        m = model("phi3")
        given = type(m.config)(**{**config("phi3").to_dict(), **switch, "rope_parameters": {**long, **switch}})
        torch.manual_seed(0)
        m = transformers.Phi3ForCausalLM._from_config(given).eval()
        with caplog.at_level(logging.WARNING):
            cache = SpectrumCache(m.config, budget=0.5)
        assert any("behind 64 tokens" in record.message for record in caplog.records)
        out = m.generate(prompt(60), past_key_values=cache, max_new_tokens=10, return_dict_in_generate=True)
        assert out.past_key_values is not cache, "Transformers has stopped doing it: take the warning out"

    def test_the_models_that_do_so(self):
        """`RECOMPUTED` is what the installed Transformers' sources say."""
        found = set()
        for package in pkgutil.iter_modules(transformers.models.__path__):
            try:
                module = importlib.import_module(f"transformers.models.{package.name}.modeling_{package.name}")
            except ImportError:
                continue
            for name, cls in vars(module).items():
                own = vars(cls).get("prepare_inputs_for_generation") if isinstance(cls, type) else None
                if own and cls.__module__ == module.__name__ and name != "GenerationMixin":
                    source = inspect.getsource(own)
                    if re.search(r"^\s+(past_key_values|cache) = None", source, re.MULTILINE):
                        found.add(package.name)
        assert found == fit.RECOMPUTED


# -- wrong models -----------------------------------------------------------------------------------------------------


class TestWrongModels:
    def refused(self, given, message, m=None):
        m = m or model("llama", "sdpa")
        cache = SpectrumCache(given, budget=0.5)
        with pytest.raises(ValueError, match=message), torch.no_grad():
            m(prompt(300), past_key_values=cache)

    def changed(self, family="llama", **changes):
        return type(config(family))(**{**config(family).to_dict(), **changes})

    def test_fewer_layers(self):
        self.refused(self.changed(num_hidden_layers=1), "its config has 1 layers, got keys and values of layer 1")

    def test_other_heads(self):
        for heads in (1, 4):
            self.refused(self.changed(num_key_value_heads=heads), f"LlamaConfig has {heads} KV heads, got 2")

    def test_another_head_dim(self):
        self.refused(self.changed(head_dim=32), "a head_dim of 16 or 32|a head_dim of 32|a RoPE over 32 channels")

    def test_another_rope(self):
        """Keys don't show their angles: RoPE is compared where the model is at hand, and in files."""
        other = self.changed(rope_parameters={"rope_type": "default", "rope_theta": 5e5})
        with pytest.raises(ValueError, match="config is not this model's: rope_parameters is .*500000"):
            SpectrumCache(other, model=model("llama"))
        cache = SpectrumCache(config("llama"), model=model("llama"))
        with pytest.raises(ValueError, match="another model: rope_parameters"):
            SpectrumCache.deserialize(cache.serialize(), other)

    @pytest.mark.parametrize("name", ["BertConfig", "CLIPConfig", "ViTConfig"])
    def test_no_decoder(self, name, caplog):
        with caplog.at_level(logging.WARNING):
            self.refused(getattr(transformers, name)(), "is an encoder's unless|of a model which keeps no cache")
        assert any("can't be used" in record.message for record in caplog.records)

    def test_bert_itself(self):
        small = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
        m = transformers.BertLMHeadModel(transformers.BertConfig(vocab_size=97, **small)).eval()
        self.refused(m.config, "BertConfig is an encoder's unless is_decoder=True", m)
        decoder = transformers.BertConfig(vocab_size=97, is_decoder=True, **small)
        m = transformers.BertLMHeadModel(decoder).eval()
        expected = forwards(m, DynamicCache(config=decoder), prompt(40), 10)
        assert torch.equal(forwards(m, SpectrumCache(decoder, policy="fp16"), prompt(40), 10), expected)

    def test_which_are_encoders_unless_told(self):
        """The list is what the installed Transformers' sources say."""
        found = set()
        for model_type in CAUSAL:
            if hasattr(made := default_config(model_type), "is_decoder"):
                module = importlib.import_module(type(made).__module__.replace("configuration_", "modeling_"))
                if "as a standalone, add" in inspect.getsource(module):
                    found.add(model_type)
        assert found == fit.ENCODERS_UNLESS_TOLD

    def test_what_generates_is_no_encoder(self):
        """Of all model types that generate none is refused but those told to be decoders."""
        for model_type in {**CAUSAL, **SEQ_TO_SEQ}:
            if (made := default_config(model_type)) is not None:
                text = made.get_text_config(decoder=True)
                if model_type not in fit.ENCODERS_UNLESS_TOLD:
                    assert fit.no_decoder(made, text) is None, model_type

    def test_workers_share_heads(self, monkeypatch):
        expected = fit.Expected.of(self.changed(num_key_value_heads=4))
        with pytest.raises(ValueError, match="4 KV heads, got 2"):
            expected.check(0, 0, torch.zeros(1, 2, 3, 16))
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
        expected.check(0, 0, torch.zeros(1, 2, 3, 16))
        with pytest.raises(ValueError, match="4 KV heads, got 3"):
            expected.check(0, 0, torch.zeros(1, 3, 3, 16))

    def test_nothing_is_changed_by_a_refusal(self):
        cache = SpectrumCache(self.changed(num_key_value_heads=1))
        with pytest.raises(ValueError, match="KV heads"):
            cache.update(torch.zeros(1, 2, 3, 16), torch.zeros(1, 2, 3, 16), 0)
        assert cache.get_seq_length() == 0
        cache.update(torch.zeros(1, 1, 3, 16), torch.zeros(1, 1, 3, 16), 0)

    def test_a_config_of_ones_own(self):
        """Nothing is expected of classes that Transformers doesn't know."""

        class OwnConfig(type(config("llama"))):
            model_type = "own"

        own = OwnConfig(**{**config("llama").to_dict(), "num_key_value_heads": 1})
        SpectrumCache(own).update(torch.zeros(1, 2, 3, 16), torch.zeros(1, 2, 3, 16), 0)
