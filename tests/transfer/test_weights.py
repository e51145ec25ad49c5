"""A file of another checkpoint is refused where the weights are known on both sides."""

import copy
import functools
import json

import pytest
import torch
from families import config, model, prompt
from pairs import PATIENCE, peer
from wire_forge import forged, opened, split

from spectrumkv_hf import SpectrumCache
from spectrumkv_hf.tiered import identity
from spectrumkv_hf.tiered.identity import weights_fingerprint
from spectrumkv_hf.transfer import TransferError, recv_cache, send_cache
from spectrumkv_hf.wire import WireError


def other_checkpoint(m=None):
    """The same architecture, finetuned a little."""
    other = copy.deepcopy(m or model("llama", "sdpa"))
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1e-3 * torch.randn_like(parameter))
    return other


def filled(m, **options):
    cache = SpectrumCache(m.config, budget=0.4, recent_window=8, **options)
    with torch.no_grad():
        m(prompt(200), past_key_values=cache)
    return cache


def header_of(data):
    return opened(split(data.numpy().tobytes())[0])[2]


class TestFiles:
    def test_another_checkpoint(self, tmp_path):
        m = model("llama", "sdpa")
        filled(m, model=m).save(tmp_path / "chat")
        for given in (m, copy.deepcopy(m), None):
            assert SpectrumCache.load(tmp_path / "chat", config=m.config, model=given).get_seq_length() == 200
        with pytest.raises(WireError, match="a cache of other weights: made by [0-9a-f]{32}, the model's are"):
            SpectrumCache.load(tmp_path / "chat", config=m.config, model=other_checkpoint())
        with pytest.raises(WireError, match="a cache of other weights"):
            SpectrumCache.load(tmp_path / "chat", config=m.config, model=copy.deepcopy(m).to(torch.bfloat16))

    def test_without_a_fingerprint_nothing_is_compared_or_written(self):
        m = model("llama", "sdpa")
        data = filled(m).serialize()
        assert "weights" not in header_of(data)
        again = SpectrumCache.deserialize(data, m.config, model=other_checkpoint())
        assert again.weights is None and torch.equal(again.serialize(), data)

    def test_it_travels_on(self):
        m = model("llama", "sdpa")
        data = filled(m, model=m).serialize()
        assert header_of(data)["weights"] == weights_fingerprint(m)
        again = SpectrumCache.deserialize(data, m.config)
        assert torch.equal(again.serialize(), data)
        assert torch.equal(copy.deepcopy(again).serialize(), data)

    @pytest.mark.parametrize("weights", ["", "x" * 32, "A" * 32, "0" * 31, 7, None, ["0" * 32]])
    def test_no_fingerprint(self, weights):
        m = model("llama", "sdpa")
        frames = split(filled(m, model=m).serialize().numpy().tobytes())
        frames[0] = forged(frames[0], lambda metadata: metadata.update(weights=weights))
        with pytest.raises(WireError, match="32 hex digits|'weights'"):
            SpectrumCache.deserialize(b"".join(frames), m.config)

    def test_from_model(self):
        m = model("llama", "sdpa")
        assert SpectrumCache.from_model(m, policy="greedy", probe=None).weights == weights_fingerprint(m)


class TestFingerprint:
    def test_is_read_once(self, monkeypatch):
        m, calls = other_checkpoint(), []
        samples = identity._samples
        monkeypatch.setattr(identity, "_samples", lambda tensor: calls.append(1) or samples(tensor))
        first = weights_fingerprint(m)
        count = len(calls)
        assert weights_fingerprint(m) == first and len(calls) == count > 0

    @pytest.mark.parametrize("change", ["add_", "data", "replace", "load", "buffer"])
    def test_changes_with_the_weights(self, change):
        m = other_checkpoint()
        m.register_buffer("extra", torch.zeros(3))
        before = weights_fingerprint(m)
        weight = m.model.layers[0].mlp.up_proj.weight
        with torch.no_grad():
            if change == "add_":
                weight.add_(1e-3)
            elif change == "data":  # as PEFT merges; no version counts it
                weight.data += 1e-3
            elif change == "replace":
                m.model.layers[0].mlp.up_proj.weight = torch.nn.Parameter(weight + 1e-3)
            elif change == "load":
                m.load_state_dict({k: v + 1e-3 for k, v in m.state_dict().items()})
            else:
                m.extra.fill_(1)
        assert weights_fingerprint(m) != before

    def test_settings_are_no_weights(self):
        m = other_checkpoint()
        before = weights_fingerprint(m)
        m.config.pad_token_id, m.config.use_cache = 5, False
        m.train()
        assert weights_fingerprint(m) == before

    @pytest.mark.parametrize("kind", ["meta", "inference", "half"])
    def test_kinds_of_tensors(self, kind):
        if kind == "meta":
            with torch.device("meta"):
                m = type(model("llama"))._from_config(config("llama"))
        else:
            with torch.inference_mode(kind == "inference"):
                m = copy.deepcopy(model("llama")).to(torch.float16 if kind == "half" else torch.float32)
        assert len(weights_fingerprint(m)) == 32 and weights_fingerprint(m) == weights_fingerprint(m)

    def test_not_held_alive(self):
        m = other_checkpoint()
        weights_fingerprint(m)
        count = len(identity._known)
        del m
        assert len(identity._known) == count - 1


def send(known):
    m = model("llama", "sdpa")
    try:
        send_cache(filled(m, **({"model": m} if known else {})), peer(), timeout=PATIENCE)
    except TransferError as problem:
        return str(problem)


def receive(same):
    m = model("llama", "sdpa")
    given = m if same else other_checkpoint(m)
    try:
        return recv_cache(peer(), m.config, timeout=PATIENCE, model=given).get_seq_length()
    except TransferError as problem:
        return str(problem)


@pytest.mark.parametrize(("known", "same"), [(True, True), (True, False), (False, False)])
def test_received(pair, kind, known, same):
    if kind != "gloo":
        pytest.skip("one transport is enough")
    sent, received, _ = pair(functools.partial(send, known), functools.partial(receive, same))
    if known and not same:
        assert "a cache of other weights" in received and "refused it" in sent
    else:
        assert received == 200 and sent is None


def test_the_identity_has_no_weights():
    """So that a header without them keeps its bytes."""
    m = model("llama", "sdpa")
    cache = filled(m, model=m)
    assert cache.weights not in json.dumps(cache.identity)
