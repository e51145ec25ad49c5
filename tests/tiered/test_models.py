"""Loading models to measure: weights in 4 and 8 bit from a local folder."""

import argparse
import logging

import families
import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from spectrumkv_hf.evaluation.protocols.quality import continuation_quality
from spectrumkv_hf.evaluation.subjects.methods import parse_method
from spectrumkv_hf.evaluation.subjects.models import add_model_arguments, load_from


def arguments(*given: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_model_arguments(parser)
    return parser.parse_args(given)


@pytest.fixture
def folder(tmp_path):
    """A tiny Llama and a tokenizer of whole words, saved. On a CPU, 4 bit takes widths that are multiples of 64."""
    families.model("llama", intermediate_size=128).save_pretrained(tmp_path)
    words = Tokenizer(models.WordLevel({str(i): i for i in range(97)}, unk_token="0"))
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(tmp_path)
    return str(tmp_path)


@pytest.mark.parametrize("load_in, layer", [("4bit", "Linear4bit"), ("8bit", "Linear8bitLt")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_load_in(folder, load_in, layer, dtype, caplog):
    pytest.importorskip("bitsandbytes")
    pytest.importorskip("accelerate")
    name = str(dtype).removeprefix("torch.")
    model, tokenizer = load_from(arguments("--model", folder, "--dtype", name, "--load-in", load_in))
    plain, _ = load_from(arguments("--model", folder, "--dtype", name))
    attention = model.model.layers[0].self_attn
    assert type(attention.q_proj).__name__ == layer and attention.q_proj.weight.dtype != dtype
    assert model.get_memory_footprint() < plain.get_memory_footprint()
    assert model.dtype == dtype and not model.training and tokenizer is not None
    ids = families.prompt(100)
    with torch.inference_mode(), caplog.at_level(logging.WARNING):
        out = model(input_ids=ids)
        expected = plain(input_ids=ids).logits.float()
    assert out.past_key_values.layers[0].keys.dtype == dtype
    assert not any("MatMul8bitLt" in record.message for record in caplog.records)  # one for every product otherwise
    error = (out.logits.float() - expected).norm() / expected.norm()
    assert 0 < error < (0.5 if load_in == "4bit" else 0.1)
    quality = continuation_quality(model, ids, 60, parse_method("sink_protect:0.5", recent_window=0))
    assert quality.kl < 0.1 and quality.actual_ratio > 0


@pytest.mark.parametrize("name", ["smollm2", "some.gguf", "random-llama-3-8b"])
def test_load_in_needs_weights_to_quantise(name):
    with pytest.raises(ValueError, match="--load-in"):
        load_from(arguments("--model", name, "--load-in", "4bit"))
