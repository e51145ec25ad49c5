"""Bad input gets a clear error, and changes nothing."""

import copy

import pytest
import torch
import transformers
from families import config, model, prompt

from spectrumkv_hf import SpectrumCache


def used(batch=1, **options):
    m = model("llama", "sdpa")
    cache = SpectrumCache(m.config, **{"budget": 0.3, "recent_window": 8, **options})
    with torch.no_grad():
        m(prompt(200, batch), past_key_values=cache)
    return m, cache


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"budget": 0.1}, ValueError, "sink_protect.*0.25 to 1.*got 0.1"),
        ({"budget": -1}, ValueError, "got -1"),
        ({"budget": 2}, ValueError, "got 2"),
        ({"policy": "uniform_int4", "budget": 0.5}, ValueError, "has the budget 0.25, got 0.5"),
        ({"policy": "snapkv"}, ValueError, "unknown policy 'snapkv': choose from fp16, greedy, sink_protect"),
        ({"codec": "zip"}, ValueError, "unknown codec 'zip': choose from spectrum, spectrum2, absmax"),
        ({"window": 3}, TypeError, "no option window"),
    ],
)
def test_construction(arguments, error, message):
    with pytest.raises(error, match=message):
        SpectrumCache(config("llama"), **arguments)


def test_config_of_a_wrong_type():
    with pytest.raises(TypeError, match="model.config.*got dict"):
        SpectrumCache({"hidden_size": 64})


def test_encoder_decoder_bare():
    with pytest.raises(ValueError, match="encoder-decoder.*for_encoder_decoder"):
        SpectrumCache(transformers.BartConfig())
    with pytest.raises(ValueError, match="no encoder-decoder"):
        SpectrumCache.for_encoder_decoder(config("llama"))


def test_another_batch_size():
    m, cache = used()
    before = cache.layers[0].keys
    with torch.no_grad(), pytest.raises(ValueError, match="holds 200 tokens of batch 1.*got batch 2.*reset"):
        m(prompt(1, batch=2), past_key_values=cache)
    assert cache.get_seq_length() == 200
    assert torch.equal(cache.layers[0].keys, before)


def test_unsupported_dtype():
    layer = SpectrumCache(config("llama")).layers[0]
    with pytest.raises(TypeError, match="float16 or torch.bfloat16 or torch.float32 or torch.float64.*got torch.int8"):
        layer.update(torch.zeros(1, 2, 4, 16, dtype=torch.int8), torch.zeros(1, 2, 4, 16, dtype=torch.int8))


def test_another_device_on_a_used_cache():
    _, cache = used()
    before = cache.get_seq_length()
    elsewhere = torch.zeros(1, *cache.layers[0].store.buffers[0].shape[1:], device="meta")[:, :, :1]
    with torch.no_grad(), pytest.raises(ValueError, match="layer 0 lies on cpu, got keys on meta.*take a device"):
        cache.update(elsewhere, elsewhere, 0)
    assert cache.get_seq_length() == before


def test_another_dtype_on_a_used_cache():
    _, cache = used()
    m = copy.deepcopy(model("llama", "sdpa")).bfloat16()
    with torch.no_grad(), pytest.raises(TypeError, match="holds keys and values of.*float32.*got.*bfloat16"):
        m(prompt(1), past_key_values=cache)
    assert cache.get_seq_length() == 200


def test_another_model():
    _, cache = used()
    other = model("qwen3", "sdpa")
    with torch.no_grad(), pytest.raises(ValueError, match="head_dim 16; got.*head_dim 32"):
        other(prompt(1), past_key_values=cache)


def test_positive_crop():
    _, cache = used()
    with pytest.raises(ValueError, match="negative number.*got 5"):
        cache.crop(5)
    assert cache.get_seq_length() == 200


def test_odd_head_dim():
    layer = SpectrumCache(config("llama")).layers[0]
    with pytest.raises(ValueError, match="a multiple of 2, got 15 for keys"):
        layer.update(torch.zeros(1, 2, 4, 15), torch.zeros(1, 2, 4, 16))


def test_tiers_can_be_read_but_not_assigned_to():
    _, cache = used()
    before = cache.layers[0].keys
    for side in ("keys", "values"):
        with pytest.raises(AttributeError, match="layer 0: keys and values can be assigned.*'fp16'.*'sink_protect'"):
            setattr(cache.layers[0], side, torch.zeros(1, 2, 3, 16))
    assert torch.equal(cache.layers[0].keys, before)


def test_from_model_without_a_probe_takes_the_default_policy():
    m = model("llama", "sdpa")
    cache = SpectrumCache.from_model(m, tokenizer=None, budget=0.3, probe=None)
    assert (cache.policy.name, cache.policy.budget) == ("sink_protect", 0.3)


def test_importing_changes_nothing_in_transformers():
    import subprocess
    import sys

    code = (
        "from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as f; import spectrumkv_hf; "
        "assert 'get_interface' not in vars(f) and 'spectrumkv' in f"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
