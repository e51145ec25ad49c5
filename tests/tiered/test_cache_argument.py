"""The name by which models take a cache, which Transformers 5.24 changed: this package never passes the old one."""

from contextlib import nullcontext

import pytest
import torch
import transformers
from families import model, prompt
from packaging.version import Version
from transformers import BartConfig, BartForConditionalGeneration

from spectrumkv_hf import SpectrumCache, cache_argument
from spectrumkv_hf.evaluation.protocols.quality import continuation_quality
from spectrumkv_hf.evaluation.subjects.methods import parse_method
from spectrumkv_hf.probe import CalibrationProbe

NEW = Version(transformers.__version__) >= Version("5.24")
pytestmark = pytest.mark.filterwarnings("error:.past_key_values:FutureWarning")


class Wrapper(torch.nn.Module):
    """Passes on what it is given, as PEFT's models do."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, *args, **kwargs):
        return self.inner(*args, **kwargs)


class Custom(torch.nn.Module):
    """Code from elsewhere, which knows the old name only."""

    def forward(self, input_ids, past_key_values=None):
        return past_key_values


class Both(torch.nn.Module):
    def forward(self, input_ids, past_key_values=None, cache=None):
        return cache


def test_the_name_of_the_installed_version():
    cache, m = SpectrumCache(model("llama").config), model("llama")
    assert cache_argument(cache) == cache_argument(cache, m) == {"cache" if NEW else "past_key_values": cache}
    assert cache_argument(cache, Wrapper(m)) == cache_argument(cache)
    assert Custom()(None, **cache_argument(cache, Custom())) is cache
    assert Both()(None, **cache_argument(cache, Both())) is cache


@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen3_next"])
def test_models_of_all_kinds_take_it(family):
    """Without a warning, and what they were given is filled."""
    m, ids = model(family), prompt(100)
    cache = SpectrumCache(m.config)
    with torch.inference_mode():
        m.generate(ids, max_new_tokens=3, do_sample=False, **cache_argument(cache))
        assert cache.get_seq_length() == 102
        m(ids[:, :1], **cache_argument(cache, m))
        assert cache.get_seq_length() == 103


def test_an_encoder_decoder_takes_it():
    config = BartConfig(
        vocab_size=97, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32,
    )  # fmt: skip
    m = BartForConditionalGeneration(config).eval()
    cache = SpectrumCache.for_encoder_decoder(m.config)
    with torch.inference_mode():
        m(prompt(30), decoder_input_ids=prompt(20), **cache_argument(cache, m))
    assert cache.get_seq_length() == 20


@pytest.mark.parametrize("call", ["generate", "forward"])
def test_either_name(call):
    """Transformers takes the old name on every version, the new one from 5.24 on."""
    m, ids, results = model("llama"), prompt(200), []
    for name in ("past_key_values", "cache") if NEW else ("past_key_values",):
        cache = SpectrumCache(m.config, budget=0.3)
        old = NEW and name == "past_key_values"
        with torch.inference_mode(), pytest.warns(FutureWarning, match=name) if old else nullcontext():
            if call == "generate":
                results.append(m.generate(ids, max_new_tokens=8, do_sample=False, **{name: cache}))
            else:
                results.append(m(ids, **{name: cache}).logits)
        assert cache.get_seq_length() == ids.shape[1] + 7 * (call == "generate")
    assert all(torch.equal(results[0], other) for other in results)


@pytest.mark.skipif(NEW, reason="takes either name")
def test_the_new_name_on_an_old_version_is_refused():
    """Nothing is answered from another cache than the one that was given."""
    m = model("llama")
    with pytest.raises(TypeError, match="takes a cache as past_key_values"), torch.inference_mode():
        m(prompt(20), cache=SpectrumCache(m.config))
    with pytest.raises(ValueError, match="cache"):
        m.generate(prompt(20), max_new_tokens=2, cache=SpectrumCache(m.config))


def test_the_probe_and_the_evaluation():
    m, probe = model("llama"), CalibrationProbe(context=200, continuation=40)
    with torch.no_grad():
        probe.measure(m, None, probe.inputs(m, None))
    continuation_quality(m, prompt(240), 200, parse_method("sink_protect:0.3"))
