"""The cache over the Triton kernels: natively where there is a GPU, else in Triton's interpreter."""

import pytest
import torch
from families import model, prompt

from spectrumkv_hf import SpectrumCache
from spectrumkv_kernels.dispatch import VARIABLE

pytest.importorskip("triton")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def logits(monkeypatch, kernels, m, ids, mask=None, **options):
    """Of the last prompt token and of three more, which read the tiers."""
    monkeypatch.setenv(VARIABLE, kernels)
    cache, out = SpectrumCache(m.config, **options), []
    with torch.inference_mode():
        for step in (ids[:, :-3], *ids[:, -3:].split(1, dim=1)):
            seen = cache.get_seq_length() + step.shape[1]
            given = None if mask is None else mask[:, :seen]
            out.append(m(step, attention_mask=given, past_key_values=cache, use_cache=True).logits[:, -1])
    return torch.stack(out), cache


def close(a, b):
    """Weights and queries have 11 bits in the kernels, and what they are wrong by goes through all layers."""
    return (a - b).norm() < 5e-3 * b.norm()


@pytest.mark.parametrize("budget", [0.3, 0.5, 0.75])
@pytest.mark.parametrize("family, sizes", [("llama", {}), ("gemma3", {"sliding_window": 200})])
def test_like_plain_pytorch(family, sizes, budget, monkeypatch):
    m, ids = model(family, "sdpa", **sizes).to(DEVICE), prompt(300).to(DEVICE)
    expected, _ = logits(monkeypatch, "torch", m, ids, budget=budget)
    out, cache = logits(monkeypatch, "triton", m, ids, budget=budget)
    assert all(layer.store.arenas for layer in cache.layers)
    assert close(out, expected)


def test_padded_batch(monkeypatch):
    m, ids = model("llama", "sdpa").to(DEVICE), torch.cat((prompt(300), prompt(300).flip(1))).to(DEVICE)
    mask = torch.ones_like(ids)
    mask[1, :37] = 0
    expected, _ = logits(monkeypatch, "torch", m, ids, mask, budget=0.3)
    out, _ = logits(monkeypatch, "triton", m, ids, mask, budget=0.3)
    assert close(out, expected)
