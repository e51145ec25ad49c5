"""The probe that plans a budget of bytes, and caches by its plans."""

import logging
from dataclasses import replace

import pytest
import torch
from families import FAMILIES, left_padded, model, prompt
from reference import error

from spectrumkv_hf import SpectrumCache, cache_argument
from spectrumkv_hf.policy import INT2, Calibrated, SinkProtect
from spectrumkv_hf.policy.calibrated import ERRORS, PLANNED
from spectrumkv_hf.probe import PlanProbe, PlanVerdict, auto, probe_model
from spectrumkv_hf.probe.divergence import logits_over, mean_kl
from spectrumkv_hf.probe.measurement import Coding, Measurement, _attention_power
from spectrumkv_hf.probe.plan import _decreasing

RANKED = tuple(0.96**i for i in range(64))
SHORT = {"context": 200, "continuation": 30, "texts": ("passage", "code")}


@pytest.fixture(autouse=True)
def own_storage(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(auto, "_remembered", {})


def wide(family="llama", **changes):
    """With heads of 64 channels: beside fewer, scales and positions weigh too much for budgets that users take."""
    return model(family, "sdpa", head_dim=64, **changes)


def planned(m, **settings):
    return probe_model(m, None, PlanProbe(**{**SHORT, **settings}))


def deaf(m, layer):
    """The model with a layer whose attention changes nothing."""
    with torch.no_grad():
        m.model.layers[layer].self_attn.o_proj.weight.zero_()
    return m


def bits(shares):
    return sum(share * tier.bits for share, tier in zip(shares, PLANNED, strict=True))


def test_sensitivities_are_those_of_each_layer_alone():
    m = model("llama", "sdpa")
    verdict = planned(m)
    assert [layer.layer for layer in verdict.layers] == list(range(m.config.num_hidden_layers))
    ids = PlanProbe(**SHORT).inputs(m, None)
    assert not torch.equal(*ids)
    for layer in verdict.layers:
        with torch.no_grad():
            losses = [
                Measurement(m, text[None], 200, "spectrum2").kl({layer.layer: Coding(INT2, INT2)}) for text in ids
            ]
        assert layer.sensitivity * ERRORS[INT2] == pytest.approx(sum(losses) / 2, rel=1e-4)
        assert sum(layer.weights) / len(layer.weights) == pytest.approx(1)
        assert list(layer.weights) == sorted(layer.weights, reverse=True) and layer.weights[0] > 1


@pytest.mark.parametrize("attention", ["eager", "spectrumkv"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss", "mistral"])
def test_errors_weigh_by_the_square_of_the_attention_that_follows(family, attention):
    """Against the probabilities that Transformers returns, with windows, a softcap and sinks."""
    sizes = {"sliding_window": 150} if "sliding_window" in FAMILIES[family][1] else {}
    ids, context, sinks = prompt(240), 200, 4
    with torch.no_grad():
        measured = Measurement(model(family, attention, **sizes), ids, context, "spectrum2", weigh=True)
        found = measured.ranked_power(sinks)
        m = model(family, "eager", **sizes)
        attentions = m(ids, output_attentions=True).attentions
    assert [*found] == measured.tiered
    for index, power in found.items():
        window = measured.layer(index).window
        first = max(sinks, context - window + 1) if window else sinks
        expected = attentions[index][0, :, context:, first:context].double().square().mean(1)
        expected = expected.unflatten(0, (m.config.num_key_value_heads, -1)).sum(1)
        order = measured._scores[index][:, first - context :].argsort(-1, descending=True)
        assert power.shape == (context - first,) and power.sum() > 0
        assert error(power, expected.gather(-1, order).sum(0)) < 1e-5


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_without_a_mask_attention_is_causal_and_keeps_to_the_window(family):
    sizes = {"sliding_window": 150} if "sliding_window" in FAMILIES[family][1] else {}
    m, compared = model(family, "eager", **sizes), []

    def compare(seen):
        keys = seen.layer.store.dense(seen.layer.store.length - seen.mask.shape[-1])[0]
        compared.append([_attention_power(each, keys) for each in (seen._replace(mask=None), seen)])

    with torch.no_grad():
        cache = SpectrumCache(m.config, policy="uniform_int8", recent_window=8)
        for layer in cache.layers:
            layer.on_attention.add(compare)
        for part in prompt(240).split(200, dim=1):
            m(part, **cache_argument(cache))
    assert len(compared) == 2 * m.config.num_hidden_layers
    for ours, theirs in compared:
        assert error(ours, theirs) < 1e-6


def test_weights_that_do_not_grow():
    for given, expected in (
        ([3.0, 2.0, 1.0], [3.0, 2.0, 1.0]),
        ([3.0, 1.0, 2.0, 0.0], [3.0, 1.5, 1.5, 0.0]),
        ([1.0, 2.0, 3.0, 6.0], [3.0] * 4),
        ([4.0, 0.0, 0.0, 3.0], [4.0, 1.0, 1.0, 1.0]),
    ):
        assert _decreasing(given) == pytest.approx(expected)


def test_a_layer_that_does_not_matter_gets_the_fewest_bits():
    verdict = planned(deaf(wide(), 1))
    assert verdict.layers[1].sensitivity < 1e-3 * verdict.layers[0].sensitivity
    shares = dict(verdict.policy(0.25).layers)
    assert bits(shares[1]) < 2.01 and bits(shares[0]) > 3


@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen3"])
@pytest.mark.parametrize(("budget", "ranked"), [(0.25, False), (0.35, False), (0.2, True), (0.25, True), (0.5, True)])
def test_the_bytes_of_what_is_tiered_are_the_budget(family, budget, ranked):
    m = wide(family)
    found = planned(m)
    if ranked:  # at .2 these random models, which hardly tell tokens apart, would have them all in one tier
        found = replace(found, layers=tuple(replace(layer, weights=RANKED) for layer in found.layers))
    policy = found.policy(budget, recent_window=8)
    for tokens in (400, 900):
        cache = SpectrumCache(m.config, policy=policy, codec="spectrum2")
        with torch.no_grad():
            logits_over(m, prompt(tokens, batch=2), cache, last=1)
        assert cache.memory().tiered_ratio == pytest.approx(budget, rel=0.02)


def test_a_plan_beats_the_same_bits_for_all():
    """On tokens that it has not seen; half of the layers here do nothing, which only a plan can use."""
    m = deaf(wide(), 1)
    ids = prompt(460, seed=5)
    with torch.no_grad():
        exact = SpectrumCache(m.config, policy="fp16")
        logits_over(m, ids[:, :400], exact, last=1)
        expected = logits_over(m, ids[:, 400:], exact)[0]

        def loss(policy):
            cache = SpectrumCache(m.config, policy=policy, codec="spectrum2")
            logits_over(m, ids[:, :400], cache, last=1)
            return cache.memory().tiered_ratio, mean_kl(expected, logits_over(m, ids[:, 400:], cache)[0])

        even_bytes, even = loss(SinkProtect(budget=0.25, recent_window=0))
        plan_bytes, plan = loss(planned(m).policy(even_bytes - 0.005, recent_window=0))
    assert plan_bytes < even_bytes and plan < even / 2


def test_verdicts_are_kept_and_read_again(monkeypatch):
    m, ran, measure = model("llama", "sdpa"), [], PlanProbe.measure
    monkeypatch.setattr(PlanProbe, "measure", lambda *args: ran.append(1) or measure(*args))
    first = planned(m)
    monkeypatch.setattr(auto, "_remembered", {})  # another process
    assert planned(m) == first and len(ran) == 1
    assert PlanVerdict.from_json(first.to_json()) == first
    planned(m, texts=("passage",))
    assert len(ran) == 2


class TestFromModel:
    @pytest.fixture(autouse=True)
    def short(self, monkeypatch):
        for name, value in SHORT.items():
            monkeypatch.setattr(PlanProbe, name, value)
            monkeypatch.setitem(PlanProbe.__init__.__kwdefaults__, name, value)

    def test_spectrum2_is_planned(self):
        m = wide()
        cache = SpectrumCache.from_model(m, budget=0.2, codec="spectrum2", recent_window=16)
        assert isinstance(cache.policy, Calibrated) and (cache.policy.budget, cache.policy.recent_window) == (0.2, 16)
        ids = prompt(300)
        out = m.generate(ids, max_new_tokens=90, do_sample=False, pad_token_id=0, **cache_argument(cache))
        assert out.shape == (1, 390) and cache.memory().tiered_ratio < 0.22
        widths = {tier.bits for layer in cache.layers for tier in layer.store.arenas}
        assert len(widths & {1, 2, 3, 4, 8}) >= 2

    def test_serialised_and_padded(self):
        m = wide()
        ids, mask = left_padded([300, 170])
        cache = SpectrumCache.from_model(m, budget=0.25, codec="spectrum2", recent_window=16)
        with torch.no_grad():
            m(ids, attention_mask=mask, **cache_argument(cache))
            again = SpectrumCache.deserialize(cache.serialize(), m.config)
            assert again.policy == cache.policy and again.codec == cache.codec
            more = torch.cat((mask, mask.new_ones(2, 1)), dim=1)
            outs = [m(ids[:, :1], attention_mask=more, **cache_argument(c)).logits for c in (cache, again)]
        assert torch.equal(*outs)

    def test_other_probes_and_codecs(self, caplog):
        m = wide(max_position_embeddings=512)
        with pytest.raises(ValueError, match="planned for codecs that balance .spectrum2., got 'spectrum'"):
            SpectrumCache.from_model(m, codec="spectrum", probe="plan")
        with pytest.raises(ValueError, match=r"all tokens in int1 take 0.07\d* of the FP16 bytes, got budget=0.07"):
            SpectrumCache.from_model(m, codec="spectrum2", budget=0.07)
        monkeypatched = PlanProbe(context=600)
        with caplog.at_level(logging.WARNING):
            fallen = SpectrumCache.from_model(m, codec="spectrum2", probe=monkeypatched, budget=0.2)
        assert fallen.policy == SinkProtect(budget=0.25)
        assert "the model takes 512 tokens" in caplog.text and "sink_protect at b=0.25" in caplog.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"codec": "absmax"}, "codecs that balance"),
        ({"context": 10}, "context is a whole number, 64 or more"),
        ({"continuation": 0}, "continuation is a whole number"),
        ({"texts": ()}, "texts are some of passage, article, code"),
        ({"texts": ("passage", "passage")}, "each once"),
        ({"texts": ("poem",)}, "'poem'"),
    ],
)
def test_bad_settings(options, message):
    with pytest.raises(ValueError, match=message):
        PlanProbe(**options)


def test_a_tier_of_a_plan_needs_channels_that_fill_bytes():
    m = model("llama", "sdpa", hidden_size=48, num_attention_heads=4, num_key_value_heads=2, head_dim=12)
    shares = dict(planned(m).policy(0.3).layers)
    assert all(each[PLANNED.index(t)] == 0 for each in shares.values() for t in PLANNED if t.bits in (3, 1))
    wrong = Calibrated(budget=0.25, layers=dict.fromkeys(shares, (0.0, 0.0, 0.0, 1.0, 0.0)))
    with pytest.raises(ValueError, match="codes of 3 bits fill bytes where head_dim is a multiple of 8, got 12"):
        SpectrumCache(m.config, policy=wrong, codec="spectrum2").update(*[torch.zeros(1, 2, 3, 12)] * 2, 0)
