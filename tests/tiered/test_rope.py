"""Rotary tables from configs equal what the models' own rotary embeddings compute."""

import pytest
import torch
import transformers
from families import config
from transformers.models.cohere.modeling_cohere import CohereRotaryEmbedding
from transformers.models.gemma3.modeling_gemma3 import Gemma3RotaryEmbedding
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding
from zoo import zoo_model

from spectrumkv_hf.tiered.identity import layer_configs
from spectrumkv_hf.tiered.rope import rotary_of
from spectrumkv_kernels import Rotary

POSITIONS = torch.tensor([[0, 1, 17, 300]])
ROPES = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 128,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256},
}


def assert_same_rotation(rotary, cos, sin, interleaved=False):
    """The model's `x cos + rotate_half(x) sin`, but for a constant factor, against `rotate`."""
    x = torch.randn(1, 1, cos.shape[-1] + 6)
    size = cos.shape[-1]
    part = x[..., :size]
    if interleaved:
        turned = torch.stack((-part[..., 1::2], part[..., ::2]), -1).flatten(-2)
    else:
        turned = torch.cat((-part[..., size // 2 :], part[..., : size // 2]), -1)
    expected = part * cos + turned * sin
    expected = expected * part.norm() / expected.norm(dim=-1, keepdim=True)  # YaRN scales cos and sin
    got = rotary.rotate(x, POSITIONS)
    assert (got[..., :size] - expected).abs().max() < 1e-4
    assert torch.equal(got[..., size:], x[..., size:].expand(-1, 4, -1))


@pytest.mark.parametrize("kind", ROPES)
def test_llama(kind):
    c = config("llama")
    c = type(c)(**{**c.to_dict(), "rope_parameters": {"rope_theta": 5e5, **ROPES[kind]}})
    cos, sin = LlamaRotaryEmbedding(c)(torch.zeros(1), POSITIONS)
    assert_same_rotation(rotary_of(c, "full_attention"), cos, sin)


def test_partial():
    c = config("phi3")
    cos, sin = Phi3RotaryEmbedding(c)(torch.zeros(1), POSITIONS)
    assert cos.shape[-1] == 8  # half of the 16 channels
    assert_same_rotation(rotary_of(c, "full_attention"), cos, sin)


@pytest.mark.parametrize("layer_type", ["sliding_attention", "full_attention"])
def test_per_layer_type(layer_type):
    c = config("gemma3")
    cos, sin = Gemma3RotaryEmbedding(c)(torch.zeros(1), POSITIONS, layer_type)
    assert_same_rotation(rotary_of(c, layer_type), cos, sin)
    assert rotary_of(c, "sliding_attention") != rotary_of(c, "full_attention")


@pytest.mark.parametrize("model_type", ["gemma4_text", "zaya", "zamba2", "falcon_h1"])
def test_of_each_layer(model_type):
    """Layers of different heads (Gemma-4), and attention beside a linear attention."""
    built = zoo_model(model_type, "causal")
    if isinstance(built, str):
        pytest.skip(built)
    found = [module for name, module in built.named_modules() if name.endswith("rotary_emb")][0]
    text = built.config
    kinds = text.layer_types if hasattr(text, "layer_types") else ["hybrid"] * text.num_hidden_layers
    for layer, kind in zip(layer_configs(text), kinds, strict=True):
        if "attention" in kind and "linear" not in kind or "hybrid" in kind:
            named = (kind,) if isinstance(text.rope_parameters.get(kind), dict) else ()
            assert_same_rotation(rotary_of(layer, kind), *found(torch.zeros(1), POSITIONS, *named))


def test_parameters_that_a_model_does_not_use():
    made = transformers.Zamba2Config()
    assert made.rope_parameters and not made.use_mem_rope and rotary_of(made, "hybrid") == Rotary()


def test_interleaved():
    c = transformers.CohereConfig(hidden_size=64, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=2)
    cos, sin = CohereRotaryEmbedding(c)(torch.zeros(1), POSITIONS)
    assert rotary_of(c).interleaved
    assert_same_rotation(rotary_of(c), cos, sin, interleaved=True)


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_length_dependent_tables_give_the_plain_mean(kind):
    c = config("llama")
    parameters = {
        "rope_type": kind,
        "rope_theta": 1e4,
        "factor": 2.0,
        "original_max_position_embeddings": 512,
        "short_factor": [1.0] * 8,
        "long_factor": [2.0] * 8,
    }
    c = type(c)(**{**c.to_dict(), "rope_parameters": parameters})
    assert rotary_of(c) == Rotary()


def test_models_without_rope_give_the_plain_mean():
    assert rotary_of(config("gpt2")) == Rotary()
