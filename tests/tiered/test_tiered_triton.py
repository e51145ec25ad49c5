"""The cache over the Triton kernels: natively where there is a GPU, else in Triton's interpreter."""

import pytest
import torch
from families import model, prompt

from spectrumkv_hf import SpectrumCache
from spectrumkv_hf.probe import CalibrationProbe
from spectrumkv_kernels.backend.dispatch import VARIABLE

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


LLAMA, GEMMA = ("llama", {}), ("gemma3", {"sliding_window": 200})
OTHERS = [(*GEMMA, 0.3), (*GEMMA, 0.75), (*LLAMA, 0.5), (*LLAMA, 0.75)]


@pytest.mark.parametrize(
    ("family", "sizes", "budget"),
    [(*LLAMA, 0.3), (*GEMMA, 0.5), *(pytest.param(*case, marks=pytest.mark.slow) for case in OTHERS)],
)
def test_like_plain_pytorch(family, sizes, budget, monkeypatch):
    m, ids = model(family, "sdpa", **sizes).to(DEVICE), prompt(300).to(DEVICE)
    expected, _ = logits(monkeypatch, "torch", m, ids, budget=budget)
    out, cache = logits(monkeypatch, "triton", m, ids, budget=budget)
    assert all(layer.store.arenas for layer in cache.layers)
    assert close(out, expected)


@pytest.mark.slow
def test_padded_batch(monkeypatch):
    m, ids = model("llama", "sdpa").to(DEVICE), torch.cat((prompt(300), prompt(300).flip(1))).to(DEVICE)
    mask = torch.ones_like(ids)
    mask[1, :37] = 0
    expected, _ = logits(monkeypatch, "torch", m, ids, mask, budget=0.3)
    out, _ = logits(monkeypatch, "triton", m, ids, mask, budget=0.3)
    assert close(out, expected)


@pytest.mark.gpu  # on a GPU whether slow or not
@pytest.mark.slow  # minutes in the interpreter
def test_the_probe_measures_the_same(monkeypatch):
    m = model("gemma3", "sdpa", sliding_window=200).to(DEVICE)
    probe = CalibrationProbe(context=200, continuation=40)
    ids, found = probe.inputs(m, None), {}
    for kernels in ("torch", "triton"):
        monkeypatch.setenv(VARIABLE, kernels)
        with torch.no_grad():
            found[kernels] = probe.measure(m, None, ids)
    expected, got = found["torch"], found["triton"]
    assert got.control == pytest.approx(0, abs=1e-6)
    for a, b in ((got.int8, expected.int8), (got.int4, expected.int4)):
        assert (a.kl, a.kl_keys, a.kl_values) == pytest.approx((b.kl, b.kl_keys, b.kl_values), rel=0.05, abs=1e-7)
        for x, y in zip(a.layers, b.layers, strict=True):
            assert (x.keys, x.values) == pytest.approx((y.keys, y.values), rel=0.05, abs=2e-3)
